"""Prints the peak to stderr at the end of every phase; enabled by the environment variable ``I2V_LAB_VRAM=1``."""

from __future__ import annotations

import sys

import torch

from i2v_lab.events import ComponentBuilt, Event, PhaseEnded, PhaseStarted
from i2v_lab.profiling.meters.devices import make_meter
from i2v_lab.units import format_bytes


class VramLines:
    """An event sink that prints the peak so far, such as ``[vram] after denoise_stage_1: peak_so_far=29.17 GiB``.

    Args:
        device: The device whose memory is metered.
    """

    def __init__(self, device: torch.device) -> None:
        self._meter = make_meter(device)
        self._peak_so_far_bytes = 0

    def __call__(self, event: Event) -> None:
        """Handle a pipeline's event."""
        match event:
            case PhaseStarted():
                self._meter.__enter__()
                self._meter.reset_peak()
            case ComponentBuilt(module=module):
                self._meter.observe([*module.parameters(), *module.buffers()])
            case PhaseEnded(phase=phase):
                self._peak_so_far_bytes = max(self._peak_so_far_bytes, self._meter.peak_bytes())
                self._meter.__exit__(None, None, None)
                line = f"[vram] after {phase.value}: peak_so_far={format_bytes(self._peak_so_far_bytes)}"
                print(line, file=sys.stderr, flush=True)
