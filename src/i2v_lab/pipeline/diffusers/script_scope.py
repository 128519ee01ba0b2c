"""All that is replaced while a script of diffusers is forecast."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers import ModelMixin

from i2v_lab.pipeline.diffusers.script_media import script_media
from i2v_lab.pipeline.diffusers.without_weights import Assume, without_weights
from i2v_lab.thread_patches import patched_here, unpatched

ADAPTERS = ("active_adapters", "merged_adapters", "disable_adapters")  # of a layer with a LoRA


@contextmanager
def script_scope(
    assume: Assume, memoize: Callable[[type[torch.nn.Module], Callable[..., Hashable]], None]
) -> Iterator[None]:
    """Within this scope scripts load without weights, read and write no network and no video, and compile nothing.

    Args:
        assume: Told of what was asked for, and what was answered.
        memoize: Told the classes of denoisers and their blocks, and what decides whether two calls are alike.

    Raises:
        ForecastError: See :func:`~i2v_lab.pipeline.diffusers.without_weights.without_weights`.
        CheckpointError: The same.
    """

    def init(model: ModelMixin, *args: Any, **kwargs: Any) -> None:
        for kind in repeated(type(model)):
            memoize(kind, memory_key)
        unpatched(ModelMixin, "__init__")(model, *args, **kwargs)

    def compile_(model: Any = None, **kwargs: Any) -> Any:
        if model is None:
            return lambda function: compile_(function, **kwargs)
        assume(f"torch.compile of {getattr(model, '__name__', type(model).__name__)}", "memory as without compilation")
        return model

    def compile_module(module: torch.nn.Module, *_: Any, **__: Any) -> None:
        compile_(module)

    with ExitStack() as scopes:
        scopes.enter_context(without_weights(assume))
        scopes.enter_context(script_media(assume))
        scopes.enter_context(patched_here(ModelMixin, "__init__", init))
        scopes.enter_context(patched_here(torch, "compile", compile_))
        scopes.enter_context(patched_here(torch.nn.Module, "compile", compile_module))
        yield


def repeated(kind: type[Any]) -> list[type[torch.nn.Module]]:
    """A denoiser and its blocks, whose calls all run the same operators; of other models nothing.

    Example:
        >>> from diffusers import WanTransformer3DModel
        >>> [each.__name__ for each in repeated(WanTransformer3DModel)]
        ['WanTransformer3DModel', 'WanTransformerBlock']
    """
    names = {*(getattr(kind, "_repeated_blocks", None) or ()), *(getattr(kind, "_no_split_modules", None) or ())}
    home = inspect.getmodule(kind)
    blocks = [getattr(home, name) for name in sorted(names) if hasattr(home, name)]
    is_denoiser = any(word in kind.__name__ for word in ("Transformer", "UNet"))
    return [kind, *blocks] if is_denoiser else []


def memory_key(module: torch.nn.Module, *_: Any, **__: Any) -> Hashable:
    """What decides, besides shapes, which operators a call of a denoiser or block runs.

    The classes of its parts, which a LoRA replaces, where their weights are and in which dtypes, attention processors
    and chunks, any of which a script may change between two calls; a call with hooks that keep anything for the next,
    such as a cache or a prefetch, equals no other.
    """
    chosen: list[Hashable] = []
    for part in module.modules():
        registry = getattr(part, "_diffusers_hook", None)
        if registry is not None and not all(_is_stateless(name, hook) for name, hook in registry.hooks.items()):
            return object()
        stored = tuple((each.dtype, each.device) for each in part._parameters.values() if each is not None)
        adapters = tuple(str(getattr(part, name, "")) for name in ADAPTERS) if hasattr(part, "lora_A") else ()
        kinds = type(part), type(getattr(part, "processor", None))
        chosen.append((*kinds, getattr(part, "_chunk_size", None), stored, adapters))
    return tuple(chosen)


def _is_stateless(name: str, hook: Any) -> bool:
    if name == "group_offloading":
        return getattr(hook.group, "stream", None) is None
    return name == "layerwise_casting"
