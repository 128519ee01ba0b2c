"""The memory that is available on this machine."""

from __future__ import annotations


def memory_budget_bytes(device: str, vram_cap_gib: float | None) -> int:
    """The bytes that a run may use: what is available on the device, at most the cap.

    Raises:
        DeviceUnavailable: There is no such device.
    """
    available_bytes = available_memory(device)[1]
    return available_bytes if vram_cap_gib is None else min(available_bytes, int(vram_cap_gib * 2**30))


def available_memory(device: str = "auto") -> tuple[str, int, str]:
    """The device's name for a sentence, its available bytes, and its type: ``cuda`` or ``cpu``.

    On CUDA these are the GPU's total bytes without those that NVML attributes to other processes; on the CPU the
    available host memory.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        DeviceUnavailable: There is no such device.

    Example:
        >>> name, memory_bytes, device = available_memory("cpu")
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
