"""The blocks of LTX-2's components, whose weights are streamed or stay on the device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from ltx_core.model.transformer.adaln import AdaLayerNormSingle
from ltx_core.model.transformer.transformer import BasicAVTransformerBlock
from ltx_core.model.video_vae.resnet import ResnetBlock3D
from ltx_core.model.video_vae.sampling import DepthToSpaceUpsample, SpaceToDepthDownsample
from ltx_core.text_encoders.gemma.embeddings_connector import _BasicTransformerBlock1D
from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer

from i2v_lab.pipeline.contract.architectures import Architecture
from i2v_lab.pipeline.ltx2.layout import meta_component
from i2v_lab.placement import STREAMED_COMPONENTS

BLOCKS = (  # module classes whose weights are streamed
    BasicAVTransformerBlock,
    AdaLayerNormSingle,
    Gemma3DecoderLayer,
    _BasicTransformerBlock1D,
    ResnetBlock3D,
    DepthToSpaceUpsample,
    SpaceToDepthDownsample,
)
LARGE_LAYERS = ("embed_tokens", "video_aggregate_embed", "audio_aggregate_embed")  # names of single layers, likewise


def block_names(model: torch.nn.Module) -> list[str]:
    """Paths of the submodules of ``model`` whose weights are streamed, in the order in which they are defined."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, BLOCKS) or name.rpartition(".")[2] in LARGE_LAYERS
    ]


@dataclass(frozen=True)
class BlockOrder:
    """The blocks of a component, and which of them stay on the device where a number of them does.

    What runs before the first block of a pass has no computation to hide its copy, and stays first. Of the others those
    that stay are evenly spaced if all are of one size, so that each copy has equally much to hide behind; else they are
    the first ones, so that more blocks are never fewer bytes. The embedding and the projections of
    text features, which are called once, stay last.

    Attributes:
        names: Paths of all, in the order in which they are defined.
        first: Those that stay first.
        last: Those that stay last.
    """

    names: tuple[str, ...]
    first: tuple[str, ...]
    last: tuple[str, ...]

    @classmethod
    def of(cls, model: torch.nn.Module) -> BlockOrder:
        """The blocks of a component, which may be on the meta device."""
        names = block_names(model)
        last = tuple(name for name in names if name.rpartition(".")[2] in LARGE_LAYERS)
        first = tuple(name for name in names if isinstance(model.get_submodule(name), AdaLayerNormSingle))
        rest = [model.get_submodule(name) for name in names if name not in {*first, *last}]
        if len({sum(parameter.numel() for parameter in block.parameters()) for block in rest}) > 1:
            first = tuple(name for name in names if name not in last)
        return cls(tuple(names), first, last)

    def resident(self, count: int) -> set[str]:
        """The ``count`` blocks that stay on the device."""
        blocks = [name for name in self.names if name not in {*self.first, *self.last}]
        rest = max(0, count - len(self.first))
        left, total = min(rest, len(blocks)), len(blocks)
        spaced = {name for at, name in enumerate(blocks) if (at + 1) * left // total > at * left // total}
        return {*self.first[:count], *spaced, *self.last[: rest - left]}

    def streamed(self, count: int) -> list[str]:
        """The others."""
        stay = self.resident(count)
        return [name for name in self.names if name not in stay]


@cache
def block_counts(architecture: Architecture) -> dict[str, int]:
    """How many blocks each component has that can be streamed."""
    components = [name for names in STREAMED_COMPONENTS.values() for name in names]
    return {name: len(block_names(meta_component(architecture, name))) for name in components}
