"""The two-stage pipeline of LTX-2: the order of its phases, the grad mode of each, and its events."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Self

import torch

from i2v_lab.errors import InvalidRequest
from i2v_lab.events import EventSink, Phase, broadcast, environment_sinks
from i2v_lab.memory_policy import MemoryPolicy, Techniques
from i2v_lab.pipeline.contract.generation import (
    GRAD_SCOPES,
    Generation,
    GradScopes,
    VideoStream,
    decode_chunks,
    require_free_memory,
    resolve_device,
)
from i2v_lab.pipeline.contract.lifecycle import phase_scope, rare_collections
from i2v_lab.pipeline.contract.media import load_still
from i2v_lab.pipeline.contract.random_tensors import DTYPE
from i2v_lab.pipeline.contract.weight_files import element_count
from i2v_lab.pipeline.ltx2 import RUNNER, phases
from i2v_lab.pipeline.ltx2.layout import file_layout, meta_component
from i2v_lab.pipeline.ltx2.memory.host_weights import HostWeights
from i2v_lab.pipeline.ltx2.tiles import chunk_count
from i2v_lab.pipeline.ltx2.weights import Weights
from i2v_lab.placement import Placement
from i2v_lab.request import I2VRequest, Quantization


class TwoStagePipeline:
    """Image to video in two stages: denoise at half size, upsample the latent, refine at full size, decode.

    Each component is built for its phase and released after it, except that the transformer of the distilled variant is
    kept from the first stage to the second. Within a ``with`` block, streamed weights stay in host memory from one call
    to the next; otherwise every call is a cold start.

    Args:
        weights: From :func:`~i2v_lab.pipeline.ltx2.weights.resolve_weights`.
        device: ``"cpu"`` or ``"cuda"``.
        sinks: Called with every :data:`~i2v_lab.events.Event`.
        techniques: Override those of the request's memory policy, not those of a placement.
        host_weights: Where streamed weights are in host memory, for pipelines that share them; it is the caller's to
            close.

    Raises:
        DeviceUnavailable: The device does not exist here.
        InvalidRequest: A technique is another runner's.

    Example:
        >>> from i2v_lab.pipeline.contract.architectures import load_architecture
        >>> from i2v_lab.pipeline.ltx2.weights import resolve_weights
        >>> pipeline = TwoStagePipeline(resolve_weights(load_architecture("ltx-2.3-tiny")))  # doctest: +SKIP
        >>> request = I2VRequest(image="still.png", width=192, height=128, frames=25)  # doctest: +SKIP
        >>> frames = torch.cat(list(pipeline(request).video))  # (25, 128, 192, 3)  # doctest: +SKIP
        >>> with pipeline:  # doctest: +SKIP
        ...     for seed in range(3):
        ...         frames = torch.cat(list(pipeline(replace(request, seed=seed, memory="streamed")).video))
    """

    def __init__(
        self,
        weights: Weights,
        device: str | torch.device = "cpu",
        sinks: Sequence[EventSink] = (),
        techniques: Techniques | None = None,
        host_weights: HostWeights | None = None,
    ) -> None:
        if techniques is not None:
            RUNNER.check_techniques(techniques)
        self.weights = weights
        self._techniques = techniques
        self._shared = host_weights
        self._own: HostWeights | None = None
        self.device = resolve_device(device)
        self._emit = broadcast([*sinks, *environment_sinks(self.device)])

    def __enter__(self) -> Self:
        """Keep streamed weights in host memory until the end of the scope."""
        if self._own is None:
            self._own = HostWeights(keep=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the host memory that is kept; the pipeline can be called again, which is a cold start then."""
        own, self._own = self._own, None
        if own is not None:
            own.close()

    def __call__(self, request: I2VRequest) -> Generation:
        """Run every phase up to the decoded audio; the returned stream decodes the video as it is consumed.

        Args:
            request: What to generate; its memory policy must be resolved.

        Returns:
            The video, ``(frames, height, width, 3)`` uint8 in chunks on the device, and its sound.

        Raises:
            InvalidRequest: The memory policy is ``auto``.
            InvalidImage: The still cannot be read; raised before any weight is loaded.
            DeviceUnavailable: The largest component does not fit the machine's free memory (CPU only).
            CheckpointError: A weight file was removed or damaged after it had been verified.
        """
        if request.memory is MemoryPolicy.AUTO:
            raise InvalidRequest(
                "memory='auto' is for the caller to resolve; use i2v_lab.capacity.placement", memory="auto"
            )
        pixels = load_still(request.image)
        require_memory(self.weights, request.quantization, self.device)
        generator = torch.Generator(self.device).manual_seed(request.seed)
        placement = request.placed
        if self._techniques is not None and request.placement is None:
            placement = Placement(techniques=self._techniques)
        host_weights = self._shared or self._own or HostWeights()
        run = phases.Run(request, self.weights, self.device, generator, placement, host_weights)
        scopes = GRAD_SCOPES[request.decode_scope]
        with rare_collections(), scopes.body(), ExitStack() as reading:
            reading.callback(host_weights.end_ahead if host_weights.keep else host_weights.close)
            run.ledger().read_transformer_ahead()
            with self._phase(Phase.ENCODE_PROMPT) as scope:
                contexts = phases.encode_prompt(run, scope)
            with self._phase(Phase.ENCODE_IMAGE) as scope:
                still_1, still_2 = phases.encode_image(run, scope, pixels)
            with ExitStack() as transformer_scope:  # which spans both stages for the distilled variant
                with self._phase(Phase.DENOISE_STAGE_1) as scope:
                    transformer = transformer_scope.enter_context(phases.transformer(run, scope, stage=1))
                    latents = phases.denoise_stage_1(run, scope, transformer, contexts, still_1)
                    if run.guided:
                        transformer_scope.close()
                with self._phase(Phase.UPSAMPLE_LATENT) as scope:
                    latents = phases.upsample_latent(run, scope, latents)
                with self._phase(Phase.DENOISE_STAGE_2) as scope:
                    if run.guided:
                        transformer = transformer_scope.enter_context(phases.transformer(run, scope, stage=2))
                    latents = phases.denoise_stage_2(run, scope, transformer, contexts, still_2, latents)
                    transformer_scope.close()
            del contexts, still_1, still_2
            with self._phase(Phase.DECODE_AUDIO) as scope:
                audio = phases.decode_audio(run, scope, latents.audio)
        source = self._decode_lazily(run, scopes, latents.video)
        return Generation(VideoStream(source, request.shape, chunk_count(request)), audio)

    def _decode_lazily(self, run: phases.Run, scopes: GradScopes, latent: torch.Tensor) -> Iterator[torch.Tensor]:
        def build() -> torch.nn.Module:
            with scopes.body():
                return run.ledger().video_decoder()

        with (
            self._phase(Phase.DECODE_VIDEO) as scope,
            scope.component("video_decoder", build) as decoder,
        ):
            chunks = phases.decode_video(run, decoder, latent)
            yield from decode_chunks(chunks, chunk_count(run.request), scopes, scope)

    def _phase(self, phase: Phase) -> AbstractContextManager[Any]:
        return phase_scope(phase, self.device, self._emit)


def require_memory(weights: Weights, quantization: Quantization, device: torch.device) -> None:
    """On a CPU, refuse a model whose largest component exceeds the free memory: the system would kill the process.

    Args:
        weights: For their architecture.
        quantization: Of the transformer.
        device: Where it is to run; on CUDA nothing is checked.

    Raises:
        DeviceUnavailable: ``fields`` has the ``component``, its ``needed_bytes``, and ``free_bytes``.
    """
    if device.type != "cpu":
        return
    architecture = weights.architecture
    gemma = element_count(file_layout(architecture, "gemma"))
    transformer = sum(p.numel() for p in meta_component(architecture, "transformer").parameters())
    item_bytes = 1 if quantization is Quantization.FP8_CAST else DTYPE.itemsize
    sizes = {"text_encoder": gemma * DTYPE.itemsize, "transformer": transformer * item_bytes}
    require_free_memory(architecture.name, sizes, device, "ltx-2.3-tiny")
