"""Tensors of weight files on a device, one after another, read by threads ahead of the copies to the device."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch

from i2v_lab.pipeline.ltx2.memory.host_copies import ALIGNMENT, BlockPlan, PlannedTensor
from i2v_lab.pipeline.ltx2.memory.host_weights import HostWeights
from i2v_lab.pipeline.ltx2.memory.readers import TensorReader
from i2v_lab.torch_compat import is_fake

GROUP_BYTES = 2**27  # of tensors that are read at once


def tensors_ahead(
    sources: Sequence[tuple[str, str]], reader: TensorReader, host_weights: HostWeights, device: torch.device
) -> Generator[torch.Tensor]:
    """Tensors of weight files, on a device, in the form that :meth:`TensorReader.tensor` returns.

    They pass through page-locked buffers, and are complete for work that is queued next on the current stream. To be
    closed (:func:`contextlib.closing`) where it is not iterated to its end.

    Args:
        sources: Path and name of each, in the order in which they are wanted.
        reader: Says where they are; those that it makes on demand are made.
        host_weights: Whose budget the buffers take; without one tensors are read one by one.
        device: Where they are wanted.

    Raises:
        CheckpointError: A file has been removed, cut short or changed; ``fields`` has its ``path``.
    """
    is_ahead = not is_fake() and host_weights.limit_bytes(device) > 0
    plans = _plans(sources, reader) if is_ahead else {}
    if not plans:
        for path, key in sources:
            yield reader.tensor(path, key, device)
        return
    files = tuple(reader.identity(path) for path in dict.fromkeys(path for path, _ in sources))
    blocks = host_weights.blocks(object(), files, plans, device, repeated=False)
    try:
        for name, plan in plans.items():
            copy = blocks.take(name)
            for _, tensor in plan.loaded(device) if copy is None else copy.tensors_on(device):
                yield tensor
                del tensor
            blocks.used(name, torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None)
    finally:
        if device.type == "cuda":  # before the buffers that copies read are released
            torch.cuda.current_stream(device).synchronize()
        blocks.close()


def _plans(sources: Sequence[tuple[str, str]], reader: TensorReader) -> dict[str, BlockPlan]:
    """Tensors in groups that are read at once; none where one is in no file."""
    groups: list[list[PlannedTensor]] = []
    room = 0
    for path, key in sources:
        part, scale = reader.part(path, key), reader.scale(path, key)
        if part is None:
            return {}
        size = part.nbytes + (0 if scale is None else scale.nbytes) + 2 * ALIGNMENT
        if size > room:
            groups.append([])
            room = GROUP_BYTES
        room -= size
        target = part.dtype if scale is None else torch.bfloat16
        groups[-1].append(PlannedTensor(key, part.shape, part.dtype, target, part, scale))
    return {str(index): BlockPlan(group, GROUP_BYTES) for index, group in enumerate(groups)}
