"""The examples in docstrings are true."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest
import torch

import i2v_lab

SOURCES = sorted(Path(i2v_lab.__file__).parent.rglob("*.py"))
WITH_EXAMPLES = [
    ".".join(path.relative_to(SOURCES[0].parents[0]).with_suffix("").parts).removesuffix("__init__").rstrip(".")
    for path in SOURCES
    if ">>>" in path.read_text()
]


def test_the_modules_with_examples_are_found():
    assert {"", "errors", "events", "request", "units", "pipeline.contract.architectures"} <= set(WITH_EXAMPLES)


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_the_examples_in_docstrings_are_true(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # an example may write
    subject = importlib.import_module(f"i2v_lab.{module}".rstrip("."))
    with torch.enable_grad():
        result = doctest.testmod(subject, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0
