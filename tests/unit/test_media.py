"""Pictures in, video out: what is converted, what is refused, and that a file is whole or absent."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image

from i2v_lab.errors import InvalidImage, OutputError
from i2v_lab.pipeline.media import check_output, load_still, write_video

PIXELS = np.random.default_rng(1).integers(0, 255, (40, 60, 3), dtype=np.uint8)


def _save(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def test_rgb_is_read_as_it_is(tmp_path):
    assert np.array_equal(load_still(_save(tmp_path / "a.png", Image.fromarray(PIXELS))), PIXELS)


def test_what_can_be_converted_is_converted(tmp_path):
    rgb, grey = Image.fromarray(PIXELS), Image.fromarray(PIXELS[..., 0])
    half = Image.fromarray(np.dstack([PIXELS, np.full((40, 60), 0, dtype=np.uint8)]))
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0] * 256)
    deep = Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257)
    saved = {
        "grey": _save(tmp_path / "grey.png", grey),
        "deep": _save(tmp_path / "deep.png", deep),
        "cmyk": _save(tmp_path / "cmyk.jpg", rgb.convert("CMYK")),
        "clear": _save(tmp_path / "clear.png", half),
        "palette": _save(tmp_path / "palette.png", palette, transparency=0),
        "single": _save(tmp_path / "single.png", rgb.crop((0, 0, 1, 1))),
        "line": _save(tmp_path / "line.png", rgb.crop((0, 0, 1, 9))),
    }
    read = {name: load_still(path) for name, path in saved.items()}
    assert all(pixels.dtype == np.uint8 and pixels.shape[2] == 3 for pixels in read.values())
    assert np.array_equal(read["grey"], np.repeat(PIXELS[..., :1], 3, axis=2))
    assert np.array_equal(read["deep"], read["grey"])
    assert read["cmyk"].shape == PIXELS.shape
    assert (read["clear"] == 255).all()  # transparent lies over white
    assert (read["palette"] == 255).all()
    assert np.array_equal(read["single"], np.tile(PIXELS[0, 0], (2, 2, 1)))
    assert read["line"].shape == (9, 2, 3)


def test_a_picture_taken_sideways_is_read_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to show
    path = _save(tmp_path / "a.png", Image.fromarray(PIXELS), exif=exif)
    assert np.array_equal(load_still(path), np.rot90(PIXELS, -1))


def test_what_cannot_be_read_is_refused_with_the_reason(tmp_path, monkeypatch):
    whole = _save(tmp_path / "a.png", Image.fromarray(PIXELS)).read_bytes()
    jpeg = _save(tmp_path / "a.jpg", Image.fromarray(PIXELS)).read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "half.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").touch()
    for name, words in {
        "missing.png": "does not exist; check the path",
        ".": "is a folder; give a picture file",
        "half.png": "is damaged or truncated",
        "half.jpg": "is damaged or truncated",
        "text.png": "is not a picture; give a PNG, JPEG or WebP",
        "empty.png": "is not a picture; give a PNG, JPEG or WebP",
    }.items():
        with pytest.raises(InvalidImage, match=words) as caught:
            load_still(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(f"image '{tmp_path / name}' ")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InvalidImage, match="has more than 1000 pixels; scale it down first"):
        load_still(tmp_path / "a.png")


def _chunks(frames: int, chunk: int = 4) -> list[torch.Tensor]:
    video = torch.from_numpy(np.random.default_rng(2).integers(0, 255, (frames, 64, 128, 3), dtype=np.uint8))
    return list(video.split(chunk))


def _audio(seconds: float) -> SimpleNamespace:
    return SimpleNamespace(waveform=torch.rand(2, round(seconds * 48000)) * 2 - 1, sampling_rate=48000)


@pytest.mark.parametrize("rate", [Fraction(24), Fraction(25), Fraction(30000, 1001), Fraction(60)])
@pytest.mark.parametrize("audio_s", [0.2, 0.9])
def test_the_file_has_every_frame_and_sound_as_long_as_the_video(tmp_path, rate, audio_s):
    written = []
    path = tmp_path / "video.mp4"
    assert write_video(iter(_chunks(9)), _audio(audio_s), path, rate, lambda: written.append(1)) == 9
    assert len(written) == 9
    with av.open(str(path)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert (video.width, video.height, video.average_rate) == (128, 64, rate)
        assert sum(1 for _ in container.decode(video)) == 9
        assert (audio.channels, audio.sample_rate) == (2, 48000)
        seconds = float(audio.duration * audio.time_base)
    assert abs(round((seconds - 9 / rate) * 48000)) <= 1024  # one AAC frame
    assert [entry.name for entry in tmp_path.iterdir()] == ["video.mp4"]


def test_outputs_that_cannot_be_written_are_refused_first(tmp_path):
    (tmp_path / "taken.mp4").mkdir()
    for path, words in {
        tmp_path / "video.avi": f"does not end in .mp4; use '{tmp_path / 'video.mp4'}'",
        tmp_path / "taken.mp4": "is a folder; name a file in it",
        tmp_path / "none" / "video.mp4": "does not exist; create it first",
        Path("/proc/video.mp4"): "the folder '/proc' is not writable",
    }.items():
        with pytest.raises(OutputError) as caught:
            check_output(path)
        assert words in str(caught.value)
        assert str(caught.value).startswith(f"out='{path}'")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["taken.mp4"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_leaves_no_half_file_and_an_existing_one_intact(tmp_path, error):
    def breaking():
        yield from _chunks(4)
        raise error

    path = tmp_path / "video.mp4"
    path.write_bytes(b"the old one")
    with pytest.raises(error):
        write_video(breaking(), None, path, Fraction(24))
    assert path.read_bytes() == b"the old one"
    assert [entry.name for entry in tmp_path.iterdir()] == ["video.mp4"]


FULL_DISK = """
import resource, signal, sys
from fractions import Fraction
from pathlib import Path
import torch
from i2v_lab.errors import OutputError
from i2v_lab.pipeline.media import write_video
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
chunks = (torch.randint(0, 255, (8, 128, 128, 3), dtype=torch.uint8) for _ in range(8))
try:
    write_video(chunks, None, Path(sys.argv[1]), Fraction(24))
except OutputError as error:
    print(error)
"""


def test_a_full_disk_leaves_no_half_file_and_an_existing_one_intact(tmp_path):
    """For real, in a process that may not write more than 20 kB to a file."""
    path = tmp_path / "video.mp4"
    path.write_bytes(b"the old one")
    child = subprocess.run([sys.executable, "-c", FULL_DISK, path], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    assert f"out='{path}' could not be written (File too large); free some space" in child.stdout
    assert path.read_bytes() == b"the old one"
    assert [entry.name for entry in tmp_path.iterdir()] == ["video.mp4"]
