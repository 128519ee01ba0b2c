"""What tests at 22B share."""

from __future__ import annotations

from functools import partial

import pytest
import torch

NEEDED_BYTES = 30 * 2**30


@pytest.fixture(scope="session")
def room_for_22b():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch finds none here")
    total_bytes = torch.cuda.get_device_properties(0).total_memory
    if total_bytes < NEEDED_BYTES:
        pytest.skip(f"needs a card with {NEEDED_BYTES} bytes, and this one has {total_bytes}")


class LatentRecorder:
    """Copies, on the CPU, of the latents that one function returns."""

    def __init__(self, monkeypatch, module, name, latents):
        original = getattr(module, name)
        self.latents = []

        def call(*args, **kwargs):
            result = original(*args, **kwargs)
            self.latents += [latent.cpu() for latent in latents(result)]
            return result

        monkeypatch.setattr(module, name, call)


@pytest.fixture
def record_latents(monkeypatch):
    return partial(LatentRecorder, monkeypatch)
