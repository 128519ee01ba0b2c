"""FlexAttention that is not compiled: metered and forecast as the operators that it runs."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.profiler import ProfilerActivity, profile

from i2v_lab.profiling.fake.attention import safe_softmax
from i2v_lab.profiling.fake.forecast import forecasting
from i2v_lab.profiling.meters.live_storages import LiveStorageMeter
from i2v_lab.torch_compat import dense_flex_attention, uncompiled_flex_attention

TOKENS, HEADS, WIDTH = 256, 2, 16
SCORES = 4 * HEADS * TOKENS * TOKENS  # in float32, whatever the query's dtype


def _attend(device: str, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    query = torch.ones(1, HEADS, TOKENS, WIDTH, device=device, dtype=dtype)
    mask = create_block_mask(lambda b, h, q, kv: q >= kv, None, None, TOKENS, TOKENS, device=device)
    result: torch.Tensor = flex_attention(query, query, query, block_mask=mask)
    return result


def _forecast(device: str) -> int:
    with forecasting(device) as profiler, torch.no_grad(), profiler.phase("attention"):
        assert _attend(device).shape == (1, HEADS, TOKENS, WIDTH)
    return profiler.peak.peak_bytes


def test_a_forecast_and_a_metered_run_count_the_same_scores():
    with LiveStorageMeter() as meter, torch.no_grad():
        _attend("cpu")
    assert meter.peak_bytes() == _forecast("cpu") > 3 * SCORES


def test_on_a_card_the_steps_of_the_softmax_count():
    """Scores before and after the mask, the softmax, and a mask of one byte for each score."""
    assert 3.25 * SCORES < _forecast("cuda") < 3.4 * SCORES


def test_a_forecast_of_safe_softmax_allocates_what_its_kernel_does():
    scores = torch.randn(2, TOKENS, TOKENS)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        kept = torch._safe_softmax(scores, -1)
    changes = [e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    with forecasting("cuda") as forecast, torch.no_grad():
        fake = torch.empty(2, TOKENS, TOKENS, device="cuda")
        with forecast.phase("softmax"):
            result = safe_softmax(fake, -1)
    assert forecast.peak.peak_bytes - scores.nbytes == max(accumulate(changes))
    assert forecast.peak.end_bytes - scores.nbytes == kept.nbytes == result.nbytes


def test_it_computes_what_it_does_outside():
    query = torch.randn(1, 1, 64, WIDTH, generator=torch.Generator().manual_seed(1))
    expected = torch.nn.functional.scaled_dot_product_attention(query, query, query)
    for scope in (uncompiled_flex_attention(), uncompiled_flex_attention(dense_flex_attention)):
        with scope, torch.no_grad():
            torch.testing.assert_close(flex_attention(query, query, query), expected)


def test_a_scope_inside_a_meter_hides_nothing_from_it():
    with LiveStorageMeter() as meter, uncompiled_flex_attention(), torch.no_grad():
        _attend("cpu")
    assert meter.peak_bytes() > 3 * SCORES


def test_torch_is_as_before_afterwards():
    before = (torch_flex.flex_attention_hop, torch_flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG)
    with pytest.raises(RuntimeError, match="stopped"), LiveStorageMeter():
        raise RuntimeError("stopped")
    with pytest.raises(RuntimeError, match="stopped"), forecasting("cuda"):
        raise RuntimeError("stopped")
    assert (torch_flex.flex_attention_hop, torch_flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG) == before
