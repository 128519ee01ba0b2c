"""The stills that a view offers: those of the package and those that were uploaded."""

from __future__ import annotations

import base64
import io
import re
from html import escape
from pathlib import Path

from i2v_lab.errors import I2VLabError, InvalidImage
from i2v_lab.files import write_atomically
from i2v_lab.paths import data_dir, find_still

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"}
PREVIEW_PX = 320
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
    ours = [(path.stem, f"stills/{path.name}") for path in sorted((data_dir() / "stills").iterdir()) if _is_still(path)]
    dropped = [(path.name, str(path)) for path in sorted(_folder(runs_dir).glob("*")) if _is_still(path)]
    known = [*ours, *dropped]
    return known if chosen in [path for _, path in known] else [*known, (Path(chosen).name, chosen)]


def add_still(runs_dir: Path, name: str, content: bytes) -> Path:
    """Store an uploaded picture.

    Args:
        runs_dir: It goes to the folder ``stills`` in it.
        name: The file's name; folders in it are ignored.
        content: The file's bytes.

    Returns:
        The path of the stored file.

    Raises:
        InvalidImage: It is not a picture, or a damaged one.
    """
    from i2v_lab.pipeline.contract.media import load_still

    plain = re.sub(r"[^\w.-]+", "_", Path(name.replace("\\", "/")).name).lstrip(".") or "still"
    target = _folder(runs_dir) / plain
    if target.suffix.lower() not in SUFFIXES:
        raise InvalidImage(f"'{name}' is not a picture; drop a PNG, JPEG or WebP", name=name)

    def write(part: Path) -> None:
        part.write_bytes(content)
        try:
            load_still(part)
        except I2VLabError as error:  # it names the temporary file
            raise InvalidImage(f"'{name}' cannot be read as a picture; drop a PNG, JPEG or WebP", name=name) from error

    return write_atomically(target, write)


def preview(image: str) -> str:
    """A thumbnail of a still as an HTML element; empty if it cannot be read."""
    from PIL import Image

    try:
        with Image.open(find_still(image)) as picture:
            small = picture.convert("RGB")
            small.thumbnail((PREVIEW_PX, PREVIEW_PX))
    except OSError:
        return ""
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img class="still" alt="{escape(Path(image).stem)}" src="data:image/jpeg;base64,{data}"/>'


def _folder(runs_dir: Path) -> Path:
    return runs_dir / "stills"


def _is_still(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
