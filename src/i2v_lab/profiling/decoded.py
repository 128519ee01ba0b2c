"""What a pipeline makes: the phase of what its autoencoder decodes."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from i2v_lab.events import Phase
from i2v_lab.profiling.components import method_words

DECODE_IMAGE = "decode_image"
FIELDS = {  # of results
    "frames": Phase.DECODE_VIDEO.value,
    "videos": Phase.DECODE_VIDEO.value,
    "video": Phase.DECODE_VIDEO.value,
    "images": DECODE_IMAGE,
    "image": DECODE_IMAGE,
    "audios": Phase.DECODE_AUDIO.value,
}


def decoded_phase(pipeline: Any, result: Any = None) -> str:
    """``decode_video``, unless a pipeline says that it makes pictures or sound.

    A pipeline that has an argument for frames, or video in its name, makes a video; else its result says what it is by
    the name of its field, or by being one picture. Of diffusers' other pipelines each makes pictures.

    Args:
        pipeline: What is called.
        result: What it returned, if it did already.

    Example:
        >>> class FluxPipeline:
        ...     def __call__(self, prompt): ...
        >>> class Output(dict): ...
        >>> decoded_phase(FluxPipeline(), {"images": []}), decoded_phase(FluxPipeline())
        ('decode_image', 'decode_video')
    """
    while isinstance(pipeline, functools.partial):
        pipeline = pipeline.func
    owner = getattr(pipeline, "__self__", pipeline)
    kind = owner if inspect.isroutine(owner) or inspect.isclass(owner) else type(owner)
    name = f"{kind.__name__} {getattr(pipeline, '__name__', '')}".lower()
    words = {word for each in _arguments(pipeline) for word in method_words(each)}
    if words & {"frame", "frames", "video", "videos"} or "vid" in name or "2v" in name:
        return Phase.DECODE_VIDEO.value
    named = [phase for name, phase in FIELDS.items() if _has_field(result, name)]
    if named:
        return named[0]
    if "audio" in words or "audio" in name:
        return Phase.DECODE_AUDIO.value
    is_picture = kind.__module__.startswith("diffusers.pipelines.") or "image" in name
    return DECODE_IMAGE if is_picture or _is_one_picture(result) else Phase.DECODE_VIDEO.value


def _arguments(pipeline: Any) -> list[str]:
    try:
        return list(inspect.signature(pipeline).parameters)
    except (TypeError, ValueError):
        return []


def _has_field(result: Any, name: str) -> bool:
    return name in result if isinstance(result, dict) else name in getattr(result, "__dict__", {})


def _is_one_picture(result: Any) -> bool:
    if isinstance(result, list | tuple) and len(result) == 1:
        return _is_one_picture(result[0])
    shape = tuple(getattr(result, "shape", ()))
    if len(shape) == 4 and shape[0] == 1:
        shape = shape[1:]
    is_array = len(shape) == 3 and 3 in (shape[0], shape[2])
    return is_array or type(result).__module__.startswith("PIL.")
