"""Training steps: a forecast and torch's MemTracker, both under fake tensors, against a real run on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.checkpoint import checkpoint

from i2v_lab import PhaseProfiler, forecast


def mlp() -> torch.nn.Module:
    layers = torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Dropout(0.1), torch.nn.LayerNorm(128)
    return torch.nn.Sequential(*layers, torch.nn.Linear(128, 64))


class Recurrent(torch.nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.layers = kind(64, 64, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x[None])[0]


class Checkpointed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(mlp() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


def step(optimizer: Any, steps: int = 1, **settings: Any) -> Callable[..., None]:
    def run(model: torch.nn.Module, x: torch.Tensor) -> None:
        made = optimizer(model.parameters(), **settings)
        for _ in range(steps):
            made.zero_grad()
            model(x).square().mean().backward()
            made.step()

    return run


def mixed(model: torch.nn.Module, x: torch.Tensor) -> None:
    made, scaler = torch.optim.AdamW(model.parameters()), torch.amp.GradScaler("cpu")
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x).square().mean()
    scaler.scale(loss).backward()
    scaler.step(made)
    scaler.update()


ADAMW = torch.optim.AdamW
CASES: dict[str, tuple[Callable[[], torch.nn.Module], Callable[..., Any]]] = {
    "SGD": (mlp, step(torch.optim.SGD, lr=0.1)),
    "AdamW": (mlp, step(ADAMW)),
    "AdamW, fused": (mlp, step(ADAMW, fused=True)),
    "AdamW, two steps": (mlp, step(ADAMW, 2)),
    "checkpointed": (Checkpointed, step(ADAMW)),
    "GradScaler": (mlp, mixed),
    "GRU": (lambda: Recurrent(torch.nn.GRU), step(ADAMW)),
    "LSTM": (lambda: Recurrent(torch.nn.LSTM), step(torch.optim.SGD, lr=0.1)),
    "LSTM, no optimizer": (lambda: Recurrent(torch.nn.LSTM), lambda model, x: model(x)),
}


def real_bytes(make: Callable[[], torch.nn.Module], run: Callable[..., Any], x: torch.Tensor) -> int:
    """Peak of live storages."""
    model = make()
    with PhaseProfiler("cpu") as profiler:
        profiler.component("model", model)
        profiler.observe([x])
        with profiler.phase("call"):
            run(model, x)
    return profiler.peak.peak_bytes


def tracked_bytes(make: Callable[[], torch.nn.Module], run: Callable[..., Any], x: torch.Tensor) -> int:
    """Peak by MemTracker."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, fake, tracker = make(), torch.empty(x.shape), MemTracker()
        tracker.track_external(model, fake)
        with tracker:
            run(model, fake)
        return sum(kinds["Total"] for kinds in tracker.get_tracker_snapshot("peak").values())


def main() -> None:
    x = torch.randn(16, 64)
    print("| step | real | forecast | MemTracker |\n|---|---|---|---|")
    for name, (make, run) in CASES.items():
        real = real_bytes(make, run, x)
        try:
            tracked = f"{tracked_bytes(make, run, x) / real - 1:+.1%}"
        except Exception as error:  # what it does not support it says in many ways
            tracked = type(error).__name__
        ours = f"{forecast(run, make(), x, device='cpu').peak.peak_bytes / real - 1:+.1%}"
        print(f"| {name} | {real:,} | {ours} | {tracked} |")


if __name__ == "__main__":
    main()
