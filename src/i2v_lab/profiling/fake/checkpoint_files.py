"""Files of safetensors, read within a forecast as fakes: their reader fills storages, which fakes do not have.

So ``from_pretrained`` of diffusers and transformers runs within a forecast.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import safetensors
import safetensors.torch
import torch

from i2v_lab.thread_patches import unpatched
from i2v_lab.torch_compat import no_dispatch

_found: tuple[int, list[tuple[Any, str, Any]]] = (0, [])


def reading_patches() -> Iterator[tuple[Any, str, Any]]:
    """What to replace, and by what, in all modules that have imported a function that reads files."""
    global _found
    modules = list(sys.modules.values())
    if _found[0] != len(modules):
        readers = (
            (unpatched(safetensors, "safe_open"), "safe_open", _FakeFile),
            (unpatched(safetensors.torch, "load_file"), "load_file", _load_file),
        )
        bound = [
            (module, name, substitute)
            for module in modules
            if module is not sys.modules[__name__]
            for name, value in list(getattr(module, "__dict__", {}).items())
            for reader, known, substitute in readers
            if value is reader or (module in (safetensors, safetensors.torch) and name == known)
        ]
        _found = (len(modules), bound)
    yield from _found[1]
    loader = sys.modules.get("transformers.core_model_loading")
    if hasattr(loader, "is_env_variable_true"):  # it would read weights in other threads
        yield loader, "is_env_variable_true", lambda name, *_: name == "HF_DEACTIVATE_ASYNC_LOAD" or _is_set(name)


def _is_set(name: str) -> bool:
    return bool(unpatched(sys.modules["transformers.core_model_loading"], "is_env_variable_true")(name))


def _load_file(filename: Any, device: Any = "cpu") -> dict[str, torch.Tensor]:
    file = _FakeFile(filename, device=device)
    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary


class _FakeFile:
    """As ``safetensors.safe_open``."""

    def __init__(self, filename: Any, framework: str = "pt", device: Any = "cpu", **options: Any) -> None:
        self._device = device
        self._file = unpatched(safetensors, "safe_open")(filename, framework=framework, device="cpu", **options)

    def __enter__(self) -> _FakeFile:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)  # names and metadata

    def get_tensor(self, name: str) -> torch.Tensor:
        """A tensor, whose values are known if it is small."""
        with no_dispatch():
            real = self._file.get_tensor(name)
        return _fake(real, self._device)

    def get_tensors(self) -> dict[str, torch.Tensor]:
        """All tensors."""
        return {name: self.get_tensor(name) for name in self._file.keys()}  # noqa: SIM118

    def get_slice(self, name: str) -> _FakeSlice:
        """A tensor of which parts are read."""
        return _FakeSlice(self._file.get_slice(name), self._device)


class _FakeSlice:
    def __init__(self, part: Any, device: Any) -> None:
        self._part, self._device = part, device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)

    def __getitem__(self, index: Any) -> torch.Tensor:
        with no_dispatch():
            real = self._part[index]
        return _fake(real, self._device)


def _fake(real: torch.Tensor, device: Any) -> torch.Tensor:
    target = torch.device(device) if isinstance(device, str) else torch.device("cuda", device or 0)
    target = device if isinstance(device, torch.device) else target
    return real.clone() if target.type == "cpu" else real.to(target)
