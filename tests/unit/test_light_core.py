"""The core without its extras: what works in an environment that has torch, and what refuses with the extra's name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from i2v_lab.extras import EXTRAS

TOP = Path(__file__).parents[2]

# Every finder of modules, as if the modules of the extras were not there; then one JSON line of what each did.
SCRIPT = """
import importlib.machinery, json, sys
from i2v_lab.extras import EXTRAS
absent = {*EXTRAS}

class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in absent else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import io, contextlib
import torch
import i2v_lab
from i2v_lab.cli import main

net, x = torch.nn.Linear(8, 8), torch.ones(2, 8)
found = {
    "profiled": i2v_lab.profile_call(net, x, run_dir="run").peak.peak_bytes,
    "forecast": i2v_lab.forecast(net, x).peak.peak_bytes,
    "grown": i2v_lab.compare_runs("run", "run").grown(),
    "guarded": [item.requires_grad for item in i2v_lab.guard_stream(net(x) for _ in range(2))],
    "frame": len(i2v_lab.read_run("run").to_frame()),
    "commands": {},
}
for words in json.loads(sys.argv[1]):
    sys.argv = ["i2v-lab", *words.split()]
    status, out, err = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as ended:
            status = ended.code
        finally:
            sys.stdout = sys.__stdout__
    found["commands"][words] = [status, err.getvalue().splitlines()]
try:
    i2v_lab.Explorer
except i2v_lab.I2VLabError as error:
    found["explorer"] = error.fields["extra"]
found["imported"] = sorted(absent & {name.partition(".")[0] for name in sys.modules})
print(json.dumps(found))
"""
WORK = ["--version", "models", "show run", "show run --export perfetto --out trace.json", "compare run run"]
REFUSED = {
    "forecast --model ltx-2.3-tiny": "i2v-lab[ltx]",
    "forecast --model wan-2.2-ti2v-5b-tiny": "i2v-lab[diffusers]",
    "forecast --model ltxv-tiny": "i2v-lab[ltx-video]",
    "forecast --script script.py": "i2v-lab[diffusers]",
    "generate --image stills/lighthouse.png --model ltx-2.3-tiny": "i2v-lab[ltx]",
    "fit --gpu RTX4090 --model wan-2.2-ti2v-5b": "i2v-lab[diffusers]",
    "show run --timeline figures": "i2v-lab[jupyter]",
    "reproduce 03": "i2v-lab[jupyter]",
    "lab": "i2v-lab[jupyter]",
}


def test_the_core_works_without_any_extra_and_the_rest_names_its_own(tmp_path):
    (tmp_path / "script.py").write_text("import torch\n")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([*WORK, *REFUSED])],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(TOP / "src")},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["profiled"] > 0
    assert found["forecast"] > 0
    assert (found["grown"], found["guarded"], found["frame"]) == ([], [False, False], 1)
    for words in WORK:
        assert found["commands"][words][0] == 0, (words, found["commands"][words])
    for words, extra in REFUSED.items():
        status, lines = found["commands"][words]
        assert (status, len(lines)) == (2, 1), (words, lines)
        assert extra in lines[0]
    assert found["explorer"] == "jupyter"
    assert found["imported"] == []


def _declared(name: str | None = None) -> dict[str, str]:
    project = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
    words = project["dependencies"] if name is None else project["optional-dependencies"][name]
    return {Requirement(each).name: str(Requirement(each)) for each in words}


def test_the_core_declares_torch_as_a_range_and_nothing_heavy_and_all_has_every_extra():
    core = _declared()
    assert {clause.operator for clause in Requirement(core["torch"]).specifier} == {">=", "<"}
    distributions = {name.replace("_", "-") for name in EXTRAS} | {"vl-convert-python", "protobuf", "ipython"}
    assert distributions & core.keys() == set()
    assert Requirement(_declared("all")["i2v-lab"]).extras == {*EXTRAS.values()}
    assert _declared("dev")["i2v-lab"] == "i2v-lab[all]"
    for extra in set(EXTRAS.values()):
        assert _declared(extra)


@pytest.mark.parametrize("module", ["ltx_core", "diffusers", "jupyterlab", "torchao", "distributed", "einops"])
def test_the_extra_of_a_module_declares_it(module):
    assert module.replace("_", "-") in _declared(EXTRAS[module])
