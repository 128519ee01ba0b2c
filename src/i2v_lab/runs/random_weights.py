"""What a video of random weights is, in words."""

from __future__ import annotations

from i2v_lab.pipeline.contract.architectures import load_architecture
from i2v_lab.pipeline.registry import runner_of


def random_weights(model: str) -> str:
    """What a video of these generations is, which load no files of weights, and how to have one of real weights.

    Args:
        model: An architecture's name.

    Example:
        >>> random_weights("ltx-2.5-tiny-diffusers")
        'Made with random weights, so that it shows noise; memory and time are those of real ones.'
    """
    architecture = load_architecture(model)
    runner = runner_of(architecture)
    takes = architecture.pipeline or not runner.settings  # those that are put together of two pipelines take none
    given = ", ".join(f"--{name.replace('_', '-')}" for name in runner.weight_options) if takes else ""
    real = f"; with real weights: i2v-lab generate --model {model}, with {given}" if given else ""
    return f"Made with random weights, so that it shows noise; memory and time are those of real ones{real}."
