"""A plan: which runs are to be measured, in which order, and how long they are expected to take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from i2v_lab.errors import I2VLabError, InvalidRequest, shown
from i2v_lab.plain_yaml import load_yaml
from i2v_lab.request import I2VRequest, Tiling
from i2v_lab.runs.spec import FULL_SIZE_MODEL, ProfilerMode, RunSpec, make_request

REQUEST_FIELDS = {field.name for field in fields(I2VRequest)}
SPEC_FIELDS = {"model", "pipeline", "generations", "consumer", "techniques", "profiler", "vram_cap_gib", "video"}
RUN_FIELDS = {*REQUEST_FIELDS, *SPEC_FIELDS, "expected_seconds"}
PLAN_FIELDS = {"defaults", "process_seconds", "groups"}
GROUP_FIELDS = {"rounds", "runs"}
MOST_RUNS = 10_000


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One process of a plan.

    Attributes:
        name: Of its folder; no other run of the plan has it.
        spec: What to do.
        expected_seconds: Until its process has ended.
        turns: Number of its group, if that is made in several rounds: its runs are compared, so they stay on one card.
    """

    name: str
    spec: RunSpec
    expected_seconds: float
    turns: int | None = None


def load_plan(path: str | Path) -> list[PlannedRun]:
    """Read and check a plan: every run of it is one that its runner and model support.

    A plan is YAML: ``groups``, each a list of ``runs`` that are made ``rounds`` times (1 by default); ``defaults`` for
    all runs; and ``process_seconds``, what starting and ending a process takes besides a run's ``expected_seconds``. A
    run has the fields of an :class:`~i2v_lab.request.I2VRequest`, whose defaults are the model's, and of a
    :class:`~i2v_lab.runs.spec.RunSpec`: ``model``, ``pipeline`` (a runner other than the model's own), ``techniques``,
    ``consumer``, ``generations``, ``profiler``, ``vram_cap_gib`` and ``video``, which is false where none is to be
    written. In every second round the runs change places, so that drift affects all of them alike. A run that occurs
    several times, in whichever groups, is numbered.

    Returns:
        The runs in the order in which they are to be made.

    Raises:
        InvalidRequest: The plan cannot be read, or breaks a rule; with the group and the run.

    Example:
        >>> [run.name for run in load_plan("data/plans/h200.yaml")][:2]  # doctest: +SKIP
        ['1024x768x97_1', '1024x768x97_escaped_1']
    """
    try:
        plan = load_yaml(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise InvalidRequest(f"plan '{path}' cannot be read ({reason}); give a YAML file", plan=path) from error
    _check_fields(plan, PLAN_FIELDS, f"plan '{path}'")
    groups = plan.get("groups")
    if not isinstance(groups, list) or not groups:
        raise InvalidRequest(f"plan '{path}' has no groups; give a list of them, each with its runs", plan=path)
    defaults = plan.get("defaults")
    defaults = {} if defaults is None else defaults
    _check_fields(defaults, RUN_FIELDS, f"plan '{path}', defaults")
    process_seconds = _number(plan.get("process_seconds", 0), f"plan '{path}': process_seconds")
    asked: list[PlannedRun] = []
    for number, group in enumerate(groups, start=1):
        where = f"plan '{path}', group {number}"
        _check_fields(group, GROUP_FIELDS, where)
        rounds = group.get("rounds", 1)
        if type(rounds) is not int or rounds < 1:
            raise InvalidRequest(
                f"{where}: rounds={shown(rounds)} is not a whole number above 0; use 1",
                rounds=rounds,
            )
        listed = group.get("runs")
        if not isinstance(listed, list) or not listed:
            raise InvalidRequest(f"{where} has no runs; give a list of them", plan=path)
        if len(asked) + rounds * len(listed) > MOST_RUNS:
            raise InvalidRequest(
                f"{where}: rounds={shown(rounds)} of {len(listed)} runs are over {MOST_RUNS} in one plan; use fewer",
                rounds=rounds,
            )
        runs = [
            _run(values, defaults, process_seconds, f"{where}, run {index}")
            for index, values in enumerate(listed, start=1)
        ]
        if rounds > 1:
            runs = [replace(run, turns=number) for run in runs]
        for turn in range(rounds):
            asked += reversed(runs) if turn % 2 else runs
    return _numbered(asked, path)


def _run(values: Any, defaults: Mapping[str, Any], process_seconds: float, where: str) -> PlannedRun:
    _check_fields(values, RUN_FIELDS, where)
    given = {**defaults, **values}
    if "expected_seconds" not in given:
        raise InvalidRequest(f"{where} has no expected_seconds; say how long it will take")
    try:
        spec = spec_of_fields(given)
    except (I2VLabError, TypeError, ValueError, OverflowError) as error:
        raise InvalidRequest(f"{where}: {error}", **getattr(error, "fields", {})) from error
    seconds = _number(given["expected_seconds"], f"{where}: expected_seconds")
    return PlannedRun(name=spec.full_name, spec=spec, expected_seconds=seconds + process_seconds)


def spec_of_fields(given: Mapping[str, Any]) -> RunSpec:
    """A run of the fields that a plan may give it, as YAML reads them; the model's defaults where nothing is given.

    Raises:
        I2VLabError: A value breaks a rule.
        TypeError: It is of a kind that no field has; so with ValueError and OverflowError.

    Example:
        >>> spec_of_fields({"model": "ltx-2.3-tiny", "width": 64, "height": 64, "frames": 9}).name
        '64x64x9'
    """
    asked = {name: value for name, value in given.items() if name in REQUEST_FIELDS}
    if asked.get("tiling") is not None:
        asked["tiling"] = Tiling.from_json(asked["tiling"])
    model = given.get("model", FULL_SIZE_MODEL)
    cap = given.get("vram_cap_gib")
    mode: Any = given.get("profiler", "full")
    return RunSpec(
        request=make_request(model, **asked),
        model=model,
        runner=given.get("pipeline", ""),
        techniques=given.get("techniques"),
        consumer=given.get("consumer", "plain"),
        generations=given.get("generations", 1),
        profiler=ProfilerMode.OFF if mode is False else mode,  # as YAML reads the word
        vram_cap_bytes=None if cap is None else round(_number(cap, "vram_cap_gib") * 2**30),
        write_video=_yes_or_no(given, "video"),
    )


def _numbered(asked: list[PlannedRun], path: str | Path) -> list[PlannedRun]:
    models = Counter(name for name, _ in {(run.name, run.spec.model) for run in asked})
    asked = [replace(run, name=f"{run.name}_{run.spec.model}") if models[run.name] > 1 else run for run in asked]
    specs: dict[str, RunSpec] = {}
    for run in asked:
        if specs.setdefault(run.name, run.spec) != run.spec:
            raise InvalidRequest(
                f"plan '{path}' has two different runs that would both be called {run.name}; put one of them elsewhere",
                name=run.name,
            )
    times = Counter(run.name for run in asked)
    seen: Counter[str] = Counter()
    numbered = []
    for run in asked:
        seen[run.name] += 1
        name = f"{run.name}_{seen[run.name]}" if times[run.name] > 1 else run.name
        numbered.append(replace(run, name=name))
    return numbered


def _yes_or_no(values: Mapping[str, Any], name: str) -> bool:
    value = values.get(name, True)
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name}={shown(value)} is neither; use true or false", **{name: value})
    return value


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        words = f"{name}={shown(value)} is not a number of 0 or more; use one"
        raise InvalidRequest(words, **{name.split(": ")[-1]: value})
    try:
        return float(value)
    except OverflowError:
        words = f"{name}={shown(value)} is too large; use less"
        raise InvalidRequest(words, **{name.split(": ")[-1]: value}) from None


def _check_fields(values: Any, known: set[str], where: str) -> None:
    if not isinstance(values, dict):
        raise InvalidRequest(f"{where} is not a mapping of names to values; write it as 'name: value' lines")
    for name, value in values.items():
        if name not in known:
            label = shown(name).strip("'")
            words = f"{where}: {label}={shown(value)} is unknown; use {', '.join(sorted(known))}"
            raise InvalidRequest(words, **{str(name): value})
