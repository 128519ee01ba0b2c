"""Compiled functions, which a forecast refuses: what they allocate is decided when they are compiled for a device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from i2v_lab.errors import ForecastError
from i2v_lab.thread_patches import patched_here, unpatched
from i2v_lab.torch_compat import compiler_home


@contextmanager
def no_compiled_functions() -> Iterator[None]:
    """Refuse calls of what ``torch.compile`` returned, in this thread within this scope.

    Raises:
        ForecastError: At the first such call.
    """
    with ExitStack() as scopes:

        def watch() -> None:
            home, name = compiler_home()
            scopes.enter_context(patched_here(home, name, lambda callback: _refuse(home, name, callback)))

        def compile_(*args: Any, **kwargs: Any) -> Any:
            watch()
            return unpatched(torch, "compile")(*args, **kwargs)

        if compiler_home(load=False) is not None:
            watch()
        else:  # which takes most of a second
            scopes.enter_context(patched_here(torch, "compile", compile_))
        yield


def _refuse(home: Any, name: str, callback: Any) -> Any:
    if callback in (None, False):  # a function that is excluded from compilation
        return unpatched(home, name)(callback)
    raise ForecastError(
        "a function that torch.compile returned was called; what it allocates is decided when it is compiled for the "
        "device. Forecast the function or module that it was made from, which allocates as without compilation",
        cause="compiled",
        operator="torch.compile",
    )
