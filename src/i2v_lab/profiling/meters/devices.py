"""The table of devices: how memory is metered on each, and what cannot be known there.

A new device is a row of :data:`DEVICES`, and a meter class if none of the existing ones can read it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from i2v_lab.errors import ProfilerError
from i2v_lab.profiling.meters.base import MemoryMeter
from i2v_lab.profiling.meters.cuda import CudaMeter
from i2v_lab.profiling.meters.live_storages import LiveStorageMeter

MeterFactory = Callable[[torch.device, int | None], MemoryMeter]


def _live_storage_meter(device: torch.device, cap_bytes: int | None) -> MemoryMeter:
    return LiveStorageMeter(cap_bytes=cap_bytes)


@dataclass(frozen=True)
class DeviceSupport:
    """How one kind of device is metered; a row of :data:`DEVICES`.

    Attributes:
        name: Key of the row.
        make_meter: Makes its default meter from a device and a cap in bytes; ``None`` where only
            :func:`~i2v_lab.profiling.fake.forecast.forecasting` makes it.
        caching_allocator: Whether ``torch.cuda``'s caching allocator can be read (``meter="cuda"``).
        reserved_bytes: Whether the bytes that an allocator reserves are known.
        process_bytes: Whether NVML reports what each process uses of the card.
        cap: Whether allocations beyond a cap can be made to fail.
        snapshot: Whether the allocator's history can be recorded for memory_viz.
        limits: What the figures do not include and cannot tell, in one sentence.
    """

    name: str
    make_meter: MeterFactory | None
    caching_allocator: bool
    reserved_bytes: bool
    process_bytes: bool
    cap: bool
    snapshot: bool
    limits: str


DEVICES: Mapping[str, DeviceSupport] = MappingProxyType(
    {
        row.name: row
        for row in (
            DeviceSupport(
                name="cuda",
                make_meter=CudaMeter,
                caching_allocator=True,
                reserved_bytes=True,
                process_bytes=True,
                cap=True,
                snapshot=True,
                limits="The CUDA context and memory allocated by libraries past the caching allocator are in no peak.",
            ),
            DeviceSupport(
                name="rocm",  # torch calls it cuda, with torch.version.hip set
                make_meter=CudaMeter,
                caching_allocator=True,
                reserved_bytes=True,
                process_bytes=False,
                cap=True,
                snapshot=True,
                limits=(
                    "As cuda, through the same API of torch, but never measured here; NVML does not know AMD cards, so "
                    "total, own and other processes' bytes are None, and no workspace sizes are fitted for its "
                    "libraries."
                ),
            ),
            DeviceSupport(
                name="cpu",
                make_meter=_live_storage_meter,
                caching_allocator=False,
                reserved_bytes=False,
                process_bytes=False,
                cap=True,
                snapshot=False,
                limits="Storages of tensors only; what kernels allocate internally and malloc's overhead are not seen.",
            ),
            DeviceSupport(
                name="mps",
                make_meter=_live_storage_meter,
                caching_allocator=False,
                reserved_bytes=False,
                process_bytes=False,
                cap=True,
                snapshot=False,
                limits=(
                    "torch.mps has no peak counter, so storages are counted at each operator; the allocator's rounding "
                    "and cache, the kernels' own buffers and other processes are unknown. Never measured here."
                ),
            ),
            DeviceSupport(
                name="fake",
                make_meter=None,
                caching_allocator=False,
                reserved_bytes=True,  # modelled, where a forecast is given workspaces
                process_bytes=False,
                cap=False,
                snapshot=False,
                limits=(
                    "Storages of fake tensors through a model of the caching allocator; workspaces are modelled from "
                    "measurements on one card, and fragmentation across streams is not modelled."
                ),
            ),
        )
    }
)


def device_support(device: torch.device) -> DeviceSupport:
    """The row of the table for a device.

    Raises:
        ProfilerError: No row for this type of device.

    Example:
        >>> device_support(torch.device("cpu")).reserved_bytes
        False
    """
    name = "rocm" if device.type == "cuda" and torch.version.hip else device.type
    if name not in DEVICES:
        raise ProfilerError(
            f"device={str(device)!r} has no row in the table of devices ({', '.join(DEVICES)}); use meter='live', "
            "which counts storages on any device",
            device=str(device),
        )
    return DEVICES[name]


def make_meter(device: torch.device, kind: str = "auto", cap_bytes: int | None = None) -> MemoryMeter:
    """Make a meter by name.

    Args:
        device: The device whose memory is metered.
        kind: ``cuda`` (the caching allocator), ``live`` (live storages), or ``auto``: the default of the device's row
            in :data:`DEVICES`.
        cap_bytes: Allocations beyond this fail.

    Raises:
        ProfilerError: An unknown name or device, a cap that is not positive, or the allocator's meter for a device
            without one.

    Example:
        >>> type(make_meter(torch.device("cpu"))).__name__
        'LiveStorageMeter'
    """
    if cap_bytes is not None and cap_bytes <= 0:
        raise ProfilerError(f"vram_cap_bytes={cap_bytes} is not positive; give whole bytes", cap_bytes=cap_bytes)
    if kind not in ("auto", "cuda", "live"):
        raise ProfilerError(f"meter={kind!r} is not a meter; use auto, cuda or live", meter=kind)
    if kind == "live":
        return _live_storage_meter(device, cap_bytes)
    support = device_support(device)
    if support.make_meter is None or (kind == "cuda" and not support.caching_allocator):
        raise ProfilerError(
            f"meter={kind!r} cannot meter device={str(device)!r}; use live or auto", meter=kind, device=str(device)
        )
    return support.make_meter(device, cap_bytes)
