"""What the committed records of full-size runs say: nothing is run here, so no test of this file says how it is now."""

from __future__ import annotations

from i2v_lab.events import Phase
from i2v_lab.memory_policy import MemoryPolicy
from i2v_lab.paths import data_dir
from i2v_lab.runs.interleaved import POLICY_ROUNDS, ratio_table, recorded_rounds
from i2v_lab.runs.phases import phase_peaks
from i2v_lab.runs.recorded import recorded_runs
from i2v_lab.runs.spec import FULL_SIZE_MODEL
from i2v_lab.runs.store import read_run
from i2v_lab.studies.pipelines import policy_specs
from i2v_lab.studies.published import study_request, varied

GIB = 2**30


def test_committed_records_at_full_size_have_no_more_bytes_than_upstreams_in_any_phase_and_no_more_time():
    folder = data_dir() / "measured" / "nvidia-h200"
    for ours, theirs in (
        ("1024x768x97_boundaries_1", "1024x768x97_upstream_boundaries_1"),
        ("1024x768x97_boundaries_2", "1024x768x97_upstream_boundaries_2"),
        ("1024x768x97_dev", "1024x768x97_dev_upstream_boundaries"),
    ):
        mine, other = (
            read_run(folder / name).frame("phase").groupby("phase")["peak_bytes"].max() for name in (ours, theirs)
        )
        phases = [phase.value for phase in Phase]
        assert (mine[phases] <= other[phases]).all()
    ratios = ratio_table(recorded_rounds()).set_index("arm")
    assert 1 / ratios.loc["ltx-pipelines", "ratio"] <= 1.02
    assert (ratios.loc[["phase boundaries", "modules and graphs"], "event_share"] < 0.01).all()


def test_committed_records_of_streamed_stay_under_4_gib_in_every_phase_and_of_lean_under_22_outside_the_text():
    sizes = varied(FULL_SIZE_MODEL, "policy_sizes")
    specs = policy_specs(study_request(FULL_SIZE_MODEL), FULL_SIZE_MODEL, sizes)
    runs = recorded_runs().find_together(specs)
    for spec, run in zip(specs, runs, strict=True):
        peaks = phase_peaks(run)
        assert set(peaks) == {phase.value for phase in Phase}
        if spec.request.memory is MemoryPolicy.STREAMED:
            assert max(peaks.values()) < (3 if spec.request.width == 1024 else 4) * GIB
        if spec.request.memory is MemoryPolicy.LEAN:
            assert max(peak for phase, peak in peaks.items() if phase != Phase.ENCODE_PROMPT) < 22 * GIB


def test_committed_times_of_lean_are_no_longer_than_of_resident_and_of_streamed_at_most_half_as_long_again():
    table = ratio_table(recorded_rounds(POLICY_ROUNDS)).set_index(["size", "arm"])["ratio"]
    assert list(dict.fromkeys(table.index.get_level_values("size"))) == ["1024x768", "2048x1536"]
    assert table.xs("lean", level="arm").max() <= 1.0
    assert table.xs("streamed", level="arm").max() <= 1.5
