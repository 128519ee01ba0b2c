"""Pictures in, video out: the still as pixels, the finished stream as an MP4 that is whole or absent."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from i2v_lab.errors import InvalidImage, OutputError
from i2v_lab.files import check_file, partial_file

# Without cpu-independent, x264's macroblock tree reads memory that nobody wrote (seen with AVX-512, at widths of 64,
# 160 and 192), and the same frames may be encoded otherwise each time.
H264_OPTIONS = {"crf": "18", "x264-params": "cpu-independent=1"}


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
            with Image.open(path) as picture:
                picture.load()
                pixels = np.array(_as_rgb(ImageOps.exif_transpose(picture)))
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
    if path.suffix.lower() != ".mp4" and not path.is_dir():
        raise OutputError(f"out='{path}' does not end in .mp4; use '{path.with_suffix('.mp4')}'", path=path)
    check_file(path, "out", "video.mp4", make_folder=False)


def write_video(
    chunks: Iterable[torch.Tensor],
    audio: Any | None,
    path: Path,
    frame_rate: Fraction,
    on_frame: Callable[[], None] = lambda: None,
) -> int:
    """Encode a stream of frames as H.264 with AAC sound, beside the target, and rename it when it is complete.

    The same frames and sound give the same file. An error, an interrupt or a full disk leaves no partial file and does
    not touch an existing one.

    Args:
        chunks: Tensors ``(F, H, W, 3)`` uint8, on any device; consumed once.
        audio: Has ``waveform`` ``(2, samples)`` float in [-1, 1] and ``sampling_rate`` in Hz; or ``None`` for silence.
            Cut, or filled up with silence, to the length of the video.
        path: The MP4 to make.
        frame_rate: Frames per second.
        on_frame: Called after each frame is encoded.

    Returns:
        The number of frames written.

    Raises:
        OutputError: It cannot be written, for instance because the disk is full. What ``chunks`` raises comes through
            as it is.

    Example:
        >>> grey = torch.full((9, 64, 64, 3), 128, dtype=torch.uint8)
        >>> write_video([grey], None, Path("grey.mp4"), Fraction(24))
        9
    """
    check_output(path)
    failures: list[OSError] = []
    try:
        with partial_file(path) as part:
            return _encode(_watched(chunks, failures), audio, part, frame_rate, on_frame)
    except (OSError, av.FFmpegError) as error:
        if error in failures:
            raise
        raise OutputError(
            f"out='{path}' could not be written ({error.strerror or error}); free some space or choose another folder",
            path=path,
        ) from error


def _watched(chunks: Iterable[torch.Tensor], failures: list[OSError]) -> Iterator[torch.Tensor]:
    try:
        yield from chunks
    except OSError as error:  # of the stream, which may read weights; not of the file that is being written
        failures.append(error)
        raise


def _encode(
    chunks: Iterable[torch.Tensor], audio: Any | None, part: Path, frame_rate: Fraction, on_frame: Callable[[], None]
) -> int:
    frames = 0
    # An absolute path: FFmpeg would take 12: in front of 12:30.mp4 for a protocol.
    with av.open(str(part.absolute()), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        video: Any = container.add_stream("libx264", rate=frame_rate, options=H264_OPTIONS)
        video.pix_fmt = "yuv420p"
        sound: Any = container.add_stream("aac", rate=audio.sampling_rate, layout="stereo") if audio else None
        for chunk in chunks:
            if frames == 0:
                video.height, video.width = chunk.shape[1:3]
            for pixels in chunk.cpu().numpy():
                container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
                frames += 1
                on_frame()
            del chunk
        container.mux(video.encode())
        if audio is not None:
            samples = fit_audio(audio.waveform, round(frames / frame_rate * audio.sampling_rate))
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="stereo")
            frame.sample_rate = audio.sampling_rate
            frame.pts = 0  # without a time the encoder's own delay would be heard, 1,024 samples of it
            container.mux(sound.encode(frame))
            container.mux(sound.encode())
    return frames


def fit_audio(waveform: torch.Tensor, samples: int) -> np.ndarray:
    """A waveform ``(2, n)`` as float32 in [-1, 1], cut or filled up with silence to ``(2, samples)``.

    The audio latent has one position for 40 ms, so a decoded waveform is up to some 40 ms off the video's length.
    """
    values = waveform.detach().float().clamp(-1, 1).cpu().numpy()[:, :samples]
    return np.ascontiguousarray(np.pad(values, ((0, 0), (0, samples - values.shape[1]))))
