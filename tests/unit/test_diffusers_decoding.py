"""diffusers' models whose latents the caller decodes outside of ``no_grad``: the same frames, the graph retained."""

from __future__ import annotations

import pytest
import torch

from i2v_lab.errors import GradScopeError, InvalidRequest
from i2v_lab.paths import data_dir
from i2v_lab.pipeline.contract.architectures import load_architecture
from i2v_lab.pipeline.registry import RUNNERS
from i2v_lab.profiling.records import PhaseRecord
from i2v_lab.reporting.figures.studies import boundaries_figure
from i2v_lab.runs.execute import Mode, execute
from i2v_lab.runs.sources import Observation, Source, small_model_of
from i2v_lab.runs.spec import RunSpec, make_request
from i2v_lab.runs.store import Run
from i2v_lab.studies import localization, no_grad

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of torch, for NumPy
STILL = str(data_dir() / "stills" / "lighthouse.png")
SMALL = {"image": STILL, "steps": 2}
RUNNER = RUNNERS["diffusers"]


def _spec(model, scope="escaped", **asked):
    return RunSpec(request=make_request(model, decode_scope=scope, **SMALL, **asked), model=model, write_video=False)


def _peaks(profiler):
    phases = [record for record in profiler.records if isinstance(record, PhaseRecord)]
    return [(each.phase, each.peak_bytes, each.saved_for_backward_bytes) for each in phases]


def _generate(spec):
    pipeline = RUNNER.pipeline(RUNNER.resolve_weights(spec.architecture, spec.request.variant), "cpu")
    with pipeline(spec.request).video as chunks:
        return torch.cat(list(chunks)), pipeline


@pytest.mark.parametrize("model", ["ltx-video-2b-tiny", "framepack-i2v-tiny"])  # which decodes between its denoising
def test_a_decoding_outside_no_grad_changes_no_frame_and_leaves_the_pipeline_as_it_was(model):
    inside, _ = _generate(_spec(model, "no_grad"))
    outside, pipeline = _generate(_spec(model))
    assert torch.equal(inside, outside)
    assert torch.is_grad_enabled()
    assert "decode" not in vars(pipeline.pipe.vae)
    assert not pipeline.pipe.transformer._forward_pre_hooks
    assert not pipeline(_spec(model, "no_grad").request).video._source.gi_frame.f_locals["video"].requires_grad


def test_its_forecast_equals_a_run_of_it_byte_for_byte_and_differs_in_the_decoding_alone():
    spec = _spec("ltx-video-2b-tiny")
    run, forecast = (_peaks(execute(spec, mode, "cpu")) for mode in (Mode.REAL, Mode.FAKE))
    assert forecast == run
    fixed = _peaks(execute(_spec("ltx-video-2b-tiny", "no_grad"), Mode.FAKE, "cpu"))
    assert run[:-1] == fixed[:-1]
    assert run[-1][0] == fixed[-1][0] == "decode_video"
    assert run[-1][1] - fixed[-1][1] > 0.5 * run[-1][2] > 0 == fixed[-1][2]


def test_no_denoising_is_inside_the_graph_where_a_pipeline_decodes_section_by_section():
    found = _peaks(execute(_spec("framepack-i2v-tiny"), Mode.FAKE, "cpu"))
    assert {phase for phase, _, saved in found if saved} == {"decode_video"}


def test_torch_refuses_inference_mode_around_the_pipeline_alone():
    with pytest.raises(GradScopeError) as caught:
        _generate(_spec("ltx-video-13b-tiny", "inference_mode"))
    assert caught.value.fields == {"decode_scope": "inference_mode"}
    assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == (True, False)


@pytest.mark.parametrize("model", ["cosmos-predict2-2b-video2world-tiny", "ltx-2.5-tiny-diffusion-decoder"])
@pytest.mark.parametrize("scope", ["escaped", "inference_mode"])
def test_a_model_that_decodes_inside_no_grad_whoever_calls_it_is_refused(model, scope):
    with pytest.raises(InvalidRequest) as caught:
        RUNNER.check_request(load_architecture(model), make_request(model, decode_scope=scope, image=STILL))
    assert caught.value.fields == {"decode_scope": scope}


# --- The studies of it ---


def _seen(spec, **peaks):
    phases = [
        PhaseRecord(name.rstrip("_"), None, 0, peak, 0, peak, peak, 0, float(index), 1.0, True)
        for index, (name, peak) in enumerate(peaks.items())
    ]
    metadata = {"device": "cpu", "model": spec.model}
    return Observation(spec, Source.MEASURE, Run(data_dir(), metadata, tuple(phases), "complete"))


def test_sound_that_is_decoded_after_the_video_is_no_excess_elsewhere():
    specs = no_grad.fix_specs(make_request("wan-2.2-ti2v-5b", image=STILL), "wan-2.2-ti2v-5b")
    assert [each.consumer.value for each in specs] == ["plain", "plain"]  # there is no stream to guard
    found = [
        _seen(specs[0], encode_prompt=5, denoise=9, encode_prompt_=5, decode_video=100, decode_audio=120),
        _seen(specs[1], encode_prompt=5, denoise=9, encode_prompt_=5, decode_video=7, decode_audio=2),
    ]
    peaks = no_grad.peaks_by_phase(found)
    modes = ["escaped", "no_grad"]
    assert peaks.columns.to_list() == ["phase", *(f"{mode}_bytes" for mode in modes), *(f"{m}_seconds" for m in modes)]
    twice, once = peaks.set_index("phase").loc[["encode_prompt", "decode_audio"]].to_numpy().tolist()
    assert (twice, once) == ([5, 5, 2.0, 2.0], [120, 2, 1.0, 1.0])
    where = localization.localization_verdict(found)
    assert where["verdict"] == "confirmed"
    assert (where["inside_peak_bytes"], where["gap_bytes"], where["late_excess_bytes"]) == (9, 111, 118)
    fix = no_grad.fix_verdict(found, True, "refused")
    assert (fix["verdict"], fix["excess_phase"], fix["largest_difference_elsewhere_bytes"]) == (
        "confirmed",
        "decode_audio",
        0,
    )
    labels = boundaries_figure(localization.boundaries_table(found)).axes[0].get_xticklabels()
    assert len(labels) == 5  # a phase that ran twice stands there twice


@pytest.mark.parametrize(
    ("model", "small"),
    [
        ("ltx-2.3-22b", "ltx-2.3-tiny"),
        ("ltx-2.3-22b-diffusers", "ltx-2.3-tiny-diffusers"),
        ("ltxv-13b-0.9.8", "ltxv-tiny"),
        ("wan-2.2-ti2v-5b", "wan-2.2-ti2v-5b-tiny"),
        ("svd-xt-tiny", "svd-xt-tiny"),
    ],
)
def test_what_stands_in_for_a_model_on_a_cpu_is_its_own_tiny_one(model, small):
    assert small_model_of(model) == small
