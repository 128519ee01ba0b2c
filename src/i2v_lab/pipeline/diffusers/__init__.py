"""diffusers' pipelines with random weights; the only package that imports diffusers."""

from i2v_lab.memory_policy import Technique
from i2v_lab.pipeline.contract.runner import RunnerSpec
from i2v_lab.pipeline.contract.sizes import SizeRule
from i2v_lab.request import DecodeScope, Quantization, Variant

RUNNER = RunnerSpec(
    name="diffusers",
    label="diffusers",
    models="diffusers",
    module="diffusers",
    install="pip install 'diffusers>=0.39,<0.43'",
    packages=("torch", "diffusers", "transformers", "accelerate"),
    sizes=SizeRule(pixel_multiple=64, min_pixels=64, frame_step=8, spatial_scale=32, temporal_scale=8),
    parts={
        "resolve_weights": "diffusers.ltx2:resolve_weights",
        "skeleton_weights": "diffusers.ltx2:skeleton_weights",
        "pipeline": "diffusers.ltx2:DiffusersLTX2",
        "memoizable_modules": "diffusers.ltx2:memoizable_modules",
    },
    quantizations=(Quantization.BF16,),
    variants=(Variant.DISTILLED,),
    decode_scopes=(DecodeScope.NO_GRAD,),  # its pipelines decorate themselves with torch.no_grad()
    techniques=frozenset({Technique.MODEL_OFFLOAD, Technique.GROUP_OFFLOAD}),
    lazy_decode=False,
    repeatable=False,
    emits_events=False,
    third_party=True,
)
