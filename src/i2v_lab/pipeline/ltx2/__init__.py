"""LTX-2.3 through ltx-core and ltx-pipelines; the only package that imports them.

``RUNNER`` is this package's own pipeline, ``UPSTREAM`` that of ltx-pipelines as it is.
"""

from dataclasses import replace

from i2v_lab.errors import InvalidRequest
from i2v_lab.memory_policy import TECHNIQUES, MemoryPolicy
from i2v_lab.pipeline.contract.architectures import Architecture
from i2v_lab.pipeline.contract.runner import RunnerSpec
from i2v_lab.pipeline.ltx2.tiles import SIZES
from i2v_lab.request import I2VRequest, Quantization


def check_model(architecture: Architecture, request: I2VRequest) -> None:
    """Refuse a video that the upsampler cannot normalize, and more resident blocks than there are.

    Raises:
        InvalidRequest: With the number of frames (``SizeRule.check_normalized``), or of blocks.
    """
    SIZES.check_normalized(request, architecture.upsampler["mid_channels"], architecture.name)
    if request.placement is not None and request.placement.resident_blocks:
        from i2v_lab.pipeline.ltx2.memory.blocks import block_counts

        counts = block_counts(architecture)
        for component, count in request.placement.resident_blocks:
            if count > counts[component]:
                raise InvalidRequest(
                    f"resident_blocks: {component}={count} is above the {counts[component]} blocks of "
                    f"model={architecture.name!r}; use that or less",
                    **{component: count},
                )


RUNNER = RunnerSpec(
    name="ltx-2",
    label="i2v-lab",
    models="ltx-2",
    module="ltx_pipelines",
    install="pip install 'i2v-lab[ltx]'",
    packages=("torch", "ltx-core", "ltx-pipelines", "transformers"),
    sizes=SIZES,
    parts={
        "resolve_weights": "ltx2.weights:resolve_weights",
        "skeleton_weights": "ltx2.weights:skeleton_weights",
        "pipeline": "ltx2.pipeline:TwoStagePipeline",
        "memoizable_modules": "ltx2.components:memoizable_modules",
        "kept_weights": "ltx2.memory.host_weights:HostWeights",
    },
    weight_options=("checkpoint", "gemma", "upsampler", "lora"),
    quantizations=(Quantization.FP8_CAST, Quantization.BF16),
    techniques=TECHNIQUES[MemoryPolicy.STREAMED],
    tiled=True,
    check_model=check_model,
)
UPSTREAM = replace(
    RUNNER,
    name="ltx-pipelines",
    label="ltx-pipelines",
    parts={
        **{name: part for name, part in RUNNER.parts.items() if name != "kept_weights"},
        "pipeline": "ltx2.upstream:UpstreamPipeline",
    },
    techniques=frozenset(),
    third_party=True,
)
