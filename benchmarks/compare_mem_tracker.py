"""Our meters beside torch's own ``MemTracker`` and ``ModTracker``, on the same code.

Each case runs plain under torch's profiler, whose CPU allocator events are the truth (every allocation, those inside
kernels included); under our profiler; under MemTracker; and under both with fake tensors. Without a CUDA driver no
backward pass runs on fake ``cuda``, because autograd's engine asks the driver for the device's context.

    python benchmarks/compare_mem_tracker.py
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import DeviceType
from torch.distributed._tools.mem_tracker import MemTracker

from i2v_lab.paths import data_dir
from i2v_lab.pipeline.contract.architectures import load_architecture
from i2v_lab.pipeline.ltx2.pipeline import TwoStagePipeline
from i2v_lab.pipeline.ltx2.weights import resolve_weights
from i2v_lab.profiling.fake.forecast import forecasting
from i2v_lab.profiling.fake.workspaces import load_workspaces
from i2v_lab.profiling.phase_profiler import PhaseProfiler
from i2v_lab.profiling.records import ModuleRecord
from i2v_lab.request import I2VRequest

F = torch.nn.functional
TOKENS, WIDTH, HEADS = 256, 128, 4
FRAME = (1, 8, 48, 64)  # of the decoder's latents


class Block(torch.nn.Module):
    """Attention and a feed-forward, each behind a norm and added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = torch.nn.LayerNorm(WIDTH), torch.nn.LayerNorm(WIDTH)
        self.qkv, self.out = torch.nn.Linear(WIDTH, 3 * WIDTH), torch.nn.Linear(WIDTH, WIDTH)
        self.up, self.down = torch.nn.Linear(WIDTH, 4 * WIDTH), torch.nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.qkv(self.norm1(x)).view(1, TOKENS, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads.unbind())
        x = x + self.out(mixed.transpose(1, 2).reshape(1, TOKENS, WIDTH))
        return x + self.down(F.relu(self.up(self.norm2(x))))


class Decoder(torch.nn.Sequential):
    """Convolutions that upsample twice."""

    def __init__(self) -> None:
        super().__init__(
            torch.nn.Conv2d(8, 32, 3, padding=1),
            torch.nn.SiLU(),
            torch.nn.Upsample(scale_factor=2),
            torch.nn.Conv2d(32, 16, 3, padding=1),
            torch.nn.SiLU(),
            torch.nn.Upsample(scale_factor=2),
            torch.nn.Conv2d(16, 3, 3, padding=1),
        )


def forward(block: torch.nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        block(x)


def train(block: torch.nn.Module, x: torch.Tensor) -> None:
    optimizer = torch.optim.Adam(block.parameters())
    block(x).sum().backward()
    optimizer.step()


def stream(decoder: torch.nn.Module, x: torch.Tensor, grad: bool = False) -> None:
    def decode() -> Iterator[torch.Tensor]:
        for _ in range(3):
            with torch.set_grad_enabled(grad):
                frame = decoder(x)
            yield frame
            del frame

    for frame in decode():
        del frame


@dataclass(frozen=True)
class Case:
    name: str
    module: Callable[[], torch.nn.Module]
    shape: tuple[int, ...]
    run: Callable[[torch.nn.Module, torch.Tensor], None]


CASES = (
    Case("block, forward, no_grad", Block, (1, TOKENS, WIDTH), forward),
    Case("block, training step with Adam", Block, (1, TOKENS, WIDTH), train),
    Case("decoder, one call, no_grad", Decoder, FRAME, forward),
    Case("decoder, generator of 3, no_grad", Decoder, FRAME, stream),
)


def attempt(measure: Callable[[], str]) -> str:
    try:
        return measure()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"


def bytes_text(nbytes: int) -> str:
    return f"{nbytes:,}"


def allocator_truth(case: Case) -> int:
    """Peak of the CPU allocator's allocations and frees, plus what is there before: weights and input."""
    module, x = case.module(), torch.randn(case.shape)
    before_bytes = sum(t.nbytes for t in (*module.parameters(), *module.buffers(), x))
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        case.run(module, x)
    events = profile.profiler.kineto_results.events()
    memory = [event for event in events if event.name() == "[memory]" and event.device_type() == DeviceType.CPU]
    now_bytes = peak_bytes = before_bytes
    for event in sorted(memory, key=lambda event: event.start_ns()):
        now_bytes += event.nbytes()
        peak_bytes = max(peak_bytes, now_bytes)
    return peak_bytes


def ours(case: Case) -> tuple[int, dict[str, int]]:
    module, x = case.module(), torch.randn(case.shape)
    with PhaseProfiler("cpu") as profiler:
        profiler.component("net", module)
        profiler.observe([x])
        with profiler.phase("run"):
            case.run(module, x)
    by_module: dict[str, int] = {}
    for record in profiler.records:
        if isinstance(record, ModuleRecord) and record.category != "weight":
            by_module[record.module] = by_module.get(record.module, 0) + record.nbytes
    return profiler.peak.peak_bytes, by_module


def theirs(case: Case, fake_device: str | None = None) -> tuple[int, str]:
    """Their peak, and their attribution: each module's own peak, and the kinds of memory at the overall peak."""
    with ExitStack() as scopes:
        if fake_device is not None:
            scopes.enter_context(FakeTensorMode())
            scopes.enter_context(torch.device(fake_device))
        module, x = case.module(), torch.randn(case.shape)
        tracker = MemTracker()
        tracker.track_external(module, x)
        with tracker:
            case.run(module, x)
    (snapshot,) = tracker.get_tracker_snapshot("peak").values()
    kinds = ", ".join(f"{kind}: {nbytes:,}" for kind, nbytes in snapshot.items() if nbytes)
    peaks = {each.mod_fqn: max(each.local_peak.values(), default=0) for each in tracker.memory_tracking.values()}
    modules = ", ".join(f"{name}: {nbytes:,}" for name, nbytes in sorted(peaks.items()))
    return snapshot["Total"], f"{modules}; {kinds}"


def ours_fake(case: Case, device: str, *, modelled: bool = False) -> int:
    with forecasting(device, workspaces=load_workspaces() if modelled else None) as profiler, torch.device(device):
        module, x = case.module(), torch.randn(case.shape)
        profiler.component("net", module)
        with profiler.phase("run"):
            case.run(module, x)
    return profiler.peak.peak_bytes


def seconds(run: Callable[[], object], rounds: int = 5) -> float:
    times = []
    for _ in range(rounds):
        start_s = time.perf_counter()
        run()
        times.append(time.perf_counter() - start_s)
    return min(times)


def plain(case: Case) -> None:
    case.run(case.module(), torch.randn(case.shape))


def compare(case: Case) -> None:
    print(f"\n## {case.name}")
    our_peak, by_module = ours(case)
    rows = {
        "CPU allocator's events (truth)": lambda: bytes_text(allocator_truth(case)),
        "ours, CPU": lambda: bytes_text(our_peak),
        "MemTracker, CPU": lambda: bytes_text(theirs(case)[0]),
        "ours, fake cpu": lambda: bytes_text(ours_fake(case, "cpu")),
        "MemTracker, fake cpu": lambda: bytes_text(theirs(case, "cpu")[0]),
        "ours, fake cuda, tensors alone": lambda: bytes_text(ours_fake(case, "cuda")),
        "ours, fake cuda, allocator and workspaces": lambda: bytes_text(ours_fake(case, "cuda", modelled=True)),
        "MemTracker, fake cuda": lambda: bytes_text(theirs(case, "cuda")[0]),
        "seconds, plain": lambda: f"{seconds(lambda: plain(case)):.4f}",
        "seconds, ours": lambda: f"{seconds(lambda: ours(case)):.4f}",
        "seconds, MemTracker": lambda: f"{seconds(lambda: theirs(case)):.4f}",
    }
    for name, measure in rows.items():
        print(f"| {name} | {attempt(measure)} |")
    largest = sorted(by_module.items(), key=lambda item: -item[1])[:4]
    owners = ", ".join(f"{name or 'no module'}: {nbytes:,}" for name, nbytes in largest)
    print(f"| ours, owners at the peak, weights aside | {owners} |")
    print(f"| MemTracker, modules at their own peaks | {attempt(lambda: theirs(case)[1])} |")


def compare_pipeline() -> None:
    """The tiny pipeline as a whole: built, run and released component by component, its video decoded lazily."""
    print("\n## tiny pipeline of LTX-2.3, 128x64, 17 frames, no_grad")
    weights = resolve_weights(load_architecture("ltx-2.3-tiny"))
    still = data_dir() / "stills" / "lighthouse.png"
    request = I2VRequest(image=str(still), width=128, height=64, frames=17)

    def run_ours() -> str:
        with PhaseProfiler("cpu") as profiler:
            for _ in TwoStagePipeline(weights, sinks=[profiler])(request).video:
                pass
        return f"{bytes_text(profiler.peak.peak_bytes)} in {profiler.peak.phase}"

    def run_theirs() -> str:
        with MemTracker() as tracker:
            for _ in TwoStagePipeline(weights)(request).video:
                pass
        (snapshot,) = tracker.get_tracker_snapshot("peak").values()
        return bytes_text(snapshot["Total"])

    for name, run in {"ours": run_ours, "MemTracker": run_theirs}.items():
        start_s = time.perf_counter()
        print(f"| {name} | {attempt(run)} | {time.perf_counter() - start_s:.1f} s |")


def main() -> None:
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for case in CASES:
        compare(case)
    compare_pipeline()


if __name__ == "__main__":
    main()
