"""The pipeline of first-generation LTX-Video: the order of its phases, the grad mode of each, and its events."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import torch

from i2v_lab.events import EventSink, Phase, broadcast, environment_sinks
from i2v_lab.pipeline.contract.generation import (
    GRAD_SCOPES,
    Generation,
    GradScopes,
    VideoStream,
    decode_chunks,
    require_free_memory,
    resolve_device,
)
from i2v_lab.pipeline.contract.lifecycle import phase_scope
from i2v_lab.pipeline.contract.media import load_still
from i2v_lab.pipeline.contract.random_tensors import DTYPE
from i2v_lab.pipeline.contract.weight_files import element_count
from i2v_lab.pipeline.ltx_video import RUNNER, components, passes
from i2v_lab.pipeline.ltx_video.layout import TRANSFORMER_PREFIX, file_layout
from i2v_lab.pipeline.ltx_video.weights import LtxVideoWeights
from i2v_lab.request import I2VRequest


class LtxVideoPipeline:
    """Image to video in two stages: denoise at two thirds of the size, upsample the latent, refine, decode.

    Each pass is the package's own. A component is built for its phase and released after it, except that the
    transformer is kept from the first pass to the second. There is no sound.

    Args:
        weights: From :func:`~i2v_lab.pipeline.ltx_video.weights.resolve_weights`.
        device: ``"cpu"`` or ``"cuda"``.
        sinks: Called with every :data:`~i2v_lab.events.Event`.

    Raises:
        DeviceUnavailable: The device does not exist here.

    Example:
        >>> from i2v_lab.pipeline.contract.architectures import load_architecture
        >>> from i2v_lab.pipeline.ltx_video.weights import resolve_weights
        >>> pipeline = LtxVideoPipeline(resolve_weights(load_architecture("ltxv-tiny")))  # doctest: +SKIP
        >>> size = {"width": 192, "height": 128, "frames": 25}
        >>> request = I2VRequest(image="still.png", **size, quantization="bf16", tiling=None)
        >>> frames = torch.cat(list(pipeline(request).video))  # (25, 128, 192, 3)  # doctest: +SKIP
    """

    def __init__(
        self, weights: LtxVideoWeights, device: str | torch.device = "cpu", sinks: Sequence[EventSink] = ()
    ) -> None:
        self.weights = weights
        self.device = resolve_device(device)
        self._emit = broadcast([*sinks, *environment_sinks(self.device)])

    def __call__(self, request: I2VRequest) -> Generation:
        """Run every phase up to the last latent; the returned stream decodes the video as it is consumed.

        Args:
            request: What to generate.

        Returns:
            The video, one chunk ``(frames, height, width, 3)`` uint8 on the device; no sound.

        Raises:
            InvalidRequest: The model does not support a value of the request.
            InvalidImage: The still cannot be read; raised before any weight is loaded.
            DeviceUnavailable: The largest component does not fit the machine's free memory (CPU only).
        """
        weights, device = self.weights, self.device
        RUNNER.check_request(weights.architecture, request)
        pixels = passes.still_pixels(load_still(request.image), request)
        self._require_memory()
        generators = [torch.Generator(device).manual_seed(request.seed) for _ in range(2)]
        run = passes.Run(request, weights, device, *generators)
        scopes = GRAD_SCOPES[request.decode_scope]
        with scopes.body():
            vae = components.build_vae(weights, device)
            with self._phase(Phase.ENCODE_PROMPT) as scope:
                build = partial(components.build_text_encoder, weights, device)
                with scope.component("text_encoder", build) as encoder:
                    contexts = passes.encode_prompt(run, vae, encoder, scope.emit)
            with self._phase(Phase.ENCODE_IMAGE) as scope:
                build = partial(components.build_vae, weights, device, "encoder")
                with scope.component("video_encoder", build) as encoder:
                    still = torch.tensor(pixels)
                    stills = [passes.encode_still(run, encoder, still, stage) for stage in (1, 2)]
                    del still
            with ExitStack() as transformer_scope:  # both passes
                with self._phase(Phase.DENOISE_STAGE_1) as scope:
                    build = partial(components.build_transformer, weights, device)
                    transformer = transformer_scope.enter_context(scope.component("transformer", build))
                    latents = passes.denoise(run, 1, transformer, vae, contexts, stills[0], scope.step)
                with self._phase(Phase.UPSAMPLE_LATENT) as scope:
                    build = partial(components.build_upsampler, weights, device)
                    with scope.component("spatial_upsampler", build) as upsampler:
                        latents = passes.upsample_latent(run, vae, upsampler, latents)
                with self._phase(Phase.DENOISE_STAGE_2) as scope:
                    latents = passes.denoise(run, 2, transformer, vae, contexts, stills[1], scope.step, latents)
                    transformer_scope.close()
                    latents = passes.latent_to_decode(run, latents)
            del contexts, stills, vae
        source = self._decode_lazily(run, scopes, latents)
        return Generation(VideoStream(source, request.shape, 1), None)

    def _decode_lazily(self, run: passes.Run, scopes: GradScopes, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        def build() -> torch.nn.Module:
            with scopes.body():
                return components.build_vae(self.weights, self.device, "decoder")

        with self._phase(Phase.DECODE_VIDEO) as scope, scope.component("video_decoder", build) as decoder:
            chunks = passes.decode_video(run, decoder, latents)
            yield from decode_chunks(chunks, 1, scopes, scope)

    def _require_memory(self) -> None:
        architecture = self.weights.architecture
        layouts = {"text_encoder": file_layout(architecture, "text_encoder")}
        checkpoint = file_layout(architecture, "checkpoint")
        layouts["transformer"] = {key: shape for key, shape in checkpoint.items() if key.startswith(TRANSFORMER_PREFIX)}
        sizes = {name: element_count(layout) * DTYPE.itemsize for name, layout in layouts.items()}
        require_free_memory(architecture.name, sizes, self.device, "ltxv-tiny")

    def _phase(self, phase: Phase) -> AbstractContextManager[Any]:
        return phase_scope(phase, self.device, self._emit)
