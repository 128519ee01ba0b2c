"""The two-stage pipeline: the order of its phases, the grad mode of each, and the events on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from i2v_lab.errors import DeviceUnavailable, GradScopeError, InvalidRequest
from i2v_lab.events import EventSink, Phase, broadcast, environment_sinks
from i2v_lab.pipeline import ltx2, phases
from i2v_lab.pipeline.checkpoints import Weights
from i2v_lab.pipeline.lifecycle import PhaseScope, phase_scope
from i2v_lab.pipeline.media import load_still
from i2v_lab.request import DecodeScope, I2VRequest, MemoryPolicy, Quantization, VideoShape
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


class VideoStream(Iterator[torch.Tensor]):
    """A video that is decoded while it is consumed; each item is a chunk ``(F, H, W, 3)`` uint8 on the run's device.

    The decoder is built when the first chunk is asked for and let go of after the last one, on :meth:`close`, on an
    error, or at the end of a ``with`` block. The caller's grad mode is left as it was found.

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
        self.shape = shape
        self.chunks = chunks

    def __next__(self) -> torch.Tensor:
        try:
            return next(self._source)
        except RuntimeError as error:
            if "nference tensor" not in str(error):
                raise
            raise GradScopeError(
                f"{str(error).splitlines()[0].rstrip('.')}. The pipeline ran inside torch.inference_mode() but its "
                "video was decoded outside; use decode_scope='no_grad', which needs no mode around the consumer",
                decode_scope=DecodeScope.INFERENCE_MODE.value,
            ) from error

    def __enter__(self) -> VideoStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop early: the decoder and everything it holds are released."""
        close = getattr(self._source, "close", None)
        if close is not None:
            close()


@dataclass(frozen=True)
class Generation:
    """What a pipeline returns.

    Attributes:
        video: Lazily decoded chunks of frames.
        audio: ``waveform`` ``(2, samples)`` float32 and ``sampling_rate`` in Hz.

    Example:
        >>> generation = pipeline(request)  # everything but the decoding of the video  # doctest: +SKIP
        >>> with generation.video as chunks:  # doctest: +SKIP
        ...     write_video(chunks, generation.audio, Path("video.mp4"), request.frame_rate)
    """

    video: VideoStream
    audio: ltx2.Audio


class TwoStagePipeline:
    """Image to video in two stages: denoise at half size, upsample the latent, refine at full size, decode.

    A cold start on every call: each component is built for its phase and released after it, except that the transformer
    of the distilled variant stays from the first stage to the second.

    Args:
        weights: From :func:`~i2v_lab.pipeline.checkpoints.resolve_weights`.
        device: ``"cpu"`` or ``"cuda"``.
        sinks: Called with every :data:`~i2v_lab.events.Event`.

    Raises:
        DeviceUnavailable: The device does not exist here.

    Example:
        >>> from i2v_lab.pipeline.architectures import load_architecture
        >>> from i2v_lab.pipeline.checkpoints import resolve_weights
        >>> pipeline = TwoStagePipeline(resolve_weights(load_architecture("ltx-2.3-tiny")))  # doctest: +SKIP
        >>> request = I2VRequest(image="still.png", width=192, height=128, frames=25)  # doctest: +SKIP
        >>> frames = torch.cat(list(pipeline(request).video))  # (25, 128, 192, 3)  # doctest: +SKIP
    """

    def __init__(self, weights: Weights, device: str | torch.device = "cpu", sinks: Sequence[EventSink] = ()) -> None:
        self.weights = weights
        self.device = resolve_device(device)
        self._emit = broadcast([*sinks, *environment_sinks(self.device)])

    def __call__(self, request: I2VRequest) -> Generation:
        """Run every phase but the decoding of the video, which the returned stream does as it is consumed.

        Raises:
            InvalidRequest: The memory policy is ``auto``, which stands for others.
            InvalidImage: The still cannot be read; nothing has been loaded by then.
            DeviceUnavailable: The largest component does not fit the machine's free memory (CPU only).
        """
        if request.memory is MemoryPolicy.AUTO:
            raise InvalidRequest(
                "memory='auto' is for the caller to resolve; use i2v_lab.studies.policies", memory="auto"
            )
        pixels = load_still(request.image)
        require_memory(self.weights, request.quantization, self.device)
        generator = torch.Generator(self.device).manual_seed(request.seed)
        run = phases.Run(request, self.weights, self.device, generator)
        scopes = GRAD_SCOPES[request.decode_scope]
        with scopes.body():
            with self._phase(Phase.ENCODE_PROMPT) as scope:
                contexts = phases.encode_prompt(run, scope)
            with self._phase(Phase.ENCODE_IMAGE) as scope:
                still_1, still_2 = phases.encode_image(run, scope, pixels)
            with ExitStack() as held:  # the transformer, which the distilled variant builds once for both stages
                with self._phase(Phase.DENOISE_STAGE_1) as scope:
                    transformer = held.enter_context(phases.transformer(run, scope, stage=1))
                    latents = phases.denoise_stage_1(run, scope, transformer, contexts, still_1)
                    if run.guided:
                        held.close()
                with self._phase(Phase.UPSAMPLE_LATENT) as scope:
                    latents = phases.upsample_latent(run, scope, latents)
                with self._phase(Phase.DENOISE_STAGE_2) as scope:
                    if run.guided:
                        transformer = held.enter_context(phases.transformer(run, scope, stage=2))
                    latents = phases.denoise_stage_2(run, scope, transformer, contexts, still_2, latents)
                    held.close()
            del contexts, still_1, still_2
            with self._phase(Phase.DECODE_AUDIO) as scope:
                audio = phases.decode_audio(run, scope, latents.audio)
        source = self._decode_lazily(run, scopes, latents.video)
        return Generation(VideoStream(source, request.shape, request.chunks()), audio)

    def _decode_lazily(self, run: phases.Run, scopes: GradScopes, latent: torch.Tensor) -> Iterator[torch.Tensor]:
        def build() -> torch.nn.Module:
            with scopes.body():
                return run.ledger().video_decoder()

        with (
            self._phase(Phase.DECODE_VIDEO) as scope,
            scope.component("video_decoder", build) as decoder,
        ):
            chunks = phases.decode_video(run, decoder, latent)
            yield from decode_chunks(chunks, run.request.chunks(), scopes, scope)

    def _phase(self, phase: Phase) -> AbstractContextManager[Any]:
        return phase_scope(phase, self.device, self._emit)


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


def require_memory(weights: Weights, quantization: Quantization, device: torch.device) -> None:
    """On a CPU, refuse a model whose largest component exceeds the free memory, before the system kills the run.

    Raises:
        DeviceUnavailable: With the component, its size, and the memory there is.
    """
    if device.type != "cpu":
        return
    architecture = weights.architecture
    gemma = sum(math.prod(shape) for shape in ltx2.file_layout(architecture, "gemma").values())
    transformer = sum(p.numel() for p in ltx2.meta_component(architecture, "transformer").parameters())
    item_bytes = 1 if quantization is Quantization.FP8_CAST else ltx2.DTYPE.itemsize
    sizes = {"text_encoder": gemma * ltx2.DTYPE.itemsize, "transformer": transformer * item_bytes}
    name = max(sizes, key=lambda key: sizes[key])
    free = psutil.virtual_memory().available
    if sizes[name] > free:
        raise DeviceUnavailable(
            f"model={architecture.name!r} needs {format_bytes(sizes[name])} for its {name} alone and this machine has "
            f"{format_bytes(free)} free; use --model ltx-2.3-tiny, or a machine that has more",
            component=name,
            needed_bytes=sizes[name],
            free_bytes=free,
        )
