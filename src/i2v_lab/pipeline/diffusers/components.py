"""Components of diffusers' pipelines from published configurations: with random weights, or none in a forecast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import diffusers
import torch
import transformers

from i2v_lab.errors import RunnerUnavailable
from i2v_lab.pipeline.contract.architectures import Architecture
from i2v_lab.pipeline.diffusers import stand_ins

CLASS = "_class_name"


def find_class(architecture: Architecture, name: str) -> Any:
    """A class of diffusers or transformers, or one of :mod:`~i2v_lab.pipeline.diffusers.stand_ins`.

    Args:
        architecture: Who asks for it, for the error.
        name: Of the class.

    Raises:
        RunnerUnavailable: The installed packages lack it.
    """
    homes = [stand_ins, diffusers, transformers]
    pipeline = getattr(diffusers, architecture.pipeline, None)
    if pipeline is not None:  # some components are exported by the package of their pipeline alone
        homes.append(import_module(pipeline.__module__.rpartition(".")[0]))
    for home in homes:
        found = getattr(home, name, None)
        if found is not None:
            return found
    raise RunnerUnavailable(
        f"model={architecture.name!r} needs {name}, which diffusers {diffusers.__version__} and transformers "
        f"{transformers.__version__} lack; run `pip install --upgrade diffusers transformers`",
        model=architecture.name,
        missing=name,
    )


def build(architecture: Architecture, name: str) -> Any:
    """Build one component: a model, a scheduler, a tokenizer, an image processor or a guider.

    Args:
        architecture: Whose configuration: of each component what differs from the defaults of its class.
        name: As in diffusers' pipeline.

    Returns:
        A model is on torch's default device and in its default dtype, but for the modules that diffusers keeps in
        float32; it is in evaluation mode.

    Raises:
        RunnerUnavailable: The installed packages lack its class.

    Example:
        >>> from i2v_lab.pipeline.contract.architectures import load_architecture
        >>> type(build(load_architecture("svd-xt-tiny"), "scheduler")).__name__
        'EulerDiscreteScheduler'
    """
    config = dict(architecture.config[name])
    kind = find_class(architecture, config.pop(CLASS))
    if not issubclass(kind, torch.nn.Module):
        with torch.device("cpu"):  # schedulers hand their tables to numpy
            return kind(**config)
    is_transformers = issubclass(kind, transformers.PreTrainedModel)
    module: torch.nn.Module = kind(kind.config_class(**config)) if is_transformers else kind(**config)
    _convert(module, torch.get_default_dtype())
    return module.eval()


def _convert(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Give a module the dtypes that ``from_pretrained(torch_dtype=dtype)`` gives it.

    diffusers keeps the parameters of some modules in float32, and then the buffers as they were made.
    """
    kept = set(module._keep_in_fp32_modules or ()) if isinstance(module, diffusers.ModelMixin) else set()
    if not kept:
        torch.nn.Module.to(module, dtype)  # diffusers' own warns
        return
    for name, parameter in module.named_parameters():
        if kept & set(name.split(".")):
            parameter.data = parameter.data.float()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make new floating-point tensors of a dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
