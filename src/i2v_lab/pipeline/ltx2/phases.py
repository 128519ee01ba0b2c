"""What each phase does: build its components, run ltx-core's operation, hand on latents, hold nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from i2v_lab.memory_policy import Techniques
from i2v_lab.pipeline.contract.lifecycle import PhaseScope
from i2v_lab.pipeline.ltx2 import components as ltx2
from i2v_lab.pipeline.ltx2.tiles import stage_shape
from i2v_lab.pipeline.ltx2.weights import Weights
from i2v_lab.request import I2VRequest, Variant


@dataclass(frozen=True)
class Run:
    """What all phases of one generation share.

    Attributes:
        request: What was asked for.
        weights: Where components come from.
        device: Where they run.
        generator: The run's only source of randomness.
        techniques: How the components hold less than upstream's.
    """

    request: I2VRequest
    weights: Weights
    device: torch.device
    generator: torch.Generator
    techniques: Techniques

    def ledger(self, *, with_lora: bool = False) -> ltx2.Ledger:
        """The builders, with the distilled LoRA fused into the transformer or not."""
        return ltx2.Ledger(self.weights, self.device, self.request.quantization, self.techniques, with_lora=with_lora)

    @property
    def guided(self) -> bool:
        """Whether stage 1 uses guidance, which needs a negative prompt and several passes a step."""
        return self.request.variant is Variant.DEV


def encode_prompt(run: Run, scope: PhaseScope) -> list[ltx2.Contexts]:
    """The prompt, and for the guided variant the negative prompt, as transformer contexts."""
    prompts = [run.request.prompt, run.request.negative_prompt] if run.guided else [run.request.prompt]
    ledger = run.ledger()
    with scope.component("text_encoder", ledger.text_encoder) as text_encoder:
        hidden = ltx2.run_text_encoder(text_encoder, prompts)
    with scope.component("embeddings_processor", ledger.gemma_embeddings_processor) as processor:
        return ltx2.run_embeddings_processor(processor, hidden)


def encode_image(run: Run, scope: PhaseScope, pixels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """The still's latent at the size of each stage, both ``(1, 128, 1, H', W')``."""
    with scope.component("video_encoder", run.ledger().video_encoder) as encoder:
        first, second = (
            ltx2.encode_still(encoder, pixels, stage_shape(run.request, stage), run.device) for stage in (1, 2)
        )
    return first, second


def transformer(run: Run, scope: PhaseScope, *, stage: int) -> AbstractContextManager[Any]:
    """The transformer of a stage. The distilled variant's is the same in both; the guided one fuses a LoRA for 2."""
    ledger = run.ledger(with_lora=run.guided and stage == 2)
    return scope.component("transformer", ledger.transformer)


def denoise_stage_1(
    run: Run, scope: PhaseScope, transformer: Any, contexts: list[ltx2.Contexts], still: torch.Tensor
) -> ltx2.Latents:
    """From noise to latents at half size."""
    architecture = run.weights.architecture
    ltx2.expect_still(transformer, still)
    if run.guided:
        sigmas = ltx2.scheduled_sigmas(architecture, run.device)
        denoise_fn = ltx2.guided(transformer, architecture, *contexts)
    else:
        sigmas = ltx2.distilled_sigmas(run.device)
        denoise_fn = ltx2.unguided(transformer, contexts[0])
    return ltx2.denoise_stage(
        run.request,
        stage_shape(run.request, 1),
        still,
        ltx2.GaussianNoiser(generator=run.generator),
        sigmas,
        denoise_fn,
        scope.step,
    )


def upsample_latent(run: Run, scope: PhaseScope, latents: ltx2.Latents) -> ltx2.Latents:
    """The video latent at twice the height and width; the audio latent as it was."""
    ledger = run.ledger()
    with (
        scope.component("video_encoder", ledger.video_encoder) as encoder,
        scope.component("spatial_upsampler", ledger.spatial_upsampler) as upsampler,
    ):
        video = ltx2.upsample_video(latent=latents.video[:1], video_encoder=encoder, upsampler=upsampler)
    return ltx2.Latents(video, latents.audio)


def denoise_stage_2(
    run: Run,
    scope: PhaseScope,
    transformer: Any,
    contexts: list[ltx2.Contexts],
    still: torch.Tensor,
    latents: ltx2.Latents,
) -> ltx2.Latents:
    """Refine the upsampled latents at full size, in three unguided steps."""
    ltx2.expect_still(transformer, still)
    return ltx2.denoise_stage(
        run.request,
        stage_shape(run.request, 2),
        still,
        ltx2.GaussianNoiser(generator=run.generator),
        ltx2.stage_2_sigmas(run.device),
        ltx2.unguided(transformer, contexts[0]),
        scope.step,
        initial=latents,
    )


def decode_audio(run: Run, scope: PhaseScope, latent: torch.Tensor) -> ltx2.Audio:
    """The audio latent as a stereo waveform."""
    ledger = run.ledger()
    with (
        scope.component("audio_decoder", ledger.audio_decoder) as decoder,
        scope.component("vocoder", ledger.vocoder) as vocoder,
    ):
        return ltx2.decode_audio(latent, decoder, vocoder)


def decode_video(run: Run, decoder: torch.nn.Module, latent: torch.Tensor) -> Iterator[torch.Tensor]:
    """Chunks ``(F, H, W, 3)`` uint8, each decoded when it is asked for, in the grad mode that it is asked for in."""
    return ltx2.decode_video(latent, decoder, run.request.tiling, run.generator, run.techniques)
