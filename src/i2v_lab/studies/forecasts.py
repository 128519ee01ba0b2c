"""What a generation would take on a GPU that is not here: one request, or many, each worked out once."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

import i2v_lab
from i2v_lab.errors import OutputError, RecordError
from i2v_lab.paths import cache_dir, data_dir, find_still
from i2v_lab.pipeline.architectures import Architecture, load_architecture
from i2v_lab.profiling.garbage import no_collection
from i2v_lab.profiling.records import Forecast, record_from_json, record_to_json
from i2v_lab.reporting.files import write_text
from i2v_lab.request import I2VRequest
from i2v_lab.store import usable_cores

if TYPE_CHECKING:
    import pandas as pd

DEFAULT_MODEL = "ltx-2.3-22b"
DEFAULT_STILL = "stills/lighthouse.png"
PACKAGES = ("torch", "ltx-core", "ltx-pipelines", "transformers")


def forecast_request(request: I2VRequest, model: str = DEFAULT_MODEL, device: str = "cuda") -> Forecast:
    """What :class:`~i2v_lab.pipeline.two_stage.TwoStagePipeline` would record for a request.

    The pipeline itself runs, under fake tensors. On ``cuda`` the records are those of the caching allocator, cuBLAS and
    cuDNN workspaces included; on ``cpu`` those of live storages. Kept in the cache by everything that they depend on.

    Args:
        request: What to generate; of its still only the size matters.
        model: An architecture's name.
        device: ``cuda`` (there need be none) or ``cpu``.

    Raises:
        UnknownModel: No such architecture.
        InvalidImage: The still cannot be read.
        ForecastError: The pipeline does something that cannot be known without running it.

    Example:
        >>> request = I2VRequest(image="stills/lighthouse.png", width=1024, height=768, frames=97)
        >>> forecast_request(request).peak.phase  # doctest: +SKIP
        'encode_prompt'
    """
    start_s = time.perf_counter()
    architecture = load_architecture(model)
    request = replace(request, image=str(find_still(request.image)))
    path = cache_dir() / "forecasts" / f"{_key(request, architecture, device)}.json"
    known = _read(path)
    if known is None:
        with no_collection():
            known = _work_out(request, architecture, device)
        try:
            write_text(path, json.dumps({"records": [record_to_json(r) for r in known.records], **_figures(known)}))
        except OSError as error:
            raise OutputError(f"the cache folder '{cache_dir()}' cannot be written ({error.strerror})") from error
    return Forecast(known.records, known.context_bytes, time.perf_counter() - start_s)


def forecast_sweep(
    requests: Sequence[I2VRequest], model: str = DEFAULT_MODEL, *, jobs: int | None = None, progress: bool = True
) -> pd.DataFrame:
    """Many forecasts as one tidy table.

    Args:
        requests: In the order of the table.
        model: An architecture's name.
        jobs: Processes; by default one for each core.
        progress: Show a bar on stderr.

    Returns:
        One row for each request and phase: ``model, width, height, frames, variant, quantization, decode_scope,
        tile_px, tile_overlap_px, tile_frames, tile_overlap_frames, phase, start_bytes, peak_bytes, end_bytes,
        peak_reserved_bytes, saved_for_backward_bytes, context_bytes``. Without tiling the tile columns are missing
        values.
    """
    import pandas as pd

    done = forecast_many(requests, model, jobs=jobs, progress=progress)
    rows = [row for request, found in zip(requests, done, strict=True) for row in _rows(request, model, found)]
    table = pd.DataFrame(rows)
    return table.astype({name: "Int64" for name in table.columns if name.startswith("tile_")})


def forecast_many(
    requests: Sequence[I2VRequest], model: str = DEFAULT_MODEL, *, jobs: int | None = None, progress: bool = True
) -> list[Forecast]:
    """:func:`forecast_request` for many, on all cores; arguments as in :func:`forecast_sweep`."""
    done: dict[int, Forecast] = {}
    bar = tqdm(total=len(requests), desc="forecasts", disable=not progress or not requests)
    jobs = min(jobs or usable_cores(), max(1, len(requests)))
    with bar, ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:  # torch does not survive a fork
        pending = {pool.submit(forecast_request, request, model): i for i, request in enumerate(requests)}
        for future in as_completed(pending):
            done[pending[future]] = future.result()
            bar.update()
    return [done[i] for i in range(len(requests))]


def _rows(request: I2VRequest, model: str, forecast: Forecast) -> Iterable[dict[str, Any]]:
    tiling = request.tiling
    asked = {
        "model": model,
        "width": request.width,
        "height": request.height,
        "frames": request.frames,
        "variant": request.variant.value,
        "quantization": request.quantization.value,
        "decode_scope": request.decode_scope.value,
        "tile_px": tiling.tile_px if tiling else None,
        "tile_overlap_px": tiling.tile_overlap_px if tiling else None,
        "tile_frames": tiling.tile_frames if tiling else None,
        "tile_overlap_frames": tiling.tile_overlap_frames if tiling else None,
    }
    for phase in forecast.phases:
        yield {
            **asked,
            "phase": phase.phase,
            "start_bytes": phase.start_bytes,
            "peak_bytes": phase.peak_bytes,
            "end_bytes": phase.end_bytes,
            "peak_reserved_bytes": phase.peak_reserved_bytes,
            "saved_for_backward_bytes": phase.saved_for_backward_bytes,
            "context_bytes": forecast.context_bytes,
        }


def _work_out(request: I2VRequest, architecture: Architecture, device: str) -> Forecast:
    from i2v_lab.pipeline import ltx2
    from i2v_lab.pipeline.checkpoints import skeleton_weights
    from i2v_lab.pipeline.two_stage import TwoStagePipeline
    from i2v_lab.profiling.forecast import forecasting
    from i2v_lab.profiling.workspaces import load_workspaces

    start_s = time.perf_counter()
    workspaces = load_workspaces() if device == "cuda" else None
    weights = skeleton_weights(architecture)
    with forecasting(device, repeats=ltx2.repeats(), workspaces=workspaces) as profiler:
        for _ in TwoStagePipeline(weights, device, sinks=[profiler])(request).video:
            pass
    context_bytes = workspaces.context_bytes if workspaces else 0
    return Forecast(tuple(profiler.records), context_bytes, time.perf_counter() - start_s)


# --- Cache ------------------------------------------------------------------------------------------------------------


def _key(request: I2VRequest, architecture: Architecture, device: str) -> str:
    asked = {name: value for name, value in request.to_json().items() if name not in ("image", "seed")}
    parts = [
        json.dumps(asked, sort_keys=True),
        _still_size(request.image),
        architecture.to_json(),
        json.dumps(architecture.sampling, sort_keys=True),
        architecture.model_version,
        device,
        *(version(package) for package in PACKAGES),
        _code(),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


def _still_size(image: str) -> str:
    from PIL import Image, UnidentifiedImageError

    with suppress(OSError, UnidentifiedImageError), Image.open(image) as picture:
        return str(picture.size)
    return "unreadable"  # which the pipeline will say


@cache
def _code() -> str:
    """A hash of all code and data of ours that a forecast runs through."""
    package = Path(i2v_lab.__file__).parent
    files = [*package.glob("pipeline/*.py"), *package.glob("profiling/*.py"), package / "request.py"]
    files.append(data_dir() / "workspaces.json")
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()


def _figures(forecast: Forecast) -> dict[str, Any]:
    return {"context_bytes": forecast.context_bytes, "seconds": forecast.seconds}


def _read(path: Path) -> Forecast | None:
    """A cached forecast; a damaged file is as good as none."""
    with suppress(OSError, ValueError, KeyError, TypeError, RecordError):
        values = json.loads(path.read_text())
        records = tuple(record_from_json(record) for record in values["records"])
        return Forecast(records, values["context_bytes"], values["seconds"])
    return None
