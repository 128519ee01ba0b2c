"""The phases of an LTX-2 generation: each builds its components, runs its operation, and returns latents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ltx_core.components.noisers import GaussianNoiser
from ltx_core.types import Audio

from i2v_lab.pipeline.contract.lifecycle import PhaseScope
from i2v_lab.pipeline.ltx2 import operations, sampling
from i2v_lab.pipeline.ltx2.components import Ledger
from i2v_lab.pipeline.ltx2.memory.host_weights import HostWeights
from i2v_lab.pipeline.ltx2.sampling import Contexts, Latents, Stage
from i2v_lab.pipeline.ltx2.tiles import stage_shape
from i2v_lab.pipeline.ltx2.weights import Weights
from i2v_lab.placement import Placement
from i2v_lab.request import I2VRequest, Variant


@dataclass(frozen=True)
class Run:
    """What all phases of one generation share.

    Attributes:
        request: What to generate.
        weights: The weight files and their loader.
        device: Where components run.
        generator: The run's only source of randomness.
        placement: Memory techniques, applied to the components, and what stays on the device.
        host_weights: Where streamed blocks are in host memory.
    """

    request: I2VRequest
    weights: Weights
    device: torch.device
    generator: torch.Generator
    placement: Placement
    host_weights: HostWeights

    def ledger(self, *, with_lora: bool = False) -> Ledger:
        """The builders; with the distilled LoRA fused into the transformer if ``with_lora``."""
        return Ledger(
            self.weights,
            self.device,
            self.request.quantization,
            self.placement,
            with_lora=with_lora,
            host_weights=self.host_weights,
        )

    def noiser(self) -> GaussianNoiser:
        """ltx-core's noiser over the run's generator."""
        return GaussianNoiser(generator=self.generator)

    @property
    def guided(self) -> bool:
        """Whether stage 1 uses guidance, with a negative prompt and several transformer passes a step."""
        return is_guided(self.request)


def is_guided(request: I2VRequest) -> bool:
    """Whether stage 1 of a request uses guidance."""
    return request.variant is Variant.DEV


def prompts_of(request: I2VRequest) -> dict[str, str]:
    """The prompts that are encoded, by the name of their field."""
    negative = {"negative_prompt": request.negative_prompt} if is_guided(request) else {}
    return {"prompt": request.prompt, **negative}


def encode_prompt(run: Run, scope: PhaseScope) -> list[Contexts]:
    """Contexts of the prompt, and for the guided variant of the negative prompt."""
    prompts = prompts_of(run.request)
    ledger = run.ledger()
    with scope.component("text_encoder", ledger.text_encoder) as text_encoder:
        operations.note_cut_prompts(text_encoder, prompts, scope.emit)
        hidden = operations.run_text_encoder(text_encoder, list(prompts.values()))
    with scope.component("embeddings_processor", ledger.gemma_embeddings_processor) as processor:
        return operations.run_embeddings_processor(processor, hidden)


def encode_image(run: Run, scope: PhaseScope, pixels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """The still ``(H, W, 3)`` uint8 to its latent at the size of each stage, both ``(1, 128, 1, H', W')``."""
    with scope.component("video_encoder", run.ledger().video_encoder) as encoder:
        first, second = (
            operations.encode_still(encoder, pixels, stage_shape(run.request, stage), run.device) for stage in (1, 2)
        )
    return first, second


def transformer(run: Run, scope: PhaseScope, *, stage: int) -> AbstractContextManager[Any]:
    """The transformer of a stage. The distilled variant's is the same in both; the guided one fuses a LoRA for 2."""
    ledger = run.ledger(with_lora=run.guided and stage == 2)
    return scope.component("transformer", ledger.transformer)


def denoise_stage_1(
    run: Run, scope: PhaseScope, transformer: Any, contexts: Sequence[Contexts], still: torch.Tensor
) -> Latents:
    """From noise to latents at half size."""
    architecture = run.weights.architecture
    sampling.set_still_tokens(transformer, still)
    if run.guided:
        sigmas = sampling.scheduled_sigmas(architecture, run.device)
        denoise_fn = sampling.guided_denoise_fn(transformer, architecture, *contexts)
    else:
        sigmas = sampling.distilled_sigmas(run.device)
        denoise_fn = sampling.unguided_denoise_fn(transformer, contexts[0])
    stage = Stage(stage_shape(run.request, 1), run.request.fps, still, sigmas)
    return sampling.denoise_stage(stage, denoise_fn, run.noiser(), scope.step)


def upsample_latent(run: Run, scope: PhaseScope, latents: Latents) -> Latents:
    """The video latent at twice the height and width; the audio latent unchanged."""
    ledger = run.ledger()
    with (
        scope.component("video_encoder", ledger.video_encoder) as encoder,
        scope.component("spatial_upsampler", ledger.spatial_upsampler) as upsampler,
    ):
        video = operations.upsample_video(latents.video[:1], encoder, upsampler)
    return Latents(video, latents.audio)


def denoise_stage_2(
    run: Run,
    scope: PhaseScope,
    transformer: Any,
    contexts: Sequence[Contexts],
    still: torch.Tensor,
    latents: Latents,
) -> Latents:
    """Refine the upsampled latents at full size, in three unguided steps."""
    sampling.set_still_tokens(transformer, still)
    sigmas = sampling.stage_2_sigmas(run.device)
    stage = Stage(stage_shape(run.request, 2), run.request.fps, still, sigmas, initial=latents)
    denoise_fn = sampling.unguided_denoise_fn(transformer, contexts[0])
    return sampling.denoise_stage(stage, denoise_fn, run.noiser(), scope.step)


def decode_audio(run: Run, scope: PhaseScope, latent: torch.Tensor) -> Audio:
    """The audio latent ``(1, 8, T', 16)`` to a stereo waveform ``(2, samples)``, float32."""
    ledger = run.ledger()
    with (
        scope.component("audio_decoder", ledger.audio_decoder) as decoder,
        scope.component("vocoder", ledger.vocoder) as vocoder,
    ):
        return operations.decode_audio(latent, decoder, vocoder)


def decode_video(run: Run, decoder: torch.nn.Module, latent: torch.Tensor) -> Iterator[torch.Tensor]:
    """Chunks ``(F, H, W, 3)`` uint8, each decoded when it is asked for, in the grad mode of the caller."""
    return operations.decode_video(latent, decoder, run.request.tiling, run.generator, run.placement.techniques)
