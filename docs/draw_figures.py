"""Draw the figures of the README and the documentation from the recorded runs: `make figures`."""

from __future__ import annotations

import sys
from pathlib import Path

from i2v_lab.reporting.figures.studies import boundaries_figure, flatness_figure
from i2v_lab.reporting.figures.style import save_png
from i2v_lab.reporting.figures.techniques import waterfall_figure
from i2v_lab.runs.sources import Source, observe
from i2v_lab.runs.spec import FULL_SIZE_MODEL
from i2v_lab.studies.localization import boundaries_table, scope_specs
from i2v_lab.studies.published import published_peak, study_request, to_size, varied
from i2v_lab.studies.resolution import deciding_table, flatness_table, resolution_specs
from i2v_lab.studies.techniques import step_specs, steps_table

FIGURES = Path(__file__).parent / "figures"


def draw(folder: Path) -> list[Path]:
    """Write all of them to a folder."""
    request = study_request(FULL_SIZE_MODEL)
    scopes = observe(scope_specs(request, FULL_SIZE_MODEL), Source.RECORDED, folder)
    sizes = varied(FULL_SIZE_MODEL, "sizes")
    by_size = observe(resolution_specs(request, FULL_SIZE_MODEL, sizes), Source.RECORDED, folder)
    flatness = flatness_figure(
        deciding_table(by_size), flatness_table(by_size), "megapixels", "megapixels of a frame, 97 frames"
    )
    width, height = to_size(varied(FULL_SIZE_MODEL, "policy_sizes")[-1])
    large = study_request(FULL_SIZE_MODEL, width, height)
    steps = observe(step_specs(large, FULL_SIZE_MODEL), Source.RECORDED, folder)
    waterfall = waterfall_figure(steps_table(steps), published_peak(large, FULL_SIZE_MODEL))
    return [
        save_png(boundaries_figure(boundaries_table(scopes)), folder / "boundaries.png"),
        save_png(flatness, folder / "resolution.png"),
        save_png(waterfall, folder / "waterfall.png"),
    ]


if __name__ == "__main__":
    for path in draw(Path(sys.argv[1]) if len(sys.argv) > 1 else FIGURES):
        print(path)
