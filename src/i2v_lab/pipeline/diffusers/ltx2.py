"""diffusers' LTX-2 pipelines, at full size or tiny, with random weights.

Nothing of theirs is changed. Their two-stage generation is what their documentation describes: half the size to a
latent, the latent upsampled, the same pipeline again from there, decoded by it or by the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2ImageToVideoPipeline,
    LTX2LatentUpsamplePipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.models.transformers.transformer_ltx2 import LTX2VideoTransformerBlock
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel
from diffusers.pipelines.ltx2.utils import DISTILLED_SIGMA_VALUES, STAGE_2_DISTILLED_SIGMA_VALUES
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from diffusers.video_processor import VideoProcessor
from PIL import Image
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, PreTrainedTokenizerFast

from i2v_lab.events import EventSink
from i2v_lab.memory_policy import OFFLOADING, Technique, Techniques
from i2v_lab.pipeline.contract.architectures import Architecture
from i2v_lab.pipeline.contract.byte_tokenizer import IMAGE_TOKENS, SPECIALS, byte_tokenizer
from i2v_lab.pipeline.contract.generation import Generation, VideoStream, resolve_device
from i2v_lab.pipeline.contract.media import load_still
from i2v_lab.pipeline.diffusers import RUNNER
from i2v_lab.request import I2VRequest
from i2v_lab.torch_compat import is_fake


@dataclass(frozen=True)
class DiffusersWeights:
    """Random weights of an architecture, drawn when the components are built.

    Attributes:
        architecture: Whose; ``config`` is what differs from diffusers' defaults, by component, ``gemma`` Gemma's whole
            configuration.
    """

    architecture: Architecture


def resolve_weights(architecture: Architecture, progress: Callable[..., None] = lambda *_: None) -> DiffusersWeights:
    """The weights of a model: always random here."""
    return DiffusersWeights(architecture)


def skeleton_weights(architecture: Architecture) -> DiffusersWeights:
    """The same: under fake tensors nothing is drawn."""
    return DiffusersWeights(architecture)


def memoizable_modules() -> dict[type[torch.nn.Module], Callable[..., Hashable]]:
    """The transformer's blocks: without guidance all of their calls run the same operators."""
    return {LTX2VideoTransformerBlock: lambda *args, **kwargs: ()}


class DiffusersLTX2:
    """diffusers' ``LTX2ImageToVideoPipeline`` and ``LTX2LatentUpsamplePipeline``, called like this package's pipelines.

    Args:
        weights: Of the model.
        device: Where the components are, or where diffusers moves them.
        sinks: Of no use: these pipelines report no phases.
        techniques: ``model_offload`` or ``group_offload``: components stay on the CPU and diffusers moves them.
        dtype: Of all weights.

    Attributes:
        generate: Both stages.
        upsample: Between them; shares the autoencoder.

    Raises:
        DeviceUnavailable: The device does not exist here.
        InvalidRequest: A technique is another runner's.
    """

    def __init__(
        self,
        weights: DiffusersWeights,
        device: str | torch.device = "cpu",
        sinks: Sequence[EventSink] = (),
        techniques: Techniques = frozenset(),
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        RUNNER.check_techniques(techniques)
        device = resolve_device(device)
        architecture = weights.architecture
        offloaded = techniques & OFFLOADING
        where = "cpu" if offloaded else device

        def moved(module: torch.nn.Module) -> Any:
            return module.to(where).eval()

        def build(kind: Any, name: str) -> Any:
            return moved(kind(**architecture.config.get(name, {})))

        # On the device even where they do not stay there: on a CPU, to draw the numbers of 31 B weights takes minutes.
        with torch.random.fork_rng(devices=[]), torch.device(device), _default_dtype(dtype):
            torch.manual_seed(0)
            vae = build(AutoencoderKLLTX2Video, "vae")
            self.generate: Any = LTX2ImageToVideoPipeline(
                scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
                vae=vae,
                audio_vae=build(AutoencoderKLLTX2Audio, "audio_vae"),
                # Its vision tower is float32 otherwise.
                text_encoder=moved(Gemma3ForConditionalGeneration(Gemma3Config(**architecture.gemma)).to(dtype)),
                tokenizer=_tokenizer(),
                connectors=build(LTX2TextConnectors, "connectors"),
                transformer=build(LTX2VideoTransformer3DModel, "transformer"),
                vocoder=build(LTX2Vocoder, "vocoder"),
            )
            with torch.device("cpu"):  # its constructor multiplies integer matrices, which CUDA cannot
                upsampler = build(LTX2LatentUpsamplerModel, "latent_upsampler")
            self.upsample: Any = LTX2LatentUpsamplePipeline(vae, upsampler)
        if Technique.MODEL_OFFLOAD in techniques:
            for pipeline in (self.generate, self.upsample):
                pipeline.enable_model_cpu_offload(device=device)
        elif Technique.GROUP_OFFLOAD in techniques:  # by blocks its autoencoder fails: it is encoded with, not called
            self.generate.enable_group_offload(onload_device=device, offload_type="leaf_level")
            self.upsample.latent_upsampler.to(device)
        if is_fake():
            ratio = self.generate.vae_spatial_compression_ratio
            self.generate.video_processor = ForecastProcessor(ratio, resample="bilinear")
        self.generate.set_progress_bar_config(disable=True)

    def __call__(self, request: I2VRequest) -> Generation:
        """Both stages and the decoding, which diffusers does before it returns."""
        video, audio = self.run(request)
        source = _as_chunk(video)
        return Generation(VideoStream(source, request.shape, 1), self._sound(audio))

    def run(self, request: I2VRequest, output_type: str = "pt") -> tuple[torch.Tensor, torch.Tensor]:
        """Two stages, without guidance, with the distilled steps.

        Args:
            request: What to generate.
            output_type: diffusers' own: ``pt``, ``np``, ``pil``, or ``latent``, which leaves decoding to the caller.

        Returns:
            Video and audio as ``output_type`` has them; for ``pt`` ``(1, F, 3, H, W)`` in [0, 1] and
            ``(1, 2, samples)``.
        """
        common: dict[str, Any] = {
            "prompt": request.prompt,
            "num_frames": request.frames,
            "frame_rate": float(request.fps),
            "image": Image.fromarray(load_still(request.image)),
            "guidance_scale": 1.0,
            "return_dict": False,
        }
        device = self.generate._execution_device
        common["generator"] = torch.Generator(device).manual_seed(request.seed)
        half: dict[str, Any] = {"width": request.width // 2, "height": request.height // 2}
        video, audio = self.generate(**common, **half, sigmas=DISTILLED_SIGMA_VALUES, output_type="latent")
        (video,) = self.upsample(latents=video, **half, output_type="latent", return_dict=False)
        made: tuple[torch.Tensor, torch.Tensor] = self.generate(
            **common,
            width=request.width,
            height=request.height,
            latents=video,
            audio_latents=audio,
            sigmas=STAGE_2_DISTILLED_SIGMA_VALUES,
            noise_scale=STAGE_2_DISTILLED_SIGMA_VALUES[0],
            output_type=output_type,
        )
        return made

    def _sound(self, audio: torch.Tensor) -> Any:
        rate = int(self.generate.vocoder.config.output_sampling_rate)
        return SimpleNamespace(waveform=audio[0], sampling_rate=rate)


def _as_chunk(video: torch.Tensor) -> Iterator[torch.Tensor]:
    """A decoded video ``(1, F, 3, H, W)`` in [0, 1] as one chunk ``(F, H, W, 3)`` uint8, converted on the CPU."""
    frames = video[0].float().cpu()
    yield (frames.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _tokenizer() -> PreTrainedTokenizerFast:
    named = {name: token for name, token in SPECIALS.items() if name not in IMAGE_TOKENS}
    extra = {name: SPECIALS[name] for name in IMAGE_TOKENS}
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(), clean_up_tokenization_spaces=False, extra_special_tokens=extra, **named
    )


class ForecastProcessor(VideoProcessor):
    """Reads a still as diffusers does, without testing it for negative values, which a forecast does not know.

    Only a warning depends on the test, and nothing that is on the device.
    """

    def preprocess(self, image: Any, height: int | None = None, width: int | None = None) -> torch.Tensor:
        """The still ``(1, 3, H, W)`` in [-1, 1]."""
        resized = self.resize(image, height, width)
        return self.normalize(self.numpy_to_pt(self.pil_to_numpy(resized)))


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
