"""A process of one's own: the environment and code of the moment, a status, and what it said."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fault_injection import running

from i2v_lab.runs import workers
from i2v_lab.runs.workers import run_in_child

HERE = "I2V_LAB_OF_THE_MOMENT"


def _say() -> None:
    print(os.environ.get(HERE), Path.cwd())
    print("to stderr", file=sys.stderr)
    sys.exit(3)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _fail() -> None:
    raise ValueError("no such thing")


def _imports(path: str) -> None:
    Path(path).write_text("\n".join(sorted(sys.modules)))


def _products_of_equal_operands() -> None:
    """Ends with the number of places in memory at which a product has other bits."""
    import torch

    generator = torch.Generator().manual_seed(0)
    x, weights = torch.randn(1, 64, generator=generator), torch.randn(64, 64, generator=generator)
    expected = torch.nn.functional.linear(x, weights)
    others = 0
    for offset in range(1, 33):
        elsewhere = torch.empty(weights.numel() + 64)[offset : offset + weights.numel()].view(weights.shape)
        others += not torch.equal(torch.nn.functional.linear(x, elsewhere.copy_(weights)), expected)
    sys.exit(others)


def _sleep(path: str) -> None:
    Path(path).write_text(str(os.getpid()))
    time.sleep(600)


def test_it_has_the_environment_of_the_moment_and_its_words_come_back(monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(tmp_path)
    for value in ("first", "second"):
        monkeypatch.setenv(HERE, value)
        ended = run_in_child(_say)
        assert ended.status == 3
        assert ended.errors.splitlines() == [f"{value} {tmp_path}", "to stderr"]
    monkeypatch.delenv(HERE)
    assert run_in_child(_say).errors.splitlines()[0] == f"None {tmp_path}"
    assert capfd.readouterr() == ("", "")


def test_death_and_errors_are_told_apart():
    assert run_in_child(_die).status == -signal.SIGKILL
    ended = run_in_child(_fail)
    assert ended.status == 1
    assert ended.errors.strip().endswith("ValueError: no such thing")


def test_what_it_is_forked_from_knows_libraries_but_neither_this_package_nor_what_looks_for_a_gpu(tmp_path):
    run_in_child(_imports, str(tmp_path / "modules"))
    modules = set((tmp_path / "modules").read_text().split())
    assert {"torch", "ltx_core.model.video_vae", "av"} <= modules
    assert "ltx_pipelines" not in modules  # it asks for CUDA devices on import, and what has asked cannot be forked
    assert "i2v_lab.pipeline.ltx2.components" not in modules


def test_an_interrupted_wait_leaves_no_process(tmp_path):
    told = tmp_path / "pid"

    def interrupt() -> None:
        while not (told.exists() and told.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # parallel workers of pytest ignore it
    try:
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            run_in_child(_sleep, str(told))
    finally:
        signal.signal(signal.SIGINT, handler)
        thread.join()
    assert not running([int(told.read_text())])


def test_nothing_is_left_when_the_one_who_asked_is_killed(tmp_path):
    told = tmp_path / "pid"
    folders = [str(folder) for folder in Path(__file__).parents[:2]]
    code = f"import sys; sys.path[:0] = {folders!r}; import test_workers as t; "
    code += f"t.run_in_child(t._sleep, {str(told)!r})"
    parent = subprocess.Popen([sys.executable, "-c", code])
    while not (told.exists() and told.read_text()):
        assert parent.poll() is None
        time.sleep(0.05)
    pid = int(told.read_text())
    parent.kill()
    parent.wait()
    while running([pid]):
        time.sleep(0.1)  # for ever if it stays, which the limit of every test ends


def test_a_product_has_the_same_bits_wherever_in_memory_its_operands_lie():
    assert run_in_child(_products_of_equal_operands).status == 0


@pytest.mark.parametrize("card", [None, 13])
def test_where_there_is_a_card_nothing_is_preloaded_that_imports_torchao(monkeypatch, card):
    monkeypatch.setattr(workers, "driver_cuda_major", lambda: card)
    preloaded = workers._preloaded()
    assert (preloaded == workers.LIBRARIES) is (card is None)
    if card is not None:
        lines = "\n".join(f"import {name}" for name in preloaded)
        code = f"{lines}\nimport sys, torch\nprint('torchao' in sys.modules, torch.cuda.is_initialized())"
        shown = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
        assert shown.stdout.split() == ["False", "False"]
