"""Kernels of notebooks that are killed while they run: the notebook fails with a line, its files are whole."""

from __future__ import annotations

import random
import shutil
import threading
from pathlib import Path

import nbformat
import psutil
from fault_injection import FAULTS, each, running

from i2v_lab.errors import I2VLabError
from i2v_lab.reproduce import run as reproduction

CELLS = """
from pathlib import Path
from i2v_lab.files import write_text
for number in range(200):
    write_text(Path(out_dir, f"table-{number % 3}.csv"), "peak_bytes\\n" * 1000)
"""


@each(FAULTS, 0.01)
def test_killed_kernels(seeds, tmp_path, tally, forked_kernels, monkeypatch):
    notebooks = tmp_path / "notebooks"
    notebooks.mkdir()
    cells = [
        nbformat.v4.new_markdown_cell("# Writes"),
        nbformat.v4.new_code_cell("out_dir: str = 'build'", metadata={"tags": ["parameters"]}),
        *(nbformat.v4.new_code_cell(CELLS) for _ in range(4)),
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), notebooks / "writes.ipynb")
    monkeypatch.setattr(reproduction, "NOTEBOOKS", notebooks)
    own = psutil.Process()
    for seed in seeds:
        chance = random.Random(f"kernel {seed}")
        out = tmp_path / f"build {seed}"
        before = set(own.children(recursive=True))
        killed = threading.Event()

        def kill(after_s: float = chance.uniform(0.2, 2.0), before=before, killed=killed) -> None:
            threading.Event().wait(after_s)
            for process, command in running(set(own.children(recursive=True)) - before).items():
                if "ipykernel" in command:
                    process.kill()
                    killed.set()

        killer = threading.Thread(target=kill)
        killer.start()
        problems = []
        try:
            reproduction.reproduce(out=out)
            outcome = "ended before"
        except I2VLabError as error:
            outcome = "one line"
            if "\n" in str(error):
                problems.append(f"not one line: {error}")
        killer.join()
        problems += _half_files(out)
        if chance.random() < 0.3:
            if [each.error for each in reproduction.reproduce(out=out)] != [None]:
                problems.append("it does not run again")
            problems += _half_files(out)
        left = set(own.children(recursive=True)) - before
        problems += [f"left: {command}" for command in running(psutil.wait_procs(left, timeout=5)[1]).values()]
        tally.count(outcome if killed.is_set() else "ended before", problems, seed)
        shutil.rmtree(out, ignore_errors=True)


def _half_files(out: Path) -> list[str]:
    found = []
    for path in out.rglob("*"):
        if path.name.startswith(".") and path.is_file() and not path.name.endswith((".lock", ".json")):
            found.append(f"{path.name} is left")
        elif path.suffix == ".ipynb":
            nbformat.validate(nbformat.read(path, as_version=4))
        elif path.suffix == ".csv" and len(path.read_text().splitlines()) != 1000:
            found.append(f"{path.name} is not whole")
    return found
