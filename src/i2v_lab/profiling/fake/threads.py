"""A forecast belongs to one thread: work of its tensors in another one is refused, since it would not be counted."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch

from i2v_lab.errors import ForecastError
from i2v_lab.thread_patches import patched_here, unpatched
from i2v_lab.torch_compat import DispatchMode, HardwareFreeFakeMode


class ForecastMode(HardwareFreeFakeMode):
    """Makes tensors fake in the thread that made it.

    Attributes:
        refusals: Errors of other threads, which nobody may have seen there.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.refusals: list[ForecastError] = []
        self._owner = threading.get_ident()
        self._is_over = False

    def __enter__(self) -> Self:
        if threading.get_ident() != self._owner and not self._is_over:  # torch does it for a lone fake tensor
            self.refuse("an operator on a tensor of the forecast")
        return super().__enter__()

    def refuse(self, work: str) -> None:
        """Refuse what this thread does.

        Args:
            work: What it is, for the message.
        """
        name = threading.current_thread().name
        error = ForecastError(
            f"{work} ran in thread '{name}', where a forecast counts nothing; run it in the thread that forecasts, or "
            "forecast what that thread does by itself",
            cause="another thread",
            thread=name,
        )
        self.refusals.append(error)
        raise error

    def end(self) -> None:
        """The forecast is over: its threads, if they go on, are as any other."""
        self._is_over = True

    @property
    def is_over(self) -> bool:
        """Whether the forecast has ended."""
        return self._is_over


class _Refusing(DispatchMode):
    """Refuses every operator in a thread that a forecast started."""

    def __init__(self, mode: ForecastMode) -> None:
        super().__init__()
        self._mode = mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._mode.is_over:
            self._mode.refuse(f"operator {func}")
        return func(*args, **(kwargs or {}))


@contextmanager
def one_thread(mode: ForecastMode) -> Iterator[None]:
    """Refuse torch's operators in the threads that are started within this scope.

    Raises:
        ForecastError: In such a thread; and at the end of the scope, if its error was not passed on.
    """

    def start(thread: threading.Thread) -> None:
        run = thread.run

        def refusing() -> None:
            def initialise() -> None:
                if not mode.is_over:
                    mode.refuse("an initialisation of CUDA")
                unpatched(torch.cuda, "_lazy_init")()

            with patched_here(torch.cuda, "_lazy_init", initialise), _Refusing(mode):
                run()

        thread.run = refusing  # type: ignore[method-assign]
        unpatched(threading.Thread, "start")(thread)

    try:
        with patched_here(threading.Thread, "start", start):
            yield
        if mode.refusals:
            raise mode.refusals[0]
    finally:
        mode.end()
