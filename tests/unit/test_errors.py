"""Errors: one base, fields, an exit status, and the way through a pickle."""

from __future__ import annotations

import copy
import copyreg
import multiprocessing
import pickle
import threading
from pathlib import Path
from types import TracebackType

import pytest

from i2v_lab import errors
from i2v_lab.errors import I2VLabError

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, I2VLabError)]
FAILED_RUN = {
    *("GradScopeError", "VramCapExceeded", "GradEscape", "GenerationStopped"),
    *("MeasureError", "ReproduceError", "ScriptError", "SweepError", "OutOfDeviceMemory"),
}


def _same(error: I2VLabError, other: BaseException) -> bool:
    assert isinstance(other, I2VLabError)
    return (type(error), str(error), error.args, error.fields) == (type(other), str(other), other.args, other.fields)


def test_there_are_leaves_and_each_derives_from_the_base_alone():
    assert len(KINDS) >= 12
    assert all(kind.__bases__ == (I2VLabError,) for kind in KINDS if kind is not I2VLabError)
    assert all(kind.__doc__ for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_errors_survive_pickling(kind, protocol):
    error = kind("path='a b' is wrong; use c", path=Path("a b"), missing=["x", "y"], peak_bytes=2**40, note=None)
    again = pickle.loads(pickle.dumps(error, protocol))
    assert _same(error, again)
    assert str(again) == "path='a b' is wrong; use c"
    assert again.fields == {"path": Path("a b"), "missing": ["x", "y"], "peak_bytes": 2**40, "note": None}
    assert _same(error, copy.copy(error))
    assert _same(error, copy.deepcopy(error))


class Unsendable(RuntimeError):
    """Caused by what no other process has."""

    def __init__(self) -> None:
        super().__init__("held")
        self.held = threading.Lock()


@pytest.mark.parametrize(("cause", "kept"), [(ValueError("x"), "ValueError('x')"), (Unsendable(), "None")], ids=repr)
@pytest.mark.parametrize("explicit", [True, False])
def test_what_caused_an_error_is_pickled_with_it_where_dask_is_loaded_and_it_can_be(monkeypatch, cause, kept, explicit):
    dask = pytest.importorskip("tblib.pickling_support")
    monkeypatch.setitem(copyreg.dispatch_table, TracebackType, dask.pickle_traceback)
    for kind in (errors.ForecastError, type(cause)):
        monkeypatch.setitem(copyreg.dispatch_table, kind, dask.pickle_exception)
    with pytest.raises(errors.ForecastError) as caught:
        try:
            raise cause
        except (RuntimeError, ValueError) as error:
            raise errors.ForecastError("a", value=3) from (error if explicit else None)
    again = pickle.loads(pickle.dumps(caught.value))
    assert _same(caught.value, again)
    assert repr(again.__context__) == kept
    assert repr(again.__cause__) == (kept if explicit else "None")


@pytest.mark.parametrize("kind", KINDS)
def test_exit_statuses_tell_bad_input_from_a_run_that_failed(kind):
    assert kind("message").exit_status == (1 if kind.__name__ in FAILED_RUN else 2)
    assert kind("message").fields == {}


def _raise(kind: type[I2VLabError]) -> None:
    raise kind("value=3 breaks the rule; use 4", value=3)


def test_an_error_crosses_from_a_child_process_whole():
    with multiprocessing.get_context("spawn").Pool(1) as pool, pytest.raises(errors.CheckpointError) as caught:
        pool.apply(_raise, (errors.CheckpointError,))
    assert (str(caught.value), caught.value.fields) == ("value=3 breaks the rule; use 4", {"value": 3})
