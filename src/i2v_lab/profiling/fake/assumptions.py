"""What a forecast answers where code asks for values that it does not know, and the list of what it answered."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

from i2v_lab.errors import ForecastError, shown
from i2v_lab.profiling.fake.compact_zeros import zeros
from i2v_lab.profiling.fake.refusals import data_dependent_error, endless_loop_error
from i2v_lab.profiling.records import AssumptionRecord
from i2v_lab.torch_compat import NUMPY, no_dispatch

SKIPPED = ("torch.", "safetensors.", "i2v_lab.profiling.", "i2v_lab.thread_patches.", "i2v_lab.torch_compat.")
MAX_ANSWERS = 100_000  # to one question at one place: a loop that waits for another answer would never end


@dataclass(frozen=True)
class Assumptions:
    """Answers to questions about values that a forecast does not know; ``None`` or ``False`` refuses them.

    Attributes:
        conditions: Truth of an unknown value, such as ``image.min() < 0`` or ``torch.isnan(x).any()``.
        arrays: Whether ``numpy()`` and ``tolist()`` return zeros, of the right shape and dtype.
        numbers: What ``item()``, ``int()`` and ``float()`` of an unknown number return. Refused by default: sizes may
            follow from it.

    Example:
        >>> from i2v_lab.profiling.fake.forecast import forecasting
        >>> with forecasting("cuda", assume=Assumptions(numbers=3)) as profiler, profiler.phase("rows"):
        ...     rows = torch.empty(torch.rand(1, device="cuda").int().item(), 256, device="cuda")
        >>> profiler.peak.peak_bytes, [record.answer for record in profiler.assumptions]
        (3072, ['3'])
    """

    conditions: bool | None = False
    arrays: bool = True
    numbers: float | None = None


DEFAULT = Assumptions()
NOTHING = Assumptions(conditions=None, arrays=False, numbers=None)


def chosen_assumptions(assume: Assumptions | str | None) -> Assumptions:
    """What ``assume=`` says.

    Raises:
        ForecastError: It is neither :class:`Assumptions`, ``"nothing"`` nor ``None``, or has answers of another type.
    """
    if assume is None or assume == "nothing":
        return NOTHING
    if not isinstance(assume, Assumptions):
        raise ForecastError(
            f"assume={shown(assume)} is not known; use Assumptions(...) or 'nothing'",
            cause="unknown setting",
            assume=shown(assume),
        )
    numbers = assume.numbers
    is_number = numbers is None or (isinstance(numbers, int | float) and not isinstance(numbers, bool))
    if not (assume.conditions is None or isinstance(assume.conditions, bool)) or not is_number:
        raise ForecastError(
            f"assume={shown(assume)} has an answer of another type; conditions is True, False or None, numbers a "
            "number or None",
            cause="unknown setting",
            assume=shown(assume),
        )
    return assume


class Answers:
    """Answers questions about unknown values as :class:`Assumptions` say, and counts them by their place.

    Args:
        assume: The answers.
        current_module: Returns the path of the running module.
        current_phase: Returns the name of the phase.
        is_weight: Whether a tensor is part of a weight of a module.
    """

    def __init__(
        self,
        assume: Assumptions,
        current_module: Callable[[], str],
        current_phase: Callable[[], str] = str,
        is_weight: Callable[[torch.Tensor], bool] = lambda tensor: False,
    ) -> None:
        self._is_weight = is_weight
        self._assume = assume
        self._current_module = current_module
        self._current_phase = current_phase
        self._counts: Counter[tuple[str, str, str, str, str]] = Counter()

    def condition(self, operator: Any) -> bool:
        """The truth of an unknown value; true where ``torch.distributions`` checks its arguments.

        Raises:
            ForecastError: Conditions are refused, or this one was asked too often.
        """
        if self._assume.conditions is None:
            raise self.refusal(operator)
        answer = self._assume.conditions or _is_check_of_distribution()
        self._add(operator, str(answer))
        return answer

    def number(self, operator: Any, tensor: torch.Tensor) -> bool | int | float:
        """An unknown value of a tensor with one element; 0 for a weight, such as a threshold, if arrays are zeros.

        Raises:
            ForecastError: Numbers are refused, or this one was asked too often.
        """
        if tensor.dtype == torch.bool:
            return self.condition(operator)
        is_weight = tensor.dtype.is_floating_point and self._is_weight(tensor)
        return self._number(operator, tensor, self._assume.arrays and is_weight)

    def number_in_text(self, operator: Any, tensor: torch.Tensor) -> bool | int | float:
        """As :meth:`number`, of one that is only printed: 0 if arrays are zeros."""
        if tensor.dtype == torch.bool:
            return self.condition(operator)
        return self._number(operator, tensor, self._assume.arrays)

    def _number(self, operator: Any, tensor: torch.Tensor, is_harmless: bool) -> int | float:
        number = 0 if self._assume.numbers is None and is_harmless else self._assume.numbers
        if number is None:
            raise self.refusal(operator)
        number = float(number) if tensor.dtype.is_floating_point else int(number)
        self._add(operator, str(number))
        return number

    def array(self, operator: Any, tensor: torch.Tensor, **kwargs: Any) -> Any:
        """An array of NumPy with the shape and dtype of a tensor.

        Args:
            operator: Who asks.
            tensor: Of unknown values.
            **kwargs: Of ``Tensor.numpy``.

        Raises:
            ForecastError: Arrays are refused.
            TypeError: NumPy has no such dtype.
            RuntimeError: The tensor requires grad.
        """
        if not self._assume.arrays:
            raise self.refusal(operator)
        with no_dispatch():  # fails where that of a real tensor would
            like = NUMPY(torch.empty(0, dtype=tensor.dtype, requires_grad=tensor.requires_grad), **kwargs)
        self._add(operator, f"zeros of {tuple(tensor.shape)}, {like.dtype}")
        return zeros(tuple(tensor.shape), like.dtype)

    def nested_list(self, operator: Any, tensor: torch.Tensor) -> Any:
        """As ``Tensor.tolist()``.

        Raises:
            ForecastError: Arrays are refused; or of a tensor without dimensions, numbers.
        """
        if not tensor.dim():
            return self.number(operator, tensor)
        if not self._assume.arrays:
            raise self.refusal(operator)
        dtype = str(tensor.dtype).removeprefix("torch.")
        self._add(operator, f"zeros of {tuple(tensor.shape)}, {dtype}")
        with no_dispatch():
            return torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu").tolist()

    def refusal(self, operator: Any) -> ForecastError:
        """The error for an operator that reads values which are not known."""
        return data_dependent_error(operator, self._current_module(), calling_line())

    def records(self) -> list[AssumptionRecord]:
        """What was answered so far, in the order of the first answers."""
        return [AssumptionRecord(*key, count=count) for key, count in self._counts.items()]

    def _add(self, operator: Any, answer: str) -> None:
        place, module = calling_line(), self._current_module()
        key = (self._current_phase(), str(operator), module, place, answer)
        self._counts[key] += 1
        if self._counts[key] > MAX_ANSWERS:
            raise endless_loop_error(operator, module, place, answer)


def calling_line() -> str:
    """File and line of the innermost code outside torch and the profilers, such as ``diffusers/image_processor.py:9``.

    Empty if there is none.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _module(frame).startswith(SKIPPED):
        frame = frame.f_back
    if frame is None:
        return ""
    name = frame.f_code.co_filename
    folders = [folder for folder in sys.path if folder and name.startswith(folder.rstrip(os.sep) + os.sep)]
    longest = max(folders, key=len, default="").rstrip(os.sep)
    return f"{name[len(longest) + 1 :] if folders else name}:{frame.f_lineno}"


def _is_check_of_distribution() -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _module(frame).startswith(SKIPPED):
        if _module(frame).startswith("torch.distributions."):
            return True
        frame = frame.f_back
    return False


def _module(frame: FrameType) -> str:
    return f"{frame.f_globals.get('__name__', '')}."
