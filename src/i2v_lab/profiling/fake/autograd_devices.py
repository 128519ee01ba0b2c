"""The devices in autograd's graph, which let its engine run a backward pass of fake CUDA tensors without a driver.

Autograd's engine asks the CUDA driver for the streams of every node of a graph whose metadata name an accelerator. It
runs nodes on the meta device without any. So the metadata of fake CUDA tensors name a meta device, which no tensor of
the code has: that of index 100 for ``cuda:0``. All other code is told the CUDA device.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from enum import Enum, auto
from typing import Any

import torch

from i2v_lab.torch_compat import DATA

_FIRST_AUTOGRAD_DEVICE = 100
_METADATA = (
    b"_ZN5torch8autograd13InputMetadataC",  # its constructors, for each node
    b"_ZN5torch8autograd11InputBuffer3addE",  # adds a gradient to those that a node is waiting for
    b"_ZN5torch8autograd16validate_outputsE",  # compares gradients with the metadata; called by the two below
    b"_ZN5torch8autograd6Engine7executeE",
    b"_ZN5torch8autograd6Engine17evaluate_functionE",
)


def autograd_device(device: torch.device) -> torch.device:
    """The device that autograd's graph has in place of a fake CUDA device, so that its engine asks no driver.

    Example:
        >>> autograd_device(torch.device("cuda", 0))
        device(type='meta', index=100)
    """
    return torch.device("meta", _FIRST_AUTOGRAD_DEVICE + (device.index or 0))


def real_device(device: torch.device) -> torch.device:
    """The fake CUDA device that :func:`autograd_device` replaced; any other device as it is."""
    if device.type != "meta" or device.index is None or device.index < _FIRST_AUTOGRAD_DEVICE:
        return device
    return torch.device("cuda", device.index - _FIRST_AUTOGRAD_DEVICE)


class _Symbol(ctypes.Structure):
    """``Dl_info``: of which library and function an address is."""

    _fields_ = (
        ("library", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


class _Frame(Enum):
    """Where a return address on the stack lies."""

    INTERPRETER = auto()  # or in any other library
    BINDING = auto()  # of torch to Python
    METADATA = auto()  # in one of the functions in _METADATA
    NAMED = auto()  # in another one that libtorch_cpu exports
    UNNAMED = auto()  # in one that it does not


_frames: dict[int, _Frame] = {}  # by return address


def asked_by_autograd() -> bool:
    """Whether a fake's device is read for the metadata of autograd's graph, rather than to choose a kernel.

    Both dispatch ``prim::device`` from C++, above the same Python frames, so only the frames of C++ tell. False where
    the C library lists none, as on Windows.
    """
    if _C_LIBRARY is None:
        return False
    for limit in (32, 512):  # mostly there are 15 up to the reader; with each mode that passes the operator on, 26 more
        addresses = (ctypes.c_size_t * limit)()
        found = _is_read_by_autograd(addresses[: _C_LIBRARY.backtrace(addresses, limit)])
        if found is not None:
            return found
    return False


def _is_read_by_autograd(addresses: Sequence[int]) -> bool | None:
    """Whether a function of ``_METADATA`` is the reader; ``None`` if these innermost frames do not reach that."""
    last, passed_on = _Frame.INTERPRETER, False
    for address in addresses:
        frame = _frames.get(address) or _frames.setdefault(address, _frame(address))
        if frame in (_Frame.METADATA, _Frame.NAMED):
            return frame is _Frame.METADATA and last is not _Frame.INTERPRETER
        if frame is _Frame.UNNAMED:  # a function that a named one calls, or ``prim::device``, which a mode passed on
            passed_on = True
        elif frame is _Frame.INTERPRETER and last is _Frame.BINDING:
            if not passed_on:  # the binding is the reader
                return False
            passed_on = False
        last = frame
    return None


def _frame(address: int) -> _Frame:
    symbol = _Symbol()
    _C_LIBRARY.dladdr(ctypes.c_void_p(address), ctypes.byref(symbol))
    library = (symbol.library or b"").rpartition(b"/")[2]
    if library.startswith((b"libtorch_python", b"libc10")):
        return _Frame.BINDING
    if not library.startswith(b"libtorch"):
        return _Frame.INTERPRETER
    if not symbol.name:
        return _Frame.UNNAMED
    return _Frame.METADATA if symbol.name.startswith(_METADATA) else _Frame.NAMED


def _c_library() -> Any:
    """The C library, if it can list the frames of C++; called without giving up the interpreter lock."""
    try:
        library = ctypes.PyDLL(None)
        return library if library.backtrace and library.dladdr else None
    except (AttributeError, OSError, TypeError):
        return None


_C_LIBRARY: Any = _c_library()


class AutogradDevices:
    """Tells C++ code the device of a fake tensor, or the one in autograd's graph."""

    def __init__(self) -> None:
        self._has_graph = False  # otherwise autograd asks for nothing without gradients
        self._sets_data = False

    def told(self, device: torch.device) -> torch.device:
        """What C++ code is told that asks for the device of a fake tensor.

        Args:
            device: Its own.
        """
        if device.type != "cuda":
            return device
        if self._sets_data:
            return autograd_device(device)
        if not (self._has_graph or torch.is_grad_enabled()) or not asked_by_autograd():
            return device
        self._has_graph = True
        return autograd_device(device)

    def set_data(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        """``tensor.data = value``, which compares the device of ``value`` with that in autograd's graph."""
        self._sets_data = True
        try:
            DATA.__set__(tensor, value)
        finally:
            self._sets_data = False


def with_real_device(kwargs: dict[str, Any]) -> dict[str, Any]:
    """An operator's keyword arguments, whose device may be one in autograd's graph, with the fake CUDA device."""
    device = kwargs.get("device")
    return kwargs if device is None else {**kwargs, "device": real_device(device)}
