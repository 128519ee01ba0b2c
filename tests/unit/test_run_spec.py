"""One spec for every run: what its runner lacks is refused before anything runs, and a record says what really ran."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from i2v_lab.errors import DeviceUnavailable, GradScopeError, I2VLabError, InvalidRequest, RecordError, UnknownModel
from i2v_lab.memory_policy import NEEDS, TECHNIQUES, MemoryPolicy, Technique, policy_of
from i2v_lab.memory_settings import MemorySettings
from i2v_lab.paths import data_dir
from i2v_lab.pipeline.contract.architectures import load_architecture
from i2v_lab.pipeline.registry import RUNNERS
from i2v_lab.profiling.records import GenerationRecord, OutOfMemoryRecord, PhaseRecord
from i2v_lab.request import DecodeScope, I2VRequest, Tiling
from i2v_lab.runs.execute import Hooks, Mode, execute
from i2v_lab.runs.interleaved import BASELINE, policy_arms, profiler_arms, ratio_table, run_interleaved
from i2v_lab.runs.plans import load_plan
from i2v_lab.runs.recorded import recorded_runs, spec_of
from i2v_lab.runs.sources import as_run
from i2v_lab.runs.spec import DEFAULT_STILL, ProfilerMode, RunSpec, make_request
from i2v_lab.runs.store import Run, RunWriter, read_run

LEAN = {"shared_modulations", "token_chunks", "text_only", "feature_chunks", "blend_in_place", "row_bands"}
STREAMED = LEAN | {"streamed_text", "streamed_transformer", "streamed_vae"}
TILING = {"tile_px": 768, "tile_overlap_px": 64, "tile_frames": 80, "tile_overlap_frames": 24}


def _tiny(model: str, **changes: Any) -> RunSpec:
    asked = {"width": 64, "height": 64, "frames": 9, "fps": 120}
    own = {name: changes.pop(name) for name in list(changes) if name in I2VRequest.__dataclass_fields__}
    return RunSpec(request=make_request(model, **{**asked, **own}), model=model, **changes)


# --- Techniques of the policies ---


def test_policies_are_the_sets_that_recorded_runs_were_measured_with():
    """A technique that is added joins no policy by itself."""
    named = {policy.value: {technique.value for technique in own} for policy, own in TECHNIQUES.items()}
    assert named == {"resident": set(), "lean": LEAN, "streamed": STREAMED}
    assert {technique.value for technique in Technique} >= STREAMED
    for policy, own in TECHNIQUES.items():
        assert policy_of(own) is policy
        for technique in set(Technique) - own:
            assert policy_of(own | {technique}) is not policy


# --- Refusals ---

DIFFUSERS = {"model": "ltx-2-tiny"}
UPSTREAM = {"pipeline": "ltx-pipelines"}
LTX_VIDEO = {"model": "ltxv-tiny"}
UNSUPPORTED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({**UPSTREAM, "memory": "lean"}, {"memory": "lean"}),
    ({**UPSTREAM, "memory": "streamed"}, {"memory": "streamed"}),
    *(({**UPSTREAM, "techniques": [name]}, {"technique": name}) for name in sorted(STREAMED - set(NEEDS))),
    ({**DIFFUSERS, "variant": "dev"}, {"variant": "dev"}),
    ({**DIFFUSERS, "consumer": "guarded"}, {"consumer": "guarded"}),
    ({**DIFFUSERS, "consumer": "left_open"}, {"consumer": "left_open"}),
    ({**DIFFUSERS, "generations": 3}, {"generations": 3}),
    ({**DIFFUSERS, "tiling": TILING}, {"tiling": Tiling()}),
    ({**DIFFUSERS, "quantization": "fp8-cast"}, {"quantization": "fp8-cast"}),
    ({**DIFFUSERS, "memory": "lean"}, {"memory": "lean"}),
    ({**DIFFUSERS, "memory": "streamed"}, {"memory": "streamed"}),
    ({**DIFFUSERS, "techniques": ["row_bands"]}, {"technique": "row_bands"}),
    ({**DIFFUSERS, "settings": {"offload": "disk"}}, {"offload": "disk"}),
    ({**DIFFUSERS, "settings": {"offload": "model", "offload_stream": True}}, {"offload_stream": True}),
    ({**DIFFUSERS, "settings": {"offload": "group-leaf", "offload_blocks": 2}}, {"offload_blocks": 2}),
    (
        {**DIFFUSERS, "settings": {"vae_tile": {"tile_sample_min_height": 64}}},
        {"vae_tile": {"tile_sample_min_height": 64}},
    ),
    ({**DIFFUSERS, "settings": {"dtypes": {"vae": "int8"}}}, {"vae": "int8"}),
    ({**DIFFUSERS, "settings": {"dtypes": {"unet": "float32"}}}, {"unet": "float32"}),
    ({**DIFFUSERS, "settings": {"speed": 1}}, {"settings": {"speed": 1}}),
    ({**DIFFUSERS, "steps": 0}, {"steps": 0}),
    ({"steps": 4}, {"steps": 4}),
    ({**UPSTREAM, "steps": 4}, {"steps": 4}),
    ({**LTX_VIDEO, "settings": {"vae_tiling": True}}, {"settings": MemorySettings(vae_tiling=True).to_json()}),
    ({**DIFFUSERS, "profiler": "boundaries"}, {"profiler": "boundaries"}),
    ({**DIFFUSERS, "profiler": False}, {"profiler": "off"}),  # as YAML reads off
    ({**DIFFUSERS, "pipeline": "ltx-2"}, {"pipeline": "ltx-2", "model": "ltx-2-tiny"}),
    ({**DIFFUSERS, **UPSTREAM}, {"pipeline": "ltx-pipelines", "model": "ltx-2-tiny"}),
    ({"model": "ltx-2.3-22b", "pipeline": "diffusers"}, {"pipeline": "diffusers", "model": "ltx-2.3-22b"}),
    ({"techniques": ["model_offload"]}, {"technique": "model_offload"}),
    ({"settings": {"offload": "model"}}, {"settings": MemorySettings(offload="model").to_json()}),
    ({"techniques": ["token_chunks"]}, {"technique": "token_chunks"}),
    ({"memory": "lean", "techniques": ["row_bands"]}, {"memory": "lean", "techniques": ["row_bands"]}),
    ({"techniques": ["streamed_text"]}, {"technique": "streamed_text"}),
    ({**LTX_VIDEO, "techniques": ["row_bands"]}, {"technique": "row_bands"}),
    ({**LTX_VIDEO, "tiling": TILING}, {"tiling": Tiling()}),
    ({**LTX_VIDEO, "quantization": "fp8-cast"}, {"quantization": "fp8-cast"}),
    ({**LTX_VIDEO, "memory": "streamed"}, {"memory": "streamed"}),
    ({**LTX_VIDEO, **UPSTREAM}, {"pipeline": "ltx-pipelines", "model": "ltxv-tiny"}),
    ({"model": "ltxv-2b-0.9.8-distilled", "variant": "dev"}, {"variant": "dev"}),
    ({"memory": "auto"}, {"memory": "auto"}),
    ({"pipeline": "comfy"}, {"pipeline": "comfy"}),
    ({"pipeline": "diffusers, model offloading"}, {"pipeline": "diffusers, model offloading"}),
    ({"consumer": "nobody"}, {"consumer": "nobody"}),
    ({"profiler": "half"}, {"profiler": "half"}),
    ({"techniques": ["magic"]}, {"technique": "magic"}),
    ({"model": "ltx-9"}, {"model": "ltx-9"}),
    ({"generations": 0}, {"generations": 0}),
    ({"generations": True}, {"generations": True}),
    ({"vram_cap_gib": 0}, {"vram_cap_bytes": 0}),
]
SIZE = {"width": 64, "height": 64, "frames": 9, "expected_seconds": 1}


def _plan(path: Path, run: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump({"groups": [{"runs": [{"model": "ltx-2.3-tiny", **SIZE, **run}]}]}))
    return path


@pytest.mark.parametrize(("run", "fields"), UNSUPPORTED, ids=[str(run) for run, _ in UNSUPPORTED])
def test_what_is_not_supported_is_refused_by_the_plan_and_by_the_spec_with_the_value(tmp_path, run, fields):
    with pytest.raises(InvalidRequest) as refused:
        load_plan(_plan(tmp_path / "plan.yaml", run))
    assert refused.value.fields == fields
    assert "\n" not in str(refused.value)
    assert "group 1, run 1: " in str(refused.value)
    spec = {
        name: value for name, value in run.items() if name not in ("pipeline", "vram_cap_gib", "tiling", "profiler")
    }
    spec |= {"runner": run["pipeline"]} if "pipeline" in run else {}
    spec |= {"vram_cap_bytes": run["vram_cap_gib"]} if "vram_cap_gib" in run else {}
    spec |= {"tiling": Tiling(**run["tiling"])} if "tiling" in run else {}
    spec |= {"profiler": run["profiler"] or "off"} if "profiler" in run else {}
    with pytest.raises((InvalidRequest, UnknownModel)) as refused:
        _tiny(spec.pop("model", "ltx-2.3-tiny"), **spec)
    assert refused.value.fields == fields


def test_nothing_is_loaded_to_refuse_a_plan(tmp_path):
    plans = [str(_plan(tmp_path / f"{number}.yaml", run)) for number, (run, _) in enumerate(UNSUPPORTED)]
    code = (
        "import sys\nfrom i2v_lab.errors import InvalidRequest\nfrom i2v_lab.runs.plans import load_plan\n"
        f"for path in {plans!r}:\n"
        "    try: load_plan(path)\n"
        "    except InvalidRequest: continue\n"
        "    raise SystemExit(f'{path} was not refused')\n"
        "libraries = {'torch', 'diffusers', 'transformers', 'ltx_core', 'ltx_pipelines', 'ltx_video'}\n"
        "sys.exit(repr(sorted(libraries & set(sys.modules))) if libraries & set(sys.modules) else 0)\n"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (child.returncode, child.stderr) == (0, "")


def test_the_command_refuses_a_bad_plan_with_one_line_and_status_2(tmp_path):
    plan = _plan(tmp_path / "bad.yaml", {"model": "ltx-2.5-tiny-diffusion-decoder", "decode_scope": "escaped"})
    command = [sys.executable, "-m", "i2v_lab.cli", "measure", "--plan", str(plan), "--out", str(tmp_path / "out")]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (child.returncode, child.stdout) == (2, "")
    (line,) = child.stderr.splitlines()
    assert "decode_scope='escaped'" in line
    assert not (tmp_path / "out").exists()


# What each runner supports, said a second time. The first of each is the default of its models.
MODELS = {"ltx-2": "ltx-2.3-tiny", "ltx-pipelines": "ltx-2.3-tiny", "ltx-video": "ltxv-tiny", "diffusers": "ltx-2-tiny"}
WHOLE: dict[str, tuple[Any, ...]] = {
    "quantization": ("fp8-cast", "bf16"),
    "variant": ("distilled", "dev"),
    "decode_scope": ("no_grad", "escaped", "inference_mode"),
    "memory": ("resident", "lean", "streamed"),
    "tiling": (Tiling(), None, Tiling(64, 32, 16, 8)),
    "consumer": ("plain", "guarded", "left_open"),
    "generations": (1, 2, 5),
    "profiler": ("full", "boundaries", "off", "none"),
    "vram_cap_bytes": (None, 1, 2**30),
    "write_video": (True, False),
}
UNTILED_BF16 = {"quantization": ("bf16",), "tiling": (None,), "memory": ("resident",)}
SUPPORTED: dict[str, dict[str, tuple[Any, ...]]] = {
    "ltx-2": WHOLE,
    "ltx-pipelines": {**WHOLE, "memory": ("resident",)},
    "ltx-video": {**WHOLE, **UNTILED_BF16},
    "diffusers": {
        **WHOLE,
        **UNTILED_BF16,
        "variant": ("distilled",),
        "consumer": ("plain",),
        "generations": (1,),
        "profiler": ("full", "none"),  # phases are found, so all of them or none
    },
}
SUPPORTED_TECHNIQUES = {"ltx-2": STREAMED, "ltx-pipelines": set(), "ltx-video": set(), "diffusers": set()}
ANYTHING = {**WHOLE, "memory": (*WHOLE["memory"], "auto"), "generations": (*WHOLE["generations"], 0, -1)}
TECHNIQUE_SETS = st.none() | st.sets(st.sampled_from(sorted(STREAMED)), max_size=4).map(sorted)


def _consistent(techniques: list[str]) -> bool:
    return all(needed in techniques for name, needed in NEEDS.items() if name in techniques)


def _outcome(make: Callable[[], RunSpec]) -> tuple[RunSpec | None, I2VLabError | None]:
    try:
        return make(), None
    except I2VLabError as error:
        return None, error


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_spec_is_refused_or_names_exactly_what_was_asked(data):
    """Starts from what the model's runner supports, and changes up to three things to anything."""
    home = data.draw(st.sampled_from(sorted(MODELS)), "home")
    asked = {name: data.draw(st.sampled_from(choices), name) for name, choices in SUPPORTED[home].items()}
    asked |= {
        name: data.draw(st.sampled_from(ANYTHING[name]))
        for name in data.draw(st.sets(st.sampled_from(sorted(ANYTHING)), max_size=2))
    }
    runner = data.draw(st.sampled_from([home, home, home, *RUNNERS]), "runner")
    own = SUPPORTED_TECHNIQUES[runner]
    mostly_own = st.sets(st.sampled_from(sorted(own)), max_size=3).map(sorted) if own else st.just([])
    techniques = data.draw(st.none() | mostly_own | TECHNIQUE_SETS, "techniques")

    _check_refused_or_named(home, runner, asked, techniques)


@pytest.mark.parametrize("home", sorted(MODELS))
def test_every_single_choice_is_supported_or_refused_as_said(home):
    plain = {name: choices[0] for name, choices in SUPPORTED[home].items()}
    for name, choices in ANYTHING.items():
        for value in choices:
            _check_refused_or_named(home, home, {**plain, name: value}, None)
    for runner in RUNNERS:
        for technique in [None, *sorted(STREAMED)]:
            _check_refused_or_named(home, runner, plain, technique and [technique])


def _check_refused_or_named(home: str, runner: str, asked: dict[str, Any], techniques: list[str] | None) -> None:
    model, own, asked = MODELS[home], SUPPORTED_TECHNIQUES[runner], dict(asked)
    right = load_architecture(model).runner == RUNNERS[runner].models
    right &= all(asked[name] in SUPPORTED[runner][name] for name in asked)
    if techniques is not None:
        right &= set(techniques) <= own and _consistent(techniques)
        policy = {"lean": LEAN, "streamed": STREAMED}.get(asked["memory"])
        right &= policy is None or policy == set(techniques)
    request = {name: asked.pop(name) for name in ("quantization", "variant", "decode_scope", "memory", "tiling")}
    spec, error = _outcome(
        lambda: RunSpec(
            request=make_request(model, **{**request, "width": 64, "height": 64, "frames": 9}),
            model=model,
            runner=runner,
            techniques=techniques,
            **asked,
        )
    )
    assert (error is None) is right
    if error is not None:
        assert "\n" not in str(error)
        given_values = {**request, **asked, "pipeline": runner, "model": model}
        assert error.fields
        for name, value in error.fields.items():
            if name == "techniques":
                assert value == sorted(techniques)
            else:
                assert value in techniques if name == "technique" else value == given_values[name]
        return
    values = json.loads(json.dumps(spec.to_json()))
    assert RunSpec.from_json(values) == spec
    if techniques is None:
        techniques = sorted({"resident": set(), "lean": LEAN, "streamed": STREAMED}[request["memory"]])
    tiling = request["tiling"] and {name: getattr(request["tiling"], name) for name in TILING}
    assert values.pop("request").items() >= {**request, "tiling": tiling, "width": 64, "height": 64}.items()
    assert values == {"model": model, "runner": runner, "techniques": techniques, **asked}


def test_a_change_of_policy_changes_the_techniques_and_no_other_change_does():
    spec = _tiny("ltx-2.3-tiny", techniques=["row_bands"])
    assert spec.with_request(frames=17).techniques == {Technique.ROW_BANDS}
    assert spec.with_request(memory="lean").techniques == TECHNIQUES[MemoryPolicy.LEAN]
    assert spec.with_request(memory="lean").policy is MemoryPolicy.LEAN
    assert spec.policy is None


# --- Fake and real ---


def _phases(records: Any) -> list[tuple[str, str | None, bool]]:
    phases = sorted((each for each in records if isinstance(each, PhaseRecord)), key=lambda phase: phase.start_s)
    return [(phase.phase, phase.parent, phase.completed) for phase in phases]


@pytest.fixture(scope="module")
def by_diffusers(_cache, tmp_path_factory) -> tuple[RunSpec, Run]:
    spec, folder = _tiny("ltx-2-tiny", write_video=False), tmp_path_factory.mktemp("diffusers") / "run"
    execute(spec, Mode.REAL, "cpu", run_dir=folder)
    return spec, read_run(folder)


@pytest.fixture(scope="module")
def guarded(tiny, tmp_path_factory) -> tuple[RunSpec, Run]:
    """The defect, with the consumer guarded, twice; both videos are written."""
    folder = tmp_path_factory.mktemp("guarded")
    spec = _tiny(
        "ltx-2.3-tiny",
        decode_scope="escaped",
        consumer="guarded",
        generations=2,
        techniques=["row_bands", "blend_in_place"],
    )
    videos = lambda number: folder / f"{number}.mp4"  # noqa: E731
    execute(spec, Mode.REAL, "cpu", weights=tiny, run_dir=folder / "run", video_path=videos)
    return spec, read_run(folder / "run")


def test_a_run_of_diffusers_is_recorded_as_the_model_and_numbers_that_ran(by_diffusers):
    spec, run = by_diffusers
    assert run.status == "complete"
    known = run.metadata
    assert (known["model"], known["runner"]) == ("ltx-2-tiny", "diffusers")
    assert (known["request"]["quantization"], known["request"]["tiling"]) == ("bf16", None)
    assert known["spec"]["techniques"] == []
    assert known["spec"]["request"] == known["request"]
    assert set(known["versions"]) == {"python", "i2v-lab", *RUNNERS["diffusers"].packages}
    assert all(known["versions"].values())
    assert spec_of(run) == spec
    assert str(data_dir()) not in json.dumps(known)  # the still by the name it was asked by


def test_a_record_names_its_techniques_sorted_and_its_consumer_and_generations(guarded):
    spec, run = guarded
    assert run.status == "complete"
    assert run.metadata["spec"]["techniques"] == ["blend_in_place", "row_bands"]
    assert (run.metadata["spec"]["consumer"], run.metadata["spec"]["generations"]) == ("guarded", 2)
    assert spec_of(run) == spec
    assert [record.generation for record in run.of(GenerationRecord)] == [1, 2]
    assert max(phase.saved_for_backward_bytes for phase in run.of(PhaseRecord)) == 0  # which the guard is for
    assert all((run.folder.parent / name).stat().st_size > 1000 for name in ("1.mp4", "2.mp4"))


def test_fake_and_real_runs_of_a_spec_have_the_same_phases(by_diffusers, guarded):
    for spec, run in (by_diffusers, guarded):
        profiler = execute(spec, Mode.FAKE, "cpu")
        assert _phases(profiler.records) == _phases(run.records)
        fake = [phase.peak_bytes for phase in profiler.phases]
        assert fake == pytest.approx([phase.peak_bytes for phase in run.of(PhaseRecord)], rel=1e-3)


def test_a_stream_left_open_is_recorded_as_such(tiny, tmp_path):
    tiling = Tiling(64, 32, 16, 8)
    spec = _tiny(
        "ltx-2.3-tiny", frames=25, tiling=tiling, consumer="left_open", profiler="boundaries", write_video=False
    )
    seen = []
    hooks = Hooks(sinks=[seen.append])
    execute(spec, Mode.REAL, "cpu", weights=tiny, run_dir=tmp_path / "run", hooks=hooks)
    run = read_run(tmp_path / "run")
    assert spec_of(run) == spec
    assert (run.metadata["spec"]["consumer"], run.metadata["spec"]["profiler"]) == ("left_open", "boundaries")
    assert run.status == "complete"
    assert len(seen) > 7


def test_a_run_out_of_memory_below_its_cap_and_one_that_torch_refuses_are_recorded_as_failed(tiny, tmp_path):
    capped = _tiny("ltx-2.3-tiny", vram_cap_bytes=2**20, write_video=False)
    with pytest.raises(Exception) as failed:
        execute(capped, Mode.REAL, "cpu", weights=tiny, run_dir=tmp_path / "capped")
    run = read_run(tmp_path / "capped")
    assert (run.status, spec_of(run)) == ("failed", capped)
    assert run.metadata["error"].startswith(type(failed.value).__name__)
    assert [record.cap_bytes for record in run.of(OutOfMemoryRecord)] == [2**20]
    assert recorded_runs(tmp_path).find_capped(replace(capped, vram_cap_bytes=None)) == [run]

    refused = _tiny("ltx-2.3-tiny", decode_scope="inference_mode", write_video=False)
    with pytest.raises(GradScopeError):
        execute(refused, Mode.REAL, "cpu", weights=tiny, run_dir=tmp_path / "refused")
    run = read_run(tmp_path / "refused")
    assert (run.status, spec_of(run)) == ("failed", refused)
    assert run.metadata["error"].startswith("GradScopeError")


def test_without_a_profiler_nothing_is_recorded(tiny, tmp_path):
    spec = _tiny("ltx-2.3-tiny", profiler="none")
    assert execute(spec, Mode.REAL, "cpu", weights=tiny, run_dir=tmp_path / "run") is None
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("device", ["tpu", "cuda:1", "auto", ""])
def test_a_device_that_cannot_be_forecast_is_refused(device):
    with pytest.raises(DeviceUnavailable) as refused:
        execute(_tiny("ltx-2.3-tiny"), Mode.FAKE, device)
    assert refused.value.fields == {"device": device}


def test_a_run_that_is_given_no_path_for_its_videos_is_recorded_as_writing_none(tiny, tmp_path):
    execute(_tiny("ltx-2.3-tiny"), Mode.REAL, "cpu", weights=tiny, run_dir=tmp_path / "run")
    assert spec_of(read_run(tmp_path / "run")) == _tiny("ltx-2.3-tiny", write_video=False)


@pytest.mark.parametrize("offload", ["model", "sequential", "group-leaf", "group-block"])
def test_offloading_is_not_forecast_where_there_is_one_memory(offload):
    with pytest.raises(InvalidRequest) as refused:
        execute(_tiny("ltx-2-tiny", settings=MemorySettings(offload=offload)), Mode.FAKE, "cpu")
    assert refused.value.fields == {"offload": offload}


# --- Interleaved ---


def test_arms_change_places_from_round_to_round_and_the_baseline_is_its_own_measure(tiny):
    import torch

    request = _tiny("ltx-2.3-tiny").request
    every = profiler_arms(request, "ltx-2.3-tiny")
    arms = {name: every[name] for name in (BASELINE, "phase boundaries")}
    rows = list(run_interleaved(arms, tiny, torch.device("cpu"), 2))
    assert [(row["round"], row["place"], row["arm"]) for row in rows] == [
        (1, 1, BASELINE),
        (1, 2, "phase boundaries"),
        (2, 1, "phase boundaries"),
        (2, 2, BASELINE),
    ]
    for row in rows:
        assert row["seconds"] > 0
        assert (row["event_seconds"] is None) is (row["arm"] == BASELINE)
        assert row["event_seconds"] is None or 0 < row["event_seconds"] < row["seconds"]
    import pandas as pd

    table = ratio_table(pd.DataFrame(rows)).set_index("arm")
    assert list(table.index) == [BASELINE, "phase boundaries"]
    assert table["rounds"].to_list() == [2, 2]
    assert table.loc[BASELINE, ["ratio", "low_ratio", "high_ratio"]].to_list() == [1, 1, 1]
    pairs = [rows[1]["seconds"] / rows[0]["seconds"], rows[2]["seconds"] / rows[3]["seconds"]]
    assert table.loc["phase boundaries", "ratio"] == pytest.approx(sum(pairs) / 2)


def test_arms_are_what_the_model_supports_and_the_baseline_is_first_and_not_metered():
    request = _tiny("ltx-2.3-tiny", memory="lean", decode_scope="escaped").request
    arms = profiler_arms(request, "ltx-2.3-tiny")
    plain = next(iter(arms.values()))
    assert (next(iter(arms)), plain.profiler, plain.techniques) == (BASELINE, ProfilerMode.NONE, frozenset())
    assert plain.request.decode_scope is DecodeScope.NO_GRAD
    assert arms["ltx-pipelines"] == replace(plain, runner="ltx-pipelines")
    assert "ltx-pipelines" not in profiler_arms(_tiny("ltxv-tiny").request, "ltxv-tiny")
    named = {name: spec.techniques for name, spec in policy_arms(request, "ltx-2.3-tiny").items()}
    assert named == {policy.value: own for policy, own in TECHNIQUES.items()}
    assert list(policy_arms(_tiny("ltxv-tiny").request, "ltxv-tiny")) == ["resident"]


# --- Records of format 1 ---

OLD_REQUEST = {
    "image": "stills/lighthouse.png",
    "prompt": "",
    "negative_prompt": "",
    "width": 1024,
    "height": 768,
    "frames": 97,
    "fps": 24.0,
    "seed": 10,
    "variant": "distilled",
    "quantization": "fp8-cast",
    "tiling": TILING,
    "decode_scope": "no_grad",
    "pixel_multiple": 64,
    "memory": "resident",
}
ORIGINAL = RunSpec(request=I2VRequest(image=DEFAULT_STILL))
LTX_2_BF16 = RunSpec(request=I2VRequest(image=DEFAULT_STILL, quantization="bf16", tiling=None), model="ltx-2-19b")
WITHOUT_TWO = ["row_bands", "shared_modulations", "text_only"]


def _format_1(request: dict[str, Any], experiment: dict[str, Any], conditions: dict[str, Any]) -> dict[str, Any]:
    """Metadata as i2v-lab 0.1 wrote them."""
    asked = {**OLD_REQUEST, **request}
    described = {"request": asked, "model": "ltx-2.3-22b", "generations": 1, "consumer": "plain", **experiment}
    return {
        "format": "i2v-lab run",
        "format_version": 1,
        "status": "complete",
        "model": "ltx-2.3-22b",
        "device": "cuda",
        "device_name": "NVIDIA H100 80GB HBM3",
        "seed": 10,
        "request": asked,
        "experiment": described,
        "code": "1dd67e21",
        "asked_device": "cuda",
        "pipeline": "i2v-lab",
        "profiler": "full",
        "vram_cap_bytes": None,
        "apart": False,
        **conditions,
    }


DIFFUSERS_OF_OLD = {"pipeline": "diffusers", "apart": True, "video": False}
FORMAT_1: dict[str, tuple[dict[str, Any], RunSpec]] = {
    "plain": (_format_1({}, {}, {}), ORIGINAL),
    "escaped": (_format_1({"decode_scope": "escaped"}, {}, {}), ORIGINAL.with_request(decode_scope="escaped")),
    "policy": (_format_1({"memory": "streamed"}, {}, {}), ORIGINAL.with_request(memory="streamed")),
    "techniques": (_format_1({}, {"techniques": WITHOUT_TWO}, {}), replace(ORIGINAL, techniques=WITHOUT_TWO)),
    "consumer": (
        _format_1({}, {"consumer": "left_open", "generations": 5}, {}),
        replace(ORIGINAL, consumer="left_open", generations=5),
    ),
    "capped": (
        _format_1({"memory": "streamed"}, {}, {"vram_cap_bytes": 2**32, "apart": True}),
        replace(ORIGINAL.with_request(memory="streamed"), vram_cap_bytes=2**32),
    ),
    "upstream": (
        _format_1({"variant": "dev"}, {}, {"pipeline": "ltx-pipelines", "profiler": "boundaries", "apart": True}),
        replace(ORIGINAL.with_request(variant="dev"), runner="ltx-pipelines", profiler="boundaries"),
    ),
    "upstream under a policy, which it has none of": (
        _format_1({"memory": "lean"}, {}, {"pipeline": "ltx-pipelines", "apart": True}),
        replace(ORIGINAL, runner="ltx-pipelines"),
    ),
    "diffusers": (_format_1({}, {}, DIFFUSERS_OF_OLD), replace(LTX_2_BF16, write_video=False)),
    "model offloading": (
        _format_1({}, {}, {**DIFFUSERS_OF_OLD, "pipeline": "diffusers, model offloading"}),
        replace(LTX_2_BF16.with_request(settings=MemorySettings(offload="model")), write_video=False),
    ),
    "group offloading": (
        _format_1({}, {}, {**DIFFUSERS_OF_OLD, "pipeline": "diffusers, group offloading"}),
        replace(LTX_2_BF16.with_request(settings=MemorySettings(offload="group-leaf")), write_video=False),
    ),
}


@pytest.mark.parametrize("name", FORMAT_1)
def test_a_record_of_format_1_is_read_as_what_really_ran(tmp_path, name):
    metadata, expected = FORMAT_1[name]
    with RunWriter(tmp_path / "run", metadata) as writer:
        writer.append(PhaseRecord("decode_video", None, 0, 100, 0, None, 100, 0, 0.0, 1.0, True))
    path = tmp_path / "run" / "metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 1}))
    run = read_run(tmp_path / "run")
    assert spec_of(run) == expected
    found = recorded_runs(tmp_path)
    assert (found.find(expected) == run) is expected.is_reference
    assert found.find(replace(ORIGINAL, generations=7)) is None


def test_metadata_of_before_there_were_policies_are_resident():
    metadata = json.loads(json.dumps(FORMAT_1["plain"][0]))
    for values in (metadata["request"], metadata["experiment"]["request"]):
        del values["memory"], values["pixel_multiple"]
    assert spec_of(Run(Path("run"), metadata, (), "complete")) == ORIGINAL


def test_every_committed_record_says_what_it_ran():
    runs = recorded_runs().runs
    assert len(runs) >= 67
    for run in runs:
        spec = spec_of(run)
        assert spec.runner_spec.third_party is (spec.runner in ("ltx-pipelines", "diffusers"))
        assert (run.metadata["model"], run.metadata["runner"]) == (spec.model, spec.runner)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
DELETED = object()


def _paths(values: Any, above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for key, value in values.items():
        found.append((*above, key))
        found += _paths(value, (*above, key)) if isinstance(value, dict) else []
    return found


SOUND = [metadata for metadata, _ in FORMAT_1.values()]
SOUND += [{"format_version": 2, "spec": expected.to_json()} for _, expected in FORMAT_1.values()]


def _check_damaged(metadata: dict[str, Any]) -> None:
    spec, error = _outcome(lambda: spec_of(Run(Path("run"), metadata, (), "complete")))
    if error is not None:
        assert type(error) is RecordError
        assert error.fields == {"folder": Path("run")}
        assert "\n" not in str(error)
        return
    assert RunSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert spec.full_name
    assert spec.memory_key()


@pytest.mark.parametrize(
    "value",
    [DELETED, None, [], {}, "", "x", 0, -1.5, True, 10**400, [None], {"x": 1}],
    ids=lambda value: str(value)[:9],
)
def test_no_value_at_any_place_of_metadata_gives_another_error(value):
    for metadata in SOUND:
        for *above, last in _paths(metadata):
            damaged = json.loads(json.dumps(metadata))
            owner = damaged
            for key in above:
                owner = owner[key]
            if value is DELETED:
                del owner[last]
            else:
                owner[last] = value
            _check_damaged(damaged)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(SOUND), st.data())
def test_damaged_metadata_are_refused_as_such_or_say_a_spec(metadata, data):
    metadata = json.loads(json.dumps(metadata))
    for _ in range(data.draw(st.integers(1, 3))):
        *above, last = data.draw(st.sampled_from(_paths(metadata)))
        owner = metadata
        for key in above:
            owner = owner[key]
        value = data.draw(st.just(DELETED) | JSON)
        if value is DELETED:
            del owner[last]
        else:
            owner[last] = value
        if not _paths(metadata):
            break
    _check_damaged(metadata)


def test_a_forecast_in_the_form_of_a_run_says_its_spec():
    from i2v_lab.profiling.records import Forecast

    spec = _tiny("ltx-2-tiny", settings=MemorySettings(offload="model", dtypes={"vae": "float32"}), steps=3)
    run = as_run(spec, Forecast((), 0, 0.0))
    assert spec_of(run) == spec
    assert (run.metadata["runner"], run.metadata["device"]) == ("diffusers", "forecast")
