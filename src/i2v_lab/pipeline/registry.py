"""All runners, by name: one line adds one. Imports none of their packages."""

from __future__ import annotations

from collections.abc import Mapping

from i2v_lab.errors import InvalidRequest, shown
from i2v_lab.pipeline import diffusers, ltx2, ltx_video
from i2v_lab.pipeline.contract.architectures import Architecture
from i2v_lab.pipeline.contract.runner import RunnerSpec
from i2v_lab.request import I2VRequest

RUNNERS: Mapping[str, RunnerSpec] = {
    runner.name: runner
    for runner in (
        ltx2.RUNNER,
        ltx2.UPSTREAM,
        ltx_video.RUNNER,
        diffusers.RUNNER,
    )
}


def runner_of(architecture: Architecture) -> RunnerSpec:
    """The runner that an architecture names.

    Example:
        >>> from i2v_lab.pipeline.contract.architectures import load_architecture
        >>> runner_of(load_architecture("ltxv-tiny")).name
        'ltx-video'
    """
    return RUNNERS[architecture.runner]


def find_runner(name: str) -> RunnerSpec:
    """A runner by its name.

    Raises:
        InvalidRequest: There is none of that name; with those that there are.
    """
    if not isinstance(name, str) or name not in RUNNERS:
        raise InvalidRequest(f"pipeline={shown(name)} is unknown; use {' or '.join(RUNNERS)}", pipeline=name)
    return RUNNERS[name]


def check_request(architecture: Architecture, request: I2VRequest) -> None:
    """Refuse what a model or its own runner does not support; see :meth:`RunnerSpec.check_request`."""
    runner_of(architecture).check_request(architecture, request)
