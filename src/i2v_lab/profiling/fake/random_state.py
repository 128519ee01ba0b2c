"""The generators of random numbers that torch keeps for a process, for a forecast alone.

A forecast draws nothing, but what it runs seeds, and saves and restores states, as activation checkpointing does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from i2v_lab.thread_patches import unpatched


def random_patches() -> Iterator[tuple[Any, str, Any]]:
    """What to replace, and by what, so that the process's generators stay as they are."""
    cpu, cuda = (unpatched(torch, "Generator")("cpu") for _ in range(2))
    cpu.set_state(unpatched(torch, "get_rng_state")())
    own = {
        "manual_seed": lambda seed: cpu.manual_seed(int(seed)),
        "seed": cpu.seed,
        "initial_seed": cpu.initial_seed,
        "get_rng_state": cpu.get_state,
        "set_rng_state": cpu.set_state,
    }
    for name, substitute in own.items():
        for home in (torch, torch.random):
            yield home, name, substitute
    of_cards = {
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "seed": lambda: None,
        "seed_all": lambda: None,
        "initial_seed": cuda.initial_seed,
        "get_rng_state": lambda device="cuda": cuda.get_state(),
        "get_rng_state_all": lambda: [cuda.get_state()],
        "set_rng_state": lambda new_state, device="cuda": None,
        "set_rng_state_all": lambda new_states: None,
    }
    for name, substitute in of_cards.items():
        for home in (torch.cuda, torch.cuda.random):
            yield home, name, substitute
