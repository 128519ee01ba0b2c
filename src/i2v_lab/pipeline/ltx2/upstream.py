"""ltx-pipelines' own pipelines beside ours: their code as it is, our weights, and their phases told from outside.

Two things are set from outside: which loader their builders read through, which their own classes provide for, and
wrappers around functions that they call, which say where a phase begins and ends and pass everything on.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import ltx_pipelines.distilled
import ltx_pipelines.ti2vid_two_stages
import torch
from ltx_core.loader import LTXV_LORA_COMFY_RENAMING_MAP, LoraPathStrengthAndSDOps
from ltx_core.loader import SingleGPUModelBuilder as Builder
from ltx_pipelines.utils.args import ImageConditioningInput

from i2v_lab.events import EventSink, Phase, broadcast
from i2v_lab.pipeline.contract.generation import (
    GRAD_SCOPES,
    Generation,
    GradScopes,
    VideoStream,
    decode_chunks,
    resolve_device,
)
from i2v_lab.pipeline.contract.lifecycle import phase_scope
from i2v_lab.pipeline.ltx2 import components as ltx2
from i2v_lab.pipeline.ltx2.tiles import chunk_count
from i2v_lab.pipeline.ltx2.weights import Weights
from i2v_lab.request import I2VRequest, Variant

MODULES = {Variant.DISTILLED: ltx_pipelines.distilled, Variant.DEV: ltx_pipelines.ti2vid_two_stages}


class UpstreamPipeline:
    """``DistilledPipeline`` or ``TI2VidTwoStagesPipeline``, called like our ``TwoStagePipeline``.

    A transformer's building counts to the denoising stage that it is built for, an upsampler's and an audio decoder's
    to their phases, as with ours. What upstream does in another order stays so: the distilled one encodes the still for
    stage 1 inside ``denoise_stage_1``, with the transformer there already, and for stage 2 in a second
    ``encode_image``; both build the video decoder before they decode the audio, outside any phase. There are no events
    for components and steps.

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
        """Run upstream's ``__call__``; its stream is decoded in the request's scope while it is consumed."""
        scopes = GRAD_SCOPES[request.decode_scope]
        with ltx2.gemma_dimensions(self.weights.architecture.gemma), tempfile.TemporaryDirectory() as folder:
            pipeline = self._pipeline(request, _gemma_folder(self.weights, Path(folder)))
            ledgers = [part for part in vars(pipeline).values() if isinstance(part, ltx2.ModelLedger)]
            for ledger in ledgers:
                _read_through(self.weights, ledger)
            with _on_any_device(self.device), self._told(MODULES[request.variant], ledgers), scopes.body():
                video, audio = pipeline(**self._arguments(request))
        return Generation(VideoStream(self._decode(request, scopes, video), request.shape, chunk_count(request)), audio)

    @contextmanager
    def untouched(self, request: I2VRequest) -> Iterator[partial[Any]]:
        """Upstream's pipeline with the request's arguments, to be called within this scope; tells nobody of phases."""
        with ltx2.gemma_dimensions(self.weights.architecture.gemma), tempfile.TemporaryDirectory() as folder:
            pipeline = self._pipeline(request, _gemma_folder(self.weights, Path(folder)))
            for ledger in [part for part in vars(pipeline).values() if isinstance(part, ltx2.ModelLedger)]:
                _read_through(self.weights, ledger)
            with _on_any_device(self.device):
                yield partial(pipeline, **self._arguments(request))

    def _pipeline(self, request: I2VRequest, gemma_root: Path) -> Any:
        weights = self.weights
        common: dict[str, Any] = {
            "gemma_root": str(gemma_root),
            "spatial_upsampler_path": weights.upsampler,
            "loras": [],
            "device": self.device,
            "quantization": ltx2.quantization_policy(request.quantization),
        }
        if request.variant is Variant.DISTILLED:
            return ltx_pipelines.distilled.DistilledPipeline(distilled_checkpoint_path=weights.checkpoint, **common)
        lora = LoraPathStrengthAndSDOps(weights.lora, 1.0, LTXV_LORA_COMFY_RENAMING_MAP)
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
            "tiling_config": ltx2.tiling_config(request.tiling),
        }
        if request.variant is Variant.DEV:
            params = ltx2.sampling_params(self.weights.architecture)
            arguments["negative_prompt"] = request.negative_prompt
            for name in ("num_inference_steps", "video_guider_params", "audio_guider_params"):
                arguments[name] = getattr(params, name)
        return arguments

    def _decode(self, request: I2VRequest, scopes: GradScopes, video: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        with phase_scope(Phase.DECODE_VIDEO, self.device, self._emit) as scope:
            yield from decode_chunks(video, chunk_count(request), scopes, scope)

    @contextmanager
    def _told(self, module: Any, ledgers: Sequence[Any]) -> Iterator[None]:
        """Within this scope upstream's calls begin and end phases; what is open when one fails ends with its error."""
        denoising = [Phase.DENOISE_STAGE_1, Phase.DENOISE_STAGE_2]
        with ExitStack() as scopes:
            phases: dict[Phase, ExitStack] = {}

            def begin(phase: Phase) -> None:
                phases[phase] = scopes.enter_context(ExitStack())
                phases[phase].enter_context(phase_scope(phase, self.device, self._emit))

            def wrap(owner: Any, name: str, phase: Phase | None, *, ends: bool) -> None:
                original = getattr(owner, name)

                def call(*args: Any, **kwargs: Any) -> Any:
                    now = phase or denoising[0]
                    if now not in phases:
                        begin(now)
                    result = original(*args, **kwargs)
                    if ends:
                        phases.pop(now).close()
                        if phase is None:
                            denoising.pop(0)
                    return result

                setattr(owner, name, call)
                scopes.callback(setattr, owner, name, original)

            for ledger in ledgers:  # where a phase begins with the building of a component
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
    """Gemma's folder as upstream's ledger wants to find it: with a weight file, which none but the loader will read."""
    for entry in Path(weights.gemma_root).resolve().iterdir():
        (folder / entry.name).symlink_to(entry)
    if not any(folder.rglob("model*.safetensors")):
        (folder / "model.safetensors").touch()
    return folder


def _read_through(weights: Weights, ledger: Any) -> None:
    """Let every builder of a ledger read through the weights' own loader."""
    for name, builder in list(vars(ledger).items()):
        if isinstance(builder, Builder):
            setattr(ledger, name, replace(builder, model_loader=weights.loader))
    ledger.text_encoder_builder = replace(ledger.text_encoder_builder, model_path=weights.gemma_shards)


def _on_any_device(device: torch.device) -> AbstractContextManager[Any]:
    """Upstream synchronizes with CUDA whatever its device is; a CPU has nothing to wait for."""
    return nullcontext() if device.type == "cuda" else patch.object(torch.cuda, "synchronize", lambda *_: None)
