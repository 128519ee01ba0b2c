"""Any image-to-video pipeline of diffusers, from the data of an architecture, called like this package's pipelines."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from PIL import Image
from transformers import masking_utils

from i2v_lab.errors import InvalidRequest
from i2v_lab.events import EventSink, Note, Phase, broadcast
from i2v_lab.memory_policy import Techniques
from i2v_lab.memory_settings import NO_SETTINGS, MemorySettings
from i2v_lab.pipeline.contract.architectures import Architecture
from i2v_lab.pipeline.contract.generation import Generation, VideoStream, resolve_device
from i2v_lab.pipeline.contract.media import load_still
from i2v_lab.pipeline.contract.prompt_length import note_dropped_tokens
from i2v_lab.pipeline.diffusers import RUNNER
from i2v_lab.pipeline.diffusers.components import build, default_dtype, find_class
from i2v_lab.pipeline.diffusers.decoding import decoding_in
from i2v_lab.pipeline.diffusers.quantized import TRANSFORMERS, build_quantized, quantizer_config
from i2v_lab.pipeline.diffusers.settings import DENOISERS, cast_layers, check_tiles, offload, set_autoencoder
from i2v_lab.pipeline.diffusers.weights import DiffusersWeights
from i2v_lab.request import I2VRequest, VideoShape
from i2v_lab.thread_patches import patched_here
from i2v_lab.torch_compat import is_fake

BFLOAT16 = "bfloat16"


def memoizable_modules(architecture: Architecture) -> dict[type[torch.nn.Module], Callable[..., Hashable]]:
    """The denoiser, of which all steps run the same operators, and its blocks."""
    kinds: list[type[torch.nn.Module]] = []
    for name in DENOISERS:
        if name in architecture.config:
            kind = find_class(architecture, architecture.config[name]["_class_name"])
            home = inspect.getmodule(kind)
            blocks = {*(kind._repeated_blocks or ()), *(kind._no_split_modules or ())}
            kinds += [kind, *(getattr(home, block) for block in sorted(blocks) if hasattr(home, block))]
    return dict.fromkeys(kinds, lambda *args, **kwargs: ())


class DiffusersPipeline:
    """A pipeline of diffusers with the components that an architecture names.

    Args:
        weights: Of the model.
        device: Where the components are, or where diffusers moves them.
        sinks: Get a note where a prompt is cut; these pipelines report no phases.
        techniques: None: these pipelines take memory settings.
        settings: Those of the requests.

    Attributes:
        pipe: diffusers' own.

    Raises:
        DeviceUnavailable: The device does not exist here.
        InvalidRequest: A setting that the model's autoencoder does not have.
        RunnerUnavailable: The installed packages lack a class.
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
        self._device = resolve_device(device)
        self._architecture = weights.architecture
        self._settings = settings
        self._emit = broadcast(sinks)
        self._dtypes = {**weights.architecture.dtypes, **{name: dtype.value for name, dtype in settings.dtypes}}
        if weights.folder is None:
            self.pipe: Any = self._with_random_weights()
        else:
            self.pipe = self._with_weights_of(weights.folder)
        if settings.layerwise_casting:
            cast_layers(self.pipe, self._dtype("transformer"))
        if settings.offloads:
            offload(self.pipe, settings, self._device)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # of what building the components took
        self.pipe.set_progress_bar_config(disable=True)
        self._parameters = inspect.signature(self.pipe.__call__).parameters

    # --- Components ---

    def _dtype(self, name: str) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self._dtypes.get(name, self._dtypes.get("default", BFLOAT16)))
        return dtype

    def _with_random_weights(self) -> Any:
        architecture = self._architecture
        kind = find_class(architecture, architecture.pipeline)
        names = sorted(architecture.config, key=lambda name: name != "vae")  # whose settings may be refused
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            parts = {name: self._built(name) for name in names}
        return kind(**parts, **architecture.arguments)

    def _built(self, name: str) -> Any:
        # On the device even where it does not stay there: on a CPU, to draw the numbers of 14 B weights takes minutes.
        quantization, dtype = self._settings.quantization, self._dtype(name)
        with torch.device(self._device), default_dtype(dtype):
            if self._settings.quantizes and name in TRANSFORMERS:
                part = build_quantized(self._architecture, name, quantization, dtype)
            else:
                part = build(self._architecture, name)
        if isinstance(part, torch.nn.Module):
            part.to("cpu" if self._settings.offloads else self._device)  # torch.Tensor() knows no default device
        if name == "vae":
            set_autoencoder(part, self._settings, self._architecture.name)
        return part

    def _with_weights_of(self, folder: Any) -> Any:
        kind = find_class(self._architecture, self._architecture.pipeline)
        dtypes = {name: self._dtype(name) for name in ("default", *self._dtypes)}
        pipe = kind.from_pretrained(
            folder,
            quantization_config=self._quantization_config(),
            torch_dtype=dtypes,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            **self._architecture.arguments,
        )
        set_autoencoder(pipe.vae, self._settings, self._architecture.name)
        return pipe if self._settings.offloads else pipe.to(self._device)

    def _quantization_config(self) -> Any:
        """Of diffusers' own loader, for the transformers of a folder."""
        quantization = self._settings.quantization
        if not self._settings.quantizes:
            return None
        if quantization.package == "gguf":
            raise InvalidRequest(
                f"quantization={quantization.value} is not for --weights, whose weights no GGUF file holds; use a "
                "torchao one, or leave out one of the two",
                quantization=quantization.value,
            )
        names = [name for name in TRANSFORMERS if name in self._architecture.config]
        parts = {name: quantizer_config(quantization, self._dtype(name)) for name in names}
        return diffusers.PipelineQuantizationConfig(quant_mapping=parts)

    # --- Generation ---

    def __call__(self, request: I2VRequest) -> Generation:
        """Everything, the decoding included, which diffusers does before it returns."""
        made = self.run(request)
        video, waveform = made.frames, getattr(made, "audio", None)
        sound = None
        if waveform is not None:
            sound = SimpleNamespace(waveform=waveform[0], sampling_rate=self.pipe.vocoder.config.output_sampling_rate)
        shape = VideoShape(video.shape[1], video.shape[3], video.shape[4])
        return Generation(VideoStream(as_chunk(video), shape, 1), sound)

    def run(self, request: I2VRequest, output_type: str = "pt") -> Any:
        """Call the pipeline.

        Args:
            request: What to generate.
            output_type: diffusers' own: ``pt``, ``np``, ``pil`` or ``latent``.

        Returns:
            diffusers' own; its ``frames`` are for ``pt`` ``(1, F, 3, H, W)`` in [0, 1].

        Raises:
            GradScopeError: ``decode_scope=inference_mode``, as torch refuses it.
            InvalidRequest: The request has other memory settings than the pipeline was built with, or leaves a tile
                that the autoencoder cannot decode.
        """
        if request.settings != self._settings:
            raise InvalidRequest(
                f"settings={request.settings.name or 'none'} are not those that the pipeline was built with, "
                f"{self._settings.name or 'none'}; build another one",
                settings=request.settings.to_json(),
            )
        check_tiles(self.pipe.vae, request.width, request.height)
        given = {**self._architecture.sampling, **self._arguments(request)}
        with warnings.catch_warnings(), _masks_as_in_a_real_run(), decoding_in(request.decode_scope, self.pipe):
            # Norms of text encoders in float32, of which nobody can change anything.
            warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight", category=UserWarning)
            return self.pipe(**given, output_type=output_type)

    def _arguments(self, request: I2VRequest) -> dict[str, Any]:
        """The arguments of the call that the request decides, as far as the pipeline has them."""
        rule = RUNNER.size_rule(self._architecture)
        still = Image.fromarray(load_still(request.image))
        if "width" not in self._parameters:  # the size is that of the still
            still = still.resize((request.width, request.height), Image.Resampling.LANCZOS)
        generator = torch.Generator(self._device).manual_seed(request.seed)
        values: dict[str, Any] = {
            "image": still,
            "generator": generator,
            "num_frames": rule.asked_frames(request.frames),
        }
        values |= {"width": request.width, "height": request.height, "prompt": request.prompt}
        values |= {"fps": round(request.fps), "frame_rate": request.fps}
        if request.negative_prompt:
            values["negative_prompt"] = request.negative_prompt
        if request.steps is not None:
            values["num_inference_steps"] = request.steps
        self._note_dropped_tokens(values)
        if "image" not in self._parameters:  # of a published peak's model
            text = f"image: {self._architecture.pipeline} makes videos of text alone; the still is not used"
            self._emit(Note(Phase.ENCODE_PROMPT, "image", 1, text))
        return {name: value for name, value in values.items() if name in self._parameters}

    def _note_dropped_tokens(self, values: dict[str, Any]) -> None:
        tokenizer = getattr(self.pipe, "tokenizer", None)
        parameter = self._parameters.get("max_sequence_length")
        if tokenizer is None or parameter is None:
            return
        limit = self._architecture.sampling.get("max_sequence_length", parameter.default)
        for topic in ("prompt", "negative_prompt"):
            if values.get(topic):
                note_dropped_tokens(self._emit, tokenizer, topic, values[topic], limit)


def _masks_as_in_a_real_run() -> AbstractContextManager[None]:
    """Let transformers drop a mask that hides nothing: it looks at the values of a mask, but not of a fake one."""
    if is_fake() and hasattr(masking_utils, "is_tracing"):  # of transformers 5
        return patched_here(masking_utils, "is_tracing", lambda tensor=None: False)
    return nullcontext()


def as_chunk(video: torch.Tensor) -> Iterator[torch.Tensor]:
    """A decoded video ``(1, F, 3, H, W)`` in [0, 1] as one chunk ``(F, H, W, 3)`` uint8, converted on the CPU."""
    frames = video[0].float().cpu()
    yield (frames.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
