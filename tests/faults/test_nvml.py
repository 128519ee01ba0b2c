"""NVML that fails at any call, with any of its errors, for good or for a while: no card is what can be met here."""

from __future__ import annotations

import os
import random
import sys
from types import SimpleNamespace
from typing import Any

import pynvml
from fault_injection import FAULTS, each

from i2v_lab.profiling.meters import nvml

CODES = sorted(value for name, value in vars(pynvml).items() if name.startswith("NVML_ERROR_") and value)
ANSWERS: dict[str, Any] = {
    "nvmlInit": None,
    "nvmlShutdown": None,
    "nvmlSystemGetCudaDriverVersion_v2": 13000,
    "nvmlSystemGetDriverVersion": "580.1",
    "nvmlSystemGetProcessName": "server",
    "nvmlDeviceGetCount": 1,
    "nvmlDeviceGetHandleByIndex": 0,
    "nvmlDeviceGetHandleByUUID": 0,
    "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=100, used=60, free=40),
    "nvmlDeviceGetName": "a card",
    "nvmlDeviceGetMigMode": (0, 0),
    "nvmlDeviceGetComputeRunningProcesses": [SimpleNamespace(pid=os.getpid(), usedGpuMemory=20)],
    "nvmlDeviceGetGraphicsRunningProcesses": [SimpleNamespace(pid=1, usedGpuMemory=None)],
}


def _failing(chance: random.Random) -> SimpleNamespace:
    """NVML's functions over a card that does not exist; some fail from some call on."""
    library = SimpleNamespace(NVMLError=pynvml.NVMLError, open=0)

    def function(name: str, answer: Any) -> Any:
        fails_at = chance.choice([None, None, 1, 2, 3])
        lasts = chance.random() < 0.7
        error = pynvml.NVMLError(chance.choice(CODES))  # FUNCTION_NOT_FOUND is what an old library gives
        calls = 0

        def call(*_: object) -> Any:
            nonlocal calls
            calls += 1
            if fails_at is not None and (calls >= fails_at if lasts else calls == fails_at):
                raise error
            library.open += {"nvmlInit": 1, "nvmlShutdown": -1}.get(name, 0)
            return answer

        return call

    for name, answer in ANSWERS.items():
        setattr(library, name, function(name, answer))
    return library


@each(FAULTS, 0.026)
def test_nvml_gone(seeds, tally, monkeypatch):
    for seed in seeds:
        chance = random.Random(f"nvml {seed}")
        library = _failing(chance)
        monkeypatch.setitem(sys.modules, "pynvml", library)
        problems, answers = [], 0
        with nvml.NvmlSampler(interval_s=0.001) as sampler:
            pass
        for record in [*sampler.samples, *(nvml.read_device() for _ in range(3))]:
            known = record.total_bytes is not None
            answers += known
            if not known and not record.reason:
                problems.append(f"nothing is known, and no reason given: {record}")
            if record.budget_bytes is not None and not 0 <= record.budget_bytes <= 100:
                problems.append(f"a budget of {record.budget_bytes}")
            if known and (record.total_bytes, record.used_bytes) != (100, 60):
                problems.append(f"wrong: {record}")
        try:
            nvml.read_driver()
        except nvml.NvmlUnavailable as error:
            if "\n" in str(error):
                problems.append(f"not one line: {error}")
        nvml.driver_cuda_major()
        nvml.describe_device("cuda:0")
        tally.count("read" if answers else "said to be gone", problems, seed)
