"""The stills that a view offers: those of the package and those that were uploaded."""

from __future__ import annotations

import base64
import io
import re
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from i2v_lab.display import escaped
from i2v_lab.errors import InvalidImage, OutputError
from i2v_lab.files import write_atomically
from i2v_lab.paths import data_dir, find_still

PREVIEW_PX = 320
LONGEST_NAME = 50  # characters of a stored still's name, each up to 4 of the 255 bytes that a file system takes
# ipywidgets' FileUpload does not accept drops. A dropped file reaches the kernel as JSON through a hidden text area.
DROP_ZONE = """<div class="i2v-drop" tabindex="0"
  ondragover="event.preventDefault(); this.classList.add('over')" ondragleave="this.classList.remove('over')"
  ondrop="
    event.preventDefault(); event.stopPropagation(); this.classList.remove('over');
    const file = event.dataTransfer.files[0];
    const area = this.closest('.i2v-generate').querySelector('.i2v-dropped textarea');
    if (file) {
      const reader = new FileReader();
      reader.onload = () => {
        area.value = JSON.stringify({name: file.name, data: reader.result.split(',')[1] || ''});
        for (const kind of ['input', 'change']) area.dispatchEvent(new Event(kind, {bubbles: true}));
      };
      reader.readAsDataURL(file);
    }">Drop a still here</div>"""


def list_stills(runs_dir: Path, chosen: str) -> list[tuple[str, str]]:
    """Names and paths: the package's stills, uploaded ones, and the one that is selected."""
    ours = [(path.stem, f"stills/{path.name}") for path in sorted((data_dir() / "stills").glob("*.png"))]
    dropped = [
        (path.name, str(path)) for path in sorted(_folder(runs_dir).glob("[!.]*")) if path.is_file() and _is_still(path)
    ]
    known = [*ours, *dropped]
    return known if chosen in [path for _, path in known] else [*known, (Path(chosen).name, chosen)]


def add_still(runs_dir: Path, name: str, content: bytes) -> Path:
    """Store an uploaded picture of any format that the pipeline's loader reads, whatever its name ends in.

    Args:
        runs_dir: It goes to the folder ``stills`` in it.
        name: The file's name; folders in it are ignored.
        content: The file's bytes.

    Returns:
        The path of the stored file.

    Raises:
        InvalidImage: It is not a picture, or a damaged one.
        OutputError: It cannot be stored.
    """
    from i2v_lab.pipeline.contract.media import load_still

    plain = re.sub(r"[^\w.-]+", "_", Path(name.replace("\\", "/")).name).lstrip(".")[-LONGEST_NAME:] or "still"
    target = _folder(runs_dir) / plain

    def write(part: Path) -> None:
        part.write_bytes(content)
        try:
            load_still(part)
        except InvalidImage as error:
            words = error.message.replace(f"image '{part}'", f"'{name}'")  # not the temporary file
            raise InvalidImage(words, name=name) from error

    try:
        return write_atomically(target, write)
    except OSError as error:
        raise OutputError(
            f"'{name}' cannot be stored as '{target}' ({error.strerror}); give another runs_dir", path=target
        ) from error


def preview(image: str) -> str:
    """The pixels that the pipeline gets of a still, smaller, as an HTML element; empty if it cannot be read."""
    path = find_still(image)
    try:
        status = path.stat()
        data = _thumbnail(path, (status.st_mtime_ns, status.st_size))
    except (InvalidImage, OSError, ValueError):  # ValueError: a path with a NUL
        return ""
    return f'<img class="still" alt="{escaped(path.stem)}" src="data:image/png;base64,{data}"/>'


@lru_cache(maxsize=8)  # a view asks again whenever any of its controls has changed
def _thumbnail(path: Path, _version: tuple[int, int]) -> str:
    from PIL import Image

    from i2v_lab.pipeline.contract.media import load_still

    small = Image.fromarray(load_still(path))
    small.thumbnail((PREVIEW_PX, PREVIEW_PX))
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _is_still(path: Path) -> bool:
    from PIL import Image

    with suppress(Exception), Image.open(path):  # on damaged data Pillow raises almost anything
        return True
    return False


def _folder(runs_dir: Path) -> Path:
    return runs_dir / "stills"
