"""ltx-pipelines' own pipelines, unmodified, over our weights and with our phase events.

Two things are set from outside: the loader of their builders, through the field that they have for it, and wrappers
around functions that they call, which emit the beginning and end of phases and pass arguments and results through. With
transformers 5, where ltx-core cannot build Gemma, its builder also gets our key map and module operation, through its
fields.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ltx_pipelines.distilled
import ltx_pipelines.ti2vid_two_stages
import torch
from ltx_core.loader import LoraPathStrengthAndSDOps
from ltx_core.loader import SingleGPUModelBuilder as Builder
from ltx_core.text_encoders.gemma import GEMMA_MODEL_OPS
from ltx_pipelines.utils import ModelLedger
from ltx_pipelines.utils.args import ImageConditioningInput

from i2v_lab.events import EventSink, Phase, broadcast
from i2v_lab.files import scratch_folder
from i2v_lab.pipeline.contract.generation import (
    GRAD_SCOPES,
    Generation,
    GradScopes,
    VideoStream,
    decode_chunks,
    resolve_device,
)
from i2v_lab.pipeline.contract.lifecycle import phase_scope
from i2v_lab.pipeline.ltx2.components import quantization_policy
from i2v_lab.pipeline.ltx2.gemma import GEMMA_BUFFERS, gemma_key_ops, ltx_core_fits
from i2v_lab.pipeline.ltx2.layout import gemma_dimensions
from i2v_lab.pipeline.ltx2.operations import note_cut_prompts, tiling_config
from i2v_lab.pipeline.ltx2.phases import prompts_of
from i2v_lab.pipeline.ltx2.sampling import sampling_params
from i2v_lab.pipeline.ltx2.tiles import chunk_count
from i2v_lab.pipeline.ltx2.weights import Weights
from i2v_lab.request import I2VRequest, Variant
from i2v_lab.thread_patches import patched_here, unpatched

MODULES = {Variant.DISTILLED: ltx_pipelines.distilled, Variant.DEV: ltx_pipelines.ti2vid_two_stages}


class UpstreamPipeline:
    """``DistilledPipeline`` or ``TI2VidTwoStagesPipeline``, called like our ``TwoStagePipeline``.

    A phase begins, as with ours, with the building of its first component: the transformer for a denoising stage, the
    upsampler, the audio decoder. Where upstream's order differs, phases show it: the distilled pipeline encodes the
    still for stage 1 inside ``denoise_stage_1``, with the transformer loaded, and for stage 2 in a second
    ``encode_image``; both build the video decoder before they decode the audio, outside any phase. There are no
    component and step events.

    Args:
        weights: From :func:`~i2v_lab.pipeline.ltx2.weights.resolve_weights`.
        device: ``"cpu"`` or ``"cuda"``.
        sinks: Called with every :data:`~i2v_lab.events.Event`.

    Raises:
        DeviceUnavailable: The device does not exist here.
    """

    def __init__(self, weights: Weights, device: str | torch.device = "cpu", sinks: Sequence[EventSink] = ()) -> None:
        self.weights = weights
        self.device = resolve_device(device)
        self._emit = broadcast(sinks)

    def __call__(self, request: I2VRequest) -> Generation:
        """Run upstream's ``__call__``; the returned stream decodes the video, in the request's scope, when consumed.

        Args:
            request: What to generate; upstream has no memory policies, so its own is ignored.
        """
        scopes = GRAD_SCOPES[request.decode_scope]
        with (
            self._prepared(request) as (pipeline, ledgers),
            self._phase_events(MODULES[request.variant], ledgers, prompts_of(request)),
            scopes.body(),
        ):
            video, audio = pipeline(**self._arguments(request))
        return Generation(VideoStream(self._decode(request, scopes, video), request.shape, chunk_count(request)), audio)

    @contextmanager
    def without_events(self, request: I2VRequest) -> Iterator[partial[Any]]:
        """Upstream's pipeline with the request's arguments, to be called within this scope; emits no events."""
        with self._prepared(request) as (pipeline, _):
            yield partial(pipeline, **self._arguments(request))

    @contextmanager
    def _prepared(self, request: I2VRequest) -> Iterator[tuple[Any, list[ModelLedger]]]:
        """Upstream's pipeline over our weights, and its ledgers; runs on the device within this scope."""
        with gemma_dimensions(self.weights.architecture.gemma), scratch_folder() as folder:
            pipeline = self._pipeline(request, _gemma_folder(self.weights, folder))
            ledgers = [part for part in vars(pipeline).values() if isinstance(part, ModelLedger)]
            for ledger in ledgers:
                _set_loader(ledger, self.weights)
            with _cuda_synchronize_skipped(self.device):
                yield pipeline, ledgers

    def _pipeline(self, request: I2VRequest, gemma_root: Path) -> Any:
        weights = self.weights
        common: dict[str, Any] = {
            "gemma_root": str(gemma_root),
            "spatial_upsampler_path": weights.upsampler,
            "loras": [],
            "device": self.device,
            "quantization": quantization_policy(request.quantization),
        }
        if request.variant is Variant.DISTILLED:
            return ltx_pipelines.distilled.DistilledPipeline(distilled_checkpoint_path=weights.checkpoint, **common)
        lora = LoraPathStrengthAndSDOps(weights.lora, 1.0, weights.lora_keys)
        module = ltx_pipelines.ti2vid_two_stages
        return module.TI2VidTwoStagesPipeline(checkpoint_path=weights.checkpoint, distilled_lora=[lora], **common)

    def _arguments(self, request: I2VRequest) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "prompt": request.prompt,
            "seed": request.seed,
            "height": request.height,
            "width": request.width,
            "num_frames": request.frames,
            "frame_rate": float(request.fps),
            "images": [ImageConditioningInput(request.image, 0, 1.0)],
            "tiling_config": tiling_config(request.tiling),
        }
        if request.variant is Variant.DEV:
            params = sampling_params(self.weights.architecture)
            arguments["negative_prompt"] = request.negative_prompt
            for name in ("num_inference_steps", "video_guider_params", "audio_guider_params"):
                arguments[name] = getattr(params, name)
        return arguments

    def _decode(self, request: I2VRequest, scopes: GradScopes, video: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        with phase_scope(Phase.DECODE_VIDEO, self.device, self._emit) as scope:
            yield from decode_chunks(video, chunk_count(request), scopes, scope)

    @contextmanager
    def _phase_events(self, module: Any, ledgers: Sequence[ModelLedger], prompts: Mapping[str, str]) -> Iterator[None]:
        """Within this scope upstream's calls begin and end phases; one that is open when a call fails ends incomplete.

        Args:
            module: Upstream's, whose functions are wrapped.
            ledgers: Whose builders are wrapped.
            prompts: Those that are encoded.
        """
        denoising = [Phase.DENOISE_STAGE_1, Phase.DENOISE_STAGE_2]
        with ExitStack() as scopes:
            phases: dict[Phase, ExitStack] = {}

            def begin(phase: Phase) -> None:
                phases[phase] = scopes.enter_context(ExitStack())
                phases[phase].enter_context(phase_scope(phase, self.device, self._emit))

            def wrap(owner: Any, name: str, phase: Phase | None, *, ends: bool) -> None:
                original = unpatched(owner, name)

                def call(*args: Any, **kwargs: Any) -> Any:
                    current = phase or denoising[0]
                    if current not in phases:
                        begin(current)
                    result = original(*args, **kwargs)
                    if ends:
                        phases.pop(current).close()
                        if phase is None:
                            denoising.pop(0)
                    return result

                if owner is module:  # which other runs share
                    scopes.enter_context(patched_here(owner, name, call))
                else:
                    setattr(owner, name, call)
                    scopes.callback(setattr, owner, name, original)

            def noting(build: Callable[[], Any]) -> Any:
                encoder = build()
                note_cut_prompts(encoder, prompts, self._emit)
                return encoder

            for ledger in ledgers:
                ledger.text_encoder = partial(noting, ledger.text_encoder)
                scopes.callback(delattr, ledger, "text_encoder")
            for ledger in ledgers:  # phases that begin with the building of a component
                wrap(ledger, "transformer", None, ends=False)
                wrap(ledger, "spatial_upsampler", Phase.UPSAMPLE_LATENT, ends=False)
                wrap(ledger, "audio_decoder", Phase.DECODE_AUDIO, ends=False)
            wrap(module, "encode_prompts", Phase.ENCODE_PROMPT, ends=True)
            wrap(module, "combined_image_conditionings", Phase.ENCODE_IMAGE, ends=True)
            wrap(module, "denoise_audio_video", None, ends=True)
            wrap(module, "upsample_video", Phase.UPSAMPLE_LATENT, ends=True)
            wrap(module, "vae_decode_audio", Phase.DECODE_AUDIO, ends=True)
            yield


def _gemma_folder(weights: Weights, folder: Path) -> Path:
    """Gemma's folder with the weight file that upstream's ledger looks for; an empty one where weights are on demand.

    The ledger only takes the file's path, which :func:`_set_loader` replaces.
    """
    for entry in Path(weights.gemma_root).resolve().iterdir():
        (folder / entry.name).symlink_to(entry)
    if not any(folder.rglob("model*.safetensors")):
        (folder / "model.safetensors").touch()
    return folder


def _set_loader(ledger: Any, weights: Weights) -> None:
    """Let every builder of a ledger read through the weights' loader, and Gemma's fit the installed transformers."""
    for name, builder in list(vars(ledger).items()):
        if isinstance(builder, Builder):
            setattr(ledger, name, replace(builder, model_loader=weights.loader))
    builder = replace(ledger.text_encoder_builder, model_path=weights.gemma_shards)
    if not ltx_core_fits():
        own = (GEMMA_BUFFERS if op is GEMMA_MODEL_OPS else op for op in builder.module_ops)
        builder = replace(builder, model_sd_ops=gemma_key_ops(), module_ops=tuple(own))
    ledger.text_encoder_builder = builder


def _cuda_synchronize_skipped(device: torch.device) -> AbstractContextManager[Any]:
    """On a CPU, within this scope ``torch.cuda.synchronize``, which upstream calls on any device, does nothing."""
    return nullcontext() if device.type == "cuda" else patched_here(torch.cuda, "synchronize", lambda *_: None)
