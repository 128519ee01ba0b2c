"""LTX-2's components: ltx-pipelines' ledger of builders over our weights, with memory techniques applied to them.

Nothing of ltx-core's and ltx-pipelines' is rewritten here: builders get another loader and module operations, through
the fields that they have for that.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

import torch
from ltx_core.guidance.perturbations import PerturbationType
from ltx_core.loader import LoraPathStrengthAndSDOps, SDOps
from ltx_core.loader import SingleGPUModelBuilder as Builder
from ltx_core.model.transformer.transformer import BasicAVTransformerBlock
from ltx_core.model.video_vae import VideoDecoder
from ltx_core.quantization import QuantizationPolicy
from ltx_core.text_encoders.gemma import GemmaTextEncoderConfigurator
from ltx_core.text_encoders.gemma.embeddings_connector import _BasicTransformerBlock1D
from ltx_pipelines.utils import ModelLedger

from i2v_lab.memory_policy import Techniques
from i2v_lab.pipeline.contract.architectures import Architecture
from i2v_lab.pipeline.contract.random_tensors import DTYPE
from i2v_lab.pipeline.ltx2.gemma import GEMMA_BUFFERS, gemma_key_ops, tokenizer_ops
from i2v_lab.pipeline.ltx2.layout import gemma_dimensions, transformer_key_ops
from i2v_lab.pipeline.ltx2.memory.builders import with_techniques
from i2v_lab.pipeline.ltx2.memory.chunked_transformer import ChunkedBlock
from i2v_lab.pipeline.ltx2.memory.host_weights import HostWeights
from i2v_lab.pipeline.ltx2.memory.in_place_decode import TileMask
from i2v_lab.pipeline.ltx2.memory.readers import will_need
from i2v_lab.pipeline.ltx2.memory.streaming import StreamedBuilder
from i2v_lab.pipeline.ltx2.skeletons import UninitializedModules
from i2v_lab.pipeline.ltx2.weights import Weights
from i2v_lab.placement import Placement
from i2v_lab.request import Quantization


class Ledger(ModelLedger):
    """ltx-pipelines' ledger of builders, reading through the loader that comes with the weights.

    Each of its methods builds one component: ``transformer()``, ``text_encoder()``, ``video_decoder()``, ...

    Args:
        weights: The weight files and their loader.
        device: Where components are built.
        quantization: Of the transformer.
        placement: Memory techniques, applied to the components as they are built, and what stays on the device.
        with_lora: Fuse the distilled LoRA into the transformer.
        host_weights: Where streamed blocks are in host memory; by default nothing is kept when a component is released.

    Example:
        >>> ledger = Ledger(weights, torch.device("cuda"), Quantization.FP8_CAST)  # doctest: +SKIP
        >>> decoder = ledger.video_decoder()  # doctest: +SKIP
    """

    def __init__(
        self,
        weights: Weights,
        device: torch.device,
        quantization: Quantization,
        placement: Placement | Techniques = frozenset(),
        *,
        with_lora: bool = False,
        host_weights: HostWeights | None = None,
    ) -> None:
        self._weights = weights
        self._placement = placement if isinstance(placement, Placement) else Placement(techniques=placement)
        self._host_weights = host_weights or HostWeights()
        loras = (LoraPathStrengthAndSDOps(weights.lora, 1.0, weights.lora_keys),) if with_lora else ()
        super().__init__(
            dtype=DTYPE,
            device=device,
            checkpoint_path=weights.checkpoint,
            spatial_upsampler_path=weights.upsampler,
            loras=loras,
            quantization=quantization_policy(quantization),
        )

    def build_model_builders(self) -> None:
        """Upstream's builders with the weights' loader, Gemma's shards, and the techniques.

        The transformer's key map is narrowed: see :func:`~i2v_lab.pipeline.ltx2.layout.transformer_key_ops`.
        """
        super().build_model_builders()
        self.text_encoder_builder = Builder(
            model_path=self._weights.gemma_shards,
            model_class_configurator=GemmaTextEncoderConfigurator,
            model_sd_ops=gemma_key_ops(),
            registry=self.registry,
            module_ops=(GEMMA_BUFFERS, *tokenizer_ops(self._weights.gemma_root)),
        )
        key_ops = transformer_key_ops(self._weights.architecture)
        self.transformer_builder: Builder[Any] = replace(self.transformer_builder, model_sd_ops=key_ops)
        builders = {name: value for name, value in vars(self).items() if isinstance(value, Builder)}
        loader = self._weights.loader_ahead(HostWeights(self._host_weights.budget_bytes))
        changed = with_techniques(builders, self._placement, self._weights.reader, self._host_weights)
        for name, builder in changed.items():
            configurator: Any = UninitializedModules(builder.model_class_configurator)
            setattr(self, name, replace(builder, model_loader=loader, model_class_configurator=configurator))

    def _quantized_transformer(self) -> tuple[Builder[Any], dict[str, Any]]:
        """The transformer's builder and the arguments of its build besides the device, as ltx-pipelines' ledger."""
        builder, policy = self.transformer_builder, self.quantization
        if policy is None:
            return builder, {"dtype": self.dtype}
        key_ops = builder.model_sd_ops
        assert key_ops is not None
        if policy.sd_ops is not None:
            name = f"sd_ops_chain_{key_ops.name}+{policy.sd_ops.name}"
            key_ops = SDOps(name=name, mapping=(*key_ops.mapping, *policy.sd_ops.mapping))
        return replace(builder, module_ops=(*builder.module_ops, *policy.module_ops), model_sd_ops=key_ops), {}

    def read_transformer_ahead(self) -> None:
        """Have the transformer read while other components run: by threads if it is streamed, else by the system."""
        builder, options = self._quantized_transformer()
        if isinstance(builder, StreamedBuilder):
            builder.read_ahead(self._target_device(), **options)
        elif not self._weights.is_synthetic:
            will_need([self._weights.checkpoint])

    def text_encoder(self) -> torch.nn.Module:
        """Gemma 3 with its tokenizer, at the architecture's size."""
        with gemma_dimensions(self._weights.architecture.gemma):
            return super().text_encoder()

    def gemma_embeddings_processor(self) -> torch.nn.Module:
        """The feature extractor and both connectors, for Gemma at the architecture's size."""
        with gemma_dimensions(self._weights.architecture.gemma):
            return super().gemma_embeddings_processor()


def quantization_policy(quantization: Quantization) -> QuantizationPolicy | None:
    """ltx-core's policy object for a quantization; ``None`` for bfloat16."""
    return QuantizationPolicy.fp8_cast() if quantization is Quantization.FP8_CAST else None


def memoizable_modules(architecture: Architecture) -> dict[type[torch.nn.Module], Callable[..., Hashable]]:
    """Module classes whose identical calls a forecast may memoize.

    The blocks of the transformer, those of the embeddings connectors, and the video decoder and the blending weights,
    which run once for each tile.

    Returns:
        For each class a function of a call's module and arguments: what, besides shapes, decides which operators run.
        For the transformer's blocks that is which attention guidance skips.
    """
    return {
        BasicAVTransformerBlock: _perturbations_key,
        ChunkedBlock: _perturbations_key,
        _BasicTransformerBlock1D: _constant_key,
        VideoDecoder: _constant_key,
        TileMask: _constant_key,
    }


def _perturbations_key(
    block: Any, video: Any = None, audio: Any = None, perturbations: Any = None, **_: Any
) -> Hashable:
    if perturbations is None:
        return ()
    checks = (perturbations.any_in_batch, perturbations.all_in_batch)
    return tuple(check(kind, block.idx) for kind in PerturbationType for check in checks)


def _constant_key(*args: Any, **kwargs: Any) -> Hashable:
    return ()
