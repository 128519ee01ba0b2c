"""The memory that is available on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from i2v_lab.errors import DeviceUnavailable

if TYPE_CHECKING:
    import torch


def memory_budget_bytes(device: str, vram_cap_bytes: int | None) -> int:
    """The bytes that a run may use: what is available on the device, at most the cap.

    Raises:
        DeviceUnavailable: There is no such device.
    """
    available_bytes = available_memory(device)[1]
    return available_bytes if vram_cap_bytes is None else min(available_bytes, vram_cap_bytes)


def available_memory(device: str = "auto") -> tuple[str, int, str]:
    """The device's name for a sentence, its available bytes, and its type: ``cuda`` or ``cpu``.

    On CUDA these are :func:`room_bytes` of the device; on the CPU the available host memory.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        DeviceUnavailable: There is no such device, or neither CUDA nor NVML says how much of it is free.

    Example:
        >>> name, memory_bytes, device = available_memory("cpu")
        >>> name, device
        ('this machine', 'cpu')
    """
    import torch

    from i2v_lab.pipeline.contract.generation import resolve_device
    from i2v_lab.pipeline.contract.host_memory import available_bytes

    target = resolve_device(device)
    if target.type == "cpu":
        return "this machine", available_bytes(), "cpu"
    return f"this {torch.cuda.get_device_name(target)}", _cuda_room_bytes(target), "cuda"


def room_bytes(
    *,
    total_bytes: int,
    free_bytes: int,
    reserved_bytes: int,
    allocated_bytes: int,
    own_bytes: int | None,
    context_bytes: int,
    limit_bytes: int,
) -> int:
    """The bytes that a run of this process may use, its CUDA context included.

    They are what the driver says is free, and of what this process holds already the part that a run uses again: the
    caching allocator's cached blocks, and the context, which a forecast counts as part of a run. Which processes are
    on the card does not count: NVML lists them neither under WSL and WDDM nor across PID namespaces.

    Args:
        total_bytes: Of the device, or of the MIG slice, as CUDA reports it.
        free_bytes: Of the same, in use by no process.
        reserved_bytes: By the caching allocator of this process.
        allocated_bytes: By tensors of this process, which stay.
        own_bytes: All that this process holds, as NVML reports it; ``None`` or less than ``reserved_bytes`` where it is
            not known. Then the context, if there is one, is not counted.
        context_bytes: Of a context as forecasts model it; more is not counted as part of one.
        limit_bytes: Of the caching allocator, where a fraction of the device is set.

    Returns:
        Between 0 and the smallest of ``total_bytes``, ``limit_bytes`` and what is free or held by this process.

    Example:
        >>> held = {"reserved_bytes": 6, "allocated_bytes": 1, "own_bytes": 8, "context_bytes": 3}
        >>> room_bytes(total_bytes=80, free_bytes=50, limit_bytes=80, **held)
        57
    """
    own_context_bytes = min(max(0, (own_bytes or 0) - reserved_bytes), context_bytes)
    cached_bytes = max(0, reserved_bytes - allocated_bytes)
    return max(0, min(free_bytes + cached_bytes + own_context_bytes, total_bytes, limit_bytes))


def _cuda_room_bytes(device: torch.device) -> int:
    import torch

    from i2v_lab.capacity.cards import context_bytes
    from i2v_lab.profiling.meters.nvml import card_index, read_device

    target = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    card = read_device(card_index(target))
    total_bytes = int(torch.cuda.get_device_properties(target).total_memory)
    try:
        free_bytes = int(torch.cuda.mem_get_info(target)[0])
    except RuntimeError as error:  # on a card that is so full that no context fits, for instance
        if card.total_bytes is None or card.used_bytes is None:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise DeviceUnavailable(
                f"device='{target}' does not say how much of its memory is free ({reason}); choose a --memory policy, "
                "or use another device",
                device=str(target),
            ) from error
        free_bytes = card.total_bytes - card.used_bytes
    return room_bytes(
        total_bytes=total_bytes,
        free_bytes=free_bytes,
        reserved_bytes=torch.cuda.memory_reserved(target),
        allocated_bytes=torch.cuda.memory_allocated(target),
        own_bytes=card.own_bytes,
        context_bytes=context_bytes(),
        limit_bytes=int(torch.cuda.get_per_process_memory_fraction(target) * total_bytes),
    )
