"""Finds the modules of a third-party pipeline, and the phase that a call of each belongs to."""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from i2v_lab.events import Phase

MAX_DEPTH = 3  # of nested objects: a function's pipeline's ledger's attributes
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_CASE_BOUNDARY = re.compile(r"(?<=[a-z0-9A-Z])(?=[A-Z][a-z])|(?<=[a-z])(?=[A-Z])")
_LEAF_TYPES = (str, bytes, int, float, complex, type(None), type, types.ModuleType, torch.Tensor)
ENCODE_AUDIO = "encode_audio"  # the one phase of third-party pipelines that ours do not have
DENOISE = "denoise"  # the caller appends the number of the stage

TEXT = {"text", "prompt", "connector", "connectors"}
DENOISERS = {"transformer", "unet", "dit", "denoiser"}
PICTURES = {"vae", "autoencoder", "video", "image"}


def find_modules(*roots: Any) -> dict[str, torch.nn.Module]:
    """Find the components that objects reference: the outermost modules, by the name of the reference.

    Follows attributes, sequences, mappings, closures and globals of functions, and the bindings of partials and
    methods, three objects deep. A root that is a module itself is found under the name of its class.

    Example:
        >>> class Pipeline:
        ...     def __init__(self):
        ...         self.vae = torch.nn.Linear(2, 2)
        >>> list(find_modules(Pipeline()))
        ['vae']
    """
    found: dict[str, torch.nn.Module] = {}
    seen: set[int] = set()
    level = [("", root) for root in roots]
    for _ in range(MAX_DEPTH + 1):
        below: list[tuple[str, Any]] = []
        for name, value in level:
            if id(value) in seen or isinstance(value, _LEAF_TYPES):
                continue
            seen.add(id(value))
            if isinstance(value, torch.nn.Module):
                found[_unique_name(name or snake_case(type(value).__name__), found)] = value
            else:
                below += _references(value)
        level = below
    return found


def _references(value: Any) -> Iterator[tuple[str, Any]]:
    """Name and target of each of an object's references."""
    if isinstance(value, functools.partial):
        yield from [("", value.func), *(("", each) for each in value.args), *value.keywords.items()]
    elif isinstance(value, types.MethodType):
        yield "", value.__self__
    elif isinstance(value, types.FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            with suppress(ValueError):  # an unassigned cell
                yield name, cell.cell_contents
        names = value.__code__.co_names
        yield from ((name, value.__globals__[name]) for name in names if name in value.__globals__)
    elif isinstance(value, Mapping):
        yield from ((str(name), each) for name, each in value.items())
    elif isinstance(value, list | tuple | set):
        yield from (("", each) for each in value)
    else:
        yield from getattr(value, "__dict__", {}).items()


def _unique_name(name: str, taken: Mapping[str, Any]) -> str:
    unique, number = name, 1
    while unique in taken:
        number += 1
        unique = f"{name}_{number}"
    return unique


def snake_case(name: str) -> str:
    """Convert a class's name to that of an attribute.

    Example:
        >>> snake_case("X0Model"), snake_case("LTX2VideoTransformer3DModel")
        ('x0_model', 'ltx2_video_transformer3d_model')
    """
    return _CASE_BOUNDARY.sub("_", name).lower()


def phase_of(component: Sequence[str], part: Sequence[str], package: str) -> str | None:
    """The phase that a component's call belongs to, by the names that are usual for components.

    The first rule that matches: an upsampler of latents; audio; an image encoder that is no part of an autoencoder; a
    text encoder, and anything else of the package transformers; a denoiser; the encoder and the decoder of an
    autoencoder. The component's names, its attribute and its class, take precedence over the Python module that defines
    it.

    Args:
        component: Its names: the attribute that references it, its class.
        part: The same for its submodules, down to the one that is called.
        package: The Python module that defines the component's class.

    Returns:
        A :class:`~i2v_lab.events.Phase`, ``encode_audio``, :data:`DENOISE`, or ``None`` if no rule matches.

    Example:
        >>> phase_of(["vae", "AutoencoderKL"], ["decoder", "Decoder"], "diffusers.models.autoencoders")
        'decode_video'
    """
    named = _words(component)
    return _phase(named, _words(part), package) or _phase(named | _words([package]), _words(part), package)


def _phase(own: set[str], part: set[str], package: str) -> str | None:
    below = own | part
    if "upsampler" in own or "upscaler" in own:
        return Phase.UPSAMPLE_LATENT.value
    if own & {"audio", "vocoder"}:
        return ENCODE_AUDIO if "encoder" in below and "decoder" not in below else Phase.DECODE_AUDIO.value
    if "vision" in own or own >= {"image", "encoder"}:
        return Phase.ENCODE_IMAGE.value
    if own & TEXT or package.partition(".")[0] == "transformers":
        return Phase.ENCODE_PROMPT.value
    if own & DENOISERS:
        return DENOISE
    if own & PICTURES and below & {"encoder", "decoder"}:
        return (Phase.DECODE_VIDEO if "decoder" in below else Phase.ENCODE_IMAGE).value
    return None


def _words(names: Sequence[str]) -> set[str]:
    return {word.lower() for name in names for word in _WORD.findall(name)}
