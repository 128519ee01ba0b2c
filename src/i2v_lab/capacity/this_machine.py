"""What the machine that this runs on has room for."""

from __future__ import annotations


def room_within(device: str, vram_cap_gib: float | None) -> int:
    """The bytes that a run may take: a card's, or the machine's, and no more than the cap.

    Raises:
        DeviceUnavailable: There is no such device.
    """
    room_bytes = room_here(device)[1]
    return room_bytes if vram_cap_gib is None else min(room_bytes, int(vram_cap_gib * 2**30))


def room_here(device: str = "auto") -> tuple[str, int, str]:
    """A name in words, the bytes there are, and the device that they are on: ``cuda`` or ``cpu``.

    On CUDA it is the whole card, less what other processes have of it; elsewhere the memory that is free now.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        DeviceUnavailable: There is no such device.

    Example:
        >>> name, memory_bytes, device = room_here("cpu")
        >>> name, device
        ('this machine', 'cpu')
    """
    import psutil
    import torch

    from i2v_lab.pipeline.contract.generation import resolve_device
    from i2v_lab.profiling.meters.nvml import card_index, read_device

    target = resolve_device(device)
    if target.type == "cpu":
        return "this machine", psutil.virtual_memory().available, "cpu"
    total_bytes = int(torch.cuda.get_device_properties(target).total_memory)
    others_bytes = read_device(card_index(target)).others_bytes or 0
    return f"this {torch.cuda.get_device_name(target)}", total_bytes - others_bytes, "cuda"
