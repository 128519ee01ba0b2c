"""How diffusers is asked to hold less device memory: its own settings, as its users name them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any

from i2v_lab.display import HtmlFields
from i2v_lab.errors import InvalidRequest, check_fields, shown


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


class TransformerQuantization(StrEnum):
    """How the transformers of a diffusers model are quantized; their linear layers compute in the model's dtype.

    ``torchao-...``: by diffusers' ``TorchAoConfig``. ``gguf-...``: as a GGUF file has them, by
    ``GGUFQuantizationConfig``; layers whose width is no multiple of the type's block stay as they are.

    Example:
        >>> TransformerQuantization("gguf-q4_k").package
        'gguf'
    """

    NONE = "none"
    TORCHAO_INT8 = "torchao-int8-weight-only"
    TORCHAO_FLOAT8 = "torchao-float8-weight-only"
    GGUF_Q8_0 = "gguf-q8_0"
    GGUF_Q6_K = "gguf-q6_k"
    GGUF_Q5_K = "gguf-q5_k"
    GGUF_Q4_K = "gguf-q4_k"
    GGUF_Q4_0 = "gguf-q4_0"

    @property
    def package(self) -> str:
        """The Python package that it needs; empty for none."""
        return "" if self is TransformerQuantization.NONE else self.value.partition("-")[0]


QUANTIZATIONS = tuple(each for each in TransformerQuantization if each.package)
# Quantizations whose memory is not known before they run.
BNB_KERNELS = "bitsandbytes' CUDA kernels allocate what a forecast cannot see"
NOT_QUANTIZATIONS = {
    "bnb-int8": "the outlier columns that bitsandbytes keeps apart depend on the values of the activations",
    "bnb-nf4": BNB_KERNELS,
    "bnb-fp4": BNB_KERNELS,
    "torchao-int4-weight-only": "its packing takes CUDA kernels of another package",
}
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
        quantization: Of the transformers; the package of its library must be installed.

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
    quantization: TransformerQuantization = TransformerQuantization.NONE

    def __post_init__(self) -> None:
        self._set("offload", _choice(Offload, "offload", self.offload))
        for name in ("offload_stream", "vae_tiling", "vae_slicing", "layerwise_casting"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise InvalidRequest(f"{name}={shown(value)} is neither; use true or false", **{name: value})
        self._set("quantization", _quantization(self.quantization))
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
        if self.quantizes and self.layerwise_casting:
            raise InvalidRequest(
                f"quantization={self.quantization.value} is not for layerwise_casting=True, which casts the weights "
                "that it packs; use one of the two",
                quantization=self.quantization.value,
            )
        if self.quantizes and self.offload is Offload.SEQUENTIAL:
            raise InvalidRequest(
                f"quantization={self.quantization.value} is not for offload='sequential', with which accelerate makes "
                "plain tensors of quantized ones; use offload='model'",
                quantization=self.quantization.value,
                offload=self.offload.value,
            )

    @property
    def is_default(self) -> bool:
        """Whether nothing is set."""
        return self == NO_SETTINGS

    @property
    def offloads(self) -> bool:
        """Whether weights wait on the CPU."""
        return self.offload is not Offload.NONE

    @property
    def quantizes(self) -> bool:
        """Whether weights are quantized."""
        return self.quantization is not TransformerQuantization.NONE

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
        parts += [self.quantization.value.replace("_", "-")] if self.quantizes else []
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
        parts += [f"--quantization {self.quantization.value}"] if self.quantizes else []
        parts += [f"--dtype {name}={dtype.value}" for name, dtype in self.dtypes]
        return " ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Fields as JSON values; :meth:`from_json` reads them back. Without a quantization there is no such key."""
        values = {**asdict(self), "offload": self.offload.value, "vae_tile": dict(self.vae_tile)}
        values |= {"dtypes": {name: dtype.value for name, dtype in self.dtypes}}
        del values["quantization"]  # as in records from before there was one, whose digests hold
        return {**values, "quantization": self.quantization.value} if self.quantizes else values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> MemorySettings:
        """Settings by their fields, of which those that are missing have their defaults.

        Raises:
            InvalidRequest: It is no mapping, has an unknown field, or breaks a rule.
        """
        check_fields("settings", values, [field.name for field in fields(cls)])
        return cls(**values)


def _choice(kind: type[StrEnum], name: str, value: Any) -> Any:
    if not isinstance(value, str) or value not in list(kind):
        words = f"{name}={shown(value)} is unknown; use {' or '.join(kind)}"
        raise InvalidRequest(words, **{name.split(": ")[-1]: value})
    return kind(value)


def _quantization(value: Any) -> TransformerQuantization:
    """Raises InvalidRequest with the reason where a name is known, but not its memory."""
    if isinstance(value, str) and value in NOT_QUANTIZATIONS:
        names = " or ".join(QUANTIZATIONS)
        words = f"quantization={value} is not forecast: {NOT_QUANTIZATIONS[value]}; use {names}"
        raise InvalidRequest(words, quantization=value)
    found: TransformerQuantization = _choice(TransformerQuantization, "quantization", value)
    return found


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
