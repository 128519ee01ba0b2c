"""Runs measured elsewhere and kept in ``data/measured``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from i2v_lab.paths import data_dir
from i2v_lab.profiling.records import PhaseRecord
from i2v_lab.request import I2VRequest
from i2v_lab.runs.implementations import Implementation
from i2v_lab.runs.measure import is_result
from i2v_lab.runs.spec import DEFAULT_STILL, Consumer, Experiment
from i2v_lab.runs.store import METADATA, Run, read_run


def recorded_runs(folder: Path | None = None) -> list[Run]:
    """All runs below a folder, ``data/measured`` by default, in the order of their paths.

    Raises:
        RecordError: One of them is damaged.
    """
    return list(_read_all(folder or data_dir() / "measured"))


@cache
def _read_all(folder: Path) -> tuple[Run, ...]:
    return tuple(read_run(metadata.parent) for metadata in sorted(folder.rglob(METADATA)))


def experiment_of(run: Run) -> Experiment:
    """What a run did; a request's still may not be here, so that of the package stands in for it."""
    kept = run.metadata.get("experiment", {})
    return Experiment(
        request=I2VRequest.from_json({**run.metadata["request"], "image": DEFAULT_STILL}),
        model=run.metadata["model"],
        generations=kept.get("generations", 1),
        consumer=Consumer(kept.get("consumer", "plain")),
        techniques=kept.get("techniques"),
    )


def find_recorded(experiment: Experiment, folder: Path | None = None) -> Run | None:
    """The run of an experiment, whatever its still, prompt and seed; of several, that with the median time.

    Runs of another pipeline, below a cap, or without the profiler's attribution do not count; of several cards, that
    which has the most runs.
    """
    return find_together([experiment], folder)[0]


def find_together(experiments: Sequence[Experiment], folder: Path | None = None) -> list[Run | None]:
    """:func:`find_recorded` for many that are to be compared: all from the card on which most of them were measured."""
    known = _by_likeness(folder or data_dir() / "measured")
    found = [known.get(experiment.like(), []) for experiment in experiments]
    own = Counter(card for runs in found for card in {_card(run) for run in runs})
    everything = Counter(_card(run) for runs in known.values() for run in runs)
    best = max(sorted(own), key=lambda card: (own[card], everything[card]), default=None)
    return [_median([run for run in runs if _card(run) == best]) for runs in found]


def find_of(implementation: str, experiment: Experiment, card: str, folder: Path | None = None) -> Run | None:
    """The run in which somebody else's pipeline did an experiment's request, on a card; of several, the median one."""
    runs = [
        run
        for run in _made_by(implementation, experiment, folder)
        if run.metadata.get("vram_cap_bytes") is None and _card(run) == card
    ]
    return _median(sorted(runs, key=seconds_of))


def find_capped(experiment: Experiment, folder: Path | None = None) -> list[Run]:
    """All runs of an experiment in which the allocator was held to less than its card has, the highest cap first."""
    runs = _made_by(Implementation.OURS, experiment, folder)
    capped = [run for run in runs if run.metadata.get("vram_cap_bytes") is not None]
    return sorted(capped, key=lambda run: int(run.metadata["vram_cap_bytes"]), reverse=True)


def _made_by(implementation: str, experiment: Experiment, folder: Path | None) -> list[Run]:
    """Every run that shows what an experiment takes of somebody's pipeline, under whatever conditions."""
    return [
        run
        for run in recorded_runs(folder)
        if run.metadata.get("pipeline", Implementation.OURS) == implementation
        and is_result(run)
        and experiment_of(run).like() == experiment.like()
    ]


def _median(runs: Sequence[Run]) -> Run | None:
    return runs[len(runs) // 2] if runs else None


def _card(run: Run) -> str:
    return str(run.metadata.get("device_name") or run.metadata["device"])


@cache
def _by_likeness(folder: Path) -> dict[str, list[Run]]:
    """The runs that count, the quickest first, by what :meth:`Experiment.like` says of them."""
    found: dict[str, list[Run]] = {}
    for run in sorted(_read_all(folder), key=seconds_of):
        if not run.metadata.get("apart") and is_result(run):
            found.setdefault(experiment_of(run).like(), []).append(run)
    return found


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
