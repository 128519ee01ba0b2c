"""Pipelines that know nothing of this package, profiled by their components' calls alone."""

from __future__ import annotations

import functools
import gc
import itertools
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from i2v_lab import I2VRequest, profile_call, watch
from i2v_lab.cli.app import app
from i2v_lab.errors import GradEscape, InvalidRequest, OutputError, ProfilerError, VramCapExceeded
from i2v_lab.memory_policy import Technique
from i2v_lab.memory_settings import Dtype, MemorySettings
from i2v_lab.pipeline.contract.architectures import load_architecture
from i2v_lab.profiling.components import find_modules, phase_of
from i2v_lab.profiling.phase_profiler import PhaseProfiler
from i2v_lab.profiling.records import GraphRecord, HolderRecord, ModuleRecord, OutOfMemoryRecord, StepRecord
from i2v_lab.runs.store import read_run

MIB = 2**20


class TextEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class Transformer3DModel(TextEncoder):
    pass


class LatentUpsampler(TextEncoder):
    pass


class VideoDecoder(nn.Module):
    """Decodes past its own call, as ltx-core's does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Linear(64, 64)

    def decode(self, x: torch.Tensor, items: int):
        for _ in range(items):
            yield self.conv(x).relu()


class Builds:
    """A pipeline that builds its components when called, and decodes lazily."""

    def __call__(self, steps: int = 3, items: int = 2, fail_at: str = "") -> tuple[Any, torch.Tensor]:
        with torch.no_grad():
            x = TextEncoder()(torch.ones(16, 64))
            time.sleep(0.02)  # the model's weights are read, say
            transformer = Transformer3DModel()
            for step in range(steps):
                x = transformer(x if fail_at != f"step {step}" else torch.ones(1, 3))
            time.sleep(0.01)  # the last step of the scheduler
            x = LatentUpsampler()(x)
            x = transformer(x)
            decoder = VideoDecoder()
        return decoder.decode(x, items), x


def _names(call) -> list[str]:
    return [phase.phase for phase in call.phases]


BUILT = ["encode_prompt", "denoise_stage_1", "upsample_latent", "denoise_stage_2"]


# --- Phases -----------------------------------------------------------------------------------------------------------


def test_phases_follow_one_another_without_a_gap_and_a_lazy_stream_is_followed(tmp_path):
    call = profile_call(Builds(), run_dir=tmp_path / "run")
    assert _names(call) == BUILT
    stream, x = call.result
    time.sleep(0.05)  # nobody's
    items = []
    for item in stream:
        time.sleep(0.02)  # the consumer's, between two items: the phase stays open, as it does with our own pipelines
        items.append(item.requires_grad)
    assert items == [True, True]
    assert x.shape == (16, 64)
    assert _names(call) == [*BUILT, "decode_video"]
    assert sum(phase.seconds for phase in call.phases) == pytest.approx(call.seconds, rel=0.02, abs=0.01)
    ends = [(phase.start_s, phase.start_s + phase.seconds) for phase in call.phases]
    assert all(after[0] - before[1] < 0.01 for before, after in itertools.pairwise(ends[:4]))
    assert ends[4][0] - ends[3][1] >= 0.05
    seconds = {phase.phase: phase.seconds for phase in call.phases}
    assert seconds["denoise_stage_1"] >= 0.03  # its building, and what the scheduler does with what it returned
    assert seconds["decode_video"] >= 0.04
    assert all(phase.completed and phase.parent is None for phase in call.phases)
    assert call.phases[-1].saved_for_backward_bytes == 3 * 16 * 64 * 4  # the input and two results of relu

    steps = [record for record in call.records if isinstance(record, StepRecord)]
    counted = [(step.phase, step.step, step.steps) for step in steps]
    assert counted == [
        *(("denoise_stage_1", step, 3) for step in (1, 2, 3)),
        ("denoise_stage_2", 1, 1),
        *(("decode_video", step, 2) for step in (1, 2)),
    ]
    run = read_run(tmp_path / "run")
    assert run.records == tuple(call.records)
    assert (run.status, run.metadata["model"], run.metadata["request"]) == ("complete", "Builds", {})
    shown = CliRunner().invoke(app, ["show", str(tmp_path / "run")])
    assert "denoise_stage_2" in shown.output
    assert "Builds, on cpu" in shown.output


def test_what_lies_between_two_calls_is_charged_to_one_of_them():
    class Holds:
        def __init__(self) -> None:
            self.text_encoder, self.video_encoder, self.transformer = (nn.Linear(64, 64) for _ in range(3))

        @torch.no_grad()
        def __call__(self, after: str) -> None:
            for name in ("text_encoder", "video_encoder", "transformer", "transformer", "video_encoder"):
                getattr(self, name)(torch.ones(1, 64))
                if name == after:
                    torch.ones(MIB)

    def large(after: str) -> list[str]:
        phases = profile_call(Holds(), after).phases
        assert [phase.phase for phase in phases] == [
            "encode_prompt",
            "encode_image",
            "denoise_stage_1",
            "encode_image",
        ]
        return [f"{number} {phase.phase}" for number, phase in enumerate(phases) if phase.peak_bytes > 4 * MIB]

    assert large("nothing") == []
    assert large("text_encoder") == ["1 encode_image"]  # which it prepares
    assert large("video_encoder") == ["2 denoise_stage_1", "3 encode_image"]  # after the last call there is no other
    assert large("transformer") == ["2 denoise_stage_1"]  # what it returned is worked on


def test_parts_called_past_their_component_are_named_below_it():
    call = profile_call(Builds())
    list(call.result[0])
    graph = {record.module: record.nbytes for record in call.records if isinstance(record, GraphRecord)}
    size = 16 * 64 * 4  # relu is called outside of any part, on behalf of the component called last
    assert graph == {"video_decoder": 2 * size, "video_decoder.conv": size}
    modules = {r.module: r.category for r in call.records if isinstance(r, ModuleRecord) and r.phase == "decode_video"}
    assert modules["video_decoder.conv"] == "weight"
    at_denoise = [r for r in call.records if isinstance(r, HolderRecord) and r.phase == "denoise_stage_1"]
    assert {"transformer3d_model.layer", "text_encoder.layer"} & {record.module for record in at_denoise}


def test_a_stream_that_is_left_early_ends_the_profile_and_says_so():
    with profile_call(Builds(), items=5) as call:
        next(call.result[0])
    assert (_names(call)[-1], call.phases[-1].completed) == ("decode_video", False)
    assert call.phases[-1].seconds <= call.seconds
    with profile_call(Builds()) as unread, pytest.raises(ProfilerError) as caught:
        profile_call(Builds())
    assert caught.value.fields["state"] == "another active"
    assert _names(unread) == BUILT  # nothing was decoded, so nothing is said of it
    with PhaseProfiler(), pytest.raises(ProfilerError) as caught:
        profile_call(Builds())
    assert caught.value.fields["state"] == "another active"


def test_an_error_ends_the_phase_it_came_from_and_fails_the_run(tmp_path):
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        profile_call(Builds(), fail_at="step 1", run_dir=tmp_path / "run")
    run = read_run(tmp_path / "run")
    assert run.status == "failed"
    phases = run.frame("phase")
    assert list(phases["phase"]) == ["encode_prompt", "denoise_stage_1"]
    assert list(phases["completed"]) == [True, False]
    with pytest.raises(OutputError, match="is not empty"):
        profile_call(Builds(), run_dir=tmp_path / "run")
    assert not torch.nn.modules.module._global_forward_pre_hooks
    assert not torch.nn.modules.module._global_module_registration_hooks
    call = profile_call(Builds())  # the next one is as if nothing had been
    call.close()
    assert _names(call) == BUILT


def test_a_cap_names_the_phase_and_the_module(tmp_path):
    with pytest.raises(VramCapExceeded) as caught:
        profile_call(Builds(), run_dir=tmp_path / "run", vram_cap_bytes=40_000)
    assert caught.value.fields["phase"] == "upsample_latent"
    (record,) = read_run(tmp_path / "run").of(OutOfMemoryRecord)
    assert record.phase == "upsample_latent"
    assert record.module == "latent_upsampler.layer"


def test_a_stream_that_fails_fails_the_run(tmp_path):
    def lazily():
        yield torch.ones(1)
        raise ValueError("no more frames")

    call = profile_call(lambda: {"frames": lazily()}, run_dir=tmp_path / "run")
    assert next(call.result["frames"]).item() == 1
    with pytest.raises(ValueError, match="no more frames"):
        next(call.result["frames"])
    assert (call.phases[-1].phase, call.phases[-1].completed) == ("decode_video", False)
    assert read_run(tmp_path / "run").metadata["error"] == "ValueError: no more frames"


class Pair(NamedTuple):
    video: Any
    audio: Any


@dataclass(frozen=True)
class Output:
    frames: Any
    rate: int = 24


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: (s, 1), lambda s: [s], lambda s: {"a": (s,)}, Pair, Output])
def test_a_stream_is_found_wherever_a_result_holds_it(wrap):
    made = wrap if wrap not in (Pair,) else lambda s: Pair(s, 48_000)
    call = profile_call(lambda: made(iter([torch.ones(2), torch.ones(2)])))
    assert type(call.result) is type(made(1)) or call._streams == [call.result]
    (stream,) = call._streams
    assert [item.numel() for item in stream] == [2, 2]
    assert list(stream) == []
    assert _names(call) == ["call", "decode_video"]


def test_what_holds_no_known_component_is_one_phase(still):
    layer = nn.Linear(256, 256)
    call = profile_call(layer, torch.ones(4, 256))
    assert _names(call) == ["call"]
    assert call.peak.saved_for_backward_bytes == 4 * 256 * 4
    assert call.result.shape == (4, 256)
    assert "the peak is" in call._repr_html_()
    call = profile_call(functools.partial(torch.ones, 1024))
    assert (_names(call), call.peak.peak_bytes) == (["call"], 4096)


def test_a_profiler_that_is_active_is_used_and_left_open():
    with PhaseProfiler() as profiler, profiler.phase("outer"):
        call = profile_call(Builds(), profiler=profiler)
        list(call.result[0])
    assert [(each.phase, each.parent) for each in profiler.phases] == [
        *((name, "outer") for name in [*BUILT, "decode_video"]),
        ("outer", None),
    ]
    assert call.records is profiler.records


def test_the_profile_holds_no_tensor():
    call = profile_call(Builds())
    stream, x = call.result
    list(stream)
    call.result = None
    reference = x.untyped_storage()._cdata
    del stream, x
    gc.collect()
    alive = [each for each in gc.get_objects() if type(each) is torch.Tensor]
    assert reference not in {tensor.untyped_storage()._cdata for tensor in alive}


# --- Names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("component", "part", "package", "phase"),
    [
        (["gemma_text_encoder", "GemmaTextEncoder"], [], "ltx_core.text_encoders.gemma", "encode_prompt"),
        (["embeddings_processor", "EmbeddingsProcessor"], [], "ltx_core.text_encoders.gemma.x", "encode_prompt"),
        (["text_encoder", "T5EncoderModel"], [], "transformers.models.t5.modeling_t5", "encode_prompt"),
        (["prompt_enhancer", "LlamaForCausalLM"], [], "transformers.models.llama", "encode_prompt"),
        (["connectors", "LTX2TextConnectors"], [], "diffusers.pipelines.ltx2.connectors", "encode_prompt"),
        (["image_encoder", "CLIPVisionModel"], [], "transformers.models.clip", "encode_image"),
        (["video_encoder", "VideoEncoder"], ["conv_in", "CausalConv3d"], "ltx_core.model.video_vae", "encode_image"),
        (["vae", "AutoencoderKLLTX2Video"], ["encoder", "LTX2VideoEncoder3d"], "diffusers.models", "encode_image"),
        (["vae", "AutoencoderKLLTX2Video"], ["decoder", "LTX2VideoDecoder3d"], "diffusers.models", "decode_video"),
        (["vae", "CausalVideoAutoencoder"], ["decoder", "Decoder"], "ltx_video.models", "decode_video"),
        (["video_decoder", "VideoDecoder"], ["up_blocks", "ModuleList"], "ltx_core.model", "decode_video"),
        (["vae", "AutoencoderKLQwenImage"], ["decoder", "QwenImageDecoder3d"], "diffusers.models", "decode_video"),
        (["vae", "AutoencoderKL"], ["quant_conv", "Conv2d"], "diffusers.models.autoencoders", None),
        (["transformer", "QwenImageTransformer2DModel"], [], "diffusers.models.transformers", "denoise"),
        (["x0_model", "X0Model"], [], "ltx_core.model.transformer.model", "denoise"),
        (["unet", "UNet3DConditionModel"], [], "diffusers.models.unets", "denoise"),
        (["latent_upsampler", "LatentUpsampler"], [], "ltx_core.model.upsampler", "upsample_latent"),
        (["audio_vae", "AutoencoderKLLTX2Audio"], ["decoder", "LTX2AudioDecoder"], "diffusers", "decode_audio"),
        (["audio_encoder", "AudioEncoder"], [], "ltx_core.model.audio_vae", "encode_audio"),
        (["vocoder", "LTX2Vocoder"], [], "diffusers.pipelines.ltx2.vocoder", "decode_audio"),
        (["safety_checker", "StableDiffusionSafetyChecker"], [], "diffusers.pipelines", None),
        (["Linear", "Linear"], [], "torch.nn.modules.linear", None),
    ],
)
def test_a_components_names_decide_its_phase(component, part, package, phase):
    assert phase_of(component, part, package) == phase


def test_modules_are_found_in_whatever_holds_them():
    vae, unet = nn.Linear(1, 1), nn.Linear(1, 1)

    class Pipeline:
        def __init__(self) -> None:
            self.vae, self.parts, self.loop = vae, {"unet": unet, "again": vae}, self

        def run(self) -> None: ...

    pipeline = Pipeline()
    expected = {"vae": vae, "unet": unet}
    assert find_modules(pipeline) == expected
    assert find_modules(pipeline.run) == expected
    assert find_modules(lambda: pipeline) == expected
    assert find_modules(functools.partial(print, pipeline)) == expected
    assert find_modules([vae, unet]) == {"linear": vae, "linear_2": unet}
    assert find_modules(3, "text", torch.ones(1)) == {}


def test_watch_guards_every_component_of_a_pipeline():
    class Pipeline:
        def __init__(self) -> None:
            self.vae = nn.Sequential(nn.Linear(2, 2))
            self.unet = nn.Linear(2, 2)

    pipeline = Pipeline()
    with watch(pipeline) as handle:
        assert not pipeline.unet(pipeline.vae(torch.ones(2))).requires_grad
    assert handle.escaped == ["vae.0", "unet"]
    with watch(pipeline, "raise"), pytest.raises(GradEscape) as escape:
        pipeline.vae(torch.ones(2))
    assert escape.value.fields == {"module": "vae.0"}
    assert pipeline.unet(torch.ones(2)).requires_grad
    with pytest.raises(ProfilerError) as refused:
        watch(Builds())
    assert refused.value.fields == {"type": "Builds"}


class BlockVideoDecoder(nn.Module):
    """Runs a slice of its blocks, which is a list of its own for as long."""

    def __init__(self) -> None:
        super().__init__()
        self.upsamplers = nn.ModuleList([LatentUpsampler() for _ in range(3)])

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.upsamplers[:-1]:
            x = block(x)
        return x


def test_a_slice_of_a_module_list_changes_no_owner():
    decoder = BlockVideoDecoder()
    with torch.no_grad():
        call = profile_call(decoder.decode, torch.ones(4, 64))
    assert _names(call) == ["decode_video"]


# --- diffusers --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def diffusers_tiny():
    from i2v_lab.pipeline.diffusers.ltx2 import DiffusersLTX2
    from i2v_lab.pipeline.diffusers.weights import resolve_weights

    in_float32 = MemorySettings(dtypes=(("default", Dtype.FLOAT32),))
    return DiffusersLTX2(resolve_weights(load_architecture("ltx-2-tiny")), settings=in_float32)


DIFFUSERS = ["encode_prompt", "encode_image", "denoise_stage_1", "upsample_latent", "encode_prompt", "denoise_stage_2"]


def test_diffusers_ltx2_tells_its_phases_peaks_and_steps(diffusers_tiny, still, tmp_path):
    request = I2VRequest(image=str(still), prompt="waves", width=128, height=64, frames=9, fps=120)
    call = profile_call(diffusers_tiny.run, request, run_dir=tmp_path / "run")
    assert _names(call) == [*DIFFUSERS, "decode_video", "decode_audio"]
    assert sum(phase.seconds for phase in call.phases) == pytest.approx(call.seconds, rel=0.02)
    assert call.result[0].shape == (1, 9, 3, 64, 128)
    steps = [r.phase for r in call.records if isinstance(r, StepRecord)]
    assert steps == ["denoise_stage_1"] * 8 + ["denoise_stage_2"] * 3
    weights = sum(
        tensor.nbytes
        for module in find_modules(diffusers_tiny.run).values()
        for tensor in {id(t): t for t in (*module.parameters(), *module.buffers())}.values()
    )
    assert all(phase.start_bytes >= 0.95 * weights for phase in call.phases)  # all components stay resident
    assert all(phase.saved_for_backward_bytes == 0 for phase in call.phases)  # its own no_grad, though grad is on here
    holders = {r.module.partition(".")[0] for r in call.records if isinstance(r, ModuleRecord)}
    assert {"vae", "transformer", "text_encoder", "connectors", "vocoder", "latent_upsampler"} <= holders
    assert read_run(tmp_path / "run").metadata["package"] == "i2v_lab"


def test_a_technique_of_another_runner_is_refused_by_diffusers_pipeline():
    from i2v_lab.pipeline.diffusers.ltx2 import DiffusersLTX2
    from i2v_lab.pipeline.diffusers.weights import resolve_weights

    with pytest.raises(InvalidRequest) as refused:
        DiffusersLTX2(resolve_weights(load_architecture("ltx-2-tiny")), techniques=frozenset({Technique.ROW_BANDS}))
    assert refused.value.fields == {"technique": "row_bands"}


def test_diffusers_ltx2_leaks_a_graph_where_the_caller_decodes(diffusers_tiny, still):
    request = I2VRequest(image=str(still), width=128, height=64, frames=9, fps=120)
    latents = profile_call(diffusers_tiny.run, request, "latent").result[0]
    vae = diffusers_tiny.generate.vae
    kept = profile_call(vae.decode, latents)
    assert _names(kept) == ["decode_video"]
    graph = {r.module: r.nbytes for r in kept.records if isinstance(r, GraphRecord)}
    assert sum(graph.values()) == kept.peak.saved_for_backward_bytes > MIB
    assert all("decoder" in module for module in graph)
    with torch.no_grad():
        free = profile_call(vae.decode, latents)
    assert (_names(free), free.peak.saved_for_backward_bytes) == (["decode_video"], 0)
    with watch(diffusers_tiny.generate):
        assert profile_call(vae.decode, latents).peak.saved_for_backward_bytes == 0
