"""diffusers' pipelines with random weights; the only package that imports diffusers."""

import os
from importlib.util import find_spec

from i2v_lab.errors import InvalidRequest, RunnerUnavailable
from i2v_lab.memory_settings import MemorySettings
from i2v_lab.pipeline.contract.architectures import Architecture
from i2v_lab.pipeline.contract.runner import RunnerSpec
from i2v_lab.pipeline.contract.sizes import SizeRule
from i2v_lab.request import DecodeScope, I2VRequest, Quantization, Variant

SIZES = SizeRule(pixel_multiple=64, min_pixels=64, frame_step=8, spatial_scale=32, temporal_scale=8)
GGUF_KERNELS = "DIFFUSERS_GGUF_CUDA_KERNELS"  # as diffusers reads it
MID_CHANNELS = 1024  # diffusers' default of the latent upsampler
PATCH_PX = 4  # of the diffusion decoder's last stage


def has_diffusion_decoder(architecture: Architecture) -> bool:
    """Whether a model decodes with LTX-2.5's diffusion decoder instead of its autoencoder."""
    return "diffusion_decoder" in architecture.config


def check_model(architecture: Architecture, request: I2VRequest) -> None:
    """Refuse what a model of diffusers has no use for, or what one with two stages cannot generate.

    Raises:
        InvalidRequest: A prompt for a model without a text encoder, the dtype of a component that there is not, a
            quantization without a transformer, the grad mode of a diffusion decoder, or the size of a video.
    """
    components = architecture.config
    for name in ("prompt", "negative_prompt"):
        if getattr(request, name) and architecture.pipeline and "tokenizer" not in components:
            raise InvalidRequest(
                f"{name} is not for model={architecture.name!r}, which takes none; leave it out",
                **{name: getattr(request, name)},
            )
    for name, dtype in request.settings.dtypes:
        known = ["default", *(each for each in components if each != "scheduler")]
        if not architecture.pipeline:
            known.append("text_encoder")
        if name not in known:
            raise InvalidRequest(
                f"dtypes: {name}={dtype.value} is not for model={architecture.name!r}; use {', '.join(known)}",
                **{name: dtype.value},
            )
    check_quantization(architecture, request.settings)
    check_scope(architecture, request)
    if not architecture.pipeline:
        check_latent(architecture, request)


def check_quantization(architecture: Architecture, settings: MemorySettings) -> None:
    """Refuse a quantization where it would have no effect, or where its package is not installed.

    Raises:
        InvalidRequest: The model has no transformer, or is one that is put together of several pipelines; or GGUF is
            to be computed by CUDA kernels.
        RunnerUnavailable: With the package.
    """
    if not settings.quantizes:
        return
    name = settings.quantization.value
    if not architecture.pipeline or "transformer" not in architecture.config:
        why = "has no transformer" if architecture.pipeline else "is put together of two pipelines here"
        raise InvalidRequest(
            f"quantization={name} is not for model={architecture.name!r}, which {why}; leave it out",
            quantization=name,
            model=architecture.name,
        )
    package = settings.quantization.package
    if package == "gguf" and os.getenv(GGUF_KERNELS, "false").lower() in ("1", "true", "yes"):
        raise InvalidRequest(
            f"quantization={name} is not for {GGUF_KERNELS}={os.environ[GGUF_KERNELS]}, whose kernels allocate what a "
            f"forecast cannot see; unset {GGUF_KERNELS}",
            quantization=name,
        )
    if find_spec(package) is None:
        raise RunnerUnavailable(
            f"quantization={name} needs {package}, which is not installed; run `pip install 'i2v-lab[quantization]'`",
            quantization=name,
            missing=package,
        )


def check_scope(architecture: Architecture, request: I2VRequest) -> None:
    """Refuse a grad mode in which a model of diffusers cannot decode.

    Raises:
        InvalidRequest: With the grad mode.
    """
    scope, reason = request.decode_scope, ""
    if has_diffusion_decoder(architecture):
        reason = "diffusion decoder is a pipeline, which decodes inside no_grad whoever calls it"
    elif "safety_checker" in architecture.config:
        reason = "safety checker needs the frames in numpy, which takes none that require gradients"
    if reason and scope is not DecodeScope.NO_GRAD:
        raise InvalidRequest(
            f"decode_scope={scope.value!r} is not for model={architecture.name!r}, whose {reason}; use no_grad",
            decode_scope=scope.value,
        )


def check_latent(architecture: Architecture, request: I2VRequest) -> None:
    """Refuse a video that the upsampler cannot normalize, or that the diffusion decoder cannot attend in.

    Raises:
        InvalidRequest: With the side or the number of frames.
    """
    channels = architecture.config.get("latent_upsampler", {}).get("mid_channels", MID_CHANNELS)
    SIZES.check_normalized(request, channels, architecture.name)
    check_windows(architecture, request)


def check_windows(architecture: Architecture, request: I2VRequest) -> None:
    """Refuse a video that is smaller than the windows in which the diffusion decoder attends.

    Its first stage attends on the latent's grid, its last on patches of 4 x 4 pixels of every frame.

    Raises:
        InvalidRequest: With the side or the number of frames, and the least there is.
    """
    if not has_diffusion_decoder(architecture):
        return
    decoder = architecture.config["diffusion_decoder"]
    first, last = decoder["decoder_stage_kernels"][0], decoder["decoder_stage5_kernel"]
    step = SIZES.frame_step
    least = {
        "frames": -(-(last[0] - 1) // step) * step + 1,
        "height": max(SIZES.spatial_scale * first[1], PATCH_PX * last[1]),
        "width": max(SIZES.spatial_scale * first[2], PATCH_PX * last[2]),
    }
    for name, window in least.items():
        multiple = 1 if name == "frames" else SIZES.pixel_multiple
        smallest = -(-window // multiple) * multiple
        value = getattr(request, name)
        if value < smallest:
            raise InvalidRequest(
                f"{name}={value} is not for model={architecture.name!r}, whose decoder attends in larger windows; "
                f"use {smallest} or more",
                **{name: value},
            )


RUNNER = RunnerSpec(
    name="diffusers",
    label="diffusers",
    models="diffusers",
    module="diffusers",
    install="pip install 'i2v-lab[diffusers]'",
    packages=("torch", "diffusers", "transformers", "accelerate", "torchao", "gguf"),
    sizes=SIZES,
    parts={
        "resolve_weights": "diffusers.weights:resolve_weights",
        "skeleton_weights": "diffusers.weights:skeleton_weights",
        "pipeline": "diffusers.open_pipeline:open_pipeline",
        "memoizable_modules": "diffusers.open_pipeline:memoizable_modules",
    },
    weight_options=("weights",),
    quantizations=(Quantization.BF16,),
    variants=(Variant.DISTILLED,),
    tiled=has_diffusion_decoder,  # tiles of its autoencoder may be one latent position wide, which LTX-2's cannot pad
    lazy_decode=False,
    repeatable=False,
    emits_events=False,
    settings=True,
    third_party=True,
    check_model=check_model,
)
