"""Write the summary of the recorded runs, a page that can be read where no notebook can: `make figures`."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from i2v_lab.files import write_text
from i2v_lab.reporting.tables import readable
from i2v_lab.runs.sources import Observation, Source, observe, runs_frame
from i2v_lab.runs.spec import FULL_SIZE_MODEL
from i2v_lab.studies.localization import scope_specs
from i2v_lab.studies.published import study_request, to_size, varied
from i2v_lab.studies.resolution import resolution_specs
from i2v_lab.studies.techniques import step_specs, steps_table

SUMMARY = Path(__file__).parent / "summary.md"
COLUMNS = {"peak_bytes": "peak", "peak_phase": "in phase", "seconds": "time"}
PAGE = """\
# The study in short

Peak memory of whole generations with {model}, {frames} frames. `make figures` writes this page from the records
in `data/measured`: every number is measured, at full size; a time is that of one run, and differs by some per cent from
run to run. A GiB is 2^30 bytes, a peak counts allocated bytes, and the [glossary](glossary.md#phases) explains the
phases. `make reproduce` makes the whole write-up, with its notebooks, in `build/site`.

## What went wrong

The pipeline returns a lazy stream. Where it is consumed outside `torch.no_grad()`, every chunk that is decoded leaves
its activations to a backward pass that never comes. Measured at {size} on an {device}:

{scopes}

![Peak so far after each phase: equal up to the decoded audio, then far apart](figures/boundaries.png)

Consume the stream inside `no_grad`, or through
[`guard_stream`](tutorials/profile-your-pipeline.md#4-the-fix).

## What is left grows little with the size

Measured on an {device}, inside `no_grad`:

{sizes}

![Peak of each phase over resolution](figures/resolution.png)

## It can be much less

Each line has one [technique](memory-policies.md#techniques) more than the line above it; {large}, latents equal bit
for bit. Measured on an {other}:

{steps}

![Peak of the whole run after each technique](figures/waterfall.png)
"""


def summary(folder: Path) -> str:
    """The page's text.

    Args:
        folder: For what observing runs leaves; recorded ones leave nothing.
    """
    request = study_request(FULL_SIZE_MODEL)
    scopes = observe(scope_specs(request, FULL_SIZE_MODEL), Source.RECORDED, folder)
    sizes = observe(
        resolution_specs(request, FULL_SIZE_MODEL, varied(FULL_SIZE_MODEL, "sizes")), Source.RECORDED, folder
    )
    large = to_size(varied(FULL_SIZE_MODEL, "policy_sizes")[-1])
    steps = observe(step_specs(study_request(FULL_SIZE_MODEL, *large), FULL_SIZE_MODEL), Source.RECORDED, folder)
    by_scope, by_size, by_step = runs_frame(scopes), _with_size(sizes), runs_frame(steps)
    by_step["label"] = steps_table(steps)["label"]
    first = by_scope.iloc[0]
    return PAGE.format(
        model=first["model"],
        frames=first["frames"],
        size=f"{first['width']}x{first['height']}",
        large=f"{large[0]}x{large[1]}",
        device=first["device"],
        other=by_step["device"].iloc[0],
        scopes=_markdown(by_scope, {"decode_scope": "consumed"}, {"saved_for_backward_bytes": "saved for backward"}),
        sizes=_markdown(by_size, {"size": "size"}),
        steps=_markdown(by_step, {"label": "with"}),
    )


def _with_size(observations: Sequence[Observation]) -> pd.DataFrame:
    table = runs_frame(observations)
    table["size"] = table["width"].astype(str) + "x" + table["height"].astype(str)
    return table


def _markdown(table: pd.DataFrame, first: dict[str, str], more: dict[str, str] | None = None) -> str:
    shown = readable(table, {**first, **COLUMNS, **(more or {})})
    rows = [[next(iter(first.values())), *shown.columns], ["---", *["---:"] * len(shown.columns)]]
    rows += [[str(name), *cells] for name, cells in zip(shown.index, shown.to_numpy().tolist(), strict=True)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        print(write_text(Path(sys.argv[1]) if len(sys.argv) > 1 else SUMMARY, summary(Path(scratch))))
