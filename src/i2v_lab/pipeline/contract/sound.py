"""Sound as the AAC encoder takes it: two finite channels at a rate that it has; with what was done to get there."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import av
import numpy as np
import torch

# ISO/IEC 14496-3, table 1.18.
AAC_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350)
RATE = 48000  # what other rates are resampled to
LEAST_RATE, MOST_RATE = 1000, 768000
LAYOUTS = {1: "mono", 2: "stereo", 3: "2.1", 4: "4.0", 5: "5.0", 6: "5.1", 7: "6.1", 8: "7.1"}  # by channels
SLACK_S = 0.1  # a decoded waveform is up to 40 ms off the video's length

OnNote = Callable[[int, str], None]  # how many samples are concerned, and a line for the user


def prepare_sound(audio: Any | None, on_note: OnNote) -> tuple[np.ndarray, int] | None:
    """A pipeline's sound for the encoder.

    Values that are not finite become 0, the rest is clamped to [-1, 1]; mono goes to both channels, more than two are
    mixed, and a rate that AAC does not have is resampled to 48 kHz. Integers are full scale.

    Args:
        audio: Has ``waveform`` ``(channels, samples)`` or ``(samples,)``, torch or numpy, floating-point or integers of
            8, 16 or 32 bits, and ``sampling_rate`` in Hz; or ``None``.
        on_note: Called with whatever was done that changes what is heard.

    Returns:
        ``(2, samples)`` float32 in [-1, 1] and the rate in Hz; ``None`` for no sound, and for one that cannot be used.
    """
    if audio is None:
        return None
    try:
        values = _channels_first(_floats(audio.waveform), on_note)
        rate = _rate(audio.sampling_rate)
    except (AttributeError, TypeError, ValueError) as error:
        on_note(0, f"sound: {error}; the video is written without it")
        return None
    odd = ~np.isfinite(values)
    if odd.any():
        count = int(odd.sum())
        on_note(count, f"sound: {count} of {values.size} samples are NaN or infinite; they are replaced by 0")
        values = np.where(odd, np.float32(0), values)
    values = np.ascontiguousarray(values.clip(-1, 1))
    channels = len(values)
    if channels > 2:
        on_note(0, f"sound: {channels} channels are mixed to 2")
    if rate not in AAC_RATES:
        on_note(0, f"sound: {rate} Hz is not a rate of AAC; it is resampled to {RATE} Hz")
    if channels == 1:
        values = values.repeat(2, axis=0)
    if channels > 2 or rate not in AAC_RATES:
        values, rate = _resampled(values, rate, rate if rate in AAC_RATES else RATE)
    return values, rate


def fit_audio(waveform: torch.Tensor | np.ndarray, samples: int) -> np.ndarray:
    """A waveform ``(2, n)`` as float32 in [-1, 1], cut or filled up with silence to ``(2, samples)``.

    The audio latent has one position for 40 ms, so a decoded waveform is up to some 40 ms off the video's length.
    """
    values = torch.as_tensor(waveform).detach().float().clamp(-1, 1).cpu().numpy()[:, :samples]
    return np.ascontiguousarray(np.pad(values, ((0, 0), (0, samples - values.shape[1]))))


def note_length(had: int, samples: int, rate: int, on_note: OnNote) -> None:
    """Report a sound that is cut, or filled up with silence, by more than a waveform is off usually."""
    missing = samples - had
    if abs(missing) > SLACK_S * rate:
        what = f"{missing / rate:.2f} s shorter than the video; silence is" if missing > 0 else ""
        what = what or f"{-missing / rate:.2f} s longer than the video; the end is"
        on_note(abs(missing), f"sound: {what} {'added' if missing > 0 else 'cut'}")


def _floats(waveform: Any) -> np.ndarray:
    """A waveform as float32."""
    if not isinstance(waveform, torch.Tensor | np.ndarray):
        raise TypeError(f"a waveform of type {type(waveform).__name__} is no tensor and no array")
    values = waveform.detach().cpu() if isinstance(waveform, torch.Tensor) else waveform
    if isinstance(values, torch.Tensor):
        values = (values.float() if values.dtype in (torch.bfloat16, torch.float16) else values).numpy()
    if values.dtype.kind == "f":
        with np.errstate(over="ignore"):  # what float32 cannot hold is clamped, or counted as infinite
            return values.astype(np.float32)
    if values.dtype in (np.int8, np.int16, np.int32):
        return (values / (np.float64(np.iinfo(values.dtype).max) + 1)).astype(np.float32)
    if values.dtype == np.uint8:
        return ((values.astype(np.float32) - 128) / 128).astype(np.float32)
    raise ValueError(f"a waveform in {values.dtype} has no scale that is known")


def _channels_first(values: np.ndarray, on_note: OnNote) -> np.ndarray:
    """``(channels, samples)``."""
    shape = values.shape
    while values.ndim > 2 and values.shape[0] == 1:
        values = values[0]
    if values.ndim == 1:
        values = values[None]
    if values.ndim == 2 and values.shape[0] not in LAYOUTS and values.shape[1] in LAYOUTS:
        on_note(0, f"sound: of shape {shape}, which is taken as samples by channels")
        values = values.T
    if values.ndim != 2 or values.shape[0] not in LAYOUTS:
        raise ValueError(f"a waveform of shape {shape} is not 1 to {max(LAYOUTS)} channels by samples")
    return values


def _rate(value: Any) -> int:
    rate = float(value)
    if not (math.isfinite(rate) and rate.is_integer() and LEAST_RATE <= rate <= MOST_RATE):
        raise ValueError(f"sampling_rate={value!r} is not a whole number from {LEAST_RATE} to {MOST_RATE}")
    return int(rate)


def _resampled(values: np.ndarray, rate: int, to: int) -> tuple[np.ndarray, int]:
    if values.shape[1] == 0:
        return np.zeros((2, 0), np.float32), to
    packed = np.ascontiguousarray(values.T).reshape(1, -1)  # PyAV finds one plane too many for 8 channels
    frame = av.AudioFrame.from_ndarray(packed, format="flt", layout=LAYOUTS[len(values)])
    frame.sample_rate = rate
    resampler = av.AudioResampler(format="fltp", layout="stereo", rate=to)
    parts = [part.to_ndarray() for part in (*resampler.resample(frame), *resampler.resample(None))]
    return np.concatenate([np.zeros((2, 0), np.float32), *parts], axis=1).clip(-1, 1), to
