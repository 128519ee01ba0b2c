"""LTX-2's sampling: noise levels, guidance, and the denoising of one stage by ltx-pipelines' own Euler loop.

One thing of ltx-pipelines' is replaced: the progress bar of its Euler loop, by our step events.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from ltx_core.components.diffusion_steps import EulerDiffusionStep
from ltx_core.components.guiders import create_multimodal_guider_factory
from ltx_core.components.noisers import GaussianNoiser
from ltx_core.components.schedulers import LTX2Scheduler
from ltx_core.conditioning import VideoConditionByLatentIndex
from ltx_core.types import LatentState, VideoPixelShape
from ltx_pipelines.utils import (
    denoise_audio_video,
    euler_denoising_loop,
    multi_modal_guider_factory_denoising_func,
    samplers,
    simple_denoising_func,
)
from ltx_pipelines.utils.constants import (
    DISTILLED_SIGMA_VALUES,
    LTX_2_3_PARAMS,
    LTX_2_PARAMS,
    STAGE_2_DISTILLED_SIGMA_VALUES,
    PipelineParams,
)
from ltx_pipelines.utils.types import PipelineComponents

from i2v_lab.pipeline.contract.architectures import Architecture
from i2v_lab.pipeline.contract.random_tensors import DTYPE
from i2v_lab.request import VideoShape
from i2v_lab.thread_patches import patched_here


@dataclass(frozen=True)
class Contexts:
    """A prompt's embeddings, which the transformer's cross-attention reads.

    Attributes:
        video: ``(1, tokens, video width)``, bfloat16.
        audio: ``(1, tokens, audio width)``, bfloat16.
    """

    video: torch.Tensor
    audio: torch.Tensor


@dataclass(frozen=True)
class Latents:
    """The latents of video and audio after a denoising stage.

    Attributes:
        video: ``(1, 128, F', H', W')``, bfloat16.
        audio: ``(1, 8, T', 16)``, bfloat16.
    """

    video: torch.Tensor
    audio: torch.Tensor


# --- Noise levels and guidance ----------------------------------------------------------------------------------------


def sampling_params(architecture: Architecture) -> PipelineParams:
    """Guidance and step count of the ``dev`` variant.

    ltx-pipelines' own for the architecture's version, with what ``Architecture.sampling`` overrides. Source:
    ``LTX_2_3_PARAMS`` and ``LTX_2_PARAMS`` in ``ltx_pipelines.utils.constants``.
    """
    params = LTX_2_3_PARAMS if architecture.model_version.startswith("2.3") else LTX_2_PARAMS
    overrides = dict(architecture.sampling)
    blocks = overrides.pop("stg_blocks", params.video_guider_params.stg_blocks)
    return replace(
        params,
        video_guider_params=replace(params.video_guider_params, stg_blocks=blocks),
        audio_guider_params=replace(params.audio_guider_params, stg_blocks=blocks),
        **overrides,
    )


def distilled_sigmas(device: torch.device) -> torch.Tensor:
    """Noise levels of the distilled stage 1, ``(9,)`` float32: 8 steps, then 0."""
    return torch.Tensor(DISTILLED_SIGMA_VALUES).to(device)


def stage_2_sigmas(device: torch.device) -> torch.Tensor:
    """Noise levels of stage 2 of both variants, ``(4,)`` float32: 3 steps, then 0."""
    return torch.Tensor(STAGE_2_DISTILLED_SIGMA_VALUES).to(device)


def scheduled_sigmas(architecture: Architecture, device: torch.device) -> torch.Tensor:
    """Noise levels of the ``dev`` stage 1, ``(steps + 1,)`` float32, from ltx-core's ``LTX2Scheduler``."""
    steps = sampling_params(architecture).num_inference_steps
    sigmas: torch.Tensor = LTX2Scheduler().execute(steps=steps).to(dtype=torch.float32, device=device)
    return sigmas


def unguided_denoise_fn(transformer: Any, positive: Contexts) -> Any:
    """A denoising function of ltx-pipelines' with one transformer pass a step."""
    return simple_denoising_func(video_context=positive.video, audio_context=positive.audio, transformer=transformer)


def guided_denoise_fn(transformer: Any, architecture: Architecture, positive: Contexts, negative: Contexts) -> Any:
    """A denoising function with classifier-free, spatio-temporal and modality guidance: four transformer passes a step.

    Args:
        transformer: From the ledger.
        architecture: For its :func:`sampling_params`.
        positive: Of the prompt.
        negative: Of the negative prompt.
    """
    params = sampling_params(architecture)
    return multi_modal_guider_factory_denoising_func(
        video_guider_factory=create_multimodal_guider_factory(params.video_guider_params, negative.video),
        audio_guider_factory=create_multimodal_guider_factory(params.audio_guider_params, negative.audio),
        v_context=positive.video,
        a_context=positive.audio,
        transformer=transformer,
    )


# --- Denoising --------------------------------------------------------------------------------------------------------


def set_still_tokens(transformer: Any, still: torch.Tensor) -> None:
    """Set how many of the video's tokens are the still's, which a chunked transformer needs; others ignore it.

    Args:
        transformer: From the ledger.
        still: The still's latent, ``(1, 128, 1, H', W')``; its ``H' W'`` tokens come first.
    """
    transformer.velocity_model.still_tokens = still[0, 0].numel()


@contextmanager
def _reported_steps(on_step: Callable[[int, int], None]) -> Iterator[None]:
    """Within this scope ltx-pipelines' Euler loop, in this thread, calls ``on_step`` instead of a progress bar."""

    def report(sigmas: torch.Tensor) -> Iterator[torch.Tensor]:
        for step, sigma in enumerate(sigmas, start=1):
            yield sigma
            on_step(step, len(sigmas))

    with patched_here(samplers, "tqdm", report):
        yield


@dataclass(frozen=True)
class Stage:
    """What one denoising stage works on.

    Attributes:
        shape: The stage's video in pixels.
        fps: Frames per second.
        still: The still's latent at the stage's size, ``(1, 128, 1, H', W')``; held fixed as the first latent frame.
        sigmas: Noise levels, ``(steps + 1,)``, the last one 0.
        initial: Latents that noise of the first level is added to; pure noise without.
    """

    shape: VideoShape
    fps: float
    still: torch.Tensor
    sigmas: torch.Tensor
    initial: Latents | None = None


def denoise_stage(
    stage: Stage, denoise_fn: Any, noiser: GaussianNoiser, on_step: Callable[[int, int], None]
) -> Latents:
    """Denoise video and audio together.

    Args:
        stage: What is denoised.
        denoise_fn: From :func:`unguided_denoise_fn` or :func:`guided_denoise_fn`.
        noiser: ltx-core's, over the run's random generator.
        on_step: Called after each step with its number, from 1, and the number of steps.
    """
    device = stage.still.device
    start: dict[str, Any] = {}
    if stage.initial is not None:
        start = {
            "noise_scale": stage.sigmas[0],
            "initial_video_latent": stage.initial.video,
            "initial_audio_latent": stage.initial.audio,
        }

    def loop(sigmas: torch.Tensor, video: LatentState, audio: LatentState, stepper: Any) -> Any:
        return euler_denoising_loop(sigmas, video, audio, stepper, denoise_fn)

    shape = stage.shape
    with _reported_steps(on_step):
        video_state, audio_state = denoise_audio_video(
            output_shape=VideoPixelShape(1, shape.frames, shape.height, shape.width, float(stage.fps)),
            conditionings=[VideoConditionByLatentIndex(latent=stage.still, strength=1.0, latent_idx=0)],
            noiser=noiser,
            sigmas=stage.sigmas,
            stepper=EulerDiffusionStep(),
            denoising_loop_fn=loop,
            components=PipelineComponents(dtype=DTYPE, device=device),
            dtype=DTYPE,
            device=device,
            **start,
        )
    return Latents(video_state.latent, audio_state.latent)
