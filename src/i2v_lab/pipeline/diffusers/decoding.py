"""The grad mode in which a pipeline of diffusers decodes: its call's own, or that of a caller who asked for latents.

The call of such a pipeline is inside ``torch.no_grad()``, its decoding included. Whoever asks for
``output_type="latent"`` decodes by himself, in his own grad mode, and unless he disables gradients too, autograd saves
the autoencoder's activations: its parameters require gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from i2v_lab.pipeline.contract.generation import GRAD_SCOPES, explained
from i2v_lab.pipeline.diffusers.settings import DENOISERS
from i2v_lab.request import DecodeScope


@contextmanager
def decoding_in(scope: DecodeScope, pipe: Any) -> Iterator[None]:
    """Let a pipeline that is called within this scope decode as it does, or as its caller would.

    The calls are the pipeline's own. From its autoencoder's ``decode`` on, gradients are enabled, until it returns or
    denoises again, as FramePack does for each section.

    Args:
        scope: ``no_grad`` leaves everything as it is; ``escaped`` and ``inference_mode`` decode outside of the mode.
        pipe: Of diffusers.

    Raises:
        GradScopeError: The autoencoder is given tensors that were made in inference mode.

    Example:
        >>> with decoding_in(DecodeScope.ESCAPED, pipe):  # doctest: +SKIP
        ...     frames = pipe(image=still, output_type="pt").frames  # frames.grad_fn holds the decoder's activations
    """
    if scope is DecodeScope.NO_GRAD:
        yield
        return
    own = pipe.vae.decode
    denoisers = [part for part in (getattr(pipe, name, None) for name in DENOISERS) if part is not None]

    with explained(), GRAD_SCOPES[scope].body(), ExitStack() as outside:

        def decode(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                outside.enter_context(torch.inference_mode(False))  # which enables gradients
                for part in denoisers:
                    outside.callback(part.register_forward_pre_hook(denoise_again).remove)
            return own(*args, **kwargs)

        def denoise_again(module: torch.nn.Module, args: Any) -> None:
            outside.close()

        pipe.vae.decode = decode
        try:
            yield
        finally:
            del pipe.vae.decode
