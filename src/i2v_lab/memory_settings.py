"""How diffusers is asked to hold less device memory: its own settings, as its users name them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any

from i2v_lab.display import HtmlFields
from i2v_lab.errors import InvalidRequest, shown


class Offload(StrEnum):
    """What stays on the CPU until it is needed.

    ``model``: each component, by ``enable_model_cpu_offload``. ``sequential``: each submodule, by
    ``enable_sequential_cpu_offload``. ``group-leaf`` and ``group-block``: layers, or groups of blocks, by
    ``enable_group_offload``.

    Example:
        >>> Offload("group-leaf") is Offload.GROUP_LEAF
        True
    """

    NONE = "none"
    MODEL = "model"
    SEQUENTIAL = "sequential"
    GROUP_LEAF = "group-leaf"
    GROUP_BLOCK = "group-block"


class Dtype(StrEnum):
    """Dtype of a component's weights, by torch's name.

    Example:
        >>> [dtype.value for dtype in Dtype]
        ['bfloat16', 'float16', 'float32']
    """

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


GROUP_OFFLOADS = (Offload.GROUP_LEAF, Offload.GROUP_BLOCK)
MOST = 2**20  # of a number among them


@dataclass(frozen=True, kw_only=True)
class MemorySettings(HtmlFields):
    """Memory settings of diffusers' pipelines; the defaults leave a pipeline as it is built.

    Attributes:
        offload: What stays on the CPU until it is needed.
        offload_stream: Copy the next group on a CUDA stream of its own meanwhile; with group offload.
        offload_blocks: Blocks in a group; with ``group-block``.
        vae_tiling: Whether the autoencoder tiles its input and output.
        vae_tile: Arguments of the autoencoder's ``enable_tiling``, such as ``tile_sample_min_height``; its own defaults
            for the others. A mapping is kept as sorted pairs.
        vae_slicing: Whether the autoencoder processes the videos of a batch one after another.
        layerwise_casting: Keep the weights of the transformer or UNet in float8_e4m3fn, and cast each layer to the
            component's dtype while it runs.
        dtypes: Dtype of a component by its name, such as ``vae``, or of all others by the name ``default``; the model's
            own by default. A mapping is kept as sorted pairs.

    Raises:
        InvalidRequest: A value that is unknown, or one that is without effect beside the others.

    Example:
        >>> MemorySettings(offload="model", dtypes={"vae": "float32"}).name
        'offload-model_vae-float32'
        >>> MemorySettings(offload_stream=True)
        Traceback (most recent call last):
        ...
        i2v_lab.errors.InvalidRequest: offload_stream=True has no effect with offload='none'; use group offload
    """

    offload: Offload = Offload.NONE
    offload_stream: bool = False
    offload_blocks: int = 1
    vae_tiling: bool = False
    vae_tile: tuple[tuple[str, int | float], ...] = ()
    vae_slicing: bool = False
    layerwise_casting: bool = False
    dtypes: tuple[tuple[str, Dtype], ...] = ()

    def __post_init__(self) -> None:
        self._set("offload", _choice(Offload, "offload", self.offload))
        for name in ("offload_stream", "vae_tiling", "vae_slicing", "layerwise_casting"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise InvalidRequest(f"{name}={shown(value)} is neither; use true or false", **{name: value})
        tile = _pairs("vae_tile", self.vae_tile)
        for name, value in tile:
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MOST:
                raise InvalidRequest(
                    f"vae_tile: {name}={shown(value)} is not a number between 0 and {MOST}; use one", **{name: value}
                )
        self._set("vae_tile", tile)
        dtypes = [(name, _choice(Dtype, f"dtypes: {name}", value)) for name, value in _pairs("dtypes", self.dtypes)]
        self._set("dtypes", tuple(dtypes))
        if type(self.offload_blocks) is not int or not 1 <= self.offload_blocks <= MOST:
            words = f"offload_blocks={shown(self.offload_blocks)} is not a whole number above 0; use 1"
            raise InvalidRequest(words, offload_blocks=self.offload_blocks)
        self._check_effects()

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_effects(self) -> None:
        if self.offload_stream and self.offload not in GROUP_OFFLOADS:
            raise InvalidRequest(
                f"offload_stream=True has no effect with offload={self.offload.value!r}; use group offload",
                offload_stream=True,
            )
        if self.offload_blocks != 1 and self.offload is not Offload.GROUP_BLOCK:
            raise InvalidRequest(
                f"offload_blocks={self.offload_blocks} has no effect with offload={self.offload.value!r}; use "
                "group-block",
                offload_blocks=self.offload_blocks,
            )
        if self.offload is Offload.GROUP_BLOCK and self.offload_stream and self.offload_blocks != 1:
            raise InvalidRequest(
                f"offload_blocks={self.offload_blocks} is not for offload_stream=True, with which diffusers copies one "
                "block at a time; use 1",
                offload_blocks=self.offload_blocks,
            )
        if self.vae_tile and not self.vae_tiling:
            raise InvalidRequest("vae_tile has no effect without vae_tiling; set both", vae_tile=dict(self.vae_tile))

    @property
    def is_default(self) -> bool:
        """Whether nothing is set."""
        return self == NO_SETTINGS

    @property
    def offloads(self) -> bool:
        """Whether weights wait on the CPU."""
        return self.offload is not Offload.NONE

    @property
    def name(self) -> str:
        """What is set, short, for folders and axes; empty for the defaults."""
        parts = [f"offload-{self.offload.value}"] if self.offloads else []
        parts += ["stream"] if self.offload_stream else []
        parts += [f"blocks{self.offload_blocks}"] if self.offload_blocks != 1 else []
        parts += ["vae-tiling"] if self.vae_tiling else []
        parts += [f"{name.replace('_', '-')}{value:g}" for name, value in self.vae_tile]
        parts += ["vae-slicing"] if self.vae_slicing else []
        parts += ["layerwise-fp8"] if self.layerwise_casting else []
        parts += [f"{name.replace('_', '-')}-{dtype.value}" for name, dtype in self.dtypes]
        return "_".join(parts)

    @property
    def options(self) -> str:
        """What is set, as options of the command line; empty for the defaults."""
        parts = [f"--offload {self.offload.value}"] if self.offloads else []
        parts += ["--offload-stream"] if self.offload_stream else []
        parts += [f"--offload-blocks {self.offload_blocks}"] if self.offload_blocks != 1 else []
        parts += ["--vae-tiling"] if self.vae_tiling and not self.vae_tile else []
        parts += [f"--vae-tile {name}={value:g}" for name, value in self.vae_tile]
        parts += ["--vae-slicing"] if self.vae_slicing else []
        parts += ["--layerwise-casting"] if self.layerwise_casting else []
        parts += [f"--dtype {name}={dtype.value}" for name, dtype in self.dtypes]
        return " ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values; :meth:`from_json` reads them back."""
        dtypes = {name: dtype.value for name, dtype in self.dtypes}
        return {**asdict(self), "offload": self.offload.value, "vae_tile": dict(self.vae_tile), "dtypes": dtypes}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> MemorySettings:
        """Settings by their fields, of which those that are missing have their defaults.

        Raises:
            InvalidRequest: It is no mapping, has an unknown field, or breaks a rule.
        """
        known = {field.name for field in fields(cls)}
        if not isinstance(values, Mapping) or not set(values) <= known:
            words = f"settings={shown(values)} is not a mapping of {', '.join(sorted(known))}; use some of these"
            raise InvalidRequest(words, settings=values)
        return cls(**values)


def _choice(kind: type[StrEnum], name: str, value: Any) -> Any:
    if not isinstance(value, str) or value not in list(kind):
        words = f"{name}={shown(value)} is unknown; use {' or '.join(kind)}"
        raise InvalidRequest(words, **{name.split(": ")[-1]: value})
    return kind(value)


def _pairs(name: str, values: Any) -> tuple[tuple[str, Any], ...]:
    """A mapping, or pairs, as sorted pairs."""
    pairs: Iterable[Any] = values.items() if isinstance(values, Mapping) else values
    try:
        found = dict(pairs)
        named = all(isinstance(key, str) and key.isidentifier() for key in found)
    except (TypeError, ValueError):
        named = False
    if not named:
        raise InvalidRequest(f"{name}={shown(values)} is not a mapping of names to values; use one", **{name: values})
    return tuple(sorted(found.items()))


NO_SETTINGS = MemorySettings()
