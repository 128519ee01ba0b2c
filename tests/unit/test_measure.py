"""A plan is read strictly, runs to its end whatever happens, goes on where it stopped; upstream counts apart."""

from __future__ import annotations

import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from i2v_lab.cli.measure import measure
from i2v_lab.errors import InvalidRequest, MeasureError, RecordError
from i2v_lab.paths import data_dir
from i2v_lab.profiling.records import OutOfMemoryRecord, PhaseRecord
from i2v_lab.request import I2VRequest
from i2v_lab.runs import measure as measured
from i2v_lab.runs.plans import load_plan
from i2v_lab.runs.recorded import recorded_runs, spec_of
from i2v_lab.runs.spec import DEFAULT_STILL, FULL_SIZE_MODEL, SMALL_MODEL, RunSpec
from i2v_lab.runs.store import RunWriter, read_run
from i2v_lab.runs.workers import Ended
from i2v_lab.studies.accuracy import measured_table
from i2v_lab.studies.pipelines import policy_specs
from i2v_lab.studies.published import study_request, to_size, varied
from i2v_lab.studies.techniques import step_specs

TINY = {"model": SMALL_MODEL, "width": 64, "height": 64, "frames": 9, "fps": 120.0, "expected_seconds": 30}
TINY_SPEC = RunSpec(
    request=I2VRequest(image=DEFAULT_STILL, width=64, height=64, frames=9, fps=120.0), model=SMALL_MODEL
)


def _plan(tmp_path: Path, *groups: object, **fields: object) -> Path:
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump({"defaults": TINY, "groups": list(groups), **fields}))
    return path


# --- Reading ---


def test_a_plan_names_orders_and_times_its_runs(tmp_path):
    first = [{}, {"decode_scope": "escaped"}, {"pipeline": "ltx-pipelines", "profiler": "boundaries"}]
    second = [{"vram_cap_gib": 0.5, "expected_seconds": 7}, {"profiler": False}, {}]  # YAML reads off as False
    runs = load_plan(_plan(tmp_path, {"runs": first, "rounds": 2}, {"runs": second}, process_seconds=4))
    assert [run.name for run in runs] == [
        "64x64x9_1",
        "64x64x9_escaped_1",
        "64x64x9_ltx_pipelines_boundaries_1",
        "64x64x9_ltx_pipelines_boundaries_2",  # the second round is the first one backwards
        "64x64x9_escaped_2",
        "64x64x9_2",
        "64x64x9_cap0.5",
        "64x64x9_off",
        "64x64x9_3",
    ]
    assert [run.expected_seconds for run in runs] == [34] * 6 + [11, 34, 34]
    assert runs[0].spec == TINY_SPEC
    assert runs[2].spec == replace(TINY_SPEC, runner="ltx-pipelines", profiler="boundaries")
    assert runs[6].spec == replace(TINY_SPEC, vram_cap_bytes=2**29)
    assert [run.spec.is_reference for run in runs] == [True, True, False, False, True, True, False, False, True]


@pytest.mark.parametrize(
    ("run", "fields"),
    [
        ({"hight": 64}, {"hight": 64}),
        ({"height": 500}, {"height": 500}),
        ({"profiler": "half"}, {"profiler": "half"}),
        ({"vram_cap_gib": "24"}, {"vram_cap_gib": "24"}),
        ({"video": "no"}, {"video": "no"}),
        ({"techniques": ["magic"]}, {"technique": "magic"}),
        ({"techniques": ["token_chunks"]}, {"technique": "token_chunks"}),
        ({"consumer": "nobody"}, {"consumer": "nobody"}),
        ({"tiling": {"tile_px": 100}}, {"tile_px": 100}),
    ],
)
def test_a_run_that_cannot_be_is_refused_with_its_place_and_the_remedy(tmp_path, run, fields):
    with pytest.raises(InvalidRequest) as caught:
        load_plan(_plan(tmp_path, {"runs": [{}]}, {"runs": [{}, run]}))
    assert caught.value.fields == fields
    ((name, value),) = fields.items()
    said = str(caught.value)
    assert ", group 2, run 2: " in said
    assert f"{name}={value!r}" in said
    assert "; use " in said or "; name " in said
    assert "\n" not in said


def test_a_plan_that_is_none_is_refused(tmp_path):
    with pytest.raises(InvalidRequest, match=r"cannot be read \(No such file or directory\); give a YAML file"):
        load_plan(tmp_path / "nowhere.yaml")
    with pytest.raises(InvalidRequest, match="is not a mapping"):
        load_plan(_written(tmp_path, "- a\n- b"))
    with pytest.raises(InvalidRequest, match="has no groups"):
        load_plan(_written(tmp_path, "process_seconds: 3"))
    with pytest.raises(InvalidRequest, match="cannot be read"):
        load_plan(_written(tmp_path, "groups: ["))
    with pytest.raises(InvalidRequest, match="rounds=0 is not a whole number above 0"):
        load_plan(_plan(tmp_path, {"runs": [{}], "rounds": 0}))
    with pytest.raises(InvalidRequest, match="are over 10000 in one plan; use fewer"):
        load_plan(_plan(tmp_path, {"runs": [{}, {"seed": 3}], "rounds": 5001}))
    for huge in (10**400, 1e308):
        with pytest.raises(InvalidRequest):
            load_plan(_plan(tmp_path, {"runs": [{"vram_cap_gib": huge}]}))
    with pytest.raises(InvalidRequest, match="two different runs that would both be called 64x64x9"):
        load_plan(_plan(tmp_path, {"runs": [{}, {"seed": 3}]}))


def _written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    return path


def test_runs_of_two_models_that_would_share_a_folder_are_named_by_model(tmp_path):
    runs = [{"model": "ltx-2-tiny"}, {"model": "ltx-2.3-tiny-diffusers"}, {"model": "ltx-2-tiny", "frames": 17}]
    plan = load_plan(_plan(tmp_path, {"runs": runs, "rounds": 2}))
    names = ["64x64x9_diffusers_ltx-2-tiny", "64x64x9_diffusers_ltx-2.3-tiny-diffusers", "64x64x17_diffusers"]
    assert sorted({run.name.removesuffix("_1").removesuffix("_2") for run in plan}) == sorted(names)
    assert len({run.name for run in plan}) == 6


def test_the_plan_of_the_study_is_sound_and_asks_for_what_the_study_needs():
    runs = load_plan(data_dir() / "plans" / "h200.yaml")
    names = [run.name for run in runs]
    assert len(set(names)) == len(names)
    reference = [run.spec for run in runs if run.spec.is_reference]
    assert len([spec for spec in reference if spec.memory_key() == runs[0].spec.memory_key()]) >= 5
    upstream = [run.spec for run in runs if run.spec.runner == "ltx-pipelines"]
    assert {spec.request.variant.value for spec in upstream} == {"distilled", "dev"}
    assert [run.spec.vram_cap_bytes for run in runs if "_cap" in run.name] == [round(95.6 * 2**30)]


def test_the_plan_of_budgets_has_both_sizes_and_leaves_the_placement_open():
    runs = load_plan(data_dir() / "plans" / "budgets.yaml")
    assert [run.name for run in runs] == ["1024x768x97", "2048x1536x97"]
    assert all(run.spec.model == FULL_SIZE_MODEL and not run.spec.technique_set for run in runs)


def test_the_plan_of_the_policies_measures_every_step_of_the_study_and_others_beside_them():
    runs = load_plan(data_dir() / "plans" / "policies.yaml")
    own = {run.spec.memory_key() for run in runs if run.spec.is_reference and not run.spec.runner_spec.third_party}
    request = study_request(FULL_SIZE_MODEL)
    sizes = varied(FULL_SIZE_MODEL, "policy_sizes")
    width, height = to_size(sizes[-1])
    steps = step_specs(replace(request, width=width, height=height), FULL_SIZE_MODEL)
    assert {each.memory_key() for each in [*steps, *policy_specs(request, FULL_SIZE_MODEL, sizes)]} == own
    others = [run.spec for run in runs if run.spec.runner_spec.third_party]
    beside = {(spec.runner, spec.request.settings.name) for spec in others}
    offloads = [("diffusers", ""), ("diffusers", "offload-group-leaf"), ("diffusers", "offload-model")]
    assert sorted(beside) == [*offloads, ("ltx-pipelines", "")]
    assert not any(run.spec.write_video for run in runs)


# --- Running ---


@pytest.fixture(scope="module")
def measured_once(tmp_path_factory):
    """One plan run for real: upstream's pipeline, which succeeds, and a cap, below which nothing fits."""
    folder = tmp_path_factory.mktemp("measured")
    runs = [
        {"pipeline": "ltx-pipelines", "profiler": "boundaries"},
        {"vram_cap_gib": 0.001},
        {"model": "ltx-2-tiny", "settings": {"offload": "group-leaf"}},
        {"techniques": ["row_bands"], "video": False},
    ]
    plan = _plan(folder, {"runs": runs})
    measure(plan, folder / "runs", "cpu")
    return plan, folder / "runs"


def test_upstream_is_measured_phase_by_phase_and_set_apart(measured_once):
    run = read_run(measured_once[1] / "64x64x9_ltx_pipelines_boundaries")
    assert run.status == "complete"
    spec = spec_of(run)
    assert spec == replace(TINY_SPEC, runner="ltx-pipelines", profiler="boundaries")
    assert not spec.is_reference
    phases = sorted(run.of(PhaseRecord), key=lambda phase: phase.start_s)
    assert [(phase.phase, phase.parent) for phase in phases] == [
        ("generation", None),
        ("encode_prompt", "generation"),
        ("denoise_stage_1", "generation"),
        ("encode_image", "denoise_stage_1"),  # upstream encodes the still with the transformer there already
        ("upsample_latent", "generation"),
        ("encode_image", "generation"),
        ("denoise_stage_2", "generation"),
        ("decode_audio", "generation"),
        ("decode_video", "generation"),
    ]
    assert all(phase.completed and phase.peak_bytes > 0 for phase in phases)
    assert phases[0].peak_bytes == max(phase.peak_bytes for phase in phases)
    assert recorded_runs(measured_once[1]).find(TINY_SPEC) is None
    assert measured_table(folder=measured_once[1]).empty


def test_diffusers_is_measured_in_the_same_phases_and_set_apart(measured_once):
    run = read_run(measured_once[1] / "64x64x9_offload-group-leaf_diffusers")
    assert run.status == "complete"
    assert (run.metadata["model"], run.metadata["runner"]) == ("ltx-2-tiny", "diffusers")
    assert run.metadata["spec"]["request"]["settings"]["offload"] == "group-leaf"
    assert recorded_runs(measured_once[1]).find(TINY_SPEC) is None
    phases = {phase.phase for phase in run.of(PhaseRecord)}
    assert phases >= {"encode_prompt", "denoise_stage_1", "upsample_latent", "denoise_stage_2", "decode_video"}


def test_a_run_with_techniques_of_its_own_is_found_by_them_and_writes_no_video_if_none_is_wanted(measured_once):
    run = read_run(measured_once[1] / "64x64x9_row_bands")
    assert run.status == "complete"
    assert run.metadata["spec"]["techniques"] == ["row_bands"]
    assert spec_of(run).is_reference
    assert sorted(path.name for path in run.folder.iterdir()) == ["metadata.json", "records.jsonl"]
    asked = replace(TINY_SPEC, techniques=["row_bands"], write_video=False)
    assert recorded_runs(measured_once[1]).find(asked).folder == run.folder


def test_out_of_memory_below_a_cap_is_a_record_like_any_other(measured_once):
    run = read_run(measured_once[1] / "64x64x9_cap0.001")
    assert run.status == "failed"
    (record,) = run.of(OutOfMemoryRecord)
    assert record.cap_bytes == spec_of(run).vram_cap_bytes == round(0.001 * 2**30)
    assert record.phase == "encode_prompt"


def test_the_same_command_again_runs_nothing_and_no_machines_path_is_kept(measured_once, monkeypatch, capsys):
    def no_process(*_, **__):
        raise AssertionError("a process was started")

    plan, out = measured_once
    monkeypatch.setattr(measured, "run_in_child", no_process)
    measure(plan, out, "cpu")
    assert "4 runs, 4 reused; 0 to run" in capsys.readouterr().out
    for metadata in out.rglob("metadata.json"):
        assert str(Path(measured.__file__).parents[3]) not in metadata.read_text()
        assert str(out) not in metadata.read_text()


def test_a_failure_does_not_stop_the_rest_and_what_was_interrupted_is_run_again(
    measured_once, tmp_path, monkeypatch, capsys
):
    """Of four runs one is kept, one was killed halfway, one fails, and one is new."""
    out = tmp_path / "runs"
    shutil.copytree(measured_once[1] / "64x64x9_cap0.001", out / "64x64x9_cap0.001")
    killed = out / "64x64x9_escaped"
    killed.mkdir(parents=True)
    (killed / "records.jsonl").touch()
    made = []

    def process(_, identity, folder):
        made.append(folder.name)
        if folder.name == "64x64x9_off":
            return Ended(2, "Traceback\ni2v-lab: no such luck; try again")
        with RunWriter(folder, {"device": "cpu", **identity}):
            pass
        return Ended(0, "")

    monkeypatch.setattr(measured, "run_in_child", process)
    plan = _plan(
        tmp_path,
        {"runs": [{"vram_cap_gib": 0.001}, {"profiler": "off"}, {"decode_scope": "escaped"}, {"frames": 17}]},
    )
    with pytest.raises(MeasureError) as failure:
        measure(plan, out, "cpu")
    assert failure.value.fields["failed"] == ["64x64x9_off"]
    assert made == ["64x64x9_off", "64x64x9_escaped", "64x64x17"]
    said = capsys.readouterr()
    assert "4 runs, 1 reused; 3 to run, in about 90 s" in said.out
    assert "no such luck; try again" in said.err
    assert "[2/3] 64x64x9_escaped, about 60 s left" in said.err
    outcomes = {words[0]: " ".join(words[1:4]) for words in map(str.split, said.out.splitlines()) if len(words) > 1}
    assert outcomes["64x64x9_cap0.001"] == "out of memory,"
    assert outcomes["64x64x9_off"] == "failed"
    assert outcomes["64x64x9_escaped"].startswith("complete")


def test_a_dry_run_says_what_would_run(tmp_path, capsys):
    measure(_plan(tmp_path, {"runs": [{}]}, process_seconds=5), tmp_path / "runs", "cpu", dry_run=True)
    assert capsys.readouterr().out.splitlines() == [
        "1 runs, 0 reused; 1 to run, in about 35 s",
        f"{'64x64x9':<60}    35 s",
    ]
    assert not (tmp_path / "runs").exists()


def test_a_folder_with_anything_else_in_it_is_left_alone(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "thesis.tex").touch()
    with pytest.raises(RecordError, match="holds more than a run; choose another folder") as refused:
        measured.measure(TINY_SPEC, folder, "cpu")
    assert refused.value.fields == {"folder": folder}
    assert (folder / "thesis.tex").exists()


def test_two_that_measure_the_same_do_so_once_and_the_second_says_on_whom_it_waits(tmp_path, capfd):
    folder = tmp_path / "run"
    runs: list[object] = []
    threads = [
        threading.Thread(target=lambda: runs.append(measured.measure(TINY_SPEC, folder, "cpu"))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(runs) == 2
    assert runs[0] == runs[1]
    assert runs[0].status == "complete"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert sorted(path.name for path in folder.iterdir()) == ["metadata.json", "records.jsonl", "video.mp4"]
    assert f"is being written by process {os.getpid()} on" in capfd.readouterr().err
