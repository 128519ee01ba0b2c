"""i2v-lab: run, profile and explain the memory of large image-to-video pipelines.

Importing the package is cheap: names are resolved on first use, and torch is imported only by what needs it.

Example:
    >>> import i2v_lab
    >>> i2v_lab.I2VRequest(image="still.png", width=192, height=128, frames=25).shape
    VideoShape(frames=25, height=128, width=192)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from i2v_lab.errors import I2VLabError
    from i2v_lab.lab.compare import Compare
    from i2v_lab.lab.explorer import Explorer
    from i2v_lab.lab.generate import Generate
    from i2v_lab.lab.monitor import VramMonitor
    from i2v_lab.memory_settings import MemorySettings
    from i2v_lab.pipeline.contract.generation import Generation, VideoStream
    from i2v_lab.pipeline.contract.media import write_video
    from i2v_lab.pipeline.ltx2.pipeline import TwoStagePipeline
    from i2v_lab.pipeline.ltx2.weights import Weights, resolve_weights
    from i2v_lab.profiling.fake.assumptions import Assumptions
    from i2v_lab.profiling.fake.card import CardProperties
    from i2v_lab.profiling.fake.forecast import forecast, forecasting
    from i2v_lab.profiling.guard import guard_stream, watch
    from i2v_lab.profiling.phase_profiler import PhaseProfiler
    from i2v_lab.profiling.records import Forecast
    from i2v_lab.reporting.comparison import Comparison, compare_runs
    from i2v_lab.request import DecodeScope, I2VRequest, Quantization, Tiling, Variant
    from i2v_lab.runs.forecast import forecast_request
    from i2v_lab.runs.forecast_script import forecast_script
    from i2v_lab.runs.profile_call import ProfiledCall, profile_call
    from i2v_lab.runs.sources import forecast_sweep
    from i2v_lab.runs.spec import RunSpec
    from i2v_lab.runs.store import Run, read_run

__version__ = "0.2.0"

_HOME = {
    "Compare": "i2v_lab.lab.compare",
    "Explorer": "i2v_lab.lab.explorer",
    "Generate": "i2v_lab.lab.generate",
    "VramMonitor": "i2v_lab.lab.monitor",
    "I2VLabError": "i2v_lab.errors",
    "Weights": "i2v_lab.pipeline.ltx2.weights",
    "resolve_weights": "i2v_lab.pipeline.ltx2.weights",
    "write_video": "i2v_lab.pipeline.contract.media",
    "Generation": "i2v_lab.pipeline.contract.generation",
    "TwoStagePipeline": "i2v_lab.pipeline.ltx2.pipeline",
    "VideoStream": "i2v_lab.pipeline.contract.generation",
    "Forecast": "i2v_lab.profiling.records",
    "PhaseProfiler": "i2v_lab.profiling.phase_profiler",
    "guard_stream": "i2v_lab.profiling.guard",
    "watch": "i2v_lab.profiling.guard",
    "Assumptions": "i2v_lab.profiling.fake.assumptions",
    "CardProperties": "i2v_lab.profiling.fake.card",
    "forecast": "i2v_lab.profiling.fake.forecast",
    "forecasting": "i2v_lab.profiling.fake.forecast",
    "forecast_request": "i2v_lab.runs.forecast",
    "forecast_script": "i2v_lab.runs.forecast_script",
    "ProfiledCall": "i2v_lab.runs.profile_call",
    "profile_call": "i2v_lab.runs.profile_call",
    "forecast_sweep": "i2v_lab.runs.sources",
    "RunSpec": "i2v_lab.runs.spec",
    "Run": "i2v_lab.runs.store",
    "read_run": "i2v_lab.runs.store",
    "Comparison": "i2v_lab.reporting.comparison",
    "compare_runs": "i2v_lab.reporting.comparison",
    "DecodeScope": "i2v_lab.request",
    "I2VRequest": "i2v_lab.request",
    "Quantization": "i2v_lab.request",
    "MemorySettings": "i2v_lab.memory_settings",
    "Tiling": "i2v_lab.request",
    "Variant": "i2v_lab.request",
}

__all__ = [
    "Assumptions",
    "CardProperties",
    "Compare",
    "Comparison",
    "DecodeScope",
    "Explorer",
    "Forecast",
    "Generate",
    "Generation",
    "I2VLabError",
    "I2VRequest",
    "MemorySettings",
    "PhaseProfiler",
    "ProfiledCall",
    "Quantization",
    "Run",
    "RunSpec",
    "Tiling",
    "TwoStagePipeline",
    "Variant",
    "VideoStream",
    "VramMonitor",
    "Weights",
    "compare_runs",
    "forecast",
    "forecast_request",
    "forecast_script",
    "forecast_sweep",
    "forecasting",
    "guard_stream",
    "profile_call",
    "read_run",
    "resolve_weights",
    "watch",
    "write_video",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_HOME[name]), name)
    except ModuleNotFoundError as error:
        from i2v_lab.extras import missing_extra

        raise missing_extra(error) or error from error


def load_ipython_extension(shell: Any) -> None:
    """``%load_ext i2v_lab``: adds ``%vram`` and ``%%vram``."""
    from i2v_lab.profiling.jupyter.magics import load_ipython_extension as load

    load(shell)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
