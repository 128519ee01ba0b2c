"""What upstream's own pipelines need to run here. With transformers 4.57 nothing else of theirs is touched."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from ltx_pipelines.utils import model_ledger

from i2v_lab.pipeline.ltx2.gemma import GEMMA_BUFFERS, gemma_key_ops, ltx_core_fits
from i2v_lab.pipeline.ltx2.layout import gemma_dimensions
from i2v_lab.pipeline.ltx2.weights import Weights


@pytest.fixture(scope="module")
def upstream_here(tiny: Weights) -> Iterator[None]:
    """Without an unconditional synchronize, and Gemma at the tiny size; with transformers 5, by our builder."""
    with pytest.MonkeyPatch.context() as patch, gemma_dimensions(tiny.architecture.gemma):
        patch.setattr(torch.cuda, "synchronize", lambda *_: None)
        if not ltx_core_fits():
            patch.setattr(model_ledger, "GEMMA_LLM_KEY_OPS", gemma_key_ops())
            patch.setattr(model_ledger, "GEMMA_MODEL_OPS", GEMMA_BUFFERS)
        yield
