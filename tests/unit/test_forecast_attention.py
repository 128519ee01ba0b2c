"""Attention on a fake card runs by the kernel that the code allows, or is refused where that cannot run."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from i2v_lab.errors import ForecastError
from i2v_lab.profiling.fake.attention import chosen_kernel
from i2v_lab.profiling.fake.forecast import forecast

F = torch.nn.functional
MATH, FLASH, EFFICIENT, CUDNN = (
    SDPBackend.MATH,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
)
HEADS, TOKENS, WIDTH = 8, 512, 64
SCORES = 4 * HEADS * TOKENS * TOKENS  # bytes in float32
TENSOR = 2 * HEADS * TOKENS * WIDTH  # in bfloat16


def attend(allowed: list[SDPBackend], mask: bool = False, priority: bool = False, **options: Any) -> torch.Tensor:
    query = torch.empty(1, HEADS, TOKENS, WIDTH, dtype=torch.bfloat16, device="cuda")
    given = torch.ones(TOKENS, TOKENS, dtype=torch.bool, device="cuda") if mask else None
    with torch.no_grad(), sdpa_kernel(allowed, set_priority=priority):
        return F.scaled_dot_product_attention(query, query, query, given, **options)


@pytest.mark.parametrize(
    ("allowed", "options"),
    [([MATH], {}), ([MATH], {"mask": True}), ([MATH], {"is_causal": True}), ([FLASH, MATH], {"mask": True})],
)
def test_math_attention_materializes_its_scores(allowed, options):
    found = forecast(attend, allowed, **options).peak.peak_bytes
    assert 2.25 * SCORES < found < 2.25 * SCORES + 16 * TENSOR + SCORES


@pytest.mark.parametrize(
    ("allowed", "options"),
    [([FLASH], {}), ([EFFICIENT], {"mask": True}), ([CUDNN], {"mask": True}), ([EFFICIENT, MATH], {"is_causal": True})],
)
def test_fused_kernels_do_not(allowed, options):
    assert forecast(attend, allowed, **options).peak.peak_bytes < 3 * TENSOR + (
        7 * TOKENS**2 if "mask" in options else 0
    )


def test_the_flags_of_the_backends_count_and_so_does_their_priority():
    switches = (
        (torch.backends.cuda.enable_flash_sdp, torch.backends.cuda.flash_sdp_enabled),
        (torch.backends.cuda.enable_mem_efficient_sdp, torch.backends.cuda.mem_efficient_sdp_enabled),
        (torch.backends.cuda.enable_cudnn_sdp, torch.backends.cuda.cudnn_sdp_enabled),
    )
    before = [enabled() for _, enabled in switches]

    def by_flags() -> torch.Tensor:
        for enable, _ in switches:
            enable(False)
        query = torch.empty(1, HEADS, TOKENS, WIDTH, dtype=torch.bfloat16, device="cuda")
        return F.scaled_dot_product_attention(query, query, query)

    try:
        assert forecast(by_flags).peak.peak_bytes > 2 * SCORES
    finally:
        for (enable, _), value in zip(switches, before, strict=True):
            enable(value)
    assert forecast(attend, [MATH, FLASH], priority=True).peak.peak_bytes > 2 * SCORES
    assert forecast(attend, [FLASH, MATH], priority=True).peak.peak_bytes < SCORES


def _query(
    dtype: torch.dtype = torch.bfloat16, width: int = WIDTH, shape: tuple[int, ...] = (1, 4, 16)
) -> torch.Tensor:
    return torch.empty(*shape, width, dtype=dtype, device="meta")


KERNELS = [
    (_query(), {}, FLASH),
    (_query(width=60), {}, FLASH),  # padded
    (_query(width=264), {}, EFFICIENT),
    (_query(torch.float32), {}, EFFICIENT),
    (_query(), {"attn_mask": _query(width=16)}, EFFICIENT),
    (_query(width=60), {"attn_mask": _query(width=16)}, MATH),
    (_query(torch.float64), {}, MATH),
    (_query(shape=(4, 16)), {}, MATH),
    (_query(torch.float32, width=6), {}, MATH),
]


@pytest.mark.parametrize(("query", "options", "expected"), KERNELS)
def test_without_a_choice_the_kernel_is_the_first_that_can_run(query, options, expected):
    assert chosen_kernel(query, query, query, **options) == expected


REFUSED: list[tuple[list[SDPBackend], torch.Tensor, dict[str, Any]]] = [
    ([FLASH], _query(torch.float32), {}),
    ([FLASH], _query(), {"attn_mask": _query(width=16)}),
    ([FLASH], _query(width=264), {}),
    ([EFFICIENT], _query(width=60), {}),
    ([EFFICIENT], _query(torch.float64), {}),
    ([CUDNN], _query(torch.float32), {}),
    ([CUDNN], _query(width=160), {}),
    ([FLASH, EFFICIENT, CUDNN], _query(shape=(4, 16)), {}),
]


@pytest.mark.parametrize(("allowed", "query", "options"), REFUSED)
def test_what_the_chosen_kernel_cannot_run_is_refused(allowed, query, options):
    with sdpa_kernel(allowed), pytest.raises(ForecastError) as caught:
        chosen_kernel(query, query, query, **options)
    fields = caught.value.fields
    assert fields["cause"] == "no attention kernel"
    assert set(fields["allowed"]) == {backend.name for backend in allowed}
    assert (fields["shape"], fields["dtype"]) == (tuple(query.shape), str(query.dtype).removeprefix("torch."))
    assert pickle.loads(pickle.dumps(caught.value)).fields == fields


def _grouped(x: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(x, x[:, :2], x[:, :2], enable_gqa=True)


def _broadcast(x: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(x, x[:, :1], x[:, :1])


def _trained(x: torch.Tensor) -> torch.Tensor:
    out = F.scaled_dot_product_attention(x, x, x)
    out.sum().backward()
    return out


@pytest.mark.parametrize("run", [_grouped, _broadcast, _trained])
def test_math_attention_runs_in_all_its_forms(run: Callable[[torch.Tensor], torch.Tensor]):
    source = torch.empty(1, 4, 64, 16, requires_grad=run is _trained)
    shapes: list[torch.Size] = []

    def measured(x: torch.Tensor) -> None:
        with sdpa_kernel(MATH):
            shapes.append(run(x).shape)

    device = "cpu" if run is _trained else "cuda"  # a backward pass wants frames that not every machine lists
    assert forecast(measured, source, device=device).peak.peak_bytes > 4 * 4 * 64 * 64
    assert shapes == [source.shape]


def test_a_refusal_comes_out_of_a_forecast_and_no_kernel_at_all_is_one():
    with pytest.raises(ForecastError) as caught:
        forecast(attend, [FLASH], mask=True)
    assert caught.value.fields["cause"] == "no attention kernel"
    with pytest.raises(ForecastError) as caught:
        forecast(attend, [])
    assert caught.value.fields["allowed"] == []
