"""Streamed weights in page-locked host memory, of all components of a pipeline: what is kept, within which budget."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, Self

import torch

from i2v_lab.errors import InvalidRequest, shown
from i2v_lab.pipeline.ltx2.memory.host_blocks import HostBlocks
from i2v_lab.pipeline.ltx2.memory.host_copies import BlockPlan
from i2v_lab.pipeline.ltx2.memory.host_memory import HostRoom, host_budget_bytes
from i2v_lab.torch_compat import is_fake


class HostWeights:
    """Streamed weights in host memory, of all components of a pipeline; they share one budget.

    Args:
        budget_bytes: The most host memory that they may take; by default 0.8 of what is available when a component is
            built, and none for a model on a CPU.
        keep: Keep blocks until :meth:`close`; otherwise until their component is released.

    Attributes:
        keep: As given, until :meth:`close`.
        budget_bytes: As given.

    Raises:
        InvalidRequest: The budget is no number of bytes.

    Example:
        >>> with HostWeights(keep=True) as host_weights:
        ...     host_weights.held_bytes
        0
    """

    def __init__(self, budget_bytes: int | None = None, *, keep: bool = False) -> None:
        if budget_bytes is not None and (type(budget_bytes) is not int or budget_bytes < 0):
            raise InvalidRequest(
                f"budget_bytes={shown(budget_bytes)} is no number of bytes; use a whole number from 0",
                budget_bytes=budget_bytes,
            )
        self.keep = keep
        self.budget_bytes = budget_bytes
        self._room = HostRoom()
        self._components: dict[Hashable, HostBlocks] = {}  # the last to be used last
        self._ahead: list[tuple[HostBlocks, Any, Any]] = []

    @property
    def held_bytes(self) -> int:
        """What they take now."""
        return self._room.held_bytes

    def limit_bytes(self, device: torch.device) -> int:
        """The most host memory that weights for ``device`` may take, with what they take now."""
        if self.budget_bytes is not None:
            return self.budget_bytes
        return self.held_bytes + host_budget_bytes(device)

    def blocks(
        self, key: Hashable, files: Hashable, plans: Mapping[str, BlockPlan], device: torch.device, *, repeated: bool
    ) -> HostBlocks:
        """The blocks of a component, for one use, which :meth:`HostBlocks.close` ends.

        Args:
            key: What they hold: equal keys have equal blocks, from files that have not changed.
            files: The state of the files; blocks of another state are released.
            plans: How each block comes into host memory, in the order in which they are called; none for blocks that
                are loaded.
            device: Where the component runs.
            repeated: Whether its blocks are called many times, and so are kept while it is used.
        """
        if device.type == "cuda" and not is_fake():
            device = torch.empty(0, device=device).device  # with this thread's index; in those that read it is 0
        with self._room.changed:
            found = self._components.get((key, device))
            if found is not None and found.files != files and not found.users:
                found.release()
                found = None
            if found is not None and found.files != files:
                found.kept, found = False, None
            if found is None:
                found = HostBlocks(self._room, files, plans, device, kept=self.keep)
            self._components.pop((key, device), None)
            self._components[key, device] = found
            found.users += 1
            self._room.limit_bytes = self.limit_bytes(device)
            self._make_room(found.missing_bytes if repeated else 0, found)
            found.start(repeated=repeated)
            return found

    def read_ahead(self, blocks: HostBlocks, identity: Any, prepared: Any) -> None:
        """Have threads read a component's blocks until :meth:`end_ahead`, or for longer if it is claimed.

        Args:
            blocks: The blocks, in use.
            identity: By which the component is claimed.
            prepared: What :meth:`claim` returns.
        """
        self._ahead.append((blocks, identity, prepared))
        blocks.read_ahead()

    def claim(self, identity: Any) -> Any:
        """What was prepared when a component was read ahead, once; ``None`` if it was not. Its blocks are in use."""
        for index, (_, own, prepared) in enumerate(self._ahead):
            if own == identity:
                del self._ahead[index]
                return prepared
        return None

    def end_ahead(self) -> None:
        """End the reading ahead of components that were not claimed."""
        while self._ahead:
            self._ahead.pop()[0].close()

    def close(self) -> None:
        """Release everything; threads that read have ended. Components still in use load their blocks from then on.

        It can be used further, and keeps nothing then.
        """
        self.keep = False
        self.end_ahead()
        with self._room.changed:
            components = list(self._components.values())
            self._components.clear()
        for blocks in components:
            blocks.kept = False
            blocks.stop()
            blocks.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make_room(self, nbytes: int, blocks: HostBlocks) -> None:
        """Release blocks of components that are not in use until ``nbytes`` are free; with the lock held."""
        idle = [one for one in self._components.values() if not one.users and one is not blocks]
        for victim in sorted(idle, key=lambda one: one.repeated):  # what is called once a generation goes first
            while self._room.free_bytes < nbytes and len(victim):
                victim.evict()
