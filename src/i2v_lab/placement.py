"""A placement: which techniques are on, which blocks of weights stay on the device, and how large chunks are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from i2v_lab.display import HtmlFields
from i2v_lab.errors import InvalidRequest, check_fields, neighbours, shown
from i2v_lab.memory_policy import TECHNIQUES, MemoryPolicy, Technique, Techniques, policy_of, to_techniques

# The components whose blocks a technique streams.
STREAMED_COMPONENTS: Mapping[Technique, tuple[str, ...]] = {
    Technique.STREAMED_TEXT: ("text_encoder", "embeddings_processor"),
    Technique.STREAMED_TRANSFORMER: ("transformer",),
    Technique.STREAMED_VAE: ("video_encoder", "video_decoder"),
}
# The techniques that a number belongs to, the least and the most that it may be, and what it is a multiple of: features
# of chunks that are no whole vectors of the CPU differ in their last bit.
NUMBERS: Mapping[str, tuple[tuple[Technique, ...], int, int, int]] = {
    "prefetch": ((Technique.STREAMED_TRANSFORMER, Technique.STREAMED_VAE), 0, 64, 1),
    "chunk_tokens": ((Technique.TOKEN_CHUNKS,), 1, 2**20, 1),
    "feature_tokens": ((Technique.FEATURE_CHUNKS,), 32, 2**20, 32),
    "band_bytes": ((Technique.ROW_BANDS,), 1, 2**40, 1),
}
MOST_BLOCKS = 2**20


@dataclass(frozen=True, kw_only=True)
class Placement(HtmlFields):
    """How LTX-2 lies in device memory.

    A component that is streamed has its blocks copied to the device when they run, but for ``resident_blocks`` of them.
    A memory policy is a placement that keeps none, and leaves every number at its default.

    Attributes:
        techniques: Those that are on.
        resident_blocks: Blocks that stay on the device, by component; 0 for those that are missing. A mapping is kept
            as sorted pairs, without zeros.
        prefetch: Streamed blocks that are copied to the device ahead of the one that runs, so that up to ``prefetch +
            1`` are there; of components that run more than once.
        chunk_tokens: Tokens that the transformer processes at a time; ``None`` for the technique's own number, and so
            with the others.
        feature_tokens: Tokens whose text features are extracted at a time; a multiple of 32.
        band_bytes: Of a decoder block's input that is processed at a time.

    Raises:
        InvalidRequest: A value that is unknown, or one that is without effect beside the others.

    Example:
        >>> placement = Placement(techniques=["streamed_transformer"], resident_blocks={"transformer": 12})
        >>> placement.resident("transformer"), placement.name
        (12, 'transformer12')
        >>> Placement(prefetch=2)
        Traceback (most recent call last):
        ...
        i2v_lab.errors.InvalidRequest: prefetch=2 has no effect without streamed_transformer or streamed_vae; add one
    """

    techniques: Techniques = frozenset()
    resident_blocks: tuple[tuple[str, int], ...] = ()
    prefetch: int = 1
    chunk_tokens: int | None = None
    feature_tokens: int | None = None
    band_bytes: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "techniques", to_techniques(self.techniques))
        given: Any = self.resident_blocks
        try:
            counts = dict(given.items() if isinstance(given, Mapping) else given)
        except (TypeError, ValueError):
            words = f"resident_blocks={shown(given)} is not a mapping of components to numbers; use one"
            raise InvalidRequest(words, resident_blocks=given) from None
        for component, count in counts.items():
            self._check_component(component)
            if type(count) is not int or not 0 <= count <= MOST_BLOCKS:
                words = f"resident_blocks: {component}={shown(count)} is not between 0 and {MOST_BLOCKS}; use a number"
                raise InvalidRequest(words, **{component: count})
        object.__setattr__(self, "resident_blocks", tuple(sorted((n, count) for n, count in counts.items() if count)))
        for name in NUMBERS:
            self._check_number(name)

    def _check_component(self, component: Any) -> None:
        owners = {name: technique for technique, names in STREAMED_COMPONENTS.items() for name in names}
        if not isinstance(component, str) or component not in owners:
            words = f"resident_blocks: component={shown(component)} is unknown; use {', '.join(owners)}"
            raise InvalidRequest(words, component=component)
        if owners[component] not in self.techniques:
            raise InvalidRequest(
                f"resident_blocks: {component} is not streamed, and so all of it is resident; leave it out, or add "
                f"{owners[component]}",
                component=component,
            )

    def _check_number(self, name: str) -> None:
        techniques, least, most, multiple = NUMBERS[name]
        value, default = getattr(self, name), Placement.__dataclass_fields__[name].default
        if value == default and type(value) is type(default):
            return
        if type(value) is not int or not least <= value <= most:
            words = f"{name}={shown(value)} is not between {least} and {most}; use such a number"
            raise InvalidRequest(words, **{name: value})
        if value % multiple:
            words = f"{name}={value} is not a multiple of {multiple}; use {neighbours(value, multiple, least)}"
            raise InvalidRequest(words, **{name: value})
        if not self.techniques.intersection(techniques):
            words = f"{name}={value} has no effect without {' or '.join(techniques)}; add one"
            raise InvalidRequest(words, **{name: value})

    def resident(self, component: str) -> int:
        """How many blocks of a streamed component stay on the device."""
        return dict(self.resident_blocks).get(component, 0)

    @property
    def numbers(self) -> dict[str, int]:
        """The numbers that are not at their defaults, by field."""
        values = {name: getattr(self, name) for name in NUMBERS}
        return {name: value for name, value in values.items() if value != Placement.__dataclass_fields__[name].default}

    @property
    def policy(self) -> MemoryPolicy | None:
        """The memory policy that is this placement; ``None`` if there is none."""
        return None if self.resident_blocks or self.numbers else policy_of(self.techniques)

    @property
    def name(self) -> str:
        """What it has beside its techniques, short, for folders and axes; empty if nothing."""
        parts = [f"{component.replace('_', '-')}{count}" for component, count in self.resident_blocks]
        parts += [f"{name.replace('_', '-')}{value}" for name, value in self.numbers.items()]
        return "_".join(parts)

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values; :meth:`from_json` reads them back."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        names = sorted(technique.value for technique in self.techniques)
        return {**values, "techniques": names, "resident_blocks": dict(self.resident_blocks)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Placement:
        """A placement by its fields, of which those that are missing have their defaults.

        Raises:
            InvalidRequest: It is no mapping, has an unknown field, or breaks a rule.
        """
        check_fields("placement", values, [field.name for field in fields(cls)])
        return cls(**values)


def placement_of(policy: MemoryPolicy) -> Placement:
    """The placement that a memory policy stands for.

    Example:
        >>> placement_of(MemoryPolicy.LEAN).policy.value
        'lean'
    """
    return Placement(techniques=TECHNIQUES[policy])
