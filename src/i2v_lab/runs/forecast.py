"""What a run would take on a GPU that is not here: one, or many, each computed once and cached."""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

from tqdm.auto import tqdm

from i2v_lab.errors import OutputError
from i2v_lab.files import read_cached, write_cached
from i2v_lab.paths import CACHE_VARIABLE, cache_dir, find_still
from i2v_lab.profiling.fake.garbage import no_collection
from i2v_lab.profiling.record_json import record_from_json, record_to_json
from i2v_lab.profiling.records import Forecast, Record
from i2v_lab.request import I2VRequest
from i2v_lab.runs.execute import Mode, execute
from i2v_lab.runs.provenance import code_digest, runner_packages, usable_cores, versions
from i2v_lab.runs.spec import FULL_SIZE_MODEL, RunSpec
from i2v_lab.runs.workers import end_on_interrupt, worker_context
from i2v_lab.stopping import on_stop

Result = tuple[tuple[Record, ...], int]  # records, and the bytes of the CUDA context


def forecast_request(request: I2VRequest, model: str = FULL_SIZE_MODEL, device: str = "cuda") -> Forecast:
    """What a model's pipeline would record for a request.

    The pipeline itself runs, under fake tensors. On ``cuda`` the records are those of the caching allocator, cuBLAS and
    cuDNN workspaces included; on ``cpu`` those of live storages. Cached by everything that they depend on.

    Args:
        request: What to generate; of its still only the size matters.
        model: An architecture's name.
        device: ``cuda`` (there need be none) or ``cpu``.

    Raises:
        UnknownModel: No such architecture.
        InvalidRequest: The model does not support what is asked for.
        RunnerUnavailable: Its package is not installed.
        InvalidImage: The still cannot be read.
        ForecastError: The pipeline does something that cannot be known without running it.

    Example:
        >>> request = I2VRequest(image="stills/lighthouse.png", width=1024, height=768, frames=97)
        >>> forecast_request(request).peak.phase  # doctest: +SKIP
        'encode_prompt'
    """
    return forecast_spec(RunSpec(request=request, model=model), device)


def forecast_spec(spec: RunSpec, device: str = "cuda") -> Forecast:
    """What a run would record, by whichever runner and however often it generates.

    Args:
        spec: What would be done.
        device: As in :func:`forecast_request`, and so are the errors.
    """
    start_s = time.perf_counter()
    spec.runner_spec.require_package(spec.architecture)
    path = cache_path(spec, device)
    result = _read(path)
    if result is None:
        result = _compute(spec, device)
        _write(path, result)
    return Forecast(*result, time.perf_counter() - start_s)


def cached_forecast(spec: RunSpec, device: str = "cuda") -> Forecast | None:
    """The forecast of a run if it is in the cache; ``None`` if it is not."""
    start_s = time.perf_counter()
    result = _read(cache_path(spec, device))
    return None if result is None else Forecast(*result, time.perf_counter() - start_s)


def is_cached(spec: RunSpec, device: str = "cuda") -> bool:
    """Whether the forecast of a run is in the cache; quicker than :func:`cached_forecast`, which reads its records."""
    return read_cached(cache_path(spec, device)) is not None


def forecast_specs(specs: Sequence[RunSpec], *, jobs: int | None = None, progress: bool = True) -> list[Forecast]:
    """:func:`forecast_spec` for many, on all cores; equal ones are computed once, cached ones need no process.

    Args:
        specs: In the order of the result.
        jobs: Processes; by default one for each core.
        progress: Show a bar on stderr.
    """
    paths = [cache_path(spec) for spec in specs]
    # The longest first, so that no core is left alone with it at the end.
    missing = {path: spec for path, spec in zip(paths, specs, strict=True) if _read(path) is None}
    todo = sorted(missing.values(), key=lambda spec: -spec.generations)
    bar = tqdm(
        total=len(specs), initial=len(specs) - len(todo), desc="forecasts", disable=is_quiet(progress and bool(todo))
    )
    jobs = min(jobs or usable_cores(), max(1, len(todo)))
    with bar, nullcontext() if bar.disable else on_stop(partial(os.write, 2, b"\n")):  # the bar's line ends there
        if jobs == 1:
            for spec in todo:
                forecast_spec(spec)
                bar.update()
        else:
            with ProcessPoolExecutor(jobs, worker_context(), end_on_interrupt) as pool:
                for future in as_completed([pool.submit(forecast_spec, spec) for spec in todo]):
                    future.result()
                    bar.update()
    return [forecast_spec(spec) for spec in specs]


def is_quiet(progress: bool) -> bool:
    """Whether no bar is shown: it is not wanted, or ``TQDM_DISABLE`` is set."""
    return not progress or os.environ.get("TQDM_DISABLE", "0") not in ("", "0")


def _compute(spec: RunSpec, device: str) -> Result:
    from i2v_lab.profiling.fake.workspaces import load_workspaces

    with no_collection():
        profiler = execute(spec, Mode.FAKE, device)
    assert profiler is not None
    return tuple(profiler.records), load_workspaces().context_bytes if device == "cuda" else 0


# --- Cache ------------------------------------------------------------------------------------------------------------


def cache_path(spec: RunSpec, device: str = "cuda") -> Path:
    """Where the forecast of a run is, below the cache folder: by everything that its records depend on."""
    architecture = spec.architecture
    parts = [
        spec.memory_key(),
        json.dumps([spec.request.prompt, spec.request.negative_prompt]),  # beyond 1,024 tokens their length counts
        _still_size(str(find_still(spec.request.image))),
        architecture.to_json(),
        json.dumps(architecture.sampling, sort_keys=True),
        architecture.model_version,
        device,
        json.dumps(versions(runner_packages([spec.runner]))),
        code_digest(spec.runner),
    ]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]
    return Path("forecasts", f"{key}.json")


def _still_size(image: str) -> str:
    from PIL import Image

    # What Pillow raises and warns of is for the pipeline, which reads the picture itself; a pipe would make it wait.
    with suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if Path(image).is_file():
            with Image.open(image) as picture:
                return str(picture.size)
    return "unreadable"  # which the pipeline will report


def _read(path: Path) -> Result | None:
    """A cached forecast; a damaged file counts as none."""
    values = read_cached(path)
    if values is None:
        return None
    return tuple(record_from_json(record) for record in values["records"]), values["context_bytes"]


def _write(path: Path, result: Result) -> None:
    records, context_bytes = result
    values = {"records": [record_to_json(record) for record in records], "context_bytes": context_bytes}
    try:
        write_cached(path, values)
    except OSError as error:
        raise OutputError(
            f"the cache folder '{cache_dir()}' cannot be written ({error.strerror}); free some space, or name another "
            f"folder in {CACHE_VARIABLE}",
            path=cache_dir(),
        ) from error
