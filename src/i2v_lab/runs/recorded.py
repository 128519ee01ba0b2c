"""Runs measured elsewhere and committed in ``data/measured``, found by what they ran."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from i2v_lab.errors import I2VLabError, RecordError
from i2v_lab.paths import data_dir
from i2v_lab.profiling.records import PhaseRecord
from i2v_lab.runs.measure import is_result
from i2v_lab.runs.spec import DEFAULT_STILL, RunSpec
from i2v_lab.runs.store import METADATA, Run, read_run, run_folders

# Of format 1, whose diffusers records named LTX-2.3, fp8-cast and tiles: what ran was LTX-2 in bf16, untiled.
_DIFFUSERS_MODELS = {"ltx-2.3-22b": "ltx-2-19b", "ltx-2.3-tiny": "ltx-2-tiny"}
_DIFFUSERS_OFFLOADS = {
    "diffusers": [],
    "diffusers, model offloading": ["model_offload"],
    "diffusers, group offloading": ["group_offload"],
}
LONGEST_REASON = 200  # characters of what is wrong with a spec, which quotes its values


def spec_of(run: Run) -> RunSpec:
    """What a run did, of either format of its metadata; the still of the package stands in for its own.

    Raises:
        RecordError: The metadata describe no run of this package.
    """
    known = run.metadata
    try:
        values = dict(known["spec"]) if "spec" in known else _spec_of_format_1(known)
        return RunSpec.from_json({**values, "request": {**values["request"], "image": DEFAULT_STILL}})
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, I2VLabError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        reason = reason if len(reason) <= LONGEST_REASON else f"{reason[:LONGEST_REASON]}..."
        raise RecordError(
            f"run '{run.folder}' does not say what it ran ({reason}); give a run that i2v-lab recorded",
            folder=run.folder,
        ) from error


def _spec_of_format_1(known: Mapping[str, Any]) -> dict[str, Any]:
    experiment = known.get("experiment", {})
    values: dict[str, Any] = {
        "request": dict(known["request"]),
        "model": known["model"],
        "techniques": experiment.get("techniques"),
        "consumer": experiment.get("consumer", "plain"),
        "generations": experiment.get("generations", 1),
        "profiler": known.get("profiler", "full"),
        "vram_cap_bytes": known.get("vram_cap_bytes"),
        "write_video": known.get("video", True),
    }
    pipeline = known.get("pipeline", "i2v-lab")
    if pipeline in _DIFFUSERS_OFFLOADS:
        values["runner"], values["model"] = "diffusers", _DIFFUSERS_MODELS[known["model"]]
        values["request"] |= {"quantization": "bf16", "tiling": None, "memory": "resident"}
        values["techniques"] = _DIFFUSERS_OFFLOADS[pipeline]
    elif pipeline == "ltx-pipelines":
        values["runner"] = pipeline
        values["request"] |= {"memory": "resident"}
    return values


@dataclass(frozen=True)
class RecordedRuns:
    """Recorded runs and what each of them did.

    Attributes:
        runs: In the order of their paths.
    """

    runs: tuple[Run, ...]

    @cached_property
    def _results(self) -> list[tuple[RunSpec, Run]]:
        """Runs that show something, the quickest first."""
        return [(spec_of(run), run) for run in sorted(self.runs, key=seconds_of) if is_result(run)]

    def find(self, spec: RunSpec, card: str | None = None) -> Run | None:
        """The run of a spec, whatever its still, prompt and seed; of several, that with the median time.

        Runs below a cap, or without the profiler's attribution, do not count.

        Args:
            spec: What is looked for.
            card: Only on this one; by default on that which has the most runs of its model.
        """
        return self.find_together([spec], card)[0]

    def find_together(self, specs: Sequence[RunSpec], card: str | None = None) -> list[Run | None]:
        """:meth:`find` for many that are compared: all from the card on which most of them were measured."""
        found = [self._by_key.get(spec.memory_key(), []) for spec in specs]
        if card is None:
            own = Counter(name for runs in found for name in {card_of(run) for run in runs})
            models = {spec.model for spec in specs}  # runs of other models say nothing of where these were measured
            everything = Counter(card_of(run) for each, run in self._results if each.model in models)
            card = max(sorted(own), key=lambda name: (own[name], everything[name]), default=None)
        return [_median([run for run in runs if card_of(run) == card]) for runs in found]

    def find_capped(self, spec: RunSpec) -> list[Run]:
        """All runs of a spec in which the allocator was capped, the highest cap first."""
        key = spec.memory_key()
        capped = [
            (own.vram_cap_bytes, run)
            for own, run in self._results
            if own.vram_cap_bytes is not None and own.memory_key() == key
        ]
        return [run for _, run in sorted(capped, key=lambda pair: pair[0], reverse=True)]

    @cached_property
    def _by_key(self) -> dict[str, list[Run]]:
        found: dict[str, list[Run]] = {}
        for spec, run in self._results:
            if spec.is_reference:
                found.setdefault(spec.memory_key(), []).append(run)
        return found


def recorded_runs(folder: Path | None = None) -> RecordedRuns:
    """All runs below a folder, ``data/measured`` by default.

    Raises:
        RecordError: The folder is missing; or one of them is damaged, or does not say what it ran, or where.
    """
    return _read_all(folder or data_dir() / "measured")


@cache
def _read_all(folder: Path) -> RecordedRuns:
    return RecordedRuns(tuple(_recorded(each) for each in run_folders(folder)))


def _recorded(folder: Path) -> Run:
    run = read_run(folder)
    spec_of(run)
    if not run.metadata.get("device"):
        raise RecordError(f"'{folder / METADATA}' names no device; give a run that i2v-lab recorded", folder=folder)
    return run


def card_of(run: Run) -> str:
    """The card that a run was measured on; its device where there is no name."""
    return str(run.metadata.get("device_name") or run.metadata["device"])


def by_generation(phases: Iterable[PhaseRecord]) -> list[tuple[int, PhaseRecord]]:
    """Phases in the order in which they began, with the generation they belong to: how often one of the name had."""
    begun: Counter[str] = Counter()
    numbered = []
    for phase in sorted(phases, key=lambda phase: phase.start_s):
        begun[phase.phase] += 1
        numbered.append((begun[phase.phase], phase))
    return numbered


def seconds_of(run: Run) -> float:
    """All phases together; a stream's consumer included, while its phase was open."""
    phases = run.frame("phase")
    return float(phases[phases["parent"].isna()]["seconds"].sum())


def _median(runs: Sequence[Run]) -> Run | None:
    return runs[len(runs) // 2] if runs else None
