"""What ``torch.cuda`` tells in a forecast: bytes as the forecast counts them, and the properties of one card.

By default the card is the one that the models of workspaces and attention were measured on, an H100 of 80 GB.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from i2v_lab.errors import ForecastError
from i2v_lab.profiling.fake.refusals import no_answer
from i2v_lab.thread_patches import unpatched
from i2v_lab.torch_compat import FakeTensor

DEVICE = torch.device("cuda", 0)
OF_A_REAL_ALLOCATOR = ("memory_summary", "memory_snapshot", "caching_allocator_alloc", "list_gpu_processes")
OF_A_REAL_CARD = ("utilization", "memory_usage", "temperature", "power_draw", "clock_rate", "CUDAGraph", "cudart")


class CountedBytes(Protocol):
    """What a forecast counts, since its beginning or the code's last reset of the peaks."""

    def allocated_bytes(self) -> int:
        """As ``torch.cuda.memory_allocated()``."""

    def max_allocated_bytes(self) -> int:
        """As ``torch.cuda.max_memory_allocated()``."""

    def reserved_bytes(self) -> int:
        """As ``torch.cuda.memory_reserved()``."""

    def max_reserved_bytes(self) -> int:
        """As ``torch.cuda.max_memory_reserved()``."""

    def reset_max(self) -> None:
        """As ``torch.cuda.reset_peak_memory_stats()``."""

    def empty_cache(self) -> None:
        """As ``torch.cuda.empty_cache()``."""

    def use_stream(self, stream_id: int) -> None:
        """Allocate on a stream from now on; 0 is the default one."""


@dataclass(frozen=True)
class CardProperties:
    """``torch.cuda.get_device_properties()`` of a card; the same names.

    The workspace of cuBLAS follows from its compute capability, and what is free from its memory.

    Example:
        >>> CardProperties("NVIDIA A100-SXM4-40GB", major=8, minor=0, total_memory=42_297_786_368).major
        8
    """

    name: str = "NVIDIA H100 80GB HBM3"
    major: int = 9
    minor: int = 0
    total_memory: int = 85_017_493_504
    multi_processor_count: int = 132
    warp_size: int = 32
    max_threads_per_multi_processor: int = 2048
    regs_per_multiprocessor: int = 65_536
    shared_memory_per_block: int = 49_152
    shared_memory_per_block_optin: int = 232_448
    shared_memory_per_multiprocessor: int = 233_472
    L2_cache_size: int = 52_428_800
    is_integrated: int = 0
    is_multi_gpu_board: int = 0


_STREAM_IDS = itertools.count(1)


class FakeStream:
    """A stream or an event: in a forecast everything is done when it is called."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = DEVICE
        self.priority = 0
        self.cuda_stream = self.stream_id = next(_STREAM_IDS)

    def query(self) -> bool:
        """Everything is done."""
        return True

    def is_capturing(self) -> bool:
        """No CUDA graph is captured; an optimizer asks from torch 2.13 on."""
        return False

    def _nothing(self, *_: Any, **__: Any) -> None:
        pass

    wait = record = synchronize = wait_stream = wait_event = _nothing

    def __enter__(self) -> FakeStream:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        """The event."""
        return event or FakeStream()

    def elapsed_time(self, end_event: Any) -> float:
        """Refused.

        Raises:
            ForecastError: Always.
        """
        raise no_answer("torch.cuda.Event.elapsed_time", "seconds, which are not forecast")


class FakeCard:
    """Answers for the card.

    Args:
        counted: The forecast's own bytes.
        context_bytes: Of the CUDA context, which are not free.
        properties: Of the card.

    Raises:
        ForecastError: The card is older than compute capability 8.0.
    """

    def __init__(self, counted: CountedBytes, context_bytes: int = 0, properties: CardProperties | None = None) -> None:
        self.properties = properties or CardProperties()
        if self.properties.major < 8:
            capability = f"{self.properties.major}.{self.properties.minor}"
            raise ForecastError(
                f"card {self.properties.name} has compute capability {capability}; forecasts know the kernels of 8.0 "
                "and above; measure a real run",
                cause="unknown card",
                capability=capability,
            )
        self._counted = counted
        self._context_bytes = context_bytes
        self._default = FakeStream()
        self._default.cuda_stream = self._default.stream_id = 0
        self._stream: Any = self._default

    def memory_stats(self, device: Any = None) -> dict[str, Any]:
        """``torch.cuda.memory_stats_as_nested_dict()``, of what is known: no memory that is split, no pools."""
        counted = self._counted
        allocated = {"current": counted.allocated_bytes(), "peak": counted.max_allocated_bytes()}
        reserved = {"current": counted.reserved_bytes(), "peak": counted.max_reserved_bytes()}
        return {
            "allocated_bytes": {"all": allocated},
            "active_bytes": {"all": allocated},
            "reserved_bytes": {"all": reserved},
            "num_alloc_retries": 0,
            "num_ooms": 0,
        }

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        """Free and total bytes."""
        total = self.properties.total_memory
        return max(0, total - self._context_bytes - self._counted.reserved_bytes()), total

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        """Make a stream the current one."""
        before = self._stream
        self.set_stream(stream or before)
        try:
            yield
        finally:
            self.set_stream(before)

    def set_stream(self, stream: Any) -> None:
        """Make a stream the current one, on which memory is allocated."""
        self._stream = stream
        self._counted.use_stream(stream.stream_id)

    def patches(self) -> Iterator[tuple[Any, str, Any]]:
        """What to replace, and by what."""
        cuda = torch.cuda
        yield cuda, "_lazy_init", _refuse_card
        for name, substitute in self._of_memory().items():
            for home in (cuda, cuda.memory):
                yield home, name, substitute
        for name, substitute in self._of_the_card().items():
            yield cuda, name, substitute
        for name, substitute in self._of_the_accelerator().items():
            if hasattr(torch.accelerator, name):
                yield torch.accelerator, name, substitute
        yield torch.Tensor, "record_stream", _on_fakes("record_stream", lambda tensor, stream: None)
        for name in ("Stream", "Event"):
            yield torch, name, FakeStream

    def _of_memory(self) -> dict[str, Callable[..., Any]]:
        counted = self._counted
        return {
            "memory_stats_as_nested_dict": self.memory_stats,
            "reset_peak_memory_stats": lambda device=None: counted.reset_max(),
            "reset_accumulated_memory_stats": lambda device=None: None,
            "empty_cache": counted.empty_cache,
            "mem_get_info": self.mem_get_info,
            **{name: _refusal(name) for name in OF_A_REAL_ALLOCATOR},
        }

    def _of_the_card(self) -> dict[str, Any]:
        properties = self.properties
        nothing = {name: lambda *_, **__: None for name in ("init", "set_device", "synchronize", "ipc_collect")}
        return {
            **nothing,
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "is_bf16_supported": lambda *_, **__: True,
            "is_current_stream_capturing": lambda: False,  # optimizers ask
            "can_device_access_peer": lambda *_: False,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "get_device_name": lambda device=None: properties.name,
            "get_device_capability": lambda device=None: (properties.major, properties.minor),
            "get_device_properties": lambda device=None: properties,
            "device": _NoDevice,
            "Stream": FakeStream,
            "Event": FakeStream,
            "current_stream": lambda device=None: self._stream,
            "default_stream": lambda device=None: self._default,
            "stream": self.stream,
            "set_stream": self.set_stream,
            **{name: _refusal(name) for name in OF_A_REAL_CARD},
        }

    def _of_the_accelerator(self) -> dict[str, Any]:
        counted = self._counted
        nothing = {name: lambda *_, **__: None for name in ("synchronize", "set_device_index", "set_device_idx")}
        return {
            **nothing,
            "is_available": lambda: True,
            "current_accelerator": lambda check_available=False: torch.device("cuda"),
            "device_count": lambda: 1,
            "current_device_index": lambda: 0,
            "current_device_idx": lambda: 0,
            "current_stream": lambda device=None: self._stream,
            "set_stream": self.set_stream,
            "empty_cache": counted.empty_cache,
            "memory_stats": lambda device=None: torch.cuda.memory_stats(),
            "memory_allocated": lambda device=None: counted.allocated_bytes(),
            "max_memory_allocated": lambda device=None: counted.max_allocated_bytes(),
            "memory_reserved": lambda device=None: counted.reserved_bytes(),
            "max_memory_reserved": lambda device=None: counted.max_reserved_bytes(),
            "reset_peak_memory_stats": lambda device=None: counted.reset_max(),
            "get_memory_info": self.mem_get_info,
        }


class _NoDevice:
    """``torch.cuda.device``, of which there is one."""

    def __init__(self, device: Any = None) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc: object) -> None:
        pass


def _on_fakes(name: str, substitute: Callable[..., Any]) -> Callable[..., Any]:
    """A method for fake tensors; for real ones, torch's own."""

    def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        method = substitute if isinstance(tensor, FakeTensor) else unpatched(torch.Tensor, name)
        return method(tensor, *args, **kwargs)

    return call


def _refusal(name: str) -> Callable[..., Any]:
    def ask(*_: Any, **__: Any) -> Any:
        raise no_answer(f"torch.cuda.{name}", "what only a real card or its allocator knows")

    return ask


def _refuse_card() -> None:
    caller = sys._getframe(2)  # beyond the one that chooses by the thread
    raise no_answer(f"{caller.f_globals.get('__name__', '')}.{caller.f_code.co_name}", "a real card")
