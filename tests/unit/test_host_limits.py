"""Host memory within the limits of control groups."""

from __future__ import annotations

import pytest

from i2v_lab.pipeline.contract.host_memory import available_bytes
from i2v_lab.pipeline.ltx2.memory import host_memory

GIB = 2**30
NAMES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def _group(folder, names, limit, used, cached):
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, used, f"anon 1\n{names[2]} {cached}"), strict=True):
        (folder / ("memory.stat" if name == names[2] else name)).write_text(f"{value}\n")


@pytest.mark.parametrize("controllers", NAMES)
def test_the_tightest_group_counts_and_its_page_cache_does_not(tmp_path, monkeypatch, controllers):
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 100 * GIB}))
    own, root = tmp_path / "own", tmp_path / "root"
    own.write_text(f"3:cpu:/job/step\n0:{controllers}:/job/step\n")
    assert available_bytes(root, own) == available_bytes(root, tmp_path / "missing") == 100 * GIB
    _group(root / controllers, NAMES[controllers], "max", 60 * GIB, 0)
    _group(root / controllers / "job" / "step", NAMES[controllers], 50 * GIB, 30 * GIB, 10 * GIB)
    assert available_bytes(root, own) == 30 * GIB
    _group(root / controllers / "job", NAMES[controllers], 40 * GIB, 35 * GIB, 0)
    assert available_bytes(root, own) == 5 * GIB
    _group(root / controllers / "job", NAMES[controllers], 30 * GIB, 35 * GIB, 0)
    assert available_bytes(root, own) == 0
    own.write_text(f"0:{controllers}:/of/the/host\n")  # which a container does not see
    _group(root / controllers, NAMES[controllers], 8 * GIB, 2 * GIB, 0)
    assert available_bytes(root, own) == 6 * GIB


def test_weights_take_a_share_of_what_the_groups_leave(monkeypatch):
    import torch

    monkeypatch.setattr(host_memory, "available_bytes", lambda: 10 * GIB)
    assert host_memory.host_budget_bytes(torch.device("cuda")) == 8 * GIB
    assert host_memory.host_budget_bytes(torch.device("cpu")) == 0
