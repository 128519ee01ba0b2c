"""Building ltx-core's modules on the meta device, where nothing has a value, without computing any.

torch runs the initialization of parameters there too, and the vocoder computes 400 resampling filters, through
references in Python: of two seconds that a pipeline takes to build its modules at full size, more than half.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from ltx_core.model.audio_vae import vocoder

from i2v_lab.thread_patches import patched_here, unpatched

INITIALIZERS = ("uniform_", "normal_", "kaiming_uniform_", "xavier_uniform_", "zeros_", "ones_", "constant_")
FILTERS = (vocoder, "kaiser_sinc_filter1d")


@dataclass(frozen=True)
class UninitializedModules:
    """Stands in for one of ltx-core's configurators, on the meta device.

    Attributes:
        configurator: Whose modules are built; parameters and buffers have the same shapes and dtypes.
    """

    configurator: Any

    def from_config(self, config: dict[str, Any]) -> Any:
        """The module of a configuration."""
        with ExitStack() as scopes:
            for name in INITIALIZERS:
                scopes.enter_context(patched_here(torch.nn.init, name, _unchanged))
            scopes.enter_context(patched_here(*FILTERS, cache(unpatched(*FILTERS))))
            return self.configurator.from_config(config)


def _unchanged(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return tensor
