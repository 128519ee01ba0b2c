"""Random placements of the tiny model on the CPU: latents and frames equal bit for bit, and bytes as forecast.

python benchmarks/placements.py --number 200 --forecasts 20
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import replace

import numpy as np
import torch

from i2v_lab.memory_policy import NEEDS, Technique
from i2v_lab.paths import find_still
from i2v_lab.pipeline.contract.architectures import load_architecture
from i2v_lab.pipeline.ltx2 import RUNNER, phases
from i2v_lab.pipeline.ltx2.memory import chunked_transformer
from i2v_lab.pipeline.ltx2.memory.blocks import block_counts
from i2v_lab.pipeline.ltx2.pipeline import TwoStagePipeline
from i2v_lab.pipeline.ltx2.weights import resolve_weights
from i2v_lab.placement import STREAMED_COMPONENTS, Placement
from i2v_lab.profiling.phase_profiler import PhaseProfiler
from i2v_lab.request import I2VRequest
from i2v_lab.runs.forecast import forecast_request
from i2v_lab.runs.spec import DEFAULT_STILL, SMALL_MODEL, make_request


def random_placement(seed: int, counts: dict[str, int]) -> Placement:
    """Any techniques, as many blocks resident as there are or fewer, and any numbers."""
    rng = random.Random(seed)  # noqa: S311
    techniques = {technique for technique in sorted(RUNNER.techniques) if rng.random() < 0.75}
    techniques |= {NEEDS[technique] for technique in techniques if technique in NEEDS}
    resident = {
        component: rng.choice([0, rng.randint(0, counts[component]), counts[component]])
        for technique, components in STREAMED_COMPONENTS.items()
        if technique in techniques
        for component in components
    }
    choices = {
        Technique.TOKEN_CHUNKS: ("chunk_tokens", [7, 20, 500]),
        Technique.FEATURE_CHUNKS: ("feature_tokens", [96, 1024]),
        Technique.ROW_BANDS: ("band_bytes", [2**14, 2**17]),
    }
    numbers = {name: rng.choice(values) for one, (name, values) in choices.items() if one in techniques}
    if techniques & {Technique.STREAMED_TRANSFORMER, Technique.STREAMED_VAE}:
        numbers["prefetch"] = rng.choice([0, 1, 2, 5])
    return Placement(techniques=frozenset(techniques), resident_blocks=resident, **numbers)


def generated(request: I2VRequest) -> tuple[list[np.ndarray], dict[str, int]]:
    """Latents of both stages, as whole numbers of their size, and the frames; and the peak of each phase."""
    arrays: list[np.ndarray] = []
    kept = phases.denoise_stage_1, phases.denoise_stage_2

    def noting(denoise):
        def denoised(*args):
            latents = denoise(*args)
            for one in (latents.video, latents.audio):  # a view of their bits, which is not metered
                bits = one.view(torch.int16 if one.element_size() == 2 else torch.int32)
                arrays.append(bits.numpy().copy())
            return latents

        return denoised

    phases.denoise_stage_1, phases.denoise_stage_2 = map(noting, kept)
    try:
        with PhaseProfiler("cpu") as profiler:
            generation = TwoStagePipeline(resolve_weights(load_architecture(SMALL_MODEL)), sinks=[profiler])(request)
            for chunk in generation.video:
                arrays.append(chunk.numpy().copy())  # as arrays, which are not metered
                del chunk
    finally:
        phases.denoise_stage_1, phases.denoise_stage_2 = kept
    return arrays, {phase.phase: phase.peak_bytes for phase in profiler.phases}


def main() -> None:
    """Generate with each placement, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=200)
    parser.add_argument("--forecasts", type=int, default=20, help="of how many the bytes are compared")
    options = parser.parse_args()
    chunked_transformer.SMALL_TOKENS, chunked_transformer.MODULATION_ROWS = 0, 20  # so that few tokens are chunked too
    still = str(find_still(DEFAULT_STILL))
    request = make_request(SMALL_MODEL, image=still, prompt="waves", width=64, height=64, frames=9, fps=120, seed=3)
    counts = block_counts(load_architecture(SMALL_MODEL))
    expected, _ = generated(request)
    start_s, different, wrong = time.perf_counter(), [], []
    for seed in range(options.number):
        placed = replace(request, placement=random_placement(seed, counts))
        arrays, peaks = generated(placed)
        if len(arrays) != len(expected) or not all(map(np.array_equal, arrays, expected)):
            different.append(seed)
        if seed < options.forecasts:
            forecast = forecast_request(placed, SMALL_MODEL, "cpu")
            if {phase.phase: phase.peak_bytes for phase in forecast.phases} != peaks:
                wrong.append(seed)
        if seed % 20 == 19:
            print(f"{seed + 1}: {len(different)} differ, {len(wrong)} forecasts are wrong", flush=True)
    print(f"{options.number} placements in {time.perf_counter() - start_s:.0f} s; differ: {different}; wrong: {wrong}")


if __name__ == "__main__":
    main()
