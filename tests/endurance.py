"""A person without patience: random control changes, random stops. `make endurance` does it at full length.

The test-suite does the same for a shorter time; both count threads, processes, memory and files.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path

import psutil

from i2v_lab import Explorer, Generate, I2VRequest, forecast
from i2v_lab.lab.generation_job import State
from i2v_lab.paths import find_still
from i2v_lab.runs.execute import Mode, execute
from i2v_lab.runs.forecast import forecast_spec
from i2v_lab.runs.spec import RunSpec
from i2v_lab.runs.store import FAILED, read_run

MODEL = "ltx-2.3-tiny"
STILL = "stills/lighthouse.png"
KNOWN = ("64x64", "128x64")  # sizes whose forecasts are made first, so that their answers appear at once
MIB = 2**20


@dataclass(frozen=True)
class Changes:
    """What random control changes left behind.

    Attributes:
        seconds: All of them together.
        known_ms: What each change whose answer was known took, from the control to the finished picture.
        threads: More than before, once the explorer is closed.
        processes: Forecasts that are still at work then.
        grown_bytes: Resident memory at the end above that after the first quarter.
        problems: What the explorer had to say that was no answer.
    """

    seconds: float
    known_ms: list[float]
    threads: int
    processes: int
    grown_bytes: int
    problems: list[str]


def change_controls(count: int, seed: int = 0) -> Changes:
    """Set controls to random values, one right after the other, and wait for the last answer."""
    chance = random.Random(seed)
    for size in KNOWN:
        width, height = map(int, size.split("x"))
        request = I2VRequest(image=STILL, width=width, height=height, frames=9)
        forecast_spec(RunSpec(request=request, model=MODEL))
    threads = threading.active_count()
    explorer = Explorer(I2VRequest(image=STILL, width=64, height=64, frames=9), MODEL)
    controls = {name: control for name, control in explorer.controls.items() if name not in ("model", "budget")}
    first = {name: control.value for name, control in controls.items()}
    known_ms, problems, resident = [], [], 0
    began_s = time.perf_counter()
    for number in range(count):
        name = chance.choice([*controls, "size", "gpu"])
        value = chance.choice([option[1] if isinstance(option, tuple) else option for option in controls[name].options])
        before = explorer.exploration.question
        start_s = time.perf_counter()
        controls[name].value = value
        if explorer.exploration.question != before and not explorer.exploration.working:
            known_ms.append(1000 * (time.perf_counter() - start_s))
        if explorer.exploration.problem:
            problems.append(explorer.exploration.problem)
        if chance.random() < 0.4:  # back to what is known, as one does
            for other, value in first.items():
                if other not in ("size", "gpu"):
                    controls[other].value = value
            start_s = time.perf_counter()
            controls["size"].value = chance.choice(KNOWN)
            controls["gpu"].value = chance.choice(controls["gpu"].options)
            if not explorer.exploration.working:
                known_ms.append(500 * (time.perf_counter() - start_s))  # two changes
        if chance.random() < 0.1:
            time.sleep(chance.random() * 0.5)  # long enough for a process to have begun
        if number == count // 4:
            gc.collect()
            resident = psutil.Process().memory_info().rss
    seconds = time.perf_counter() - began_s
    start_s = time.perf_counter()
    controls["size"].value = "192x128" if explorer.exploration.question.request.width != 192 else "64x64"
    while explorer.exploration.working and time.perf_counter() - start_s < 120:
        time.sleep(0.05)
    gc.collect()
    grown = psutil.Process().memory_info().rss - resident
    assert explorer.exploration.answer.question == explorer.exploration.question, explorer.exploration.problem
    explorer.close()
    return Changes(seconds, known_ms, threading.active_count() - threads, forecasts_at_work(), grown, problems)


def forecasts_at_work() -> int:
    """Processes of forecasts that this one has started and that have not ended."""
    return len(multiprocessing.active_children())


@dataclass(frozen=True)
class Stop:
    """What a stop at a random moment left behind.

    Attributes:
        at_s: After how many seconds it was asked for.
        phase: Where the generation was then.
        steps_after: How many steps ended after that.
        took_s: Until the generation had ended.
        state: How it ended.
        tensors: More than before the first generation, in this process.
        leftovers: Files in its folder that are not records.
    """

    at_s: float
    phase: str
    steps_after: int
    took_s: float
    state: State
    tensors: int
    leftovers: list[str]


WHILE_DECODING = 5  # events from the beginning of the video's decoding on: after these a stop may come too late


class Told:
    """Counts what a generation tells, so that a moment is one of its own and no guess at how fast this machine is."""

    def __init__(self, generating) -> None:
        self.events = 0
        self.reached = threading.Event()
        self._until = None
        self._pass_on = generating.on_change
        generating.on_change = self

    def begin(self, until: int) -> None:
        """Count anew; ``reached`` is set with the event of this number."""
        self.events, self._until = 0, until
        self.reached.clear()
        if until == 0:
            self.reached.set()

    def __call__(self) -> None:
        self.events += 1
        if self.events == self._until:
            self.reached.set()
        self._pass_on()


def stop_at_random(count: int, folder: Path, seed: int = 0) -> list[Stop]:
    """Start and stop generations; at the end one that is not stopped has to give a video."""
    chance = random.Random(seed)
    generate = Generate(folder, I2VRequest(image=STILL, width=64, height=64, frames=9), MODEL, "cpu")
    generating = generate.job
    told = Told(generating)
    generate.start()
    generating.wait()
    assert generating.state is State.DONE, generating.message
    moments = told.events - WHILE_DECODING
    before = live_tensors()
    stops = []
    for _ in range(count):
        told.begin(until=chance.randint(0, moments))
        start_s = time.perf_counter()
        generate.start()
        assert told.reached.wait(120)
        time.sleep(chance.uniform(0, 0.1))
        at_s = time.perf_counter() - start_s
        steps, where = _steps(generating), generating.progress[-1].phase if generating.progress else "the weights"
        asked_s = time.perf_counter()
        generating.stop()
        generating.wait()
        took_s = time.perf_counter() - asked_s
        files = sorted(path.name for path in generating.folder.rglob("*")) if generating.folder.exists() else []
        if generating.folder.exists() and generating.state is State.STOPPED:
            assert read_run(generating.folder).status == FAILED  # whole, and verified by its hash
        left = [name for name in files if name not in ("metadata.json", "records.jsonl")]
        extra = live_tensors() - before
        stops.append(Stop(at_s, where, _steps(generating) - steps, took_s, generating.state, extra, left))
    generate.start()
    generating.wait()
    assert generating.state is State.DONE, generating.message
    assert generating.video.stat().st_size > 1000
    generate.close()
    return stops


def _steps(generating) -> int:
    return sum(phase.step for phase in generating.progress)


def live_tensors() -> int:
    """Bytes of all tensors that Python knows of in this process."""
    import torch

    gc.collect()
    found = {}
    for each in gc.get_objects():
        if type(each) in (torch.Tensor, torch.nn.Parameter):
            storage = each.untyped_storage()
            found[storage._cdata] = storage.nbytes()
    return sum(found.values())


@dataclass(frozen=True)
class Levels:
    """What a process holds.

    Attributes:
        resident_bytes: Its memory.
        threads: Of Python.
        files: Open file descriptors.
    """

    resident_bytes: int
    threads: int
    files: int

    @classmethod
    def now(cls) -> Levels:
        """Those of this process, after a collection."""
        gc.collect()
        process = psutil.Process()
        return cls(process.memory_info().rss, threading.active_count(), process.num_fds())

    def above(self, other: Levels) -> Levels:
        """How much more this is than another."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Levels(*(mine - before for mine, before in pairs))


def repeat(work: Callable[[], object], count: int) -> Levels:
    """What a process holds more after doing the same ``count`` times than after a quarter of them."""
    quarter = Levels.now()
    for number in range(count):
        work()
        if number == count // 4:
            quarter = Levels.now()
    return Levels.now().above(quarter)


def forecast_once() -> None:
    """The tiny pipeline on a fake card, and a training step on the CPU."""
    import torch

    request = I2VRequest(image=str(find_still(STILL)), width=64, height=64, frames=9)
    execute(RunSpec(request=request, model=MODEL), Mode.FAKE, "cuda")

    def train(model: torch.nn.Module, x: torch.Tensor) -> None:
        model(x).sum().backward()
        torch.optim.AdamW(model.parameters()).step()

    forecast(train, torch.nn.Linear(64, 64), torch.ones(8, 64), device="cpu")


def generate_once() -> None:
    """One video of the tiny pipeline, which is not written."""
    spec = RunSpec(request=I2VRequest(image=str(find_still(STILL)), width=64, height=64, frames=9), model=MODEL)
    runner = spec.runner_spec
    weights = runner.resolve_weights(spec.architecture, spec.request.variant)
    for _ in runner.pipeline(weights, "cpu", [], spec.technique_set)(spec.request).video:
        pass


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "0")
    done = change_controls(200)
    known = sorted(done.known_ms)
    print(
        f"200 control changes in {done.seconds:.1f} s: {len(done.problems)} problems, {done.threads} threads and ",
        end="",
    )
    print(f"{done.processes} forecasts left, memory {done.grown_bytes / MIB:+.1f} MiB after the first quarter")
    print(f"{len(known)} known answers: median {statistics.median(known):.0f} ms, at most {known[-1]:.0f} ms")
    for problem in sorted(set(done.problems)):
        print(f"  {problem}")
    with tempfile.TemporaryDirectory() as runs:
        stops = stop_at_random(20, Path(runs))
    for stop in stops:
        print(stop)
    bad = [s for s in stops if s.state is State.STOPPED and (s.steps_after > 1 or s.tensors > 0 or s.leftovers)]
    stopped = sum(stop.state is State.STOPPED for stop in stops)
    print(f"{stopped} of 20 stopped, at most {max(s.steps_after for s in stops)} steps and ", end="")
    print(f"{max(s.took_s for s in stops):.2f} s after the stop; {len(bad)} left something behind; the next one works")
    risen = [(work.__name__, repeat(work, 200)) for work in (forecast_once, generate_once)]
    for name, levels in risen:
        print(f"200 of {name}: {levels.resident_bytes / MIB:+.1f} MiB, {levels.threads:+d} threads, ", end="")
        print(f"{levels.files:+d} files after the first quarter")
    bad += [each for each in risen if each[1].resident_bytes > 20 * MIB or each[1].threads > 0 or each[1].files > 0]
    sys.exit(bool(bad or done.problems or done.threads > 0 or done.processes or done.grown_bytes > 20 * MIB))
