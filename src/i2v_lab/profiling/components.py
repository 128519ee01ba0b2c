"""Finds the modules of a third-party pipeline, and the phase that a call of each belongs to."""

from __future__ import annotations

import functools
import inspect
import re
import types
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from i2v_lab.events import Phase

MAX_DEPTH = 3  # of nested objects: a function's pipeline's ledger's attributes
_WORD = re.compile(r"(?:[Uu]?[Mm]|[Bb]y)?[Tt]5(?![a-z])|[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_CASE_BOUNDARY = re.compile(r"(?<=[a-z0-9A-Z])(?=[A-Z][a-z])|(?<=[a-z])(?=[A-Z])")
_ONE_WORD = re.compile(r"UNet|D[iI]T(?![a-z])|ViT(?![a-z])|Auto[eE]ncoder|ControlNet|[Uu]p[Ss]ampler")  # of mixed case
_TASK = re.compile(r"[a-z]+(?:2|_to_)[a-z]+")  # text2video, image_to_video: of no component
_LEAF_TYPES = (str, bytes, int, float, complex, type(None), type, types.ModuleType, torch.Tensor)
ENCODE_AUDIO = "encode_audio"  # the one phase of third-party pipelines that ours do not have
DENOISE = "denoise"  # the caller appends the number of the stage
GUIDE = "guide"  # part of a step of denoising that is none by itself
AUTOENCODER = "autoencoder"  # whose direction its names do not say

TEXT = {"text", "textual", "txt", "textencoder", "prompt", "connector", "connectors", "conditioner", "llm"}
TEXT |= {"clip", "t5", "umt5", "mt5", "byt5"}
VISION = {"vision", "visual", "siglip"}
PICTURE_ENCODERS = ({"image", "encoder"}, {"img", "encoder"}, {"feature", "extractor"})  # words together
DENOISERS = {"transformer", "unet", "dit", "mmdit", "stdit", "denoiser", "denoise", "noise"}  # as in high_noise_model
GUIDES = {"controlnet", "guider"}
AUTOENCODERS = {"vae", "autoencoder", "ae", "movq", "vqgan", "vqvae"}
PIPELINES = {"pipeline", "pipe"}
GENERIC = {"model", "module", "net", "network", "inner", "wrapped", "hf", "orig", "mod", "fsdp", "dynamo"}
PARTS = {"block", "blocks", "layer", "layers", "embed", "embedding", "embeddings", "embedder", "proj", "projection"}
NOISE_LEVELS = {"t", "timestep", "timesteps", "sigma", "sigmas"}  # what a denoiser's forward takes


def find_modules(*roots: Any, open_pipelines: bool = True) -> dict[str, torch.nn.Module]:
    """Find the components that objects reference: the outermost modules, by the name of the reference.

    Follows attributes, sequences, mappings, closures and globals of functions, and the bindings of partials and
    methods, three objects deep. A name that says nothing, such as ``model``, is replaced by that of the object that
    holds it, such as ``vae``. A root that is a module itself is found under the name of its class.

    Args:
        *roots: Any objects.
        open_pipelines: Of a module that holds a denoiser or an autoencoder beside other components, find these.

    Example:
        >>> class Pipeline:
        ...     def __init__(self):
        ...         self.vae = torch.nn.Linear(2, 2)
        >>> list(find_modules(Pipeline()))
        ['vae']
    """
    paths: dict[torch.nn.Module, tuple[str, ...]] = {}
    seen: set[int] = set()
    level: deque[tuple[tuple[str, ...], Any]] = deque(((), root) for root in roots)
    for _ in range(MAX_DEPTH + 1):
        below: deque[tuple[tuple[str, ...], Any]] = deque()
        while level:
            path, value = level.popleft()
            if isinstance(value, torch.nn.Module):
                if open_pipelines and id(value) not in seen and is_container(value, path):
                    level.extendleft(reversed([((*path, name), child) for name, child in value.named_children()]))
                elif value not in paths or _says(path) > _says(paths[value]):
                    paths[value] = path
            elif isinstance(value, _LEAF_TYPES) or id(value) in seen:
                continue
            elif isinstance(value, functools.partial | types.MethodType):  # no object of its own
                level.extendleft(reversed(_below(path, value)))
            else:
                below += _below(path, value)
            seen.add(id(value))
        level = below
    found: dict[str, torch.nn.Module] = {}
    held = Counter(path[:depth] for path in paths.values() for depth in range(len(path)))
    for module, path in paths.items():
        # What holds several is a pipeline, whose name, such as that of a variable, says nothing of each.
        said = [name for depth, name in enumerate(path, 1) if held[path[:depth]] < 2 or role_of([name]) is not None]
        found[_unique_name(_component_name(said) or snake_case(type(module).__name__), found)] = module
    return found


def _says(path: Sequence[str]) -> int:
    """How much a path's names say of a component: nothing, something, or what it is."""
    name = _component_name(path)
    is_known = role_of([name]) is not None or bool(_words([name]) & {"encoder", "decoder"})
    return 0 if is_generic(path) else 1 + is_known


def _below(path: tuple[str, ...], value: Any) -> list[tuple[tuple[str, ...], Any]]:
    return [((*path, name) if name else path, each) for name, each in _references(value)]


def _references(value: Any) -> Iterator[tuple[str, Any]]:
    """Name and target of each of an object's references; without a name, the target has that of the object."""
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
        slots = (name for kind in type(value).__mro__ for name in _slots(kind) if hasattr(value, name))
        yield from ((name, getattr(value, name)) for name in slots)


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _unique_name(name: str, taken: Mapping[str, Any]) -> str:
    unique, number = name, 1
    while unique in taken:
        number += 1
        unique = f"{name}_{number}"
    return unique


def _component_name(path: Sequence[str]) -> str:
    """A component's name by the references that lead to it; empty if they say nothing."""
    named = [name for name in path if not is_generic([name])]
    roles = [(name, role_of([name])) for name in named if not _words([name]) & PIPELINES]
    outer = next(((name, role) for name, role in roles if role is not None), None)
    if outer is None:
        return named[-1] if named else path[-1] if path else ""
    inner, role = roles[-1]
    if inner == outer[0] or role == outer[1]:
        return outer[0]
    return f"{outer[0]}_{inner}"


def is_generic(path: Sequence[str]) -> bool:
    """Whether none of these names says anything, as ``model`` does not."""
    return all(_words([name]) <= GENERIC for name in path)


def is_container(module: torch.nn.Module, path: Sequence[str] = ()) -> bool:
    """Whether a module is a whole pipeline: it holds a denoiser or an autoencoder beside components of other kinds.

    Args:
        module: Any.
        path: The references that lead to it, which may say what it is.
    """
    if role_of([_component_name(path)]) is not None or type(module).__module__.startswith("transformers."):
        return False
    children = [name for name, _ in module.named_children() if not _words([name]) & PARTS]
    roles = {role_of([name]) for name in children} - {None}
    return len(roles) > 1 and bool(roles & {DENOISE, AUTOENCODER})


def snake_case(name: str) -> str:
    """Convert a class's name to that of an attribute.

    Example:
        >>> snake_case("X0Model"), snake_case("LTX2VideoTransformer3DModel"), snake_case("AsymmDiTJoint")
        ('x0_model', 'ltx2_video_transformer3d_model', 'asymm_dit_joint')
    """
    return _CASE_BOUNDARY.sub("_", _as_words(name)).lower()


def _as_words(name: str) -> str:
    return _ONE_WORD.sub(lambda word: word[0].capitalize(), name)


def phase_of(component: Sequence[str], part: Sequence[str], package: str) -> str | None:
    """The phase that a component's call belongs to, by the names that are usual for components.

    See :func:`role_of` for the rules. The encoder and the decoder of an autoencoder are told apart by the names of the
    submodule that is called, else by those of the component.

    Args:
        component: Its names: the attribute that references it, its class.
        part: The same for its submodules, from the one that is called to the component's child.
        package: The Python module that defines the component's class.

    Returns:
        A :class:`~i2v_lab.events.Phase`, ``encode_audio``, :data:`DENOISE`, or ``None`` if the names do not say.

    Example:
        >>> phase_of(["vae", "AutoencoderKL"], ["decoder", "Decoder"], "diffusers.models.autoencoders")
        'decode_video'
    """
    role = role_of(component, package, part)
    if role == Phase.DECODE_AUDIO:
        return ENCODE_AUDIO if _direction(component, part) == "encoder" else role
    if role == Phase.ENCODE_PROMPT and "clip" in _words(component) and _words(part) & VISION:
        return Phase.ENCODE_IMAGE.value
    if role == AUTOENCODER:
        phases = {"encoder": Phase.ENCODE_IMAGE.value, "decoder": Phase.DECODE_VIDEO.value, None: None}
        return phases[_direction(component, part)]
    return DENOISE if role == GUIDE else role


def role_of(component: Sequence[str], package: str = "", part: Sequence[str] = ()) -> str | None:
    """What a component is, by its names.

    The first rule that matches: an upsampler of latents; audio; an image encoder that is no part of an autoencoder; a
    text encoder, and anything else of the package transformers; a controlnet; a denoiser; an autoencoder. The
    attribute's name takes precedence over the class's, and both over the Python module that defines it.

    Args:
        component: As in :func:`phase_of`.
        package: As there.
        part: As there.

    Returns:
        As there, with :data:`AUTOENCODER` for both directions and ``decode_audio`` for those of sound.

    Example:
        >>> role_of(["low_noise_model", "WanModel"]), role_of(["magic"])
        ('denoise', None)
    """
    for count in range(1, len(component) + 1):
        role = _role(_words(component[:count]), _words(part))
        if role is not None:
            return role
    own = _words(component)
    if package.partition(".")[0] == "transformers":
        return Phase.ENCODE_PROMPT.value
    return _role(own | _words(package.split(".")[1:]), _words(part)) if package else None


def _role(own: set[str], part: set[str]) -> str | None:
    if own & {"upsampler", "upscaler"}:
        return Phase.UPSAMPLE_LATENT.value
    if own & {"audio", "vocoder"}:
        return Phase.DECODE_AUDIO.value
    if own & VISION or any(own >= words for words in PICTURE_ENCODERS):
        return Phase.ENCODE_IMAGE.value
    if own & TEXT or own >= {"cond", "stage"}:
        return Phase.ENCODE_PROMPT.value
    if own & GUIDES:
        return GUIDE
    if own & DENOISERS or any(word.endswith("unet") for word in own):
        return DENOISE
    if own >= {"diffusion", "model"} and not own & {"encoder", "decoder"}:
        return DENOISE
    if own & AUTOENCODERS or any(word.endswith("vae") for word in own) or own >= {"first", "stage"}:
        return AUTOENCODER
    return AUTOENCODER if own & {"video", "image"} and (own | part) & {"encoder", "decoder"} else None


def _direction(component: Sequence[str], part: Sequence[str]) -> str | None:
    """``encoder`` or ``decoder``, by the outermost name that says it; the class of an autoencoder does not."""
    for name in [*reversed(part), *component]:
        words = _words([name])
        found = words & {"encoder", "decoder"}
        if len(found) == 1 and not words & AUTOENCODERS - {"vae"}:
            return found.pop()
    return None


def takes_noise_level(module: torch.nn.Module) -> bool:
    """Whether a module's forward has an argument for the timestep, as a denoiser's does."""
    with suppress(TypeError, ValueError):
        return bool(NOISE_LEVELS & set(inspect.signature(module.forward).parameters))
    return False


def _words(names: Sequence[str]) -> set[str]:
    return {word.lower() for name in names for word in _WORD.findall(_as_words(_TASK.sub(" ", name)))}


def method_words(name: str) -> set[str]:
    """The words in a function's name.

    Example:
        >>> sorted(method_words("decode_first_stage"))
        ['decode', 'first', 'stage']
    """
    return _words([name])
