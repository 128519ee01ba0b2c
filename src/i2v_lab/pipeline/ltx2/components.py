"""The only place that talks to ltx-core and ltx-pipelines: their builders, key maps and samplers, composed.

Nothing of theirs is rewritten here. Two things are adapted from outside: the Gemma dimensions, which ltx-core keeps in
a module constant, and the progress bar of the Euler loop, whose place our step events take.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from ltx_core.components.diffusion_steps import EulerDiffusionStep
from ltx_core.components.guiders import create_multimodal_guider_factory
from ltx_core.components.noisers import GaussianNoiser
from ltx_core.components.schedulers import LTX2Scheduler
from ltx_core.conditioning import VideoConditionByLatentIndex
from ltx_core.guidance.perturbations import PerturbationType
from ltx_core.loader import (
    LTXV_LORA_COMFY_RENAMING_MAP,
    ContentMatching,
    ContentReplacement,
    LoraPathStrengthAndSDOps,
    SafetensorsModelStateDictLoader,
    SDOps,
    StateDict,
)
from ltx_core.loader import SingleGPUModelBuilder as Builder
from ltx_core.model.audio_vae import (
    AUDIO_VAE_DECODER_COMFY_KEYS_FILTER,
    AUDIO_VAE_ENCODER_COMFY_KEYS_FILTER,
    VOCODER_COMFY_KEYS_FILTER,
    AudioDecoderConfigurator,
    AudioEncoderConfigurator,
    VocoderConfigurator,
)
from ltx_core.model.audio_vae import decode_audio as _decode_audio
from ltx_core.model.transformer import LTXV_MODEL_COMFY_RENAMING_MAP, LTXModelConfigurator
from ltx_core.model.transformer.transformer import BasicAVTransformerBlock
from ltx_core.model.upsampler import LatentUpsamplerConfigurator
from ltx_core.model.upsampler import upsample_video as upsample_video
from ltx_core.model.video_vae import (
    VAE_DECODER_COMFY_KEYS_FILTER,
    VAE_ENCODER_COMFY_KEYS_FILTER,
    SpatialTilingConfig,
    TemporalTilingConfig,
    TilingConfig,
    VideoDecoder,
    VideoDecoderConfigurator,
    VideoEncoderConfigurator,
)
from ltx_core.model.video_vae import decode_video as _decode_video
from ltx_core.quantization import QuantizationPolicy
from ltx_core.text_encoders.gemma import (
    EMBEDDINGS_PROCESSOR_KEY_OPS,
    GEMMA_LLM_KEY_OPS,
    GEMMA_MODEL_OPS,
    EmbeddingsProcessorConfigurator,
    GemmaTextEncoderConfigurator,
    module_ops_from_gemma_root,
)
from ltx_core.text_encoders.gemma.embeddings_connector import _BasicTransformerBlock1D
from ltx_core.text_encoders.gemma.encoders import encoder_configurator
from ltx_core.types import Audio, LatentState, VideoPixelShape
from ltx_pipelines.utils import (
    ModelLedger,
    denoise_audio_video,
    euler_denoising_loop,
    multi_modal_guider_factory_denoising_func,
    samplers,
    simple_denoising_func,
)
from ltx_pipelines.utils.constants import (
    DEFAULT_IMAGE_CRF,
    DISTILLED_SIGMA_VALUES,
    LTX_2_3_PARAMS,
    LTX_2_PARAMS,
    STAGE_2_DISTILLED_SIGMA_VALUES,
    PipelineParams,
)
from ltx_pipelines.utils.media_io import normalize_latent, preprocess, resize_and_center_crop
from ltx_pipelines.utils.types import PipelineComponents

from i2v_lab.memory_policy import Technique, Techniques
from i2v_lab.pipeline.contract.weight_files import kept_layout
from i2v_lab.pipeline.ltx2.memory import lean_decode
from i2v_lab.pipeline.ltx2.memory.builders import with_techniques
from i2v_lab.pipeline.ltx2.memory.lean_transformer import LeanBlock
from i2v_lab.request import I2VRequest, Quantization, Tiling, VideoShape

if TYPE_CHECKING:
    from i2v_lab.pipeline.contract.architectures import Architecture
    from i2v_lab.pipeline.ltx2.weights import Weights

__all__ = [
    "Audio",
    "Contexts",
    "GaussianNoiser",
    "Ledger",
    "ModelLedger",
    "SafetensorsModelStateDictLoader",
    "StateDict",
    "denoise_stage",
    "upsample_video",
]

DTYPE = torch.bfloat16  # the compute dtype of ltx-pipelines, for every component


# --- Layout: which tensors each weight file holds -------------------------------------------------------------------


@dataclass(frozen=True)
class ComponentSpec:
    """How ltx-core builds one component.

    Attributes:
        file: The weight file that holds it: ``checkpoint``, ``gemma`` or ``upsampler``.
        configurator: ltx-core's class that makes the module from a configuration.
        key_ops: ltx-core's map from checkpoint keys to module keys; ``None`` where they are the same.
    """

    file: str
    configurator: type[Any]
    key_ops: SDOps | None


COMPONENTS: Mapping[str, ComponentSpec] = {
    "transformer": ComponentSpec("checkpoint", LTXModelConfigurator, LTXV_MODEL_COMFY_RENAMING_MAP),
    "embeddings_processor": ComponentSpec("checkpoint", EmbeddingsProcessorConfigurator, EMBEDDINGS_PROCESSOR_KEY_OPS),
    "video_encoder": ComponentSpec("checkpoint", VideoEncoderConfigurator, VAE_ENCODER_COMFY_KEYS_FILTER),
    "video_decoder": ComponentSpec("checkpoint", VideoDecoderConfigurator, VAE_DECODER_COMFY_KEYS_FILTER),
    "audio_encoder": ComponentSpec("checkpoint", AudioEncoderConfigurator, AUDIO_VAE_ENCODER_COMFY_KEYS_FILTER),
    "audio_decoder": ComponentSpec("checkpoint", AudioDecoderConfigurator, AUDIO_VAE_DECODER_COMFY_KEYS_FILTER),
    "vocoder": ComponentSpec("checkpoint", VocoderConfigurator, VOCODER_COMFY_KEYS_FILTER),
    "text_encoder": ComponentSpec("gemma", GemmaTextEncoderConfigurator, GEMMA_LLM_KEY_OPS),
    "spatial_upsampler": ComponentSpec("upsampler", LatentUpsamplerConfigurator, None),
}


@contextmanager
def gemma_dimensions(overrides: Mapping[str, Any]) -> Iterator[None]:
    """Within this scope ltx-core builds Gemma, and what reads its hidden states, at the given size.

    ltx-core 1.0.0 takes the dimensions of Gemma 3 12B from a module constant; an empty ``overrides`` leaves it alone.
    """
    original = encoder_configurator.GEMMA3_CONFIG_FOR_LTX
    sections = {
        key: replace(getattr(original, key), **value) if isinstance(value, Mapping) else value
        for key, value in overrides.items()
    }
    encoder_configurator.GEMMA3_CONFIG_FOR_LTX = replace(original, **sections)
    try:
        yield
    finally:
        encoder_configurator.GEMMA3_CONFIG_FOR_LTX = original


def gemma_config() -> dict[str, Any]:
    """Gemma's configuration as ltx-core holds it, at the size of the enclosing :func:`gemma_dimensions`."""
    config: dict[str, Any] = encoder_configurator.GEMMA3_CONFIG_FOR_LTX.to_dict()
    return config


def meta_component(architecture: Architecture, name: str) -> torch.nn.Module:
    """One component on the meta device: shapes and dtypes, no memory."""
    spec = COMPONENTS[name]
    config = architecture.upsampler if spec.file == "upsampler" else architecture.config
    with gemma_dimensions(architecture.gemma), torch.device("meta"):
        module: torch.nn.Module = spec.configurator.from_config(config)
    return module


@cache
def file_layout(architecture: Architecture, file: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors in one weight file: ``checkpoint``, ``gemma``, ``upsampler`` or ``lora``.

    Worked out from ltx-core's own modules on the meta device and its own key maps, read backwards; which takes seconds
    for a large model, so the result is kept in the cache folder.
    """
    recipe = f"{architecture.to_json()}:{version('ltx-core')}:{Path(__file__).read_text()}"
    return kept_layout(file, recipe, lambda: _work_out_layout(architecture, file))


def _work_out_layout(architecture: Architecture, file: str) -> dict[str, tuple[int, ...]]:
    layout: dict[str, tuple[int, ...]] = {}
    if file == "lora":
        for name, module in meta_component(architecture, "transformer").named_modules():
            if isinstance(module, torch.nn.Linear) and name.startswith("transformer_blocks."):
                layout[f"diffusion_model.{name}.lora_A.weight"] = (architecture.lora_rank, module.in_features)
                layout[f"diffusion_model.{name}.lora_B.weight"] = (module.out_features, architecture.lora_rank)
        return layout
    for name, spec in COMPONENTS.items():
        if spec.file == file:
            for key, tensor in meta_component(architecture, name).state_dict().items():
                source = checkpoint_key(spec.key_ops, key)
                if source is not None:
                    layout[source] = tuple(tensor.shape)
    return layout


def checkpoint_key(key_ops: SDOps | None, module_key: str) -> str | None:
    """The checkpoint's name for a module's tensor: the key that ``key_ops`` maps to ``module_key``.

    Returns:
        The name, or ``None`` if no checkpoint key maps there (Gemma's tied ``lm_head``, made from the embedding).
    """
    if key_ops is None:
        return module_key
    replacements = [op for op in key_ops.mapping if isinstance(op, ContentReplacement)]
    replacements.sort(key=lambda op: len(op.replacement), reverse=True)
    candidates = [
        op.content + module_key[len(op.replacement) :] for op in replacements if module_key.startswith(op.replacement)
    ]
    candidates += [op.prefix + module_key for op in key_ops.mapping if isinstance(op, ContentMatching)]
    probe = torch.empty(0, device="meta")
    for candidate in candidates:
        mapped = key_ops.apply_to_key(candidate)
        if mapped is not None and key_ops.apply_to_key_value(mapped, probe)[0].new_key == module_key:
            return candidate
    return None


# --- Components ------------------------------------------------------------------------------------------------------


class Ledger(ModelLedger):
    """ltx-pipelines' ledger of builders, reading through the loader that comes with the weights.

    Args:
        weights: Where the tensors come from.
        device: Where components are built.
        quantization: Applied to the transformer.
        techniques: How the components hold less than upstream's.
        with_lora: Fuse the distilled LoRA into the transformer.
    """

    def __init__(
        self,
        weights: Weights,
        device: torch.device,
        quantization: Quantization,
        techniques: Techniques = frozenset(),
        *,
        with_lora: bool = False,
    ) -> None:
        self._weights = weights
        self._techniques = techniques
        loras = (LoraPathStrengthAndSDOps(weights.lora, 1.0, LTXV_LORA_COMFY_RENAMING_MAP),) if with_lora else ()
        super().__init__(
            dtype=DTYPE,
            device=device,
            checkpoint_path=weights.checkpoint,
            spatial_upsampler_path=weights.upsampler,
            loras=loras,
            quantization=quantization_policy(quantization),
        )

    def build_model_builders(self) -> None:
        """As upstream, everything through the weights' own loader; the text encoder by its list of shards.

        The embeddings connectors lie under the transformer's prefix: upstream's builder loads them with it, 3 GiB at
        full size, and drops them. Ours leaves them where they are.
        """
        super().build_model_builders()
        self.text_encoder_builder = Builder(
            model_path=self._weights.gemma_shards,
            model_class_configurator=GemmaTextEncoderConfigurator,
            model_sd_ops=GEMMA_LLM_KEY_OPS,
            registry=self.registry,
            module_ops=(GEMMA_MODEL_OPS, *module_ops_from_gemma_root(self._weights.gemma_root)),
        )
        keys = _transformer_keys(self._weights.architecture)
        self.transformer_builder: Builder[Any] = replace(self.transformer_builder, model_sd_ops=keys)
        builders = {name: value for name, value in vars(self).items() if isinstance(value, Builder)}
        for name, builder in with_techniques(builders, self._techniques, self._weights.reader).items():
            setattr(self, name, replace(builder, model_loader=self._weights.loader))

    def text_encoder(self) -> torch.nn.Module:
        """Gemma 3 with its tokenizer, at the architecture's size."""
        with gemma_dimensions(self._weights.architecture.gemma):
            return super().text_encoder()

    def gemma_embeddings_processor(self) -> torch.nn.Module:
        """The feature extractor and both connectors, for Gemma at the architecture's size."""
        with gemma_dimensions(self._weights.architecture.gemma):
            return super().gemma_embeddings_processor()


@cache
def _transformer_keys(architecture: Architecture) -> SDOps:
    """ltx-core's key map of the transformer, letting through what it has and not the connectors under its prefix."""
    (prefix,) = (op.prefix for op in LTXV_MODEL_COMFY_RENAMING_MAP.mapping if isinstance(op, ContentMatching))
    own = {
        key.removeprefix(prefix).partition(".")
        for key in file_layout(architecture, "checkpoint")
        if key.startswith(prefix) and EMBEDDINGS_PROCESSOR_KEY_OPS.apply_to_key(key) is None
    }
    matchers = [ContentMatching(prefix + name + dot) for name, dot, _ in sorted(own)]
    rest = [op for op in LTXV_MODEL_COMFY_RENAMING_MAP.mapping if not isinstance(op, ContentMatching)]
    return replace(LTXV_MODEL_COMFY_RENAMING_MAP, mapping=(*dict.fromkeys(matchers), *rest))


def quantization_policy(quantization: Quantization) -> QuantizationPolicy | None:
    """ltx-core's policy object for a quantization."""
    return QuantizationPolicy.fp8_cast() if quantization is Quantization.FP8_CAST else None


def memoizable_modules() -> dict[type[torch.nn.Module], Callable[..., Hashable]]:
    """The modules that run many times alike, each with what besides shapes decides which operators a call runs.

    For forecasts, which need not run such a call twice: the blocks of the transformer, where guidance switches off
    attention in some; those of the embeddings connectors; and the video decoder, which runs once for each tile.
    """
    return {
        BasicAVTransformerBlock: _perturbed,
        LeanBlock: _perturbed,
        _BasicTransformerBlock1D: _nothing,
        VideoDecoder: _nothing,
    }


def _perturbed(block: Any, video: Any = None, audio: Any = None, perturbations: Any = None, **_: Any) -> Hashable:
    if perturbations is None:
        return ()
    checks = (perturbations.any_in_batch, perturbations.all_in_batch)
    return tuple(check(kind, block.idx) for kind in PerturbationType for check in checks)


def _nothing(*args: Any, **kwargs: Any) -> Hashable:
    return ()


# --- Phase operations ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contexts:
    """A prompt as the transformer reads it.

    Attributes:
        video: ``(1, tokens, video width)``, bfloat16.
        audio: ``(1, tokens, audio width)``, bfloat16.
    """

    video: torch.Tensor
    audio: torch.Tensor


@dataclass(frozen=True)
class Latents:
    """What a denoise stage leaves.

    Attributes:
        video: ``(1, 128, F', H', W')``, bfloat16.
        audio: ``(1, 8, T', 16)``, bfloat16.
    """

    video: torch.Tensor
    audio: torch.Tensor


def run_text_encoder(text_encoder: Any, prompts: Sequence[str]) -> list[Any]:
    """All of Gemma's hidden states, with the mask, for each prompt (always 1,024 tokens, padded)."""
    return [text_encoder.encode(prompt) for prompt in prompts]


def run_embeddings_processor(processor: Any, hidden: Sequence[Any]) -> list[Contexts]:
    """Hidden states to transformer contexts."""
    outputs = [processor.process_hidden_states(states, mask) for states, mask in hidden]
    return [Contexts(output.video_encoding, output.audio_encoding) for output in outputs]


def encode_still(video_encoder: Any, pixels: np.ndarray, shape: VideoShape, device: torch.device) -> torch.Tensor:
    """A still ``(H, W, 3)`` uint8 to its latent ``(1, 128, 1, H', W')``: compressed, resized, cropped as upstream."""
    compressed = preprocess(image=pixels, crf=DEFAULT_IMAGE_CRF)
    image = torch.tensor(compressed, dtype=torch.float32, device=device)
    image = normalize_latent(resize_and_center_crop(image, shape.height, shape.width), device, DTYPE)
    latent: torch.Tensor = video_encoder(image)
    return latent


def sampling_params(architecture: Architecture) -> PipelineParams:
    """Guidance and step count of the ``dev`` variant: ltx-pipelines' own for this version, at this depth."""
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
    """Noise levels of the distilled stage 1 (8 steps)."""
    return torch.Tensor(DISTILLED_SIGMA_VALUES).to(device)


def stage_2_sigmas(device: torch.device) -> torch.Tensor:
    """Noise levels of stage 2, both variants (3 steps)."""
    return torch.Tensor(STAGE_2_DISTILLED_SIGMA_VALUES).to(device)


def scheduled_sigmas(architecture: Architecture, device: torch.device) -> torch.Tensor:
    """Noise levels of the ``dev`` stage 1."""
    steps = sampling_params(architecture).num_inference_steps
    sigmas: torch.Tensor = LTX2Scheduler().execute(steps=steps).to(dtype=torch.float32, device=device)
    return sigmas


def expect_still(transformer: Any, still: torch.Tensor) -> None:
    """Tell a lean transformer how many of the video's tokens are the still's; to any other it makes no difference.

    Args:
        transformer: From the ledger.
        still: The still's latent, ``(1, 128, 1, H', W')``; it becomes the first frame's tokens.
    """
    transformer.velocity_model.still_tokens = still[0, 0].numel()


def unguided(transformer: Any, positive: Contexts) -> Any:
    """A denoising function with one pass a step."""
    return simple_denoising_func(video_context=positive.video, audio_context=positive.audio, transformer=transformer)


def guided(transformer: Any, architecture: Architecture, positive: Contexts, negative: Contexts) -> Any:
    """A denoising function with classifier-free, spatio-temporal and modality guidance: four passes a step."""
    params = sampling_params(architecture)
    return multi_modal_guider_factory_denoising_func(
        video_guider_factory=create_multimodal_guider_factory(params.video_guider_params, negative.video),
        audio_guider_factory=create_multimodal_guider_factory(params.audio_guider_params, negative.audio),
        v_context=positive.video,
        a_context=positive.audio,
        transformer=transformer,
    )


@contextmanager
def _reported_steps(on_step: Callable[[int, int], None]) -> Iterator[None]:
    """Put our step report in the place of the Euler loop's own progress bar."""

    def report(sigmas: torch.Tensor) -> Iterator[torch.Tensor]:
        for step, sigma in enumerate(sigmas, start=1):
            yield sigma
            on_step(step, len(sigmas))

    bar = samplers.tqdm
    samplers.tqdm = report
    try:
        yield
    finally:
        samplers.tqdm = bar


def denoise_stage(
    request: I2VRequest,
    shape: VideoShape,
    still: torch.Tensor,
    noiser: GaussianNoiser,
    sigmas: torch.Tensor,
    denoise_fn: Any,
    on_step: Callable[[int, int], None],
    initial: Latents | None = None,
) -> Latents:
    """Denoise video and audio together, from noise or from ``initial``, holding the first frame to the still.

    Args:
        request: For the frame rate.
        shape: The stage's video in pixels.
        still: Its latent at this size, ``(1, 128, 1, H', W')``.
        noiser: Carries the run's random generator.
        sigmas: Noise levels, the last one 0.
        denoise_fn: From :func:`unguided` or :func:`guided`.
        on_step: Called with the step (from 1) and the number of steps.
        initial: Latents to add noise to, at the first sigma.
    """
    device = still.device
    start: dict[str, Any] = {}
    if initial is not None:
        start = {
            "noise_scale": sigmas[0],
            "initial_video_latent": initial.video,
            "initial_audio_latent": initial.audio,
        }

    def loop(sigmas: torch.Tensor, video: LatentState, audio: LatentState, stepper: Any) -> Any:
        return euler_denoising_loop(sigmas, video, audio, stepper, denoise_fn)

    with _reported_steps(on_step):
        video_state, audio_state = denoise_audio_video(
            output_shape=VideoPixelShape(1, shape.frames, shape.height, shape.width, float(request.fps)),
            conditionings=[VideoConditionByLatentIndex(latent=still, strength=1.0, latent_idx=0)],
            noiser=noiser,
            sigmas=sigmas,
            stepper=EulerDiffusionStep(),
            denoising_loop_fn=loop,
            components=PipelineComponents(dtype=DTYPE, device=device),
            dtype=DTYPE,
            device=device,
            **start,
        )
    return Latents(video_state.latent, audio_state.latent)


def decode_audio(latent: torch.Tensor, audio_decoder: Any, vocoder: Any) -> Audio:
    """The audio latent to a stereo waveform ``(2, samples)``, float32."""
    return _decode_audio(latent, audio_decoder, vocoder)


def tiling_config(tiling: Tiling | None) -> TilingConfig | None:
    """ltx-core's own form of a tiling."""
    if tiling is None:
        return None
    return TilingConfig(
        SpatialTilingConfig(tiling.tile_px, tiling.tile_overlap_px),
        TemporalTilingConfig(tiling.tile_frames, tiling.tile_overlap_frames),
    )


def decode_video(
    latent: torch.Tensor,
    video_decoder: Any,
    tiling: Tiling | None,
    generator: torch.Generator,
    techniques: Techniques = frozenset(),
) -> Iterator[torch.Tensor]:
    """The video latent to chunks ``(F, H, W, 3)`` uint8, decoded as they are asked for."""
    decode = lean_decode.decode_video if Technique.BLEND_IN_PLACE in techniques else _decode_video
    chunks: Iterator[torch.Tensor] = decode(latent, video_decoder, tiling_config(tiling), generator)
    return chunks
