"""Parameters with which each notebook runs in seconds, finds what it is about, and shares runs with the others."""

from __future__ import annotations

from typing import Any

SIZES = {"width": 64, "height": 64, "frames": 9}
LARGER = {"width": 192, "height": 128, "frames": 9}  # the least at which the graph shows
FEW = ["shared_modulations", "streamed_transformer", "streamed_vae"]
SMALL: dict[str, dict[str, Any]] = {
    "00_generate": {**SIZES, "prompt": ""},
    "01_tiling_dead_end": {**LARGER, "tilings": ["768/64/80/24", "64/32/16/8"]},
    "02_peak_localization": LARGER,
    "03_no_grad_fix": {**LARGER, "small_width": 192, "small_height": 128, "small_frames": 9},
    "04_flat_across_resolution": {**SIZES, "sizes": ["64x64", "128x64"], "frame_counts": [9]},
    "05_leak": {**SIZES, "generations": 1},
    "06_will_it_fit": {
        **SIZES,
        "sizes": ["64x64"],
        "frame_counts": [9],
        "gpus": ["T4", "RTX 5090"],
        "judged": 1,
        "published": ["torchao-flux-1-dev-batch1"],  # which is no model here
    },
    "07_what_holds_the_peak": {**SIZES, "sizes": ["64x64"], "techniques": FEW, "others": ["diffusers"]},
}
NAMES = list(SMALL)
