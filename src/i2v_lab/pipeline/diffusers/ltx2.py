"""diffusers' pipelines for LTX-2, LTX-2.3 and LTX-2.5, at full size or tiny, with random weights.

Nothing of theirs is changed. Their two-stage generation is what their documentation describes: half the size to a
latent, the latent upsampled, the same pipeline again from there, decoded by it, by the caller, or by the diffusion
decoder, which is a pipeline of its own. What the models differ by is data of their architectures.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import transformers
from diffusers import LTX2ImageToVideoPipeline, LTX2LatentUpsamplePipeline
from diffusers.models.transformers.transformer_ltx2 import LTX2VideoTransformerBlock
from diffusers.pipelines import ltx2 as ltx2_pipelines
from diffusers.pipelines.ltx2.utils import DISTILLED_SIGMA_VALUES, STAGE_2_DISTILLED_SIGMA_VALUES
from PIL import Image
from transformers import PreTrainedTokenizerFast

from i2v_lab.events import EventSink, broadcast
from i2v_lab.memory_policy import Techniques
from i2v_lab.memory_settings import NO_SETTINGS, MemorySettings, Offload
from i2v_lab.pipeline.contract.architectures import Architecture
from i2v_lab.pipeline.contract.byte_tokenizer import IMAGE_TOKENS, SPECIALS, byte_tokenizer
from i2v_lab.pipeline.contract.generation import Generation, VideoStream, resolve_device
from i2v_lab.pipeline.contract.media import load_still
from i2v_lab.pipeline.contract.prompt_length import note_dropped_tokens
from i2v_lab.pipeline.diffusers import RUNNER
from i2v_lab.pipeline.diffusers.components import default_dtype
from i2v_lab.pipeline.diffusers.decoding import decoding_in
from i2v_lab.pipeline.diffusers.pipeline import as_chunk
from i2v_lab.pipeline.diffusers.settings import cast_layers, offload, set_autoencoder
from i2v_lab.pipeline.diffusers.weights import DiffusersWeights
from i2v_lab.request import I2VRequest, Tiling
from i2v_lab.torch_compat import uncompiled_flex_attention

# Of each component, where an architecture names none; those of the others follow from its configuration.
CLASSES = {
    "transformer": "LTX2VideoTransformer3DModel",
    "connectors": "LTX2TextConnectors",
    "vae": "AutoencoderKLLTX2Video",
    "audio_vae": "AutoencoderKLLTX2Audio",
    "vocoder": "LTX2Vocoder",
    "latent_upsampler": "LTX2LatentUpsamplerModel",
    "duration_head": "LTX2DurationHead",
    "diffusion_decoder": "LTX2VideoDiffusionDecoderModel",
    "scheduler": "FlowMatchEulerDiscreteScheduler",
}
MAX_TOKENS = 1024  # of a prompt, diffusers' default
# Distilled weights need no guidance, of which diffusers 0.42 has three kinds on by default: 33 calls instead of 11.
UNGUIDED: dict[str, Any] = {
    "guidance_scale": 1.0,
    "stg_scale": 0.0,
    "modality_scale": 1.0,
    "guidance_rescale": 0.0,
    "audio_guidance_scale": 1.0,
    "audio_stg_scale": 0.0,
    "audio_modality_scale": 1.0,
    "audio_guidance_rescale": 0.0,
}


def memoizable_modules(architecture: Architecture) -> dict[type[torch.nn.Module], Callable[..., Hashable]]:
    """The blocks of the transformer and of the diffusion decoder: all of their calls run the same operators."""
    kinds: list[type[torch.nn.Module]] = [LTX2VideoTransformerBlock]
    with suppress(ImportError):  # of diffusers 0.40
        from diffusers.models.autoencoders import ltx2_diffusion_decoder as decoder

        kinds += [decoder.LTX2VideoVaeNABlock, decoder.LTX2VideoVaeDiffusionNABlock]
    return dict.fromkeys(kinds, lambda *args, **kwargs: ())


def component(architecture: Architecture, name: str) -> Any:
    """Build one of diffusers' components, or its scheduler.

    Args:
        architecture: Whose configuration.
        name: As in diffusers' pipelines, one of :data:`CLASSES`.

    Returns:
        On torch's default device, in its default dtype.

    Example:
        >>> from i2v_lab.pipeline.contract.architectures import load_architecture
        >>> type(component(load_architecture("ltx-2-tiny"), "vocoder")).__name__
        'LTX2Vocoder'
    """
    config = dict(architecture.config.get(name, {}))
    kind = config.pop("_class_name", CLASSES[name])
    home = diffusers if hasattr(diffusers, kind) else ltx2_pipelines
    return getattr(home, kind)(**config)


def text_encoder(architecture: Architecture) -> torch.nn.Module:
    """Build the text encoder: the class of transformers that its configuration names, Gemma 3 or 4.

    Returns:
        On torch's default device; its vision tower in the dtype of the configuration, the rest in torch's default
        dtype.
    """
    kind = getattr(transformers, architecture.gemma["architectures"][0])
    module: torch.nn.Module = kind(kind.config_class(**architecture.gemma))
    return module


class DiffusersLTX2:
    """diffusers' ``LTX2ImageToVideoPipeline`` and ``LTX2LatentUpsamplePipeline``, called like this package's pipelines.

    An architecture with a ``diffusion_decoder`` is decoded by ``LTX2VideoDiffusionDecodePipeline``, with its default
    attention, others by the convolutional decoder of the autoencoder.

    Args:
        weights: Of the model.
        device: Where the components are, or where diffusers moves them.
        sinks: Get a note where a prompt is cut; these pipelines report no phases.
        techniques: None: these pipelines take memory settings.
        settings: Those of the requests.

    Attributes:
        generate: Both stages.
        upsample: Between them; shares the autoencoder.
        decode: The diffusion decoder's pipeline; ``None`` without one.

    Raises:
        DeviceUnavailable: The device does not exist here.
        InvalidRequest: A setting that the model's autoencoder does not have.
    """

    def __init__(
        self,
        weights: DiffusersWeights,
        device: str | torch.device = "cpu",
        sinks: Sequence[EventSink] = (),
        techniques: Techniques = frozenset(),
        settings: MemorySettings = NO_SETTINGS,
    ) -> None:
        RUNNER.check_techniques(techniques)
        device = resolve_device(device)
        architecture = weights.architecture
        where = "cpu" if settings.offloads else device
        dtypes = {name: getattr(torch, dtype.value) for name, dtype in settings.dtypes}
        default = dtypes.get("default", torch.bfloat16)

        def build(name: str) -> Any:
            with default_dtype(dtypes.get(name, default)):
                return component(architecture, name).to(where).eval()

        # On the device even where they do not stay there: on a CPU, to draw the numbers of 31 B weights takes minutes.
        with torch.random.fork_rng(devices=[]), torch.device(device), default_dtype(default):
            torch.manual_seed(0)
            scheduler, vae = component(architecture, "scheduler"), build("vae")
            set_autoencoder(vae, settings, architecture.name)
            self.generate: Any = LTX2ImageToVideoPipeline(
                scheduler=scheduler,
                vae=vae,
                audio_vae=build("audio_vae"),
                text_encoder=text_encoder(architecture).to(where, dtypes.get("text_encoder", default)).eval(),
                tokenizer=_tokenizer(),
                connectors=build("connectors"),
                transformer=build("transformer"),
                vocoder=build("vocoder"),
                **{name: build(name) for name in ("duration_head",) if name in architecture.config},
            )
            with torch.device("cpu"):  # its constructor multiplies integer matrices, which CUDA cannot
                upsampler = build("latent_upsampler")
            self.upsample: Any = LTX2LatentUpsamplePipeline(vae, upsampler)
            self.decode: Any = None
            if "diffusion_decoder" in architecture.config:
                self.decode = diffusers.LTX2VideoDiffusionDecodePipeline(build("diffusion_decoder"), scheduler)
        self._sampling = architecture.sampling
        self._emit = broadcast(sinks)
        others = [each for each in (self.upsample, self.decode) if each is not None]
        if settings.layerwise_casting:
            cast_layers(self.generate, dtypes.get("transformer", default))
        if settings.offloads:
            offload(self.generate, settings, device)
        for each in others if settings.offloads else ():
            if settings.offload is Offload.MODEL:
                each.enable_model_cpu_offload(device=device)
            else:  # its own component; the autoencoder has hooks already
                (each.latent_upsampler if each is self.upsample else each.diffusion_decoder).to(device)
        self.generate.set_progress_bar_config(disable=True)

    def __call__(self, request: I2VRequest) -> Generation:
        """Both stages and the decoding, which diffusers does before it returns."""
        video, audio = self.run(request)
        source = as_chunk(video)
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
        note_dropped_tokens(self._emit, self.generate.tokenizer, "prompt", request.prompt, MAX_TOKENS)
        common: dict[str, Any] = {
            "prompt": request.prompt,
            "max_sequence_length": MAX_TOKENS,
            "num_frames": request.frames,
            "frame_rate": float(request.fps),
            "image": Image.fromarray(load_still(request.image)),
            "return_dict": False,
            **UNGUIDED,
            **self._sampling,
        }
        device = self.generate._execution_device
        common["generator"] = torch.Generator(device).manual_seed(request.seed)
        if self.decode is not None:
            _set_tiling(self.decode.diffusion_decoder, request.tiling)
        half: dict[str, Any] = {"width": request.width // 2, "height": request.height // 2}
        video, audio = self.generate(**common, **half, sigmas=DISTILLED_SIGMA_VALUES, output_type="latent")
        (video,) = self.upsample(latents=video, **half, output_type="latent", return_dict=False)
        with decoding_in(request.decode_scope, self.generate):
            made: tuple[torch.Tensor, torch.Tensor] = self.generate(
                **common,
                width=request.width,
                height=request.height,
                latents=video,
                audio_latents=audio,
                sigmas=STAGE_2_DISTILLED_SIGMA_VALUES,
                noise_scale=STAGE_2_DISTILLED_SIGMA_VALUES[0],
                output_type=output_type if self.decode is None else "latent",
            )
        if self.decode is None or output_type == "latent":
            return made
        return self._decode(*made, common["generator"], output_type)

    @torch.no_grad()
    def _decode(
        self, video: torch.Tensor, audio: torch.Tensor, generator: torch.Generator, output_type: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode the latents of stage 2, which are denormalized already, and the sound as that pipeline does."""
        # The operators are the same; otherwise torch traces each of several hundred calls anew, to compile nothing.
        with uncompiled_flex_attention():
            (video,) = self.decode(
                video, generator=generator, output_type=output_type, denormalize=False, return_dict=False
            )
        audio_vae = self.generate.audio_vae
        (spectrogram,) = audio_vae.decode(audio.to(audio_vae.dtype), return_dict=False)
        sound = self.generate.vocoder(spectrogram)
        self.generate.maybe_free_model_hooks()
        return video, sound

    def _sound(self, audio: torch.Tensor) -> Any:
        rate = int(self.generate.vocoder.config.output_sampling_rate)
        return SimpleNamespace(waveform=audio[0], sampling_rate=rate)


def _set_tiling(decoder: Any, tiling: Tiling | None) -> None:
    """Let the diffusion decoder run its last stages tile by tile, or the whole latent at once."""
    if tiling is None:
        decoder.disable_tiling()
        return
    side, stride = tiling.tile_px, tiling.tile_px - tiling.tile_overlap_px
    decoder.enable_tiling(
        tile_sample_min_height=side,
        tile_sample_min_width=side,
        tile_sample_min_num_frames=tiling.tile_frames,
        tile_sample_stride_height=stride,
        tile_sample_stride_width=stride,
        tile_sample_stride_num_frames=tiling.tile_frames - tiling.tile_overlap_frames,
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    named = {name: token for name, token in SPECIALS.items() if name not in IMAGE_TOKENS}
    extra = {name: SPECIALS[name] for name in IMAGE_TOKENS}
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(), clean_up_tokenization_spaces=False, extra_special_tokens=extra, **named
    )
