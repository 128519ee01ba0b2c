"""Errors for operators whose memory a forecast cannot know, or which fail in a real run."""

from __future__ import annotations

from typing import Any

import torch

from i2v_lab.errors import ForecastError


def data_dependent_error(operator: Any, module: str, place: str = "") -> ForecastError:
    """The error for an operator that reads values which are not known.

    Args:
        operator: Which.
        module: Path of the running module.
        place: File and line of the code that called it.
    """
    is_number = any(name in str(operator) for name in ("_local_scalar_dense", "__bool__", "tolist"))
    remedy = "or answer it by assume=Assumptions(...)" if is_number else "or measure a real run"
    return ForecastError(
        f"operator {operator} at {place or 'an unknown line'} in {module or 'no module'} reads values that a forecast "
        "does not know, and memory may depend on them; compute them from numbers or tensors on the CPU whose values "
        f"are known, pass what follows from them as an argument, {remedy}",
        cause="data dependent",
        operator=str(operator),
        module=module,
        place=place,
    )


def endless_loop_error(operator: Any, module: str, place: str, answer: str) -> ForecastError:
    """The error for a question about unknown values that was asked so often that a loop seems to wait for the answer.

    Args:
        operator: Which asks.
        module: Path of the running module.
        place: File and line of the code that called it.
        answer: That it got each time.
    """
    return ForecastError(
        f"operator {operator} at {place or 'an unknown line'} in {module or 'no module'} was answered {answer} so "
        "often that a loop seems to wait for another answer; bound the loop, or give another answer by "
        "assume=Assumptions(...)",
        cause="endless loop",
        operator=str(operator),
        module=module,
        place=place,
    )


def no_kernel_error(operator: Any, module: str) -> ForecastError:
    """The error for an operator whose results' shapes only its real kernel tells."""
    return ForecastError(
        f"operator {operator} has no fake kernel, so what it allocates cannot be forecast; it ran in "
        f"{module or 'no module'}; register one with torch.library.register_fake",
        cause="no fake kernel",
        operator=str(operator),
        module=module,
    )


def real_write_error(operator: Any, module: str) -> ForecastError:
    """The error for an operator that writes to a real tensor."""
    return ForecastError(
        f"operator {operator} in {module or 'no module'} would write to a real tensor, which a forecast must not "
        "change; write to its clone(), make it inside the callable, or pass it or its module as an argument",
        cause="writes to a real tensor",
        operator=str(operator),
        module=module,
    )


def math_attention_error(operator: Any, module: str) -> ForecastError:
    """The error for attention on a card by operators that a card would not run."""
    return ForecastError(
        f"attention in {module or 'no module'} was called through another name, which a forecast cannot "
        "replace by the kernel of a real card; call torch.nn.functional.scaled_dot_product_attention",
        cause="math attention",
        operator=str(operator),
        module=module,
    )


def not_strided_error(operator: Any, module: str) -> ForecastError:
    """The error for a sparse result, or another without a storage of its own."""
    return ForecastError(
        f"operator {operator} in {module or 'no module'} returned a tensor that is not strided, whose memory a "
        "forecast does not count; use dense tensors, or measure a real run",
        cause="not strided",
        operator=str(operator),
        module=module,
    )


def no_answer(call: str, what: str) -> ForecastError:
    """The error for a question that only a real card can answer.

    Args:
        call: What was called.
        what: What it asks for.
    """
    return ForecastError(
        f"{call} asks for {what}; leave the call out of what is forecast, or measure a real run",
        cause="needs a card",
        operator=call,
    )


def check_devices(devices: set[torch.device]) -> None:
    """Torch checks this for every fake operator but the convolution, which then fails only in a real run."""
    if len(devices) > 1:
        found = ", ".join(sorted(map(str, devices)))
        raise RuntimeError(f"Expected all tensors of a convolution to be on the same device, but found {found}")
