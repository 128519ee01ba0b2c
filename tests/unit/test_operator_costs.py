"""What forecasts count of their operators: kinds, operations and bytes, whatever the card."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from i2v_lab.profiling.fake.forecast import forecasting
from i2v_lab.profiling.fake.operator_costs import OperatorCosts
from i2v_lab.profiling.records import CostRecord, PhaseRecord


def rows_of(call, **options):
    with forecasting("cuda", **options) as profiler, profiler.phase("call"), torch.no_grad():
        call()
    return [record for record in profiler.records if isinstance(record, CostRecord)]


def counted(records, *kinds):
    """Number, operations and bytes by kind and dtype, over all segments."""
    found = {}
    for record in records:
        for kind, dtype, count, flops, nbytes in record.rows:
            if kind in kinds or not kinds:
                before = found.get((kind, dtype), (0, 0, 0))
                more = (count, count * flops, count * nbytes)
                found[kind, dtype] = tuple(a + record.repeats * b for a, b in zip(before, more, strict=True))
    return found


def half(*shape, device="cuda"):
    return torch.empty(shape, dtype=torch.bfloat16, device=device)


CASES = {
    "linear": (
        lambda: functional.linear(half(8, 16), half(32, 16), half(32)),
        {("matmul", "bfloat16"): (1, 2 * 8 * 16 * 32, 2 * (32 + 8 * 16 + 16 * 32 + 8 * 32))},
    ),
    "convolution": (
        lambda: functional.conv3d(half(1, 128, 4, 6, 6), half(256, 128, 3, 3, 3)),
        {("convolution 3d", "bfloat16"): (1, 2 * 256 * 128 * 27 * 32, 2 * (128 * 144 + 256 * 128 * 27 + 256 * 32))},
    ),
    "few channels": (
        lambda: functional.conv3d(half(1, 96, 3, 6, 6), half(96, 96, 3, 3, 3)),
        {("convolution 3d of few channels", "bfloat16"): (1, 2 * 96 * 96 * 27 * 16, 2 * 96 * (108 + 96 * 27 + 16))},
    ),
    "cudnn attention": (  # runs as no operator; 130 queries and keys take two tiles of 128
        lambda: functional.scaled_dot_product_attention(*[half(1, 4, 130, 64)] * 3),
        {("cudnn attention 64", "bfloat16"): (1, 4 * 4 * 256 * 256 * 64, 2 * 4 * 4 * 130 * 64)},
    ),
    "efficient attention": (
        lambda: functional.scaled_dot_product_attention(*[half(1, 1, 64, 384)] * 3),
        {("efficient attention 384", "bfloat16"): (1, 4 * 64 * 64 * 384, 2 * 4 * 64 * 384)},
    ),
    "dense": (lambda: half(4, 8) + half(4, 8), {("pointwise", "bfloat16"): (1, 0, 3 * 64)}),
    "broadcast": (lambda: half(4, 8) * half(1, 8), {("strided pointwise", "bfloat16"): (1, 0, 2 * 64 + 16)}),
    "expanded": (lambda: half(4, 8) * half(1, 8).expand(4, 8), {("strided pointwise", "bfloat16"): (1, 0, 144)}),
    "upcast": (lambda: half(4, 8).float(), {("strided pointwise", "float32"): (1, 0, 64 + 128)}),
    "fp8-cast": (
        lambda: torch.empty(4, 8, dtype=torch.float8_e4m3fn, device="cuda").to(torch.bfloat16),
        {("cast from 8 bit", "bfloat16"): (1, 0, 32 + 64)},
    ),
    "transposition": (lambda: half(4, 8).t().contiguous(), {("transposition", "bfloat16"): (1, 0, 128)}),
    "groups": (
        lambda: functional.group_norm(half(1, 64, 8), 32),
        {("group norm 32", "bfloat16"): (1, 0, 2 * 2 * 64 * 8 + 2 * 2 * 32)},
    ),
    "embedding": (
        lambda: functional.embedding(torch.zeros(3, dtype=torch.long, device="cuda"), half(1000, 8)),
        {("lookup", "bfloat16"): (1, 0, 2 * 3 * 8 * 2), ("write", "int64"): (1, 0, 24)},
    ),
    "to device": (lambda: half(8, device="cpu").to("cuda"), {("copy to device, pageable", ""): (1, 0, 16)}),
    "to host": (lambda: half(8).to("cpu"), {("copy to host, pageable", ""): (1, 0, 16)}),
    "to no device": (lambda: half(8).to("meta"), {}),  # of weights whose host copy is kept
    "page-locked": (
        lambda: half(8, device="cpu").pin_memory().to("cuda"),
        {("copy to device, page-locked", ""): (1, 0, 16), ("host", "bfloat16"): (1, 0, 32)},
    ),
    "page-locked from the start": (
        lambda: torch.empty(16, dtype=torch.uint8, device="cpu", pin_memory=True).view(4, 4)[1:].to("cuda"),
        {("copy to device, page-locked", ""): (1, 0, 12)},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_operators_are_counted_by_what_limits_their_kernel(case):
    call, expected = CASES[case]
    found = {cell: values for cell, values in counted(rows_of(call)).items() if not cell[0].startswith("first ")}
    assert {cell: values for cell, values in found.items() if cell[0] not in ("view", "empty")} == expected


def test_the_views_and_the_empty_tensors_of_a_call_cost_the_host_alone():
    found = counted(rows_of(lambda: half(4, 8).t()[1:].unsqueeze(0)))
    assert found == {("empty", ""): (1, 0, 0), ("view", ""): (3, 0, 0)}


def test_what_a_process_does_once_is_counted_once():
    kernels = counted(rows_of(lambda: [functional.silu(half(4)) for _ in range(3)]), "first kernel", "pointwise")
    assert kernels == {("first kernel", ""): (1, 0, 0), ("pointwise", "bfloat16"): (3, 0, 48)}
    shapes = [(1, 8, 4, 4), (1, 8, 4, 4), (1, 8, 6, 6)]
    found = counted(rows_of(lambda: [functional.conv2d(half(*s), half(8, 8, 3, 3)) for s in shapes]))
    assert found["first convolution", ""][0] == 2
    assert found["first use of cuDNN", ""][0] == 1
    products = counted(rows_of(lambda: [half(8, n) @ half(n, 8) for n in (8, 8, 64)]))
    assert (products["first use of cuBLAS", ""][0], products["first matmul", ""][0]) == (1, 2)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(16, 16, device="cuda", dtype=torch.bfloat16)

    def forward(self, hidden):
        return functional.silu(self.inner(hidden)) + hidden


def test_a_memoized_call_costs_what_the_executed_one_did():
    def run():
        hidden = half(4, 16)
        for block in [Block() for _ in range(5)]:
            hidden = block(hidden)

    kinds = ("matmul", "pointwise", "view")
    executed = counted(rows_of(run), *kinds)
    memoized = counted(rows_of(run, memoize={Block: lambda *_, **__: None}), *kinds)
    assert memoized == executed
    assert executed["matmul", "bfloat16"][0] == 5


def test_equal_segments_in_a_row_are_one_record_and_precede_their_phase():
    with forecasting("cuda") as profiler, profiler.phase("outer"):
        half(2).neg()
        with profiler.phase("inner"):
            for _ in range(3):
                half(8).neg()
                profiler.end_step()
    records = [r for r in profiler.records if isinstance(r, CostRecord | PhaseRecord)]
    assert [(r.phase, getattr(r, "repeats", None)) for r in records] == [
        ("inner", 3),  # the kernel was loaded by the outer phase
        ("inner", None),
        ("outer", 1),
        ("outer", None),
    ]
    assert counted(records[:1], "pointwise") == {("pointwise", "bfloat16"): (3, 0, 96)}


def test_the_weights_of_a_component_are_counted_when_it_is_built():
    with forecasting("cuda") as profiler, profiler.phase("load"):
        profiler.component("model", Block())
    found = counted([r for r in profiler.records if isinstance(r, CostRecord)], "module", "weight", "host weight")
    assert found == {("module", ""): (2, 0, 0), ("weight", "bfloat16"): (2, 0, 2 * 272)}


def test_a_segment_holds_cells_of_like_size():
    costs = OperatorCosts("cuda")
    for nbytes in (1000, 1010, 1_000_000):
        costs.count("pointwise", "float32", nbytes=nbytes)
    costs.cut()
    rows = (("pointwise", "float32", 2, 0, 1005), ("pointwise", "float32", 1, 0, 1_000_000))
    assert costs.take() == [rows]
    assert costs.take() == []
