"""How many workers, and on what: ``--workers`` and ``--cluster`` of the command line, checked before anything runs."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from i2v_lab.errors import InvalidRequest, WorkersUnavailable, shown
from i2v_lab.plain_yaml import load_yaml
from i2v_lab.profiling.meters.nvml import visible_cards
from i2v_lab.runs.provenance import usable_cores

AUTO = "auto"
MOST_WORKERS = 10_000
REMEDY = "pip install 'i2v-lab[scale]'"
SLURM_COMMANDS = ("sbatch", "scancel")


@dataclass(frozen=True)
class Workers:
    """Where tasks run, one at a time on each worker.

    Attributes:
        count: How many workers.
        cards: UUIDs of the cards of this machine, one a worker; empty for work on CPUs, and on a cluster.
        threads: Of a worker's libraries, ``OMP_NUM_THREADS``; ``None`` leaves it as it is.
        cluster: Dask's configuration of a Slurm cluster; empty on this machine.
    """

    count: int
    cards: tuple[str, ...] = ()
    threads: int | None = None
    cluster: dict[str, Any] = field(default_factory=dict)

    @property
    def local(self) -> bool:
        """Whether they are processes of this machine."""
        return not self.cluster


def chosen_workers(
    text: str | None, cluster: Path | None = None, *, on_cards: bool = False, single_threaded: bool = False
) -> Workers | None:
    """The workers that a command line asks for.

    Args:
        text: A number, or ``auto``: as many as there are cards, or cores for work on CPUs.
        cluster: A file in Dask's own configuration, with the section ``jobqueue.slurm``.
        on_cards: Whether each worker needs a card of its own.
        single_threaded: Whether each worker computes on one core, however many there are; otherwise workers on CPUs
            share the cores equally.

    Returns:
        ``None`` where there is nothing to distribute: nothing is asked for, or one worker of this machine.

    Raises:
        InvalidRequest: It is no number, above the number of cards, or the file cannot be used.
        WorkersUnavailable: A package or a command is missing.

    Example:
        >>> chosen_workers(None), chosen_workers("1")
        (None, None)
    """
    if text is None and cluster is None:
        return None
    count = _count(text)
    if cluster is not None:
        if count is None:
            raise InvalidRequest(
                f"workers={text} has no meaning for cluster='{cluster}'; give the number of its jobs, --workers N",
                workers=text,
                cluster=cluster,
            )
        return _on_cluster(count, cluster, 1 if single_threaded else None)
    cards = visible_cards() if on_cards else []
    places = len(cards) or usable_cores()
    if cards and count is not None and count > len(cards):
        raise InvalidRequest(
            f"workers={count} is above the {len(cards)} cards that are visible here, and two runs never share one; "
            f"use {len(cards)}",
            workers=count,
            cards=len(cards),
        )
    count = places if count is None else count
    if count == 1:
        return None
    _require("distributed")
    threads = None if cards else 1 if single_threaded else max(1, places // count)
    return Workers(count, tuple(cards[:count]), threads)


def _count(text: str | None) -> int | None:
    if text is None or text == AUTO:
        return None
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= MOST_WORKERS):
        raise InvalidRequest(
            f"workers={shown(text)} is not a whole number from 1 to {MOST_WORKERS}; use one, or auto", workers=text
        )
    return int(text)


def _on_cluster(count: int, path: Path, threads: int | None) -> Workers:
    try:
        values = load_yaml(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise InvalidRequest(f"cluster='{path}' cannot be read ({reason}); give a YAML file", cluster=path) from error
    slurm = values.get("jobqueue") if isinstance(values, dict) else None
    slurm = slurm.get("slurm") if isinstance(slurm, dict) else None
    if not isinstance(slurm, dict):
        raise InvalidRequest(
            f"cluster='{path}' has no jobqueue: slurm: section; write Dask's configuration of a Slurm cluster",
            cluster=path,
        )
    _require("distributed")
    _require("dask_jobqueue", "dask-jobqueue")
    _check_slurm(slurm, path)
    for command in SLURM_COMMANDS:
        if shutil.which(command) is None:
            raise WorkersUnavailable(
                f"cluster='{path}' needs the command {command}, which is not on PATH; use a machine of the cluster",
                command=command,
            )
    return Workers(count, threads=threads, cluster=values)


def _check_slurm(slurm: dict[str, Any], path: Path) -> None:
    import dask
    import dask_jobqueue  # noqa: F401 - its defaults are then in dask.config

    known = {*dask.config.get("jobqueue.slurm"), "protocol"}
    for name, value in slurm.items():
        if str(name).replace("_", "-") not in known:
            raise InvalidRequest(
                f"cluster='{path}': {shown(name)}={shown(value)} is unknown; use {', '.join(sorted(known))}",
                **{str(name): value},
            )
    for name in ("cores", "memory"):
        if not slurm.get(name):
            raise InvalidRequest(f"cluster='{path}' has no {name}; say what each job gets", cluster=path)
    if slurm.get("processes", 1) != 1:
        raise InvalidRequest(
            f"cluster='{path}': processes={shown(slurm['processes'])}, but a job is one worker, with the card that "
            "Slurm gives it; use 1 and more --workers",
            processes=slurm["processes"],
        )


def _require(module: str, package: str = "") -> None:
    if importlib.util.find_spec(module) is None:
        raise WorkersUnavailable(f"{package or module} is not installed; {REMEDY}", package=package or module)
