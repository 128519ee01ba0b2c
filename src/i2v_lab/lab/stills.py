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
UPLOAD_MIB = 6  # as base64 it stays below the 10 MiB at which Jupyter servers close the connection
# A file reaches the kernel as JSON through a hidden text area: ipywidgets' FileUpload accepts no drops, and sends files
# of any size. A larger picture is scaled down here first, with its pixels over white, as the pipeline's loader does.
_SEND = """
  const input = this, file = this.files[0], view = this.closest('.i2v-generate'), most = MIB * 1048576;
  const say = (words) => { view.querySelector('.i2v-upload').textContent = words; };
  const send = (blob) => {
    const reader = new FileReader();
    reader.onload = () => {
      const area = view.querySelector('.i2v-dropped textarea');
      area.value = JSON.stringify({name: file.name, data: reader.result.split(',')[1] || ''});
      for (const kind of ['input', 'change']) area.dispatchEvent(new Event(kind, {bubbles: true}));
      say('');
    };
    reader.onerror = () => say(`'${file.name}' cannot be read; choose another file`);
    reader.readAsDataURL(blob);
  };
  const smaller = async () => {
    const picture = await createImageBitmap(file), canvas = document.createElement('canvas');
    const longest = Math.max(picture.width, picture.height), made = (kind) => new Promise(
      (done) => canvas.toBlob(done, kind, 0.95));
    for (let side = Math.min(longest, 4096); side >= 512; side *= 0.7) {
      canvas.width = Math.max(1, Math.round(picture.width * side / longest));
      canvas.height = Math.max(1, Math.round(picture.height * side / longest));
      const pen = canvas.getContext('2d');
      pen.fillStyle = 'white';
      pen.fillRect(0, 0, canvas.width, canvas.height);
      pen.imageSmoothingQuality = 'high';
      pen.drawImage(picture, 0, 0, canvas.width, canvas.height);
      for (const kind of ['image/png', 'image/jpeg']) {
        const blob = await made(kind);
        if (blob && blob.size <= most) return blob;
      }
    }
    return null;
  };
  const refuse = () => say(`'${file.name}' has ${(file.size / 1048576).toFixed(1)} MiB and is no picture that this ` +
    `browser can scale down; use one of at most MIB MiB`);
  if (file && file.size <= most) send(file);
  else if (file) {
    say(`Scaling '${file.name}' down to at most MIB MiB.`);
    smaller().then((blob) => blob ? send(blob) : refuse(), refuse);
  }
  setTimeout(() => { input.value = ''; });
""".replace("MIB", str(UPLOAD_MIB))
DROP_ZONE = f"""<div class="i2v-drop" tabindex="0"
  ondragover="event.preventDefault(); this.classList.add('over')" ondragleave="this.classList.remove('over')"
  ondrop="
    event.preventDefault(); event.stopPropagation(); this.classList.remove('over');
    const input = this.querySelector('input');
    input.files = event.dataTransfer.files;
    input.dispatchEvent(new Event('change'));
  ">Drop a still here, or
  <button type="button" class="jupyter-button widget-button" style="width:auto"
    onclick="this.nextElementSibling.click()">Choose a file</button>
  <input type="file" accept="image/*" aria-label="a still" hidden onchange="{escaped(_SEND)}">
  <br><small>above {UPLOAD_MIB} MiB it is scaled down</small></div><p class="i2v-upload" role="status"></p>"""


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
