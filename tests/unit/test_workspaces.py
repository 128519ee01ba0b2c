"""The libraries' workspaces by card and dtype; and their factors from measurements of single convolutions."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from i2v_lab.capacity.calibration import calibrate
from i2v_lab.errors import ForecastError, RecordError
from i2v_lab.profiling.fake.card import CardProperties
from i2v_lab.profiling.fake.forecast import forecast, forecasting
from i2v_lab.profiling.fake.workspaces import load_workspaces

GIB = 2**30
A100 = CardProperties("NVIDIA A100-SXM4-40GB", major=8, minor=0, total_memory=40 * GIB)
BLACKWELL = CardProperties("NVIDIA B200", major=10, minor=0, total_memory=178 * GIB)
OLD = CardProperties("Tesla T4", major=7, minor=5, total_memory=15 * GIB)


@pytest.mark.parametrize(
    ("card", "cublas_bytes"), [(None, 33_554_432), (A100, 8_519_680), (BLACKWELL, 8_519_680)], ids=str
)
def test_the_workspace_of_cublas_follows_from_the_card(card, cublas_bytes):
    def multiply() -> None:
        source = torch.empty(512, 512, device="cuda")
        told.append((torch.cuda.get_device_capability(), torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1]))
        source @ source

    told: list[tuple] = []
    found = forecast(multiply, workspaces=load_workspaces(), card=card)
    assert found.peak.peak_bytes == 2 * 2**20 + cublas_bytes
    expected = card or CardProperties()
    assert told == [((expected.major, expected.minor), expected.name, expected.total_memory)]


def test_a_card_whose_kernels_are_not_known_is_refused():
    with pytest.raises(ForecastError) as caught, forecasting("cuda", card=OLD):
        pytest.fail("it ran")
    assert caught.value.fields == {"cause": "unknown card", "capability": "7.5"}
    assert pickle.loads(pickle.dumps(caught.value)).fields == caught.value.fields


def _workspace(dtype: torch.dtype, batch: int, **factors) -> int:
    model = replace(load_workspaces(), **factors)
    source, weight = torch.empty(batch, 8, 64, 64, dtype=dtype), torch.empty(16, 8, 3, 3, dtype=dtype)
    result = torch.empty(batch, 16, 64, 64, dtype=dtype)
    arguments = (source, weight, None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    return model.transient(torch.ops.aten.convolution.default, arguments, result)


def test_a_measured_dtype_has_its_own_factors_whatever_the_batch():
    one, result, weight = 8 * 64 * 64 * 4, 16 * 64 * 64 * 4, 16 * 8 * 9 * 4  # of one picture in float32, and a weight
    factors = {"float32": (1.0, 0.0, 1.0)}
    assert _workspace(torch.float32, 1, factors=factors) == one + weight
    assert _workspace(torch.float32, 9, factors=factors) == 9 * one + weight
    assert _workspace(torch.float32, 9, factors={"float32": (1.0, 1.0, 1.0)}) == 9 * (one + result) + weight
    assert _workspace(torch.float32, 8, factors={}) == _workspace(torch.float64, 8, factors=factors) == 0
    as_before = _workspace(torch.bfloat16, 8, factors={})
    assert _workspace(torch.bfloat16, 8, factors=factors) == as_before > 0


def _convolution(source: torch.Tensor, outputs: int, kernel: int = 3) -> tuple[int, int]:
    """Bytes of the workspace, and of the weight."""
    weight = source.new_empty(outputs, source.shape[1], *[kernel] * (source.dim() - 2))
    spatial = list(source.shape[2:])
    arguments = (source, weight, None, (1,), (kernel // 2,), (1,), False, (0,), 1)
    result = source.new_empty(len(source), outputs, *spatial)
    return load_workspaces().transient(torch.ops.aten.convolution.default, arguments, result), weight.nbytes


def test_an_input_that_is_in_neither_order_is_copied_first():
    dense = torch.empty(1, 256, 9, 24, 36, dtype=torch.bfloat16)
    permuted = torch.empty(1, 9, 256, 24, 36, dtype=torch.bfloat16).transpose(1, 2)
    nbytes = dense.nbytes
    whole, weight = _convolution(dense, 128)
    assert whole == nbytes + nbytes // 2 + weight
    assert _convolution(permuted, 128)[0] == whole + nbytes
    assert _convolution(dense, 128, kernel=1)[0] == 0
    assert _convolution(permuted, 128, kernel=1)[0] == nbytes  # measured on an H100: 379.69 MiB of 379.69
    assert _convolution(dense.to(memory_format=torch.channels_last_3d), 128) == (weight, weight)
    assert _convolution(dense.to(memory_format=torch.channels_last_3d), 128, kernel=1)[0] == 0


def test_channels_of_16_bit_are_padded_to_eight():
    # Measured on an H100: [1, 128, 11, 240, 360] to 3 channels took 243.95 MiB, [1, 3, 3, 240, 360] to 128 took 25.10.
    to_three, weight = _convolution(torch.empty(1, 128, 11, 24, 36, dtype=torch.bfloat16), 3)
    assert to_three == (128 + 8) * 11 * 24 * 36 * 2 + weight
    from_three, weight = _convolution(torch.empty(1, 3, 3, 24, 36, dtype=torch.float16), 128)
    assert from_three == (8 + 128) * 3 * 24 * 36 * 2 + weight
    single, weight = _convolution(torch.empty(1, 3, 3, 24, 36), 128)
    assert single == (3 + 128) * 3 * 24 * 36 * 4 + weight


LAWS = {("float32", 1): (1, 1, 1), ("bfloat16", 16): (1, 0, 0), ("float16", 1): None}


def _measurements(folder: Path) -> Path:
    sizes = [(2**20 * (10 + i), 2**20 * (5 + i % 7), 2**20 * (1 + i % 3)) for i in range(40)]
    table = pd.DataFrame(sizes, columns=["input_bytes", "output_bytes", "weight_bytes"])
    table = table.assign(workspace_bytes=table.sum(axis=1), contiguous=True, grouped=False)
    source = folder / "gpu.json"
    source.write_text(json.dumps({"gpu": "g", "torch": "t", "cudnn": 1, "cublas_bytes": 2, "context_bytes": 3}))
    table.to_csv(source.with_suffix(".csv"), index=False)
    rows = [{"kind": "device", "gpu": "g"}]
    for (dtype, batch), law in LAWS.items():
        for size in sizes:
            nbytes = 0 if law is None else int(sum(f * n for f, n in zip(law, size, strict=True)))
            parts = dict(zip(("input_bytes", "output_bytes", "weight_bytes"), size, strict=True))
            row = {"kind": "convolution", "dtype": dtype, "batch": batch, "contiguous": True, "grouped": False}
            row["kernel"] = 3
            rows.append({**row, **parts, "workspace_bytes": nbytes})
            rows.append({**row, **parts, "workspace_bytes": 7 * nbytes, "contiguous": False})
    rows += [dict(rows[1], workspace_bytes=0)] * 9  # another kernel, which takes none
    rows += [dict(rows[1], dtype="float64")] * 2  # too few
    source.with_suffix(".jsonl").write_text("\n".join(map(json.dumps, rows)))
    return source


def test_calibration_finds_what_the_kernels_of_each_dtype_transpose(tmp_path):
    source, out = _measurements(tmp_path), tmp_path / "model.json"
    lines = list(calibrate(source, out))
    assert len(lines) == 2 + len(LAWS)
    model = json.loads(out.read_text())
    assert (model["input_factor"], model["output_factor"], model["weight_factor"]) == (1, 1, 1)
    expected = {key: list(law or (0, 0, 0)) for key, law in LAWS.items()}
    assert {dtype: value for (dtype, _), value in expected.items()} == model["factors"]
    source.with_suffix(".jsonl").unlink()
    list(calibrate(source, out))
    assert "factors" not in json.loads(out.read_text())


@pytest.mark.parametrize("text", ["{", '{"kind": "convolution"}', "[]", "3", '{"a": 1}', ""])
def test_lines_that_cannot_be_read_are_refused(tmp_path, text):
    source, out = _measurements(tmp_path), tmp_path / "model.json"
    source.with_suffix(".jsonl").write_text(text)
    with pytest.raises(RecordError) as caught:
        list(calibrate(source, out))
    assert caught.value.fields == {"path": source.with_suffix(".jsonl")}
    assert not out.exists()


def test_a_product_with_a_bias_also_allocates_the_workspace_of_cublaslt_once():
    def multiply(*layers: torch.nn.Linear) -> None:
        source = torch.empty(512, 512, device="cuda")
        for layer in layers:
            layer(source)

    plain, biased = (torch.nn.Linear(512, 512, bias=bias) for bias in (False, True))
    found = [forecast(multiply, *each, workspaces=load_workspaces()) for each in ((plain,), (plain, biased, biased))]
    tensors = 3 * 2**20  # source, weight and product
    assert found[0].peak.peak_bytes == tensors + 33_554_432
    assert found[1].peak.peak_bytes == tensors + 2**20 + 2048 + 33_554_432 + 1_048_576
