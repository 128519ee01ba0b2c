"""Every error that i2v-lab raises on purpose: the value, the rule and the remedy in one line.

All share :class:`I2VLabError`, carry the values that led to them in ``fields``, and survive pickling, so that a run in
a child process can hand its error to the parent whole.
"""

from __future__ import annotations

import copyreg
import difflib
import pickle
import reprlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from i2v_lab.display import printable

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlong = 500


def shown(value: Any) -> str:
    """A value in one short line, for the message of an error: whatever it is, however large and however nested.

    Example:
        >>> shown("height"), shown([[[[[1]]]]] * 1000), shown(10**9999)
        ("'height'", '[[[[[1]]]], [[[[1]]]], [[[[1]]]], [[[[1]]]], [[[[1]]]], [[[[1]]]], ...]', 'a huge int')
    """
    try:
        text = _SHORT.repr(value)
    except Exception:  # more digits than Python prints, or a repr that fails
        text = f"a huge {type(value).__name__}"
    return " ".join(text.split())


class I2VLabError(Exception):
    """Base of all errors of this package.

    Args:
        message: One line: the value, the rule it breaks, and what to do.
        **fields: The values behind the message, for code that wants to react to them.

    Attributes:
        exit_status: What the command line exits with.

    Example:
        >>> try:
        ...     raise InvalidRequest("height=500 is not a multiple of 64; use 448 or 512", height=500)
        ... except I2VLabError as error:
        ...     error.fields
        {'height': 500}
    """

    exit_status = 2

    def __init__(self, message: str, /, **fields: Any) -> None:
        super().__init__(message)
        self.message = message
        self.fields = fields

    def __str__(self) -> str:
        return printable(self.message)  # it quotes names and paths, and is shown by terminals, notebooks and logs

    def __reduce__(self) -> tuple[Any, ...]:
        if type(self) in copyreg.dispatch_table:  # Dask registers every error, to pickle what caused it with it
            for link in ("__cause__", "__context__"):
                if not _survives_pickling(getattr(self, link)):
                    setattr(self, link, None)
        return _rebuild, (type(self), self.message, self.fields)


def _rebuild(kind: type[I2VLabError], message: str, fields: dict[str, Any]) -> I2VLabError:
    return kind(message, **fields)


def _survives_pickling(error: BaseException | None) -> bool:
    try:
        pickle.dumps(error)
    except Exception:  # whatever an error of other code raises
        return False
    return True


class InvalidRequest(I2VLabError):
    """A request breaks a rule of the model or of ltx-core."""


class InvalidImage(I2VLabError):
    """The still cannot be read as a picture."""


class InvalidVideo(I2VLabError):
    """Frames cannot be encoded as a video: there are none, or they are not uint8 RGB of one size."""


class UnknownModel(I2VLabError):
    """No architecture of that name is in ``data/architectures``."""


class RunnerUnavailable(I2VLabError):
    """A package that a runner or a model needs is not installed, or too old."""


class CheckpointError(I2VLabError):
    """Weights are missing, damaged, incomplete or of another architecture."""


class OutputError(I2VLabError):
    """The output cannot be written where it should go."""


class DeviceUnavailable(I2VLabError):
    """The device asked for is not on this machine, or too small for the model."""


class GradScopeError(I2VLabError):
    """Torch refused to decode because of the grad mode that the stream was consumed in."""

    exit_status = 1


class RecordError(I2VLabError):
    """A run directory or a record in it cannot be read."""


class ProfilerError(I2VLabError):
    """A profiler is used in a way that it cannot measure."""


class ForecastError(I2VLabError):
    """A forecast cannot know what a real run would do."""


class ScriptError(I2VLabError):
    """A script that is forecast cannot be run, or failed by itself."""

    exit_status = 1


class VramCapExceeded(I2VLabError):
    """An allocation crossed the cap that was set on purpose."""

    exit_status = 1


class OutOfDeviceMemory(I2VLabError):
    """A generation asked its device for more memory than there is, or than it may take."""

    exit_status = 1


class GradEscape(I2VLabError):
    """Work with trainable parameters ran with grad enabled where it should not."""

    exit_status = 1


class GenerationStopped(I2VLabError):
    """A generation was stopped by hand."""

    exit_status = 1


class MeasureError(I2VLabError):
    """At least one run of a plan failed in a way that is no result."""

    exit_status = 1


class SweepError(I2VLabError):
    """At least one forecast of a sweep failed."""

    exit_status = 1


class WorkersUnavailable(I2VLabError):
    """Workers cannot be started as asked: a package or a command is missing, or the cluster refuses them."""


class ReproduceError(I2VLabError):
    """At least one notebook failed."""

    exit_status = 1


def neighbours(value: int, multiple: int, minimum: int, offset: int = 0, maximum: int | None = None) -> str:
    """The allowed values next to one that is not, in words.

    Example:
        >>> neighbours(500, 64, 64)
        '448 or 512'
    """
    below = (value - offset) // multiple * multiple + offset
    near = [n for n in (below, below + multiple) if n >= minimum and (maximum is None or n <= maximum)]
    return " or ".join(map(str, near))


def did_you_mean(value: Any, known: Iterable[str], others: str = "") -> str:
    """The remedy for a name that is none of those known: the nearest ones, or all of them.

    Args:
        value: What was given.
        known: All names.
        others: What lists them, in place of all names; only beside near ones.

    Example:
        >>> did_you_mean("wan-2.2-ti2v", ["wan-2.2-ti2v-5b", "ltx-2.3-22b"], "`i2v-lab models` lists all")
        'did you mean wan-2.2-ti2v-5b? `i2v-lab models` lists all'
        >>> did_you_mean("x", ["cpu", "cuda"])
        'use one of: cpu, cuda'
    """
    names = list(known)
    text = value.lower() if isinstance(value, str) else ""
    begun = [name for name in names if len(text) > 2 and name.lower().startswith(text)]
    near = list(dict.fromkeys([*difflib.get_close_matches(text, names, n=3, cutoff=0.7), *begun]))[:3]
    listed = f"use one of: {', '.join(names)}"
    return f"did you mean {' or '.join(near)}? {others or listed}" if near else listed


def check_fields(name: str, values: Any, known: Collection[str]) -> None:
    """Refuse what is no mapping of known fields.

    Args:
        name: What is described, as the error calls it and its field.
        values: What was given.
        known: Names of all fields.

    Raises:
        InvalidRequest: ``values`` is no mapping, or has another field.

    Example:
        >>> check_fields("tiling", {"tile_px": 768}, ["tile_px", "tile_frames"])
    """
    if not isinstance(values, Mapping) or not set(values) <= set(known):
        words = f"{name}={shown(values)} is not a mapping of {', '.join(sorted(known))}; use some of these"
        raise InvalidRequest(words, **{name: values})
