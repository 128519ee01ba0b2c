"""LTX-Video's sizes: two stages, the second at twice the first's width and height. Imports no torch."""

from __future__ import annotations

from i2v_lab.errors import InvalidRequest
from i2v_lab.pipeline.contract.architectures import Architecture
from i2v_lab.pipeline.contract.sizes import SizeRule
from i2v_lab.request import I2VRequest, VideoShape

SIZES = SizeRule(pixel_multiple=32, min_pixels=64, frame_step=8, spatial_scale=32, temporal_scale=8)


def stage_shape(architecture: Architecture, request: I2VRequest, stage: int) -> VideoShape:
    """The video in pixels as a stage of the model processes it.

    The first stage runs at ``downscale_factor`` of the size, rounded down to 32 pixels, and the second at twice that,
    which may be larger than the request; the result is scaled down at the end. Source:
    ``LTXMultiScalePipeline.__call__``.

    Example:
        >>> from i2v_lab.pipeline.contract.architectures import load_architecture
        >>> request = I2VRequest(image="still.png", width=320, height=192)
        >>> stage_shape(load_architecture("ltxv-tiny"), request, 2)
        VideoShape(frames=97, height=192, width=384)
    """
    factor, unit = architecture.sampling["downscale_factor"], SIZES.spatial_scale
    height, width = (int(side * factor) // unit * unit for side in (request.height, request.width))
    return VideoShape(request.frames, height * stage, width * stage)


def check_latent(architecture: Architecture, request: I2VRequest) -> None:
    """Refuse a request whose first stage has a single latent position, which the transformer cannot run.

    Raises:
        InvalidRequest: With what to use.
    """
    if SIZES.latent(stage_shape(architecture, request, 1)).tokens == 1:
        raise InvalidRequest(
            f"frames=1 at {request.width}x{request.height} is not for model={architecture.name!r}, whose transformer "
            "needs more than one latent position; use 9 frames, or 128 pixels or more",
            frames=1,
        )
