"""Random damaged options and inputs of every command that takes a request: one line and status 2, or a right result."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from fault_injection import INPUTS, each

from i2v_lab.cli.app import main

MODEL = ["--model", "ltx-2.3-tiny"]
SIZE = {"--width": "64", "--height": "64", "--frames": "9"}
NUMBERS = ["inf", "-inf", "nan", "-1", "0", "1e400", "1e9", "", "x", "9" * 20, "9" * 5000, "64.5", "0x40", "١٢", "1_0"]
WHOLE = ["--width", "--height", "--frames", "--seed", "--tile-px", "--tile-overlap-px", "--tile-frames"]
CHOICES = ["--variant", "--quantization", "--decode-scope", "--memory", "--model"]
WORDS = ["", "auto", "AUTO", "dev ", "None", "é", "\udcff", "a" * 5000, "[bold]", "../x", "-", "fp8-cast"]
TEXTS = ["\udcff", "waves \udc80 roll", "a\ud800"]
PLANS = [
    "",
    "3",
    "[]",
    "groups: {}",
    "groups: [[]]",
    "groups: [{rounds: .inf, runs: [{}]}]",
    "groups: [{rounds: 99999999, runs: [{expected_seconds: 1}]}]",
    "groups: [{runs: [{expected_seconds: .nan}]}]",
    "groups: [{runs: [{expected_seconds: 1, width: [64], model: {a: b}}]}]",
    "groups: [{runs: [{expected_seconds: 1, tiling: {bad: 1}}]}]",
    "groups: [{runs: [{expected_seconds: 1, techniques: [[1]]}]}]",
    "groups: [{runs: [{expected_seconds: 1, pipeline: [1], vram_cap_gib: .inf}]}]",
    "message: 1",
    "self: 1",
    "groups: 2001-99-99",
    "groups: " + "9" * 5000,
    "groups: " + "[" * 20_000,
    "groups: !!python/object/apply:os.system [touch ran]",
    "&a [*a]",
    "a: &a {b: *a}",
    "\x00\x01",
    "? [a]\n: b",
    "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)),
    "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12)),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files that are no good as a still, as weights or as a plan, by what they are."""
    folder = tmp_path_factory.mktemp("inputs")
    found = {name: folder / name for name in ("fifo", "socket", "folder", "empty", "text", "big", "bomb", "loop")}
    os.mkfifo(found["fifo"])
    found["folder"].mkdir()
    found["empty"].touch()
    found["text"].write_text("neither")
    found["loop"].symlink_to("loop")
    found["big"].write_bytes(_png(20_000, 20_000))
    found["bomb"].write_bytes(_png(2**31 - 1, 2**31 - 1))
    where = Path.cwd()
    os.chdir(folder)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as end:
        end.bind("socket")
    os.chdir(where)
    others = {"null": "/dev/null", "gone": str(folder / "gone"), "long": "x" * 300, "below a file": "/dev/null/x"}
    return found | {name: Path(path) for name, path in others.items()}


def _png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


def _damaged_request(draw: random.Random) -> list[str]:
    """Options of a request, of which one or two are damaged at least."""
    options = dict(SIZE)
    for _ in range(draw.randint(1, 2)):
        kind = draw.choice(["whole", "fps", "cap", "choice", "text"])
        if kind == "whole":
            options[draw.choice(WHOLE)] = draw.choice(NUMBERS)
        elif kind == "fps":
            options["--fps"] = draw.choice([number for number in NUMBERS if number != "1e9"])
        elif kind == "cap":
            options["--vram-cap-gib"] = draw.choice(NUMBERS)
        elif kind == "choice":
            options[draw.choice(CHOICES)] = draw.choice(WORDS)
        else:
            options[draw.choice(["--prompt", "--negative-prompt"])] = draw.choice(TEXTS)
    model = [] if "--model" in options else MODEL
    return [*model, *(f"{name}={value}" for name, value in options.items())]


def _command(draw: random.Random, inputs: dict[str, Path], folder: Path) -> list[str]:
    path = str(draw.choice(list(inputs.values())))
    size = [word for pair in SIZE.items() for word in pair]
    plan = folder / "plan.yaml"
    plan.write_bytes(draw.choice(PLANS).encode("utf-8", "surrogateescape"))
    weights = [f"--{name}={path}" for name in ("checkpoint", "gemma", "upsampler") if draw.random() < 0.8]
    video = f"--out={folder / 'a.mp4'}"
    makers: list[Callable[[], list[str]]] = [
        lambda: ["forecast", *_damaged_request(draw), "--json"],
        lambda: ["forecast", *MODEL, *size, f"--image={path}", "--json"],
        lambda: ["forecast", *MODEL, *size, f"--profile={path}/x" if path != "x" * 300 else f"--profile={path}"],
        lambda: ["generate", "--image", str(inputs["gone"]), *_damaged_request(draw), video],
        lambda: ["generate", *MODEL, *size, f"--image={path}", video],
        lambda: (
            ["generate", *MODEL, *size, "--image=stills/lighthouse.png", f"--out={folder / 'a.mp4'}", "--lora", path]
            + weights
        ),
        lambda: ["fit", f"--gpu={draw.choice([*WORDS, *NUMBERS])}GiB?", *MODEL, *size],
        lambda: ["fit", "--gpu=T4", *MODEL, *size, f"--aspect={draw.choice(NUMBERS)}:{draw.choice(NUMBERS)}x"],
        lambda: ["measure", "--dry-run", "--out", str(folder / "runs"), "--plan", draw.choice([path, str(plan)])],
        lambda: ["show", str(folder / "none"), f"--timeline={path}/x"],
        lambda: ["accuracy", str(folder / "none"), f"--csv={draw.choice([path + '/x', str(inputs['folder'])])}"],
        lambda: ["calibrate", path, f"--out={folder / 'w.json'}"],
    ]
    return draw.choice(makers)()


def _run(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit status; any exception but SystemExit comes through."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(sys, "argv", ["i2v-lab", *argv])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0


@each(INPUTS, 0.3)
def test_damaged_requests(seeds, inputs, tmp_path, monkeypatch, capsys, tally):
    monkeypatch.chdir(tmp_path)
    for seed in seeds:
        folder = tmp_path / str(seed)
        folder.mkdir()
        argv = _command(random.Random(seed), inputs, folder)
        try:
            status = _run(argv, monkeypatch)
        except Exception as error:
            capsys.readouterr()
            tally.count("raised", [f"{type(error).__name__}: {error}"], f"seed {seed}, {argv}")
            continue
        out, err = capsys.readouterr()
        problems = []
        if status == 2:
            if not err.startswith("i2v-lab: ") or err.count("\n") != 1:
                problems.append(f"not one line: {err}")
            if out:
                problems.append(f"on stdout: {out}")
            if {entry.name for entry in folder.iterdir()} - {"plan.yaml"}:
                problems.append("it left a file")
        elif status == 0 and "--json" in argv and not json.loads(out)["peak_bytes"] > 0:
            problems.append(f"printed {out}")
        elif status not in (0, 1):
            problems.append(f"status {status}")
        tally.count("one line" if status == 2 else "a right result", problems, f"seed {seed}, {argv}")
    assert not (tmp_path / "ran").exists()
