"""``VramMonitor``: a live chart of device memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from i2v_lab.lab.view import View, page, sentence
from i2v_lab.profiling.monitor import MemoryMonitor
from i2v_lab.reporting.figures import live as pictures
from i2v_lab.reporting.figures.style import ALLOCATED, LIMIT, OTHERS, RESERVED
from i2v_lab.units import format_bytes

if TYPE_CHECKING:
    import pandas as pd

SHOWN = 240  # samples


class VramMonitor(View):
    """A live chart of allocated and reserved bytes, other processes' bytes, and the bytes available to this process.

    A thread samples them, so the chart is updated while a cell runs. As one of a pipeline's sinks it marks the phases.
    On a machine without a GPU it shows the live tensor storages of this process.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.
        interval_s: Sampling interval in seconds.

    Attributes:
        monitor: The samples and marks; usable without widgets.

    Example:
        >>> from i2v_lab import VramMonitor
        >>> monitor = VramMonitor("cpu")
        >>> with monitor:  # or press Start
        ...     pass
        >>> len(monitor.monitor.samples) > 0
        True
    """

    def __init__(self, device: str = "auto", interval_s: float = 0.25) -> None:
        super().__init__()
        self.monitor = MemoryMonitor(device, interval_s, on_sample=self._show)

    def __repr__(self) -> str:
        samples = self.monitor.samples
        now = f"{format_bytes(samples[-1].allocated_bytes)} allocated" if samples else "not started"
        return f"VramMonitor({self.monitor.device}: {now})"

    def __call__(self, event: Any) -> None:
        """Receive a pipeline's event."""
        self.monitor(event)

    def __enter__(self) -> VramMonitor:
        self.monitor.start()
        self._show()
        return self

    def __exit__(self, *_: Any) -> None:
        self.monitor.stop()

    def to_frame(self) -> pd.DataFrame:
        """The samples, one a row: ``time_s`` and the bytes; ``monitor`` has them, too."""
        return self.monitor.to_frame()

    def html(self) -> str:
        """The chart as static HTML; with one sample taken now if there is none."""
        if not self.monitor.samples:
            self.monitor.sample()
            return self._chart() + sentence(
                "Not started yet: this is a single sample, taken when the page was rendered."
            )
        return self._chart()

    def _chart(self) -> str:
        samples = list(self.monitor.samples)[-SHOWN:]
        if not samples:
            return sentence(self.monitor.source) + sentence("Press Start monitor, or start a generation.")
        curves = [
            pictures.Curve("allocated", ALLOCATED, [s.allocated_bytes for s in samples], filled=True),
            pictures.Curve("reserved", RESERVED, [s.reserved_bytes for s in samples]),
            pictures.Curve("other processes", OTHERS, [s.others_bytes for s in samples]),
            pictures.Curve("budget", LIMIT, [s.budget_bytes for s in samples]),
        ]
        times = [sample.time_s for sample in samples]
        picture = pictures.over_time(times, curves, list(self.monitor.marks), "Memory in use over the last seconds")
        return sentence(self.monitor.source) + picture

    def _build(self) -> Any:
        import ipywidgets as widgets

        self._start = widgets.Button(description="Start monitor", icon="play")
        self._stop = widgets.Button(description="Stop monitor", icon="stop")
        self._start.on_click(lambda _: self.__enter__())
        self._stop.on_click(lambda _: self.monitor.stop())
        self._picture = widgets.HTML()
        self._widget = widgets.VBox([widgets.HBox([self._start, self._stop]), self._picture])
        self._show()
        return self._widget

    def _show(self) -> None:
        with self._drawing:
            if self._widget is None:
                return
            self._picture.value = page(self._chart())
            self._start.disabled, self._stop.disabled = self.monitor.running, not self.monitor.running

    def close(self) -> None:
        """Stop sampling and close the widgets."""
        self.monitor.stop()
        super().close()
