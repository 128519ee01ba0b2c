"""Seconds of a forecast on a card: what its operators cost, by the rates of a device profile.

A phase is a row of segments: the build of a component, a step, the rest. The host launches ahead of the device: a
segment lasts as long as the slower of the two, or as copies of page-locked memory to the device, which overlap with
both. Those to the host, of streamed blocks in the first pass, are queued behind kernels, and the driver locks their
memory, which no launch overlaps with. Copies of pageable memory, and what a process does once, are on top.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from i2v_lab.capacity.device_profile import DeviceProfile, device_profile, has_profile
from i2v_lab.profiling.records import CostRecord, CostRow, Forecast, HostMemoryRecord, PhaseRecord
from i2v_lab.units import format_seconds

HOST_KINDS = ("view", "empty", "module", "segment")  # cost the host alone
WEIGHTS = ("weight", "host weight")
HOST_BYTES_PER_S = 8e9  # of operators on the host's own tensors


@dataclass(frozen=True)
class PhaseTime:
    """Predicted seconds of one phase, those of nested phases included.

    Attributes:
        phase: Its name.
        parent: The phase that it is nested in; ``None`` at the top level.
        seconds: All together.
        device_s: Kernels.
        host_s: Launches, and building modules.
        copies_s: Copies between host and device, overlapped or not.
        once_s: What a process does once: loading kernels, choosing algorithms. Less in a second generation.
        weight_bytes: Of the weights of components that it built; reading them from a disk is in no other field.
        read_bytes: Of the weights that it would read from files, streamed blocks included.
    """

    phase: str
    parent: str | None
    seconds: float
    device_s: float
    host_s: float
    copies_s: float
    once_s: float
    weight_bytes: int
    read_bytes: int


@dataclass
class Segment:
    """Seconds of one segment by what does the work; each a sum over its operators.

    Attributes:
        device_s: Kernels.
        queued_s: Copies of page-locked memory to the host, in the same stream.
        host_s: Launches, and building modules.
        lock_s: Page-locking the memory that is copied to.
        overlapped_s: Copies of page-locked memory to the device.
        serial_s: Copies of pageable memory.
        once_s: What a process does once.
        weight_bytes: Of the weights of components that it builds.
    """

    device_s: float = 0.0
    queued_s: float = 0.0
    host_s: float = 0.0
    lock_s: float = 0.0
    overlapped_s: float = 0.0
    serial_s: float = 0.0
    once_s: float = 0.0
    weight_bytes: int = 0

    @property
    def seconds(self) -> float:
        """From its beginning to its end."""
        together = max(self.device_s + self.queued_s, self.host_s, self.overlapped_s)
        return together + self.lock_s + self.serial_s + self.once_s

    def later(self, *, warm: bool) -> Segment:
        """The same in a later generation of a process; a warm one has streamed blocks in page-locked memory already."""
        again = replace(self, once_s=0.0)
        return replace(again, queued_s=0.0, lock_s=0.0) if warm else again

    @property
    def copies_s(self) -> float:
        """All copies between host and device."""
        return self.queued_s + self.overlapped_s + self.serial_s


def segment(rows: Iterable[CostRow], device: DeviceProfile) -> Segment:
    """What the operators of one segment take on a card.

    Args:
        rows: Of a :class:`~i2v_lab.profiling.records.CostRecord`.
        device: The card's rates.
    """
    total = Segment()
    for kind, dtype, count, flops, nbytes in rows:
        if kind.startswith("first "):
            total.once_s += count * device.once_s.get(kind, device.once_s["other"])
        elif kind in WEIGHTS:
            total.weight_bytes += count * nbytes
            total.host_s += count * device.host_s["weight"]
        elif kind in HOST_KINDS:
            total.host_s += count * device.host_s[kind]
        elif kind == "host":
            total.host_s += count * (device.host_s["host"] + nbytes / HOST_BYTES_PER_S)
        elif kind.startswith("copy "):
            seconds = count * device.copies[kind].seconds(0, nbytes)
            total.host_s += count * device.host_s["operator"]
            if "pageable" in kind:
                total.serial_s += seconds
            elif "to host" in kind:
                total.queued_s += seconds
                total.lock_s += count * nbytes / device.load["lock"]
            else:
                total.overlapped_s += seconds
        else:
            total.device_s += count * device.rate(kind, dtype).seconds(flops, nbytes)
            total.host_s += count * host_seconds(kind, device)
    return total


def host_seconds(kind: str, device: DeviceProfile) -> float:
    """Seconds that the host takes to launch one operator of a kind."""
    for name, seconds in device.host_s.items():
        if name in kind:
            return seconds
    return device.host_s["operator"]


def phase_times(
    forecast: Forecast, device: DeviceProfile, *, first: bool = True, warm: bool = False
) -> tuple[PhaseTime, ...]:
    """Predicted seconds of every phase of a forecast, in the order of its records.

    Args:
        forecast: With the costs of its operators.
        device: Of which card.
        first: Whether it is the first generation of its process, which loads libraries and kernels.
        warm: Of a later one, whether it finds streamed blocks in page-locked memory, kept by the one before.

    Returns:
        One for each :class:`~i2v_lab.profiling.records.PhaseRecord`. Nested phases precede the phase around them, whose
        seconds are the sum.
    """
    times: list[PhaseTime] = []
    pending: list[CostRecord] = []
    nested: dict[str, list[PhaseTime]] = {}
    streamed: dict[str, int] = {}  # bytes of streamed components, by the phase that built them
    for record in forecast.records:
        if isinstance(record, HostMemoryRecord) and record.resident_bytes:
            streamed[record.phase] = streamed.get(record.phase, 0) + record.resident_bytes[-1]
    for record in forecast.records:
        if isinstance(record, CostRecord):
            pending.append(record)
        elif isinstance(record, PhaseRecord):
            own = [(each.repeats, segment(each.rows, device)) for each in pending]
            own = own if first else [(repeats, each.later(warm=warm)) for repeats, each in own]
            inner = nested.pop(record.phase, [])
            weight_bytes = sum(n * s.weight_bytes for n, s in own)
            build_s = device.host_s["build"] if weight_bytes else 0.0
            time = PhaseTime(
                record.phase,
                record.parent,
                build_s + sum(n * s.seconds for n, s in own) + sum(each.seconds for each in inner),
                sum(n * s.device_s for n, s in own) + sum(each.device_s for each in inner),
                build_s + sum(n * s.host_s for n, s in own) + sum(each.host_s for each in inner),
                sum(n * s.copies_s for n, s in own) + sum(each.copies_s for each in inner),
                sum(n * s.once_s for n, s in own) + sum(each.once_s for each in inner),
                weight_bytes + sum(each.weight_bytes for each in inner),
                max(weight_bytes, streamed.pop(record.phase, 0)) + sum(each.read_bytes for each in inner),
            )
            pending = []
            times.append(time)
            if record.parent is not None:
                nested.setdefault(record.parent, []).append(time)
    return tuple(times)


def predicted_seconds(forecast: Forecast, device: DeviceProfile, *, first: bool = True, warm: bool = False) -> float:
    """Predicted seconds of all phases together, without reading weights from a disk and without encoding the video.

    Args:
        forecast: With the costs of its operators.
        device: Of which card.
        first: As for :func:`phase_times`.
        warm: Likewise.

    Example:
        >>> from i2v_lab.capacity.device_profile import device_profile
        >>> row = ("pointwise", "bfloat16", 1000, 0, 2 * 2**30)
        >>> phase = PhaseRecord("decode_video", None, 0, 2**30, 0, 2**30, 2**30, 0, 0.0, 0.1, True)
        >>> forecast = Forecast((CostRecord("decode_video", 1, (row,)), phase), context_bytes=0, seconds=0.1)
        >>> 0.6 < predicted_seconds(forecast, device_profile("H100 80GB")) < 0.8
        True
    """
    times = phase_times(forecast, device, first=first, warm=warm)
    return sum(time.seconds for time in times if time.parent is None)


def seconds_from_files(forecast: Forecast, device: DeviceProfile) -> dict[str, float]:
    """Predicted seconds of all phases where weights are read from files: from the ``page cache``, and from a ``disk``.

    Threads read ahead of what is computed, so that a phase lasts at least as long as reading its weights. Their files
    are taken to have the bytes that they have on the device.

    Args:
        forecast: With the costs of its operators.
        device: With the host's rates.
    """
    times = [time for time in phase_times(forecast, device) if time.parent is None]
    rates = {"page cache": device.load["read"], "disk": device.load["disk"]}
    return {place: sum(max(time.seconds, time.read_bytes / rate) for time in times) for place, rate in rates.items()}


def time_in_words(forecast: Forecast, gpu: str) -> str:
    """How long a forecast takes on a card, in words; also where that is not known.

    Args:
        forecast: With the costs of its operators.
        gpu: Name of a card.

    Example:
        >>> time_in_words(Forecast((), 0, 0.0), "RTX 4090")
        'predicted to take 0.00 s on RTX 4090 (not measured: from published rates)'
        >>> time_in_words(Forecast((), 0, 0.0), "Instinct MI300X")
        'how long it takes on Instinct MI300X is not known: it has no published rates here'
    """
    if not has_profile(gpu):
        return f"how long it takes on {gpu} is not known: it has no published rates here"
    device = device_profile(gpu)
    caveat = f" ({device.caveat})" if device.caveat else ""
    return f"predicted to take {format_seconds(predicted_seconds(forecast, device))} on {gpu}{caveat}"


def overlapped_seconds(compute_s: Sequence[float], copy_s: Sequence[float], prefetch: int = 1) -> float:
    """Seconds of one pass over blocks whose weights are copied to the device while earlier blocks compute.

    Copies follow each other on one stream; that of a block starts when the block ``prefetch`` before it does.

    Args:
        compute_s: Of each block.
        copy_s: Of each block's weights; 0 of a block that stays on the device.
        prefetch: Blocks that are copied ahead.

    Returns:
        From the start of the first copy to the end of the last block.

    Example:
        >>> overlapped_seconds([2.0, 2.0, 2.0], [1.0, 1.0, 1.0])
        7.0
        >>> overlapped_seconds([1.0, 1.0, 1.0], [2.0, 2.0, 2.0])
        7.0
        >>> overlapped_seconds([1.0, 1.0, 1.0], [0.0, 0.0, 0.0])
        3.0
    """
    started: list[float] = []
    copied = ended = 0.0
    for index, (compute, copy) in enumerate(zip(compute_s, copy_s, strict=True)):
        if copy:
            earliest = started[index - prefetch] if index >= prefetch else 0.0
            copied = max(copied, earliest) + copy
            ended = max(ended, copied)
        started.append(ended)
        ended += compute
    return ended


def video_seconds(pixels: int, device: DeviceProfile) -> float:
    """Seconds of encoding a video on the host, while its frames are decoded one chunk after another.

    Args:
        pixels: Of all its frames.
        device: With the host's rate.
    """
    return pixels / device.load["encoded_pixels"]
