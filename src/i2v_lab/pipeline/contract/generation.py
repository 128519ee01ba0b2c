"""What every runner's pipeline returns: a lazily decoded video, its sound if any, in the grad mode asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from i2v_lab.errors import DeviceUnavailable, GradScopeError
from i2v_lab.pipeline.contract.host_memory import available_bytes
from i2v_lab.pipeline.contract.lifecycle import PhaseScope
from i2v_lab.request import DecodeScope, VideoShape
from i2v_lab.thread_modes import CarriedModes
from i2v_lab.units import format_bytes

GradMode = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class GradScopes:
    """The grad modes of a run.

    Attributes:
        body: Around every phase up to the decoded audio, and around the building of the video decoder.
        decode: Around the decoding of each chunk of video; ``nullcontext`` leaves it to the consumer.
    """

    body: GradMode
    decode: GradMode


GRAD_SCOPES = {
    DecodeScope.NO_GRAD: GradScopes(body=torch.no_grad, decode=torch.no_grad),
    DecodeScope.ESCAPED: GradScopes(body=torch.no_grad, decode=nullcontext),
    DecodeScope.INFERENCE_MODE: GradScopes(body=torch.inference_mode, decode=nullcontext),
}


@contextmanager
def explained() -> Iterator[None]:
    """Say what to do about torch's refusal of tensors that were made in inference mode.

    Raises:
        GradScopeError: In place of torch's error, within this scope.
    """
    try:
        yield
    except RuntimeError as error:
        if "nference tensor" not in str(error):
            raise
        raise GradScopeError(
            f"{str(error).splitlines()[0].rstrip('.')}. The pipeline ran inside torch.inference_mode() but its "
            "video was decoded outside; use decode_scope='no_grad', which needs no mode around the consumer",
            decode_scope=DecodeScope.INFERENCE_MODE.value,
        ) from error


class VideoStream(Iterator[torch.Tensor]):
    """A video that is decoded while it is consumed; each item is a chunk ``(F, H, W, 3)`` uint8 on the run's device.

    The decoder is built when the first chunk is asked for and let go of after the last one, on :meth:`close`, on an
    error, or at the end of a ``with`` block. It is decoded in the autocast and on the default device of the moment in
    which the stream was made, in whichever thread; the consumer keeps its own modes.

    Attributes:
        shape: The whole video.
        chunks: How many chunks there will be.

    Example:
        >>> from i2v_lab.request import VideoShape
        >>> with VideoStream(iter([torch.zeros(9, 64, 64, 3)]), VideoShape(9, 64, 64), chunks=1) as stream:
        ...     [chunk.shape[0] for chunk in stream]
        [9]
    """

    def __init__(self, source: Iterator[torch.Tensor], shape: VideoShape, chunks: int) -> None:
        self._source = source
        self._modes = CarriedModes()  # grad and inference mode are those of the run's scopes, or else the consumer's
        self.shape = shape
        self.chunks = chunks

    def __next__(self) -> torch.Tensor:
        with explained(), self._modes.step():
            return next(self._source)

    def __enter__(self) -> VideoStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop early: the decoder and everything it holds are released."""
        close = getattr(self._source, "close", None)
        if close is not None:
            with self._modes.step():
                close()


class Sound(Protocol):
    """A waveform with its rate, as ltx-core has it."""

    waveform: torch.Tensor
    sampling_rate: int


@dataclass(frozen=True)
class Generation:
    """What a pipeline returns.

    Attributes:
        video: Lazily decoded chunks of frames.
        audio: ``waveform`` ``(2, samples)`` float32 and ``sampling_rate`` in Hz; ``None`` where the model has no sound.

    Example:
        >>> generation = pipeline(request)  # everything but the decoding of the video  # doctest: +SKIP
        >>> with generation.video as chunks:  # doctest: +SKIP
        ...     write_video(chunks, generation.audio, Path("video.mp4"), request.frame_rate)
    """

    video: VideoStream
    audio: Sound | None


def decode_chunks(
    chunks: Iterator[torch.Tensor], count: int, scopes: GradScopes, scope: PhaseScope
) -> Iterator[torch.Tensor]:
    """Pass on what a decoder yields, each chunk decoded in the grad mode of ``scopes`` and reported as a step."""
    for step in range(1, count + 1):
        with scopes.decode():
            chunk = next(chunks)
        scope.step(step, count)
        yield chunk
        del chunk  # not to be held while the next one is decoded
    with scopes.decode():
        if next(chunks, None) is not None:
            raise AssertionError("the decoder yielded more chunks than its tiling has")


def resolve_device(device: str | torch.device) -> torch.device:
    """The device to run on; ``auto`` is CUDA where there is one.

    Raises:
        DeviceUnavailable: CUDA is asked for where there is none, or the name is not a device.
    """
    name = str(device)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(name)
    except RuntimeError as error:
        raise DeviceUnavailable(f"device={name!r} is not a device; use cpu or cuda", device=name) from error
    if resolved.type not in ("cpu", "cuda"):
        raise DeviceUnavailable(f"device={name!r} is not supported; use cpu or cuda", device=name)
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise DeviceUnavailable(f"device={name!r}: torch finds no CUDA device here; use cpu", device=name)
    return resolved


def require_free_memory(model: str, sizes: Mapping[str, int], device: torch.device, small_model: str) -> None:
    """On a CPU, refuse a model whose largest component exceeds the free memory, before the system kills the run.

    Args:
        model: Its name.
        sizes: Bytes of its large components, by name.
        device: Where it is to run.
        small_model: What to use in its place.

    Raises:
        DeviceUnavailable: With the component, its size, and the memory there is.
    """
    if device.type != "cpu":
        return
    name = max(sizes, key=lambda key: sizes[key])
    free = available_bytes()
    if sizes[name] > free:
        raise DeviceUnavailable(
            f"model={model!r} needs {format_bytes(sizes[name])} for its {name} alone and this machine has "
            f"{format_bytes(free)} free; use --model {small_model}, or a machine that has more",
            component=name,
            needed_bytes=sizes[name],
            free_bytes=free,
        )
