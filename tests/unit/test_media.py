"""Pictures in, video out: what is converted, what is refused, and that a file is whole or absent."""

from __future__ import annotations

import io
import os
import re
import subprocess
import warnings
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image

from i2v_lab.errors import InvalidImage, OutputError
from i2v_lab.pipeline.contract.media import check_output, fit_audio, load_still, write_video

PIXELS = np.random.default_rng(1).integers(0, 255, (40, 60, 3), dtype=np.uint8)


def _save(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tiff", "a.webp"])
def test_rgb_is_read_as_it_is(tmp_path, name):
    options = {"lossless": True} if name.endswith("webp") else {}
    path = _save(tmp_path / name, Image.fromarray(PIXELS), **options)
    pixels = load_still(path)
    assert (pixels.dtype, pixels.shape) == (np.uint8, (40, 60, 3))
    assert np.array_equal(pixels, PIXELS)
    assert np.array_equal(load_still(str(path)), PIXELS)


def test_a_jpeg_is_read_as_pillow_reads_it(tmp_path):
    path = _save(tmp_path / "a.jpg", Image.fromarray(PIXELS))
    with Image.open(path) as picture:
        assert np.array_equal(load_still(path), np.array(picture))


def test_greyscale_becomes_three_equal_channels(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    read = load_still(_save(tmp_path / "grey.png", Image.fromarray(grey)))
    assert np.array_equal(read, np.repeat(grey[..., None], 3, axis=2))
    assert np.array_equal(load_still(_save(tmp_path / "bits.png", Image.fromarray(grey > 99))), (read > 99) * 255)


def test_16_bit_greyscale_is_rounded_to_the_nearest_of_8(tmp_path):
    deep = np.array([[0, 128, 129, 257, 32896, 65406, 65407, 65535]], dtype=np.uint16).repeat(2, axis=0)
    read = load_still(_save(tmp_path / "deep.png", Image.fromarray(deep)))
    assert read[0, :, 0].tolist() == [0, 0, 1, 1, 128, 254, 255, 255]
    everywhere = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    again = load_still(_save(tmp_path / "all.png", Image.fromarray(everywhere)))
    assert np.array_equal(again, np.repeat((everywhere // 257)[..., None], 3, axis=2))


def test_numbers_that_are_no_brightness_become_black_or_white(tmp_path):
    values = np.array([[0.0, 0.5, 1.0, 7.0, -1.0, np.nan]], dtype=np.float32).repeat(2, axis=0)
    read = load_still(_save(tmp_path / "float.tiff", Image.fromarray(values)))
    assert read[0, :, 0].tolist() == [0, 128, 255, 255, 0, 0]


def test_cmyk_shows_the_same_colours(tmp_path):
    flat = np.full((32, 32, 3), (200, 40, 90), dtype=np.uint8)
    cmyk = Image.fromarray(flat).convert("CMYK")
    for name in ("a.jpg", "a.tiff"):
        read = load_still(_save(tmp_path / name, cmyk))
        assert read.shape == (32, 32, 3)
        assert np.abs(read.astype(int) - flat).max() <= 4


def test_transparency_is_laid_over_white(tmp_path):
    colour = np.full((4, 3, 3), (10, 20, 30), dtype=np.uint8)
    alpha = np.array([[0], [51], [204], [255]], dtype=np.uint8).repeat(3, axis=1)
    read = load_still(_save(tmp_path / "a.png", Image.fromarray(np.dstack([colour, alpha]))))
    assert read[:, 0].tolist() == [[255, 255, 255], [206, 208, 210], [59, 67, 75], [10, 20, 30]]
    grey = Image.fromarray(np.dstack([colour[..., 0], alpha]), mode=None).convert("LA")
    read = load_still(_save(tmp_path / "grey.png", grey))
    assert read[:, 0].tolist() == [[255] * 3, [206] * 3, [59] * 3, [10] * 3]


def test_a_palette_with_a_transparent_colour_is_laid_over_white(tmp_path):
    palette = Image.new("P", (2, 2))
    palette.putpalette([255, 0, 0, 0, 0, 255] + [0] * 762)
    palette.putdata([0, 1, 1, 0])
    opaque, clear = [[255, 0, 0], [0, 0, 255]], [[255, 255, 255], [0, 0, 255]]
    assert load_still(_save(tmp_path / "opaque.png", palette))[0].tolist() == opaque
    assert load_still(_save(tmp_path / "clear.png", palette, transparency=0))[0].tolist() == clear
    assert load_still(_save(tmp_path / "clear.gif", palette, transparency=0))[0].tolist() == clear
    rgb = Image.fromarray(np.array([[[255, 0, 0], [0, 0, 255]]] * 2, dtype=np.uint8))
    assert load_still(_save(tmp_path / "key.png", rgb, transparency=(255, 0, 0)))[0].tolist() == clear


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 9), (9, 1), (2, 2), (3, 5)])
def test_a_side_of_one_pixel_is_doubled(tmp_path, width, height):
    small = PIXELS[:height, :width]
    read = load_still(_save(tmp_path / "a.png", Image.fromarray(small)))
    assert read.shape == (max(2, height), max(2, width), 3)
    assert np.array_equal(read[:height, :width], small)
    assert np.array_equal(read[-1, -1], small[-1, -1])


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, PIXELS),
        (2, PIXELS[:, ::-1]),
        (3, np.rot90(PIXELS, 2)),
        (4, PIXELS[::-1]),
        (5, PIXELS.transpose(1, 0, 2)),
        (6, np.rot90(PIXELS, -1)),
        (7, np.rot90(PIXELS, 2).transpose(1, 0, 2)),
        (8, np.rot90(PIXELS)),
    ],
)
def test_a_picture_taken_sideways_is_read_upright(tmp_path, orientation, upright):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = _save(tmp_path / "a.png", Image.fromarray(PIXELS), exif=exif)
    assert np.array_equal(load_still(path), upright)


def _refusal(path: Path) -> str:
    with pytest.raises(InvalidImage) as caught:
        load_still(path)
    assert "\n" not in str(caught.value)
    assert caught.value.fields == {"path": path}
    assert caught.value.exit_status == 2
    return str(caught.value).removeprefix(f"image '{path}' ")


def test_what_cannot_be_read_is_refused_with_the_reason(tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").touch()
    (tmp_path / "loop.png").symlink_to("loop.png")
    assert _refusal(tmp_path / "missing.png") == "does not exist; check the path"
    assert _refusal(tmp_path) == "is a folder; give a picture file"
    assert _refusal(tmp_path / "text.png") == "is not a picture; give a PNG, JPEG or WebP"
    assert _refusal(tmp_path / "empty.png") == "is not a picture; give a PNG, JPEG or WebP"
    assert _refusal(tmp_path / "loop.png") == "cannot be read (Too many levels of symbolic links); check it"
    assert _refusal(tmp_path / "text.png" / "a.png") == "cannot be read (Not a directory); check it"
    assert _refusal(tmp_path / f"{'a' * 300}.png") == "cannot be read (File name too long); check it"


@pytest.mark.parametrize(("suffix", "reason"), [("png", "image file is truncated"), ("jpg", "image file is truncated")])
def test_a_truncated_picture_is_refused(tmp_path, suffix, reason):
    noise = np.random.default_rng(1).integers(0, 255, (200, 300, 3), dtype=np.uint8)
    whole = _save(tmp_path / f"whole.{suffix}", Image.fromarray(noise)).read_bytes()
    path = tmp_path / f"half.{suffix}"
    for length in (len(whole) // 2, len(whole) * 9 // 10):
        path.write_bytes(whole[:length])
        words = _refusal(path)
        assert words.startswith(f"is damaged or truncated ({reason}")
        assert words.endswith("); save it again")
    load_still(tmp_path / f"whole.{suffix}")


@pytest.mark.parametrize("limit", [2399, 1100])
def test_a_picture_of_implausible_size_is_refused(tmp_path, monkeypatch, limit):
    """Pillow warns above its limit and raises above twice that."""
    path = _save(tmp_path / "a.png", Image.fromarray(PIXELS))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    assert _refusal(path) == f"has more than {limit} pixels; scale it down first"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2400)
    assert np.array_equal(load_still(path), PIXELS)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_damage_anywhere_is_refused_or_survived_but_never_a_traceback(tmp_path, kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    stream = io.BytesIO()
    Image.fromarray(PIXELS).save(stream, kind, **({"exif": exif} if kind not in ("GIF", "BMP") else {}))
    whole, path, refused = stream.getvalue(), tmp_path / "a", []
    random = np.random.default_rng(3)
    for _ in range(150):
        damaged = bytearray(whole)
        for place in random.integers(0, min(len(whole), 400), 3):
            damaged[place] = random.integers(0, 256)
        path.write_bytes(damaged[: random.integers(len(whole) // 2, len(whole) + 1)])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                assert load_still(path).shape[2] == 3
            except InvalidImage as error:
                refused.append(str(error))
    assert len(refused) > 10
    assert all("\n" not in words for words in refused)


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
        # The container notes where the sound ends in milliseconds.
        assert abs(audio.duration * audio.time_base - 9 / rate) <= Fraction(1, 1000)
        assert audio.start_time == video.start_time == 0
    with av.open(str(path)) as container:
        samples = sum(frame.samples for frame in container.decode(audio=0))
    assert 0 <= samples - round(9 / rate * 48000) < 1024  # AAC comes in frames of that many
    assert [entry.name for entry in tmp_path.iterdir()] == ["video.mp4"]


def test_sound_starts_when_it_should(tmp_path):
    """AAC puts 1,024 samples of its own in front, which are not to be heard."""
    silent_until = 2000
    times = torch.arange(9600)
    waveform = (torch.sin(times * 0.1) * (times >= silent_until)).repeat(2, 1)
    sound = SimpleNamespace(waveform=waveform, sampling_rate=48000)
    write_video([torch.zeros(12, 64, 64, 3, dtype=torch.uint8)], sound, tmp_path / "video.mp4", Fraction(60))
    with av.open(str(tmp_path / "video.mp4")) as container:
        heard = np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], axis=1)
    onset = np.argmax(np.abs(heard) > 0.5, axis=1)
    assert np.all(np.abs(onset - silent_until) < 16)
    assert np.abs(heard[:, 3000:9000] - waveform.numpy()[:, 3000:9000]).max() < 0.1


def test_a_video_without_sound_and_one_without_chunks_of_equal_length(tmp_path):
    chunks = [torch.zeros(n, 64, 64, 3, dtype=torch.uint8) for n in (8, 1, 16)]
    assert write_video(iter(chunks), None, tmp_path / "video.MP4", Fraction(24)) == 25
    with av.open(str(tmp_path / "video.MP4")) as container:
        assert [stream.type for stream in container.streams] == ["video"]
        assert sum(1 for _ in container.decode(video=0)) == 25


def test_pixels_are_kept_within_what_the_codec_loses(tmp_path):
    flat = torch.tensor([(200, 40, 90)], dtype=torch.uint8).expand(9, 64, 64, 3)
    write_video([flat], None, tmp_path / "video.mp4", Fraction(24))
    with av.open(str(tmp_path / "video.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert np.abs(np.stack(frames).astype(int) - (200, 40, 90)).max() <= 6


def test_the_same_frames_give_the_same_file_each_time(tmp_path):
    coarse = 90 + 75 * torch.rand(9, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, size=(128, 192), mode="bilinear")
    frames = smooth.to(torch.uint8).permute(0, 2, 3, 1)
    files = set()
    for _ in range(100):
        write_video([frames], None, tmp_path / "video.mp4", Fraction(24))
        files.add((tmp_path / "video.mp4").read_bytes())
    assert len(files) == 1


@pytest.mark.parametrize("samples", [0, 99, 100, 101])
def test_sound_is_cut_or_filled_up_with_silence(samples):
    waveform = torch.linspace(-2, 2, 2 * samples, dtype=torch.bfloat16).reshape(2, samples).requires_grad_()
    fitted = fit_audio(waveform, 100)
    assert (fitted.shape, fitted.dtype) == ((2, 100), np.float32)
    kept = min(samples, 100)
    assert np.array_equal(fitted[:, :kept], waveform.detach().float().clamp(-1, 1).numpy()[:, :kept])
    assert not fitted[:, kept:].any()


def test_outputs_that_cannot_be_written_are_refused_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.mp4").mkdir()
    (tmp_path / "file").touch()
    long = f"{'a' * 300}.mp4"
    for path, words in {
        tmp_path / "video.avi": f" does not end in .mp4; use '{tmp_path / 'video.mp4'}'",
        tmp_path / "video": f" does not end in .mp4; use '{tmp_path / 'video.mp4'}'",
        tmp_path / "taken.mp4": f" is a folder; name a file in it, such as '{tmp_path / 'taken.mp4' / 'video.mp4'}'",
        tmp_path: f" is a folder; name a file in it, such as '{tmp_path / 'video.mp4'}'",
        Path(): " is a folder; name a file in it, such as 'video.mp4'",
        tmp_path / "none" / "video.mp4": f": the folder '{tmp_path / 'none'}' does not exist; create it first",
        tmp_path / "file" / "video.mp4": f": the folder '{tmp_path / 'file'}' does not exist; create it first",
        Path("/proc/video.mp4"): (": the folder '/proc' is not writable (No such file or directory); choose another"),
        Path(long): " is too long a name; use a shorter one",
    }.items():
        for check in (check_output, lambda path: write_video(_chunks(1), None, path, Fraction(24))):
            with pytest.raises(OutputError) as caught:
                check(path)
            assert str(caught.value) == f"out='{path}'{words}"
            assert caught.value.fields == {"path": path}
            assert caught.value.exit_status == 2
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "taken.mp4"]


def test_a_check_leaves_nothing_and_touches_nothing(tmp_path):
    check_output(tmp_path / "new.mp4")
    (tmp_path / "old.mp4").write_bytes(b"the old one")
    check_output(tmp_path / "old.mp4")
    assert [entry.name for entry in tmp_path.iterdir()] == ["old.mp4"]
    assert (tmp_path / "old.mp4").read_bytes() == b"the old one"


def test_a_finished_video_takes_the_place_of_the_old_one_at_the_last_moment(tmp_path):
    path = tmp_path / "video.mp4"
    path.write_bytes(b"the old one")

    beside = set()

    def watching():
        for chunk in _chunks(100):  # enough for the codec to start writing
            assert path.read_bytes() == b"the old one"
            beside.update(entry.name for entry in tmp_path.iterdir() if entry != path)
            yield chunk

    write_video(watching(), None, path, Fraction(24))
    (name,) = beside  # with the process and the machine, of which a shared folder may have several
    assert re.fullmatch(rf"\.video\.{os.getpid()}@[0-9a-f]{{8}}\.part\.mp4", name)
    assert [entry.name for entry in tmp_path.iterdir()] == ["video.mp4"]
    assert path.read_bytes() != b"the old one"


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), SystemExit(143), RuntimeError("torch"), FileNotFoundError(2, "gone", "weights")]
)
@pytest.mark.parametrize("existing", [True, False])
def test_an_interrupt_leaves_no_half_file_and_an_existing_one_intact(tmp_path, error, existing):
    """Neither does an error of the stream's own, which comes through as it is: it is not the file's fault."""

    def breaking():
        yield from _chunks(4)
        raise error

    path = tmp_path / "video.mp4"
    if existing:
        path.write_bytes(b"the old one")
    with pytest.raises(type(error)) as caught:
        write_video(breaking(), None, path, Fraction(24))
    assert caught.value is error
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == [b"the old one"] * existing


FULL_DISK = """
import resource, signal, sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
import torch
from i2v_lab.errors import OutputError
from i2v_lab.pipeline.contract.media import write_video

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path(sys.argv[1])
chunks = [torch.randint(0, 255, (4, 128, 128, 3), dtype=torch.uint8) for _ in range(2)]
audio = SimpleNamespace(waveform=torch.rand(2, 16000) * 2 - 1, sampling_rate=48000)
whole = path.with_name("whole.mp4")
write_video(iter(chunks), audio, whole, Fraction(24))
size = whole.stat().st_size
whole.unlink()
statuses = set()
for limit in (0, 4000, size // 2, size - 5000, size - 500, size - 1):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        write_video(iter(chunks), audio, path, Fraction(24))
    except OutputError as error:
        statuses.add(error.exit_status)
        print(error, sorted(entry.name for entry in path.parent.iterdir()), path.read_bytes())
sys.exit(statuses.pop())
"""


def test_a_full_disk_leaves_no_half_file_and_an_existing_one_intact(tmp_path, forked_python):
    """For real, in a process that may not write more than so much to a file: at the start, midway, at the last byte."""
    path = tmp_path / "video.mp4"
    path.write_bytes(b"the old one")
    child = subprocess.run([*forked_python, "-c", FULL_DISK, path], capture_output=True, text=True, check=False)
    line = f"out='{path}' could not be written (File too large); free some space or choose another folder"
    assert child.stdout.splitlines() == [f"{line} ['video.mp4'] b'the old one'"] * 6
    assert child.returncode == 2
