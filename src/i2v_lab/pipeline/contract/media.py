"""Pictures in, video out: the still as pixels, the finished stream as an MP4 that is whole or absent."""

from __future__ import annotations

import errno
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from numbers import Rational
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from i2v_lab.errors import I2VLabError, InvalidImage, InvalidRequest, InvalidVideo, OutputError
from i2v_lab.files import check_file, partial_file
from i2v_lab.pipeline.contract.sound import OnNote, fit_audio, note_length, prepare_sound

LOGGER = logging.getLogger(__name__)
MAX_SIDE = 16384  # pixels
MAX_RATE = 1000  # frames per second
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)

# Without cpu-independent, x264's macroblock tree reads memory that nobody wrote (seen with AVX-512, at widths of 64,
# 160 and 192), and the same frames may be encoded otherwise each time. "faster" takes half the time of the default, for
# 0.05 to 0.2 dB.
H264_OPTIONS = {"crf": "18", "preset": "faster", "x264-params": "cpu-independent=1"}


def load_still(path: str | Path) -> np.ndarray:
    """Read a still as 8-bit RGB, upright.

    Greyscale (8 and 16 bit), palette, CMYK and other modes are converted; transparency is laid over white; a side of
    one pixel is doubled, since the model's image compression works on pairs of pixels.

    Args:
        path: Any format that Pillow reads.

    Returns:
        ``(H, W, 3)`` uint8, both sides at least 2.

    Raises:
        InvalidImage: The file is missing, unreadable, truncated, not a picture, or implausibly large.
    """
    path = Path(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # damaged EXIF and the like: the picture itself is what counts
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if path.exists() and not path.is_file() and not path.is_dir():  # to open a pipe would wait for a writer
                raise InvalidImage(f"image '{path}' is no regular file; give a picture file", path=path)
            with Image.open(path, formats=_formats()) as picture:
                picture.load()
                pixels = np.array(_as_rgb(ImageOps.exif_transpose(picture)))
    except InvalidImage:
        raise
    except MemoryError as error:
        words = "takes more host memory than there is; check that it is whole, or close other programs"
        raise InvalidImage(f"image '{path}' {words}", path=path) from error
    except FileNotFoundError as error:
        raise InvalidImage(f"image '{path}' does not exist; check the path", path=path) from error
    except IsADirectoryError as error:
        raise InvalidImage(f"image '{path}' is a folder; give a picture file", path=path) from error
    except UnidentifiedImageError as error:
        raise InvalidImage(f"image '{path}' is not a picture; give a PNG, JPEG or WebP", path=path) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InvalidImage(
            f"image '{path}' has more than {Image.MAX_IMAGE_PIXELS} pixels; scale it down first", path=path
        ) from error
    except Exception as error:  # on damaged data Pillow's decoders raise almost anything
        if isinstance(error, OSError) and error.strerror:
            raise InvalidImage(f"image '{path}' cannot be read ({error.strerror}); check it", path=path) from error
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InvalidImage(f"image '{path}' is damaged or truncated ({reason}); save it again", path=path) from error
    for axis in (0, 1):
        if pixels.shape[axis] == 1:
            pixels = np.repeat(pixels, 2, axis=axis)
    return pixels


def _formats() -> list[str]:
    """What Pillow reads by itself: for PostScript it would run another program."""
    Image.init()
    return [name for name in Image.ID if name != "EPS"]


def _as_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith(("I", "F")):
        values = np.nan_to_num(np.asarray(picture, dtype=np.float64))
        scale = 255 / 65535 if picture.mode.startswith("I") else 255
        return Image.fromarray((values * scale).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return picture.convert("RGB")


def check_output(path: Path) -> None:
    """Make sure that a video can be written to ``path``, leaving nothing behind.

    Raises:
        OutputError: Its folder does not exist or is not writable, or the name is not that of an MP4 file.
    """
    check_file(path, "out", "video.mp4", make_folder=False)
    if path.suffix.lower() != ".mp4":
        raise OutputError(f"out='{path}' does not end in .mp4; use '{path.with_suffix('.mp4')}'", path=path)


def check_size(width: int, height: int) -> None:
    """Make sure that frames of a size can be encoded.

    Raises:
        InvalidRequest: A side is longer than the encoder takes.
    """
    for name, side in {"width": width, "height": height}.items():
        if side > MAX_SIDE:
            words = f"{name}={side} is above {MAX_SIDE}, the most that H.264 takes; use that or less"
            raise InvalidRequest(words, **{name: side})


def write_video(
    chunks: Iterable[torch.Tensor],
    audio: Any | None,
    path: Path,
    frame_rate: Fraction,
    on_frame: Callable[[], None] = lambda: None,
    on_note: OnNote = lambda _, text: LOGGER.warning(text),
) -> int:
    """Encode a stream of frames as H.264 with AAC sound, beside the target, and rename it when it is complete.

    The same frames and sound give the same file. An error, an interrupt or a full disk leaves no partial file and does
    not touch an existing one. Sound is no reason for an error: what cannot be encoded of it is replaced, or left out
    (:func:`~i2v_lab.pipeline.contract.sound.prepare_sound`).

    Args:
        chunks: Tensors or arrays ``(F, H, W, 3)`` uint8, on any device, ``F`` from 0; consumed once. An odd side is
            padded by its last row or column, since the codec halves the colours' resolution.
        audio: Has ``waveform`` ``(2, samples)`` float in [-1, 1] and ``sampling_rate`` in Hz; or ``None`` for silence.
            Cut, or filled up with silence, to the length of the video.
        path: The MP4 to make.
        frame_rate: Frames per second.
        on_frame: Called after each frame is encoded.
        on_note: Called with the number of samples and a line wherever sound or frames were changed; by default the
            line is logged.

    Returns:
        The number of frames written.

    Raises:
        InvalidVideo: There are no frames, or they are not uint8 RGB of one size; ``fields`` has the ``shape`` and the
            ``dtype``. Or the encoder refuses them.
        OutputError: It cannot be written, for instance because the disk is full. What ``chunks`` raises comes through
            as it is.

    Example:
        >>> grey = torch.full((9, 64, 64, 3), 128, dtype=torch.uint8)
        >>> write_video([grey], None, Path("grey.mp4"), Fraction(24))
        9
    """
    check_output(path)
    if not (isinstance(frame_rate, Rational) and Fraction(1, MAX_RATE) <= frame_rate <= MAX_RATE):
        raise InvalidVideo(
            f"frame_rate={frame_rate!r} is not a ratio from 1/{MAX_RATE} to {MAX_RATE}; use Fraction(24)",
            frame_rate=frame_rate,
        )
    rate = Fraction(frame_rate).limit_denominator(10**6)  # the codec's are of 32 bits
    failures: list[BaseException] = []
    try:
        sound = prepare_sound(audio, on_note)
        with partial_file(path) as part:
            return _encode(_watched(chunks, failures), sound, part, rate, on_frame, on_note)
    except (OSError, av.FFmpegError) as error:
        if error in failures:
            raise
        raise _not_written(error, path) from error


def _not_written(error: OSError | av.FFmpegError, path: Path) -> I2VLabError:
    reason = error.strerror or str(error)
    if error.errno in NO_SPACE:
        words = f"could not be written ({reason}); free some space or choose another folder"
        return OutputError(f"out='{path}' {words}", path=path)
    if type(error) in (OSError, PermissionError, FileNotFoundError, NotADirectoryError) or error.errno in UNWRITABLE:
        return OutputError(f"out='{path}' could not be written ({reason}); choose another folder", path=path)
    return InvalidVideo(
        f"out='{path}' could not be encoded ({reason}); use another size or frame rate", path=path, reason=reason
    )


def _watched(chunks: Iterable[torch.Tensor], failures: list[BaseException]) -> Iterator[torch.Tensor]:
    try:
        yield from chunks
    except (OSError, av.FFmpegError) as error:  # of the stream, which may read weights; not of the file being written
        failures.append(error)
        raise


def _encode(
    chunks: Iterable[torch.Tensor],
    sound: tuple[np.ndarray, int] | None,
    part: Path,
    frame_rate: Fraction,
    on_frame: Callable[[], None],
    on_note: OnNote,
) -> int:
    frames = 0
    shape: tuple[int, ...] = ()
    # An absolute path: FFmpeg would take 12: in front of 12:30.mp4 for a protocol.
    with av.open(str(part.absolute()), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        video: Any = container.add_stream("libx264", rate=frame_rate, options=H264_OPTIONS)
        video.pix_fmt = "yuv420p"
        video.codec_context.thread_type = "FRAME"  # PyAV's default, slices of one frame, leaves most cores idle
        track: Any = container.add_stream("aac", rate=sound[1], layout="stereo") if sound else None
        for chunk in chunks:
            pixels = _pixels(chunk, shape)
            del chunk
            if not shape and len(pixels):
                shape = pixels.shape[1:]
                video.height, video.width = shape[0] + shape[0] % 2, shape[1] + shape[1] % 2
                if shape[0] % 2 or shape[1] % 2:
                    size = f"{shape[1]}x{shape[0]}"
                    on_note(0, f"video: H.264 has even sides only; {size} is padded to {video.width}x{video.height}")
            for frame in pixels:
                even = np.pad(frame, ((0, shape[0] % 2), (0, shape[1] % 2), (0, 0)), mode="edge")
                container.mux(video.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")))
                frames += 1
                on_frame()
            del pixels
        if not frames:
            raise InvalidVideo("the video has no frames; give at least one chunk (F, H, W, 3) with F above 0", shape=())
        container.mux(video.encode())
        if sound is not None:
            _encode_sound(container, track, sound, frames / frame_rate, on_note)
    return frames


def _pixels(chunk: Any, before: tuple[int, ...]) -> np.ndarray:
    """A chunk's frames on the CPU, if they are uint8 RGB of the size of those before."""
    shape, dtype = tuple(getattr(chunk, "shape", ())), str(getattr(chunk, "dtype", type(chunk).__name__))
    if not isinstance(chunk, torch.Tensor | np.ndarray) or len(shape) != 4 or shape[3] != 3 or 0 in shape[1:]:
        raise InvalidVideo(f"frames of shape {shape} are not (F, H, W, 3); permute them", shape=shape, dtype=dtype)
    pixels: np.ndarray = chunk.detach().cpu().numpy() if isinstance(chunk, torch.Tensor) else chunk
    if pixels.dtype != np.uint8:
        raise InvalidVideo(
            f"frames in {dtype} are not uint8; scale them to 0..255 and convert", shape=shape, dtype=dtype
        )
    if before and shape[1:] != before and shape[0]:
        was, now = (f"{size[1]}x{size[0]}" for size in (before, shape[1:]))
        raise InvalidVideo(f"the frames change from {was} to {now}; give all of one size", shape=shape, dtype=dtype)
    return pixels


def _encode_sound(
    container: Any, track: Any, sound: tuple[np.ndarray, int], seconds: Fraction, on_note: OnNote
) -> None:
    """Encode the sound behind the video; where its encoder fails, the video stays without it."""
    samples, rate = sound
    wanted = round(seconds * rate)
    note_length(samples.shape[1], wanted, rate, on_note)
    if not wanted:
        return
    frame = av.AudioFrame.from_ndarray(fit_audio(samples, wanted), format="fltp", layout="stereo")
    frame.sample_rate = rate
    frame.pts = 0  # without a time the encoder's own delay would be heard, 1,024 samples of it
    try:
        packets = [*track.encode(frame), *track.encode()]
    except av.FFmpegError as error:
        on_note(0, f"sound: it cannot be encoded ({error.strerror or error}); the video is written without it")
        return
    container.mux(packets)
