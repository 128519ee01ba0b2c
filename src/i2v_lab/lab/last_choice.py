"""What was chosen last in a view, kept for the next time that it is opened."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from i2v_lab.capacity.budget import AUTO, budget_bytes
from i2v_lab.capacity.cards import gpu_memory_bytes
from i2v_lab.errors import I2VLabError, InvalidImage, shown
from i2v_lab.files import write_text
from i2v_lab.memory_policy import MemoryPolicy
from i2v_lab.paths import find_still, user_state_dir
from i2v_lab.pipeline.contract.architectures import load_architecture
from i2v_lab.pipeline.registry import check_request, runner_of
from i2v_lab.request import I2VRequest


@dataclass(frozen=True)
class Choice:
    """What the controls of a view say.

    Attributes:
        request: What would be generated.
        model: An architecture's name.
        gpu: A card, by its name or its size; empty in a view that runs on this machine.
        budget: As in :class:`~i2v_lab.lab.question.Question`.
    """

    request: I2VRequest
    model: str
    gpu: str = ""
    budget: str = ""


def choice_path(view: str) -> Path:
    """The file of a view's last choice."""
    return user_state_dir() / f"{view}.json"


def remember(view: str, choice: Choice) -> None:
    """Keep a choice; where its file cannot be written it is not kept.

    Args:
        view: The view's name.
        choice: What was chosen.
    """
    with suppress(OSError):
        write_text(choice_path(view), json.dumps({**vars(choice), "request": choice.request.to_json()}, indent=1))


def recall(view: str, check: Callable[[Choice], None] = lambda _: None) -> tuple[Choice | None, str]:
    """The last choice, and a note where there is one that cannot be used.

    Args:
        view: The view's name.
        check: Raises an error of this package for a choice that the view cannot take.

    Example:
        >>> recall("a view that was never opened")
        (None, '')
    """
    path = choice_path(view)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError) as error:
        return None, _ignored(path, type(error).__name__)
    try:
        choice = _read(json.loads(text))
        check(choice)
    except I2VLabError as error:
        return None, _ignored(path, str(error))
    except (ValueError, TypeError, KeyError, RecursionError):
        return None, _ignored(path, "it is damaged")
    return choice, ""


def check_runs_here(choice: Choice) -> None:
    """Refuse a model whose package is gone, and a still that is.

    Raises:
        RunnerUnavailable: With the package.
        InvalidImage: With the still.
    """
    architecture = load_architecture(choice.model)
    runner_of(architecture).require_package(architecture)
    image = choice.request.image
    if not os.path.exists(find_still(image)):  # noqa: PTH110 - which raises for no name
        raise InvalidImage(f"image={shown(image)} does not exist; choose another", image=image)


def _read(values: Any) -> Choice:
    names = ("model", "gpu", "budget")
    if not isinstance(values, dict) or not all(isinstance(values[name], str) for name in names):
        raise ValueError
    choice = Choice(I2VRequest.from_json(values["request"]), *(values[name] for name in names))
    memory = MemoryPolicy.RESIDENT if choice.request.memory is MemoryPolicy.AUTO else choice.request.memory
    check_request(load_architecture(choice.model), replace(choice.request, memory=memory))
    if choice.gpu:
        gpu_memory_bytes(choice.gpu)
    if choice.budget not in ("", AUTO):
        budget_bytes(choice.budget)
    return choice


def _ignored(path: Path, why: str) -> str:
    return f"The last choice is not restored: {why} ({path})."
