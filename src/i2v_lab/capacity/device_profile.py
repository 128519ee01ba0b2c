"""How fast a card and its host are: rates by kind of operator, measured or derived from a card's published peaks."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from i2v_lab.capacity.cards import card_name
from i2v_lab.errors import InvalidRequest, RecordError, shown
from i2v_lab.paths import data_dir, user_devices_dir

MEASURED = "nvidia-h100"  # the profile that others are derived from
REFERENCE = "H100 80GB"  # its row in data/devices/peaks.csv
MEMORY_BOUND = 0.8  # of the memory's peak; kernels that reach less are limited by their instructions
NOT_MEASURED = "not measured: from published rates"
RATIOS = ("tensor_tflops", "float32_tflops", "memory_gb_s", "link_gb_s")


@dataclass(frozen=True)
class Rate:
    """Seconds of one operator on the device: ``latency_s + flops / flops_per_s + bytes / bytes_per_s``.

    Attributes:
        latency_s: Of its kernels, however small.
        flops_per_s: ``None`` where operations do not count.
        bytes_per_s: Of what it reads and writes; ``None`` where bytes do not count.
    """

    latency_s: float
    flops_per_s: float | None = None
    bytes_per_s: float | None = None

    def seconds(self, flops: float, nbytes: float) -> float:
        """Of one operator.

        Example:
            >>> Rate(1e-6, 1e12, 1e12).seconds(1e6, 2e6)
            4e-06
        """
        return (
            self.latency_s
            + (flops / self.flops_per_s if self.flops_per_s else 0.0)
            + (nbytes / self.bytes_per_s if self.bytes_per_s else 0.0)
        )


@dataclass(frozen=True)
class DeviceProfile:
    """Rates of a card and its host.

    Attributes:
        name: Of the card.
        source: Where its rates come from, in a line.
        operators: By kind of operator, or by kind and dtype, as ``matmul float32``.
        copies: By kind of copy between host and device.
        host_s: Seconds that the host takes to launch an operator of a kind, ``operator`` for the kinds not named; to
            make a ``module``, to take one ``weight``, to get a ``segment`` from the driver, and to begin and end a
            ``build`` of components.
        once_s: Seconds of what a process does once, by its kind; ``other`` for the kinds not named.
        load: What the host does in a second: bytes ``read`` from a file in the page cache, or from a ``disk``, bytes
            that the driver page-locks (``lock``), and ``encoded_pixels`` of a video.
        measured: Whether it was measured on such a card; otherwise it is from published peaks.
    """

    name: str
    source: str
    operators: Mapping[str, Rate]
    copies: Mapping[str, Rate]
    host_s: Mapping[str, float]
    once_s: Mapping[str, float]
    load: Mapping[str, float] = field(default_factory=dict)
    measured: bool = True

    @property
    def caveat(self) -> str:
        """What is to be said beside its seconds; nothing of a card that was measured."""
        return "" if self.measured else NOT_MEASURED

    def rate(self, kind: str, dtype: str) -> Rate:
        """The rate of a kind of operator; that of the nearest kind where none was measured."""
        return self.operators[_nearest(kind, dtype, frozenset(self.operators))]

    def copy_seconds(self, nbytes: int, *, page_locked: bool, to_device: bool = True) -> float:
        """Seconds of one copy between host and device.

        Args:
            nbytes: Its size.
            page_locked: Whether the host's memory is.
            to_device: Or from the device to the host.

        Example:
            >>> 0.015 < device_profile("H100 80GB").copy_seconds(2**30, page_locked=True) < 0.03
            True
        """
        kind = f"copy to {'device' if to_device else 'host'}, {'page-locked' if page_locked else 'pageable'}"
        return self.copies[kind].seconds(0, nbytes)


@cache
def _nearest(kind: str, dtype: str, known: frozenset[str]) -> str:
    """The key of a kind and dtype: itself, the kind alone, then kinds with fewer words at the end.

    Attention of a width that is not there has the rate of the nearest one, of flash attention if need be.
    """
    words = kind.split()
    for count in range(len(words), 0, -1):
        part = " ".join(words[:count])
        for name in (f"{part} {dtype}", part):
            if name in known:
                return name
    if words[1:2] == ["attention"]:
        for kernel in (words[0], "flash"):
            plain = [name.split() for name in known if name.startswith(f"{kernel} attention ")]
            widths = sorted(int(parts[2]) for parts in plain if len(parts) == 3)
            if widths:
                return f"{kernel} attention {min(widths, key=lambda width: abs(width - int(words[2])))}"
    return "pointwise"


def profile_from_json(values: Mapping[str, Any]) -> DeviceProfile:
    """A profile as :func:`profile_to_json` wrote it.

    Raises:
        RecordError: Something is missing, or of the wrong type.
    """
    try:
        return DeviceProfile(
            name=values["name"],
            source=values["source"],
            operators={kind: Rate(*rate) for kind, rate in values["operators"].items()},
            copies={kind: Rate(*rate) for kind, rate in values["copies"].items()},
            host_s=dict(values["host_s"]),
            once_s=dict(values["once_s"]),
            load=dict(values["load"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise RecordError(f"a device profile is damaged ({error!r}); calibrate again with i2v-lab calibrate") from error


def profile_to_json(profile: DeviceProfile) -> dict[str, Any]:
    """JSON values of a profile; rates are latency, operations a second and bytes a second."""
    rates = {
        name: {kind: [rate.latency_s, rate.flops_per_s, rate.bytes_per_s] for kind, rate in kinds.items()}
        for name, kinds in (("operators", profile.operators), ("copies", profile.copies))
    }
    rest = {"host_s": dict(profile.host_s), "once_s": dict(profile.once_s), "load": dict(profile.load)}
    return {"name": profile.name, "source": profile.source, **rates, **rest}


def measured_profile(name: str = MEASURED) -> DeviceProfile:
    """A profile in ``data/devices``, fitted to measurements of that card."""
    path = data_dir() / "devices" / f"{name}.json"
    return _read(path, path.stat().st_mtime_ns)


@cache
def _read(path: Path, _mtime: int) -> DeviceProfile:
    try:
        return profile_from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecordError) as error:
        raise RecordError(
            f"the device profile '{path}' cannot be read ({shown(str(error))}); calibrate again with "
            "i2v-lab calibrate --time, or remove it",
            path=path,
        ) from error


def _measured() -> dict[str, DeviceProfile]:
    """Profiles of the package, and in their place those that ``i2v-lab calibrate`` measured here, by card."""
    found: dict[str, DeviceProfile] = {}
    for folder in (data_dir() / "devices", user_devices_dir()):
        for path in sorted(folder.glob("*.json")):
            profile = _read(path, path.stat().st_mtime_ns)
            found[_table_name(profile.name)] = profile
    return found


@cache
def _table_name(gpu: str) -> str:
    try:
        return card_name(gpu)
    except InvalidRequest:  # of a card that is in no table
        return gpu


@cache
def _peaks() -> dict[str, dict[str, str]]:
    with (data_dir() / "devices" / "peaks.csv").open(encoding="utf-8", newline="") as stream:
        return {row["gpu"]: row for row in csv.DictReader(stream)}


def has_profile(gpu: str) -> bool:
    """Whether there is a profile of a card, by its name or spelling.

    Example:
        >>> has_profile("NVIDIA H200"), has_profile("cap of 4 GiB")
        (True, False)
    """
    name = _table_name(gpu)
    return name in _peaks() or name in _measured()


def has_peaks(gpu: str) -> bool:
    """Whether peaks of a card are published, by its name or spelling.

    Example:
        >>> has_peaks("RTX 4090"), has_peaks("Tesla T4")
        (True, False)
    """
    return _table_name(gpu) in _peaks()


def device_profile(gpu: str) -> DeviceProfile:
    """The profile of a card: measured on it, or :func:`derived_profile` of its published peaks.

    Args:
        gpu: A name as for :func:`~i2v_lab.capacity.cards.gpu_memory_bytes`, or that of a card measured here.

    Raises:
        InvalidRequest: Such a card was not measured, and no peaks of it are known.
        RecordError: A profile that was measured is damaged.

    Example:
        >>> device_profile("H200").caveat, device_profile("RTX 4090").caveat
        ('', 'not measured: from published rates')
    """
    return _measured().get(_table_name(gpu)) or derived_profile(gpu)


def derived_profile(gpu: str) -> DeviceProfile:
    """The profile of a card by its published peaks, with the efficiencies of the one that was measured.

    Each rate is scaled by the ratio of the two cards' published peaks: tensor cores for 16 bit, others for float32,
    memory, and the link to the host.

    Args:
        gpu: A name as for :func:`~i2v_lab.capacity.cards.gpu_memory_bytes`.

    Raises:
        InvalidRequest: No peaks of such a card are known.

    Example:
        >>> derived_profile("RTX 4090").source
        'not measured: from published rates of an RTX 4090, with the efficiencies of an NVIDIA H100 80GB HBM3'
    """
    rows = _peaks()
    name = card_name(gpu)
    if name not in rows:
        raise InvalidRequest(
            f"gpu={shown(gpu)} has no published peaks in data/devices/peaks.csv, so its seconds are not known; run "
            f"i2v-lab calibrate --time on it, or use one of: {', '.join(rows)}",
            gpu=gpu,
        )
    base = measured_profile()
    if name == REFERENCE:
        return base
    peak, reference = rows[name], rows[REFERENCE]
    ratios = {key: float(peak[key]) / float(reference[key]) for key in RATIOS}

    # Where torch prefers flash attention, which the forecast of an H100 does not run.
    operators = {
        kind: base.rate(kind.replace("cudnn", peak["attention"]), "") if "cudnn" in kind else rate
        for kind, rate in base.operators.items()
    }

    def scaled(kind: str, rate: Rate) -> Rate:
        float32 = kind.endswith("float32") and not kind.startswith("convolution")  # which takes tensor cores by default
        compute = ratios["float32_tflops" if float32 else "tensor_tflops"]
        flops = rate.flops_per_s and rate.flops_per_s * compute
        return Rate(rate.latency_s, flops, rate.bytes_per_s and _scaled_bytes(rate.bytes_per_s, ratios, reference))

    def linked(rate: Rate) -> Rate:
        return replace(rate, bytes_per_s=rate.bytes_per_s and rate.bytes_per_s * ratios["link_gb_s"])

    return replace(
        base,
        name=name,
        source=f"{NOT_MEASURED} of an {name}, with the efficiencies of an {base.name}",
        measured=False,
        operators={kind: scaled(kind, rate) for kind, rate in operators.items()},
        copies={
            kind: linked(rate) if "page-locked" in kind else rate for kind, rate in base.copies.items()
        },  # copies of pageable memory are bound by the host
    )


def _scaled_bytes(bytes_per_s: float, ratios: Mapping[str, float], reference: Mapping[str, str]) -> float:
    """Of a kernel that the memory limits, by the memory's rate; of one that its instructions limit, by those."""
    peak = float(reference["memory_gb_s"]) * 1e9
    if bytes_per_s > MEMORY_BOUND * peak:
        return bytes_per_s * ratios["memory_gb_s"]
    return min(bytes_per_s * ratios["float32_tflops"], MEMORY_BOUND * peak * ratios["memory_gb_s"])
