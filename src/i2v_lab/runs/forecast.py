"""What a generation would take on a GPU that is not here: one request, or many, each worked out once."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from tqdm.auto import tqdm

import i2v_lab
from i2v_lab.errors import OutputError, RecordError
from i2v_lab.files import write_text
from i2v_lab.paths import cache_dir, data_dir, find_still
from i2v_lab.pipeline.contract.architectures import Architecture, load_architecture
from i2v_lab.pipeline.contract.runner import backend_of, check_request
from i2v_lab.profiling.fake.garbage import no_collection
from i2v_lab.profiling.records import Forecast, Record, record_from_json, record_to_json
from i2v_lab.request import I2VRequest
from i2v_lab.runs.spec import FULL_SIZE_MODEL, Experiment, perform
from i2v_lab.runs.store import usable_cores
from i2v_lab.runs.workers import process_context

T = TypeVar("T")
Known = tuple[tuple[Record, ...], int]  # records, and the bytes of the CUDA context

PACKAGES = {
    "ltx-2": ("torch", "ltx-core", "ltx-pipelines", "transformers"),
    "ltx-video": ("torch", "ltx-video", "diffusers", "transformers"),
}


def forecast_request(request: I2VRequest, model: str = FULL_SIZE_MODEL, device: str = "cuda") -> Forecast:
    """What a model's pipeline would record for a request.

    The pipeline itself runs, under fake tensors. On ``cuda`` the records are those of the caching allocator, cuBLAS and
    cuDNN workspaces included; on ``cpu`` those of live storages. Kept in the cache by everything that they depend on.

    Args:
        request: What to generate; of its still only the size matters.
        model: An architecture's name.
        device: ``cuda`` (there need be none) or ``cpu``.

    Raises:
        UnknownModel: No such architecture.
        InvalidRequest: The model has not what is asked for.
        BackendUnavailable: Its package is not installed.
        InvalidImage: The still cannot be read.
        ForecastError: The pipeline does something that cannot be known without running it.

    Example:
        >>> request = I2VRequest(image="stills/lighthouse.png", width=1024, height=768, frames=97)
        >>> forecast_request(request).peak.phase  # doctest: +SKIP
        'encode_prompt'
    """
    return forecast_experiment(Experiment(request=request, model=model), device)


def forecast_experiment(experiment: Experiment, device: str = "cuda") -> Forecast:
    """What a process would record that generates several times, or whose consumer has its own ways.

    Args:
        experiment: What is done.
        device: As in :func:`forecast_request`, and so are the errors.
    """
    architecture = load_architecture(experiment.model)
    check_request(architecture, experiment.request)
    backend_of(architecture).require_package()
    return kept_forecast(kept_path(experiment, device), lambda: _work_out(experiment, device))


def kept_forecast(path: Path, work_out: Callable[[], Known]) -> Forecast:
    """A forecast from the cache, or worked out and left there.

    Raises:
        OutputError: The cache cannot be written.
    """
    start_s = time.perf_counter()
    known = _read(path)
    if known is None:
        with no_collection():
            known = work_out()
        records, context_bytes = known
        values = {"records": [record_to_json(record) for record in records], "context_bytes": context_bytes}
        try:
            write_text(path, json.dumps(values))
        except OSError as error:
            raise OutputError(f"the cache folder '{cache_dir()}' cannot be written ({error.strerror})") from error
    return Forecast(*known, time.perf_counter() - start_s)


def cached_forecast(experiment: Experiment, device: str = "cuda") -> Forecast | None:
    """The forecast of an experiment that has been worked out before; ``None`` if it has not."""
    start_s = time.perf_counter()
    known = _read(kept_path(experiment, device))
    return None if known is None else Forecast(*known, time.perf_counter() - start_s)


def forecast_experiments(
    experiments: Sequence[Experiment], *, jobs: int | None = None, progress: bool = True
) -> list[Forecast]:
    """:func:`forecast_experiment` for many, on all cores; those in the cache need no process of their own.

    Args:
        experiments: In the order of the result.
        jobs: Processes; by default one for each core.
        progress: Show a bar on stderr.
    """
    # The longest first, so that no core is left alone with it at the end.
    order = sorted(range(len(experiments)), key=lambda index: -experiments[index].generations)
    found = kept_forecasts(
        forecast_experiment,
        [experiments[index] for index in order],
        lambda each: kept_path(each).exists(),
        jobs=jobs,
        progress=progress,
    )
    return [found[order.index(index)] for index in range(len(experiments))]


def kept_forecasts(
    work_out: Callable[[T], Forecast],
    asked: Sequence[T],
    is_kept: Callable[[T], bool],
    *,
    jobs: int | None = None,
    progress: bool = True,
) -> list[Forecast]:
    """Work many out, those that are kept here and the others on all cores, in the order given.

    Args:
        work_out: A function of a module, so that a process can be told of it.
        asked: What it is called with.
        is_kept: Whether a process would be wasted on it.
        jobs: Processes; by default one for each core.
        progress: Show a bar on stderr.
    """
    done = {index: work_out(each) for index, each in enumerate(asked) if is_kept(each)}
    todo = [index for index in range(len(asked)) if index not in done]
    bar = tqdm(total=len(asked), initial=len(done), desc="forecasts", disable=hidden(progress and bool(todo)))
    jobs = min(jobs or usable_cores(), max(1, len(todo)))
    if jobs == 1:
        with bar:
            for index in todo:
                done[index] = work_out(asked[index])
                bar.update()
        return [done[index] for index in range(len(asked))]
    with bar, ProcessPoolExecutor(jobs, mp_context=process_context()) as pool:
        pending = {pool.submit(work_out, asked[index]): index for index in todo}
        for future in as_completed(pending):
            done[pending[future]] = future.result()
            bar.update()
    return [done[index] for index in range(len(asked))]


def hidden(progress: bool) -> bool:
    """Whether a bar is not shown: nobody wants it, or ``TQDM_DISABLE`` says that nobody watches."""
    return not progress or os.environ.get("TQDM_DISABLE", "0") not in ("", "0")


def _work_out(experiment: Experiment, device: str) -> Known:
    from i2v_lab.profiling.fake.forecast import forecasting
    from i2v_lab.profiling.fake.workspaces import load_workspaces

    workspaces = load_workspaces() if device == "cuda" else None
    architecture = load_architecture(experiment.model)
    backend = backend_of(architecture)
    weights = backend.skeleton_weights(architecture)
    with forecasting(device, memoize=backend.memoizable_modules(), workspaces=workspaces) as profiler:
        pipeline = backend.pipeline(weights, device, [profiler], experiment.techniques)
        perform(_with_still(experiment), pipeline, profiler, _discard)
    return tuple(profiler.records), workspaces.context_bytes if workspaces else 0


def _discard(_: Any, chunks: Iterable[Any]) -> None:
    for chunk in chunks:
        del chunk  # not to be held while the next one is decoded


# --- Cache ------------------------------------------------------------------------------------------------------------


def kept_path(experiment: Experiment, device: str = "cuda", more: Sequence[str] = ()) -> Path:
    """Where the forecast of an experiment is kept; ``more`` is what else it depends on."""
    experiment = _with_still(experiment)
    key = _key(experiment, load_architecture(experiment.model), device, more)
    return cache_dir() / "forecasts" / f"{key}.json"


def _with_still(experiment: Experiment) -> Experiment:
    return experiment.with_request(image=str(find_still(experiment.request.image)))


def _key(experiment: Experiment, architecture: Architecture, device: str, more: Sequence[str]) -> str:
    asked = experiment.with_request(image="", seed=0).to_json()
    parts = [
        json.dumps(asked, sort_keys=True),
        _still_size(experiment.request.image),
        architecture.to_json(),
        json.dumps(architecture.sampling, sort_keys=True),
        architecture.model_version,
        device,
        *(version(package) for package in PACKAGES[architecture.backend]),
        code_digest(),
        *more,
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


def _still_size(image: str) -> str:
    from PIL import Image, UnidentifiedImageError

    with suppress(OSError, UnidentifiedImageError), Image.open(image) as picture:
        return str(picture.size)
    return "unreadable"  # which the pipeline will say


@cache
def code_digest() -> str:
    """A hash of all code and data of ours that a generation runs through, real or forecast."""
    package = Path(i2v_lab.__file__).parent
    files = [*package.glob("pipeline/**/*.py"), *package.glob("profiling/**/*.py"), package / "request.py"]
    files += [package / "memory_policy.py", package / "runs" / "spec.py", data_dir() / "workspaces.json"]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()


def _read(path: Path) -> Known | None:
    """A cached forecast; a damaged file is as good as none."""
    with suppress(OSError, ValueError, KeyError, TypeError, RecordError):
        values = json.loads(path.read_text())
        records = tuple(record_from_json(record) for record in values["records"])
        return records, values["context_bytes"]
    return None
