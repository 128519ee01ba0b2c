"""``%vram``, ``%%vram`` and the papermill engine, each in a real kernel of this interpreter."""

from __future__ import annotations

import asyncio
import gc
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import nbformat
import papermill
import pytest
from jupyter_core.utils import ensure_event_loop
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from papermill.engines import NBClientEngine

from i2v_lab.profiling.jupyter.cell_meter import MIME
from i2v_lab.profiling.jupyter.papermill_engine import VramEngine
from i2v_lab.reproduce.kernel import InterpreterKernelManager

KERNEL = {"kernel_name": "python3", "kernel_manager_class": InterpreterKernelManager}
# Of papermill's own process, where its own engine abandons a cell whose kernel then ends.
ABANDONED = re.compile(
    r"Task exception was never retrieved\nfuture: .*\nTraceback .*\n(  .*\n)+.*DeadKernelError: .*\n"
)
SETUP = "%load_ext i2v_lab\nimport torch\nlayer = torch.nn.Linear(100, 50)"


def _run(*sources: str) -> nbformat.NotebookNode:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    client = NotebookClient(notebook, kernel_manager_class=InterpreterKernelManager, timeout=120)
    try:
        client.execute()
    except CellExecutionError as error:
        notebook.metadata["failed"] = str(error)
    return notebook


def _texts(cell: nbformat.NotebookNode) -> list[str]:
    return [output["data"]["text/plain"] for output in cell.outputs if "data" in output]


def test_magics_show_exact_bytes_and_the_value():
    notebook = _run(
        SETUP,
        "%vram torch.ones(1024, 256).sum().item()",
        "%%vram\nx = torch.ones(20, 100)\ny = layer(x)\ny.shape",
        "y.requires_grad, x.shape",
        "%%vram\nz = torch.ones(1024)\n1 / 0",
    )
    value, figures = sorted(_texts(notebook.cells[1]))
    assert value == "262144.0"
    assert figures.startswith("[vram] peak 1.0 MiB, left ")
    figures, shape = sorted(_texts(notebook.cells[2]))
    assert shape == "torch.Size([20, 50])"
    # x is 8,000 bytes and kept for the weight's gradient; the weights are 20,200 and y is 4,000
    assert figures.startswith("[vram] peak 31.4 KiB, left 31.4 KiB, saved for backward 7.8 KiB, time ")
    html = next(output["data"]["text/html"] for output in notebook.cells[2].outputs if "text/html" in output.data)
    assert "saved for backward" in html
    assert _texts(notebook.cells[3]) == ["(True, torch.Size([20, 100]))"]
    assert "ZeroDivisionError" in notebook.metadata["failed"]
    assert [output.output_type for output in notebook.cells[4].outputs] == ["display_data", "error"]


def test_what_a_magic_cannot_run_is_one_line_and_nothing_of_it_runs():
    refused = {
        "%%vram\nran = 1\nimport asyncio\nawait asyncio.sleep(0)": "top-level await",
        "%vram await asyncio.sleep(0)": "top-level await",
        "%%vram\nran = 1\n[x async for x in y()]": "top-level await",
        "%%vram\nran = 1\nreturn 3": "line 2: 'return' outside function",
        "%%vram\nran = 1\nyield 3": "line 2: 'yield' outside function",
        "%%vram\nran = 1\nx = (": "line 2: '(' was never closed",
        "%%vram 3\nran = 1": "takes no arguments",
        "%%vram": "cell body is empty",
    }
    works = [
        "%vram",
        "%%vram\n# only a comment",
        "%%vram\nasync def f():\n    await g()\n    yield 3",
        (
            "from i2v_lab import PhaseProfiler\nimport asyncio\n"
            "with PhaseProfiler() as profiler, profiler.phase('cell'):\n    x = await asyncio.sleep(0, torch.ones(9))"
        ),
        "'ran' in globals(), profiler.peak.peak_bytes",
    ]
    sources = [SETUP, *refused, *works]
    cells = [nbformat.v4.new_code_cell(source, metadata={"tags": ["raises-exception"]}) for source in sources]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, kernel_manager_class=InterpreterKernelManager, timeout=120).execute()
    for cell in notebook.cells[1 : 1 + len(refused)]:
        (said,) = (output.text for output in cell.outputs if output.output_type == "stream")
        assert said.startswith("UsageError: "), cell.source
        assert said.count("\n") == 1, cell.source
        assert refused[cell.source] in said
    for cell in notebook.cells[1 + len(refused) :]:
        assert [output for output in cell.outputs if output.output_type in ("error", "stream")] == [], cell.source
    assert _texts(notebook.cells[-1]) == ["(False, 36)"]


def _notebook(path, *sources: str) -> str:
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    cells = [nbformat.v4.new_code_cell("n = 1", metadata={"tags": ["parameters"]})]
    cells += [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)
    return str(path)


def test_the_engine_keeps_and_shows_what_every_cell_took(tmp_path):
    source = _notebook(
        tmp_path / "in.ipynb",
        "import torch",
        "a = torch.ones(n, 1024)",
        "from i2v_lab import PhaseProfiler\nwith PhaseProfiler() as p, p.phase('own'):\n    b = torch.ones(512)\n"
        "print(p.peak.peak_bytes)",
    )
    papermill.execute_notebook(source, str(tmp_path / "out.ipynb"), {"n": 5}, "vram", **KERNEL)
    cells = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells
    assert cells[1].metadata.tags == ["injected-parameters"]
    figures = [cell.metadata["i2v_lab"]["vram"] for cell in cells]
    assert figures[3]["peak_bytes"] == figures[3]["end_bytes"] == 5 * 1024 * 4
    assert figures[3]["saved_for_backward_bytes"] == 0
    assert figures[4]["peak_bytes"] == 2048  # the cell's own profiler worked beside the engine's
    assert cells[4].outputs[0]["text"] == "2048\n"
    shown = [output for output in cells[3].outputs if MIME in output.get("data", {})]
    assert shown[0]["data"]["text/plain"].startswith("[vram] peak 20.0 KiB")
    assert "text/html" in shown[0]["data"]


def test_papermill_ends_on_ctrl_c_without_an_error_of_the_kernel(tmp_path):
    """With its own engine under a notebook of ours, which has ``Cells``; and with ours under any notebook."""
    wait = f"open({str(tmp_path)!r} + f'/{{n}}', 'w').close()\nimport time\ntime.sleep(100)"
    cells = "from i2v_lab.reporting.cells import Cells\nCells('build', '09')"
    source = {"own": _notebook(tmp_path / "own.ipynb", cells, wait), "vram": _notebook(tmp_path / "vram.ipynb", wait)}
    children = {}
    for name, engine in {"own": [], "vram": ["--engine", "vram"]}.items():
        command = [sys.executable, "-m", "papermill", source[name], str(tmp_path / f"{name}-out.ipynb"), *engine]
        children[name] = subprocess.Popen(
            [*command, "-p", "n", name],
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    deadline = time.monotonic() + 120
    while not all((tmp_path / name).exists() for name in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for child in children.values():
        child.send_signal(signal.SIGINT)
    for name, child in children.items():
        said = child.communicate(timeout=60)[1]
        assert child.returncode == 1
        assert "Aborted!" in said
        if name == "own":
            said = ABANDONED.sub("", said)
        assert "ERROR" not in said
        assert "Traceback" not in said


def test_of_a_cell_that_ctrl_c_abandons_the_engine_reports_all_but_the_end_of_its_kernel(monkeypatch, caplog):
    loops = []

    async def fail(error: Exception) -> None:
        raise error

    def execute(*arguments: object, **options: object) -> None:
        loop = ensure_event_loop()
        loops.append(loop)
        tasks = [loop.create_task(fail(error)) for error in (DeadKernelError("it ended"), ValueError("a defect"))]
        loop.run_until_complete(asyncio.wait(tasks))
        raise KeyboardInterrupt

    monkeypatch.setattr(NBClientEngine, "execute_managed_notebook", execute)
    notebook = SimpleNamespace(nb=nbformat.v4.new_notebook())
    with ThreadPoolExecutor() as thread, pytest.raises(KeyboardInterrupt):  # which has a loop of its own
        thread.submit(VramEngine.execute_managed_notebook, notebook, "python3").result()
    loops[0].close()
    gc.collect()
    assert [str(record.exc_info[1]) for record in caplog.records if record.name == "asyncio"] == ["a defect"]


def test_a_failing_cell_keeps_its_figures(tmp_path):
    source = _notebook(tmp_path / "in.ipynb", "import torch\na = torch.ones(1024)\n1 / 0", "never = 1")
    with pytest.raises(papermill.PapermillExecutionError, match="ZeroDivisionError"):
        papermill.execute_notebook(source, str(tmp_path / "out.ipynb"), {}, "vram", **KERNEL)
    cells = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells
    failed = next(cell for cell in cells if "1 / 0" in cell.source)
    assert failed.metadata["i2v_lab"]["vram"]["peak_bytes"] == 4096
    assert "vram" not in cells[-1].metadata.get("i2v_lab", {})


def test_a_cell_that_is_run_again_closes_the_view_that_it_showed(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "0")
    show = "import gc, ipywidgets\nfrom i2v_lab import VramMonitor\nview = VramMonitor('cpu')\nview"
    count = "gc.collect() < 0 or sum(issubclass(type(each), ipywidgets.Widget) for each in gc.get_objects())"
    first, *others = asyncio.run(_values(["a", "a", "b", "b"], show, count))
    assert first > 0
    assert others == [first, 2 * first, 2 * first]


async def _values(cells: list[str], code: str, expression: str) -> list[int]:
    """An expression's value after each of some cells, which are told apart as JupyterLab does it."""
    manager = InterpreterKernelManager()
    await manager.start_kernel()
    client = manager.client()
    client.start_channels()
    values = []
    try:
        await client.wait_for_ready(timeout=120)
        for cell in cells:
            content = {"code": code, "silent": False, "store_history": True, "user_expressions": {"n": expression}}
            request = client.session.msg("execute_request", content, metadata={"cellId": cell})
            client.shell_channel.send(request)
            reply = await client.get_shell_msg(timeout=120)
            while reply["parent_header"]["msg_id"] != request["header"]["msg_id"]:  # a second kernel_info_reply
                reply = await client.get_shell_msg(timeout=120)
            values.append(int(reply["content"]["user_expressions"]["n"]["data"]["text/plain"]))
    finally:
        client.stop_channels()
        await manager.shutdown_kernel(now=True)
    return values
