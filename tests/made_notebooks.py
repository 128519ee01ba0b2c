"""Seven executed notebooks made by hand: every kind of output that a page can hold, in milliseconds."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import av
import nbformat
import numpy as np
import pandas as pd
from IPython.core.formatters import DisplayFormatter
from IPython.display import SVG, Video
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from i2v_lab.profiling.records import ModuleRecord, TimelineRecord
from i2v_lab.reporting.cells import METADATA, Cells
from i2v_lab.reporting.figures.placements import card_map_figure, frontier_figure
from i2v_lab.reporting.figures.runs import modules_figure
from i2v_lab.reporting.figures.studies import boundaries_figure
from i2v_lab.reporting.figures.style import save_figure
from i2v_lab.reporting.results import MIME
from i2v_lab.runs.store import Run

GIB = 2**30
FAILED = "05_leak"
TABLE = "01_tiling_dead_end"
GIVEN = {"out_dir": "/elsewhere", "prompt": "rain on a 'lake'", "frames": 49, "tilings": ["none"]}
PEAKS = {
    "escaped_peak_bytes": round(102.38 * GIB),
    "no_grad_peak_bytes": round(23.68 * GIB),
    "peak_ratio": 102.38 / 23.68,
    "excess_phase": "decode_video",
}


def make_notebooks(folder: Path, *, charts: bool = False, **results_of_03: Any) -> list[Path]:
    """Write them; ``results_of_03`` replace some of the results of ``03_no_grad_fix``.

    Args:
        folder: For the notebooks; below it are the files of their figures.
        charts: Whether ``07_what_holds_the_peak`` is among them: what a pointer can ask, and 0.9 MB of scripts.

    Returns:
        Their paths, in order; ``FAILED`` is the stem of the one that failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = [_figure(folder.parent, "one", 300), _figure(folder.parent, "two", 500)]
    bodies: dict[str, tuple[str, list[NotebookNode], dict[str, Any]]] = {
        "00_generate": (
            "A still becomes a video",
            [new_markdown_cell("## The video"), _shown(_video(folder)), _shown(_png())],
            {"verdict": "shown", "finding": "9 frames of 64x64 in 3 s.", "source": "measure", "model": "ltx-2.3-tiny"},
        ),
        "01_tiling_dead_end": (
            "Smaller tiles do not help",
            [
                _named(_shown(_table(3)), f"{TABLE}_peaks"),
                new_markdown_cell("See [the fix](03_no_grad_fix.ipynb) or [the list](index.html)."),
            ],
            {"verdict": "refuted", "finding": "Tiles of 256 px take 3 % less.", "source": "forecast"},
        ),
        "02_peak_localization": (
            "The peak is in `decode_video`",
            [
                new_markdown_cell("## Boundaries"),
                _named(_shown(figures[0]), "one"),
                _named(_shown(figures[1]), "gone"),
                new_markdown_cell("### The `gap`\n\nIt is 2 GiB in `decode_video`, and 1 GiB < 3 GiB."),
                _shown(_table(2)),
                new_markdown_cell("## Boundaries\n\nAgain."),
            ],
            {"verdict": "confirmed", "finding": "All of it is there.", "source": "recorded", "model": "ltx-2.3-22b"}
            | {"device": "NVIDIA H200"},
        ),
        "03_no_grad_fix": (
            "One call moved inside `no_grad`",
            [_shown(figures[0]), _shown({"text/markdown": "> **quoted**"})],
            {
                "verdict": "confirmed",
                "finding": "A quarter is left.",
                "source": "forecast",
                "model": "ltx-2.3-22b",
                **PEAKS,
                **results_of_03,
            },
        ),
        "04_flat_across_resolution": (
            "After the fix, resolution hardly matters",
            [new_markdown_cell("## A wide table"), _shown(_table(14)), _shown(_spanning_table())],
            {"verdict": "refined", "finding": "Flat up to 1536x1152.", "source": "forecast", "model": "ltx-2.3-22b"},
        ),
        FAILED: ("Nothing is left behind", [_streams(), _error()], {}),
        "06_will_it_fit": (
            "Will it fit?",
            [_shown({"application/vnd.jupyter.widget-view+json": {"model_id": "a"}, "text/plain": "Dropdown()"})],
            {"verdict": "no data", "finding": "There is no run of that size.", "source": "recorded", "model": None},
        ),
    }
    if charts:
        bodies["07_what_holds_the_peak"] = ("What holds the peak", _charts(folder.parent), {"verdict": "shown"})
    for stem, (title, cells, results) in bodies.items():
        claim = (
            f"# {title}\n\n**Claim.** What `{stem}` claims is said here in a sentence. A second one says more of it."
        )
        parameters = new_code_cell("frames: int = 97  # 8k+1", metadata={"tags": ["parameters"]})
        last = [_shown({MIME: results, "text/plain": "results"}, "record(**results)")] if results else []
        notebook = new_notebook(cells=[new_markdown_cell(claim), parameters, *cells, *last])
        notebook.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
        if stem == "02_peak_localization":
            notebook.metadata["papermill"] = {"parameters": GIVEN}
        nbformat.write(notebook, folder / f"{stem}.ipynb")
    tables = folder.parent / "tables"
    tables.mkdir(exist_ok=True)
    for name in (f"{TABLE}_peaks", "one"):
        (tables / f"{name}.csv").write_text("peak_bytes\n1\n", encoding="utf-8")
    return [folder / f"{stem}.ipynb" for stem in bodies]


def _shown(data: dict[str, Any], source: str = "show(figure, width=12)  # as it is") -> NotebookNode:
    return new_code_cell(source, outputs=[new_output("display_data", data=data)])


def _named(cell: NotebookNode, name: str) -> NotebookNode:
    """With the name of the files that hold the output, as ``Cells`` gives it."""
    cell.outputs[0].metadata[METADATA] = {"name": name}
    return cell


def _figure(folder: Path, name: str, escaped: int) -> dict[str, Any]:
    rows = [
        {"decode_scope": scope, "phase": phase, "peak_so_far_bytes": peak * 2**20}
        for scope, last in (("escaped", escaped), ("no_grad", 120))
        for phase, peak in zip(("encode_prompt", "denoise_stage_1", "decode_video"), (100, 110, last), strict=True)
    ]
    svg, png = save_figure(boundaries_figure(pd.DataFrame(rows)), folder / "figures", name)
    data = {"image/svg+xml": SVG(filename=str(svg)).data, "text/plain": "<SVG>"}
    return {**data, "image/png": base64.b64encode(png.read_bytes()).decode()}


def _table(columns: int) -> dict[str, Any]:
    table = pd.DataFrame({f"{1024 + 64 * n}x768 peak": ["23.68 GiB", "4.85 GiB"] for n in range(columns)})
    table.index = pd.Index(["encode_prompt", "decode_video"])
    return {"text/html": table._repr_html_(), "text/plain": str(table)}


def _spanning_table() -> dict[str, Any]:
    index = pd.MultiIndex.from_product([["fp8", "bf16"], ["escaped", "no_grad"]], names=["weights", "scope"])
    table = pd.DataFrame({"peak (GiB)": [1.5, 2.0, 3.25, 4.0], "note": ["a < b", "c", "d", None]}, index=index)
    return {"text/html": table._repr_html_(), "text/plain": str(table)}


def _png() -> dict[str, Any]:
    file = io.BytesIO()
    Image.fromarray(np.full((40, 60, 3), 200, np.uint8)).save(file, "png")
    return {"image/png": base64.b64encode(file.getvalue()).decode(), "text/plain": "<Image>"}


def _video(folder: Path) -> dict[str, Any]:
    path = folder / "made.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for shade in range(0, 240, 30):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), shade, np.uint8), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    video = Video(str(path), embed=True, html_attributes="controls loop muted playsinline")
    return {"text/html": video._repr_html_(), "text/plain": "<Video>"}


def _streams() -> NotebookNode:
    outputs = [
        new_output("stream", name="stdout", text="so far <so good>\n"),
        new_output("stream", name="stderr", text="\x1b[31m100 %\x1b[0m of 11 steps\n"),
    ]
    return new_code_cell("print('so far <so good>')", outputs=outputs)


def _error() -> NotebookNode:
    long = "x" * 300
    trace = ["\x1b[0;31mValueError\x1b[0m Traceback", f"\x1b[0;32m----> 1\x1b[0m raise ValueError('{long}')"]
    error = new_output("error", ename="ValueError", evalue="height=500 is not a multiple of 64", traceback=trace)
    return new_code_cell("raise ValueError", outputs=[error])


def _charts(out: Path) -> list[NotebookNode]:
    """Every kind of chart, as :class:`Cells` shows and saves them."""
    cells = Cells(out, "07_what_holds_the_peak")
    sizes = [30 * GIB, *([GIB] * 11)]
    modules = pd.DataFrame({"module": [f"video_decoder.part_{n}" for n in range(12)], "saved_bytes": sizes})
    keys = {"width": 1024, "height": 768, "needed_bytes": 3 * GIB, "peak_bytes": 2 * GIB, "peak_phase": "decode_video"}
    cards = pd.DataFrame(
        [
            {"gpu": gpu, "memory_bytes": gib * GIB, "frames": frames, "placement": "partial", **keys}
            | {"name": "12 of 56 blocks resident", "predicted_seconds": 10.0 * frames / gib, "rates": "published"}
            for gpu, gib in (("RTX 3060 12GB", 12), ("RTX 4090", 24), ("RTX PRO 6000 Blackwell", 96))
            for frames in (25, 49, 97, 193)
        ]
    )
    points = pd.DataFrame(
        [("placement", "streamed", 4, 20.0), ("placement", "resident", 24, 10.0), ("pipeline", "diffusers", 40, 31.0)],
        columns=["kind", "name", "gib", "seconds"],
    )
    frontier = points.assign(size="1024x768", peak_bytes=points["gib"] * GIB, warm_seconds=points["seconds"] / 2)
    runs = (made_run("escaped", 30), made_run("no_grad", 4))
    charts = {
        "Over time": cells.timeline("timeline", *runs),
        "By module": cells.figure("graph", modules_figure, modules.assign(share=modules["saved_bytes"] / sum(sizes))),
        "Each card": cells.figure("map", card_map_figure, cards),
        "Time against memory": cells.figure("frontier", frontier_figure, frontier),
    }
    shown = []
    for heading, chart in charts.items():
        data, metadata = DisplayFormatter().format(chart)
        output = new_output("display_data", data=data, metadata=metadata)
        shown += [new_markdown_cell(f"## {heading}"), new_code_cell("cells.figure(...)", outputs=[output])]
    return shown


def made_run(name: str, highest_gib: int) -> Run:
    """A run of ten moments in two phases of a second each, with its highest in the middle of ``decode_video``."""
    moments = [
        TimelineRecord(phase, second + tenths / 10, GIB, (highest_gib - 1) * GIB * (second == 1 and tenths == 4), 0, 0)
        for second, phase in enumerate(("encode_prompt", "decode_video"))
        for tenths in (0, 2, 4, 6, 8)
    ]
    held = ModuleRecord("decode_video", "video_decoder.up_blocks", "saved", (highest_gib - 1) * GIB)
    return Run(Path(name), {"device": "cpu"}, (*moments, held), "complete")
