"""First-generation LTX-Video; the only package that imports ltx_video."""

from i2v_lab.pipeline.contract.runner import RunnerSpec
from i2v_lab.pipeline.ltx_video.sizes import SIZES, check_latent
from i2v_lab.request import Quantization

RUNNER = RunnerSpec(
    name="ltx-video",
    label="i2v-lab, ltx-video",
    models="ltx-video",
    module="ltx_video",
    install="pip install 'i2v-lab[ltx-video]' && pip install --no-deps ltx-video==0.1.2",
    packages=("torch", "ltx-video", "diffusers", "transformers"),
    sizes=SIZES,
    parts={
        "resolve_weights": "ltx_video.weights:resolve_weights",
        "skeleton_weights": "ltx_video.weights:skeleton_weights",
        "pipeline": "ltx_video.pipeline:LtxVideoPipeline",
        "memoizable_modules": "ltx_video.components:memoizable_modules",
    },
    weight_options=("checkpoint", "text_encoder", "upsampler"),
    quantizations=(Quantization.BF16,),  # its own fp8 needs q8_kernels
    tiled=False,  # its tiles leave out the timestep that the decoder of 0.9.8 is conditioned on
    check_model=check_latent,
)
