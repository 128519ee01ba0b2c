"""Third-party pipelines: which of them can retain an autograd graph, and how."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from i2v_lab.files import read_cached, write_cached
from i2v_lab.memory_settings import Dtype, MemorySettings
from i2v_lab.paths import find_still
from i2v_lab.request import I2VRequest, Variant
from i2v_lab.runs.provenance import code_digest, normalized_code, runner_packages, versions
from i2v_lab.runs.spec import SMALL_MODEL

if TYPE_CHECKING:
    import torch

    from i2v_lab.pipeline.ltx2.weights import Weights

CALLERS = "the caller's"
COLUMNS = ["pipeline", "lazy", "own_scope", "grad_bytes", "no_grad_bytes", "guarded_bytes"]


@dataclass(frozen=True)
class Subject:
    """A third-party pipeline under test.

    Attributes:
        name: In the table.
        call: Runs it; all arguments are bound.
        decode: Given what ``call`` returned, a new iterator over the frames that its caller has to decode; ``None`` for
            a pipeline that returns decoded frames.
    """

    name: str
    call: Callable[[], Any]
    decode: Callable[[Any], Iterable[Any]] | None


def leak_table(image: str = "stills/lighthouse.png", model: str = SMALL_MODEL) -> pd.DataFrame:
    """Bytes that autograd retains in third-party pipelines, run on the CPU with tiny models and random weights.

    The grad modes of a pipeline do not depend on the model's size, so the table is the same for every source. It is
    cached by the code and the versions of the packages.

    Args:
        image: The still.
        model: A small architecture, for ltx-pipelines; diffusers runs ``ltx-2-tiny``.

    Returns:
        ``pipeline``; ``lazy``, whether it returns before the frames are decoded; ``own_scope``, the grad mode of its
        components when it is called with grad enabled; and the bytes saved for backward while frames are decoded:
        ``grad_bytes`` with grad enabled, ``no_grad_bytes`` inside ``no_grad``, and ``guarded_bytes`` with grad enabled
        through ``guard_stream``, missing for a pipeline that returns decoded frames.
    """
    path = _cache_path(image, model)
    rows = read_cached(path)
    if rows is None:
        rows = _leak_rows(image, model)
        with suppress(OSError):  # then they are computed again the next time
            write_cached(path, rows)
    return pd.DataFrame(rows, columns=COLUMNS).astype(dict.fromkeys(COLUMNS[3:], "Int64"))


def leak_summary(table: pd.DataFrame) -> dict[str, int]:
    """Summarize :func:`leak_table`: how many pipelines are lazy or retain a graph, and the maxima with each remedy."""
    return {
        "others": len(table),
        "others_lazy": int(table["lazy"].sum()),
        "others_leaking": int((table["grad_bytes"] > 0).sum()),
        "others_no_grad_bytes": int(table["no_grad_bytes"].max()),
        "others_guarded_bytes": int(table["guarded_bytes"].max()),
    }


def _cache_path(image: str, model: str) -> Path:
    runners = ("ltx-pipelines", "diffusers")
    code = [normalized_code(Path(__file__)), *map(code_digest, runners)]
    parts = [str(find_still(image)), model, *code, json.dumps(versions(runner_packages(runners)))]
    return Path("leaks") / f"{hashlib.sha256(chr(10).join(parts).encode()).hexdigest()[:24]}.json"


def _leak_rows(image: str, model: str) -> list[list[Any]]:
    from i2v_lab.pipeline.contract.architectures import load_architecture
    from i2v_lab.pipeline.ltx2.weights import resolve_weights

    weights = resolve_weights(load_architecture(model), needs_lora=True)
    # A graph is retained at any size.
    request = I2VRequest(image=str(find_still(image)), width=64, height=64, frames=9, fps=120.0)
    with ExitStack() as scopes:
        subjects = [*_upstream(weights, request, scopes), *_diffusers(request)]
        return [_row(subject) for subject in subjects]


def _upstream(weights: Weights, request: I2VRequest, scopes: ExitStack) -> Iterator[Subject]:
    from i2v_lab.pipeline.ltx2.upstream import UpstreamPipeline

    for variant, options in ((Variant.DISTILLED, {}), (Variant.DEV, {"num_inference_steps": 1})):
        call = scopes.enter_context(UpstreamPipeline(weights).without_events(replace(request, variant=variant)))
        yield Subject(
            f"ltx-pipelines {type(call.func).__name__}", partial(call, **options), lambda made: restarted(made[0])
        )


def _diffusers(request: I2VRequest) -> Iterator[Subject]:
    from i2v_lab.pipeline.contract.architectures import load_architecture
    from i2v_lab.pipeline.diffusers.ltx2 import DiffusersLTX2
    from i2v_lab.pipeline.diffusers.weights import resolve_weights

    in_float32 = MemorySettings(dtypes=(("default", Dtype.FLOAT32),))
    pipeline = DiffusersLTX2(resolve_weights(load_architecture("ltx-2-tiny")), settings=in_float32)
    name = f"diffusers {type(pipeline.generate).__name__}"
    decode = pipeline.generate.vae.decode
    yield Subject(name, partial(pipeline.run, request), None)
    yield Subject(
        f"{name}, output_type='latent'", partial(pipeline.run, request, "latent"), lambda made: map(decode, [made[0]])
    )


def restarted(stream: Iterator[Any]) -> Iterator[Any]:
    """A new generator of the same function and arguments as one that has not started, which is left as it is."""
    code = stream.gi_code  # type: ignore[attr-defined]
    function = stream.gi_frame.f_globals[code.co_name]  # type: ignore[attr-defined]
    arguments = inspect.getgeneratorlocals(stream)  # type: ignore[arg-type]
    new: Iterator[Any] = function(**arguments)
    return new


def _row(subject: Subject) -> list[Any]:
    import torch

    from i2v_lab.profiling.guard import guard_stream

    scope = own_scope(subject.call)
    if subject.decode is None:
        return [subject.name, False, scope, *(_retained(_called(subject.call), grad) for grad in (True, False)), None]
    with torch.no_grad():
        made = subject.call()
    decode = partial(subject.decode, made)
    lazy = any(isinstance(part, Iterator) for part in made)
    retained = [_retained(decode(), True), _retained(decode(), False), _retained(guard_stream(decode()), True)]
    return [subject.name, lazy, scope, *retained]


def _called(call: Callable[[], Any]) -> Iterator[Any]:
    yield call()


def _retained(frames: Iterable[Any], grad: bool) -> int:
    """The maximum that autograd saved for backward while frames were decoded, in bytes."""
    import torch

    from i2v_lab.profiling.phase_profiler import PhaseProfiler

    with PhaseProfiler() as profiler, profiler.phase("decode_video"), torch.set_grad_enabled(grad):
        for frame in frames:
            del frame
    return profiler.peak.saved_for_backward_bytes or 0


class _Stop(Exception):
    """Ends a call at its first module."""


def own_scope(call: Callable[[], Any]) -> str:
    """The grad mode of a pipeline's first module call while its caller has grad enabled."""
    import torch
    from torch.nn.modules.module import register_module_forward_pre_hook

    modes: list[str] = []

    def read_mode(module: torch.nn.Module, args: Any) -> None:
        inference = torch.is_inference_mode_enabled()
        modes.append("inference_mode" if inference else CALLERS if torch.is_grad_enabled() else "no_grad")
        raise _Stop

    handle = register_module_forward_pre_hook(read_mode)
    try:
        with torch.enable_grad():
            call()
    except _Stop:
        pass
    finally:
        handle.remove()
    return modes[0]
