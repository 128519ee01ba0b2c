"""Text of users and records in the site and the views, in a real Chromium: shown as it is written, and never run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from IPython.core.formatters import DisplayFormatter
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image
from playwright.sync_api import Browser, Page

from i2v_lab import Compare, Explorer, Generate, I2VRequest, VramMonitor
from i2v_lab.profiling.records import ModuleRecord, PhaseRecord, TimelineRecord
from i2v_lab.reporting.cells import Cells, absent, sentence
from i2v_lab.reporting.comparison import Comparison
from i2v_lab.reporting.results import MIME
from i2v_lab.reporting.site.render import render_site
from i2v_lab.reporting.tables import readable
from i2v_lab.runs.store import Run, RunWriter, read_run

TINY = "ltx-2.3-tiny"
ATTACK = "window.ran = true"
HOSTILE = (
    f'<img src=x onerror="{ATTACK}">',
    f"</script><script>{ATTACK}</script>",
    f"</style></textarea></title></svg><svg onload='{ATTACK}'>",
    f"' onmouseover='{ATTACK}' \" onfocus=\"{ATTACK}\" autofocus x=",
    f"[a link](javascript:{ATTACK.replace(' ', '')}) ![x](x) `code`",
    "{{7*7}} {% raw %} ${7*7} $\\frac$ $x^2$ \\(x\\) &lt;b&gt; &amp;",
    "\x1b[31mred\x1b]8;;http://example.org\x07a\x1b]8;;\x07\x00\u202eback",
)
TEXT = " ".join(HOSTILE)
NAME = TEXT.replace("/", "|").replace("\0", "")[:120]
HARM = """() => [
  window.ran, document.querySelectorAll("img[src=x], [onerror], [onload], [onmouseover], [onfocus]").length,
  document.querySelectorAll("a[href^='javascript']").length,
]"""
# What a page that was written to by somebody else would try; the policy says no to each.
TRIED = """async () => {
  const refused = [];
  document.addEventListener("securitypolicyviolation", (event) => refused.push(event.effectiveDirective));
  const script = document.createElement("script");
  script.textContent = "window.ran = true";
  document.head.append(script);
  const remote = document.createElement("script");
  remote.src = "https://example.org/a.js";
  document.head.append(remote);
  const button = document.createElement("button");
  button.setAttribute("onclick", "window.ran = true");
  document.body.append(button);
  button.click();
  new Image().src = "https://example.org/a.png";
  await fetch("https://example.org/").catch(() => {});
  await new Promise((done) => setTimeout(done, 300));
  return [window.ran, [...new Set(refused)].sort()];
}"""


@pytest.fixture
def problems() -> list[str]:
    return []


@pytest.fixture
def page(browser: Browser, problems: list[str]) -> Iterator[Page]:
    context = browser.new_context()
    page = context.new_page()
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: problems.append(dialog.message))
    yield page
    context.close()


def _hostile_run(folder: Path, name: str, peak: int) -> Run:
    text = TEXT
    with pytest.raises(ValueError, match="img"), RunWriter(folder / name, {"model": text, "device": text}) as writer:
        writer.append(PhaseRecord(text, None, 0, peak, 0, None, peak, 5, 0.0, 1.0, True))
        writer.append(ModuleRecord(text, text, "saved", 9))
        for moment in range(3):
            writer.append(TimelineRecord(text, float(moment), 1, 2, moment, 3))
        raise ValueError(text)
    return read_run(folder / name)


def _notebook(path: Path, run: Run, folder: Path) -> Path:
    results = {"verdict": TEXT, "finding": TEXT, "source": "recorded", "device": TEXT, "model": TEXT, TEXT: TEXT}
    table = pd.DataFrame({"phase": [TEXT], "note": [TEXT]})
    chart, _ = DisplayFormatter().format(Cells(folder, "hostile").timeline("run", run, run))
    outputs = [
        {"text/html": run._repr_html_()},
        {"text/html": run.records[0]._repr_html_()},
        {"text/html": Comparison(run, run).html()},
        {"text/html": readable(table, {"phase": "phase", "note": "note"})._repr_html_()},
        {"text/markdown": sentence(results).data},
        {"text/markdown": absent([TEXT]).data},
        chart,
        {"text/plain": TEXT},
        {MIME: results},
    ]
    cells = [new_code_cell(TEXT, outputs=[new_output("display_data", data=data)]) for data in outputs]
    stream = new_output("stream", name="stdout", text=TEXT)
    error = new_output("error", ename="ValueError", evalue=TEXT, traceback=[TEXT])
    cells.append(new_code_cell("1 / 0", outputs=[stream, error]))
    nbformat.write(new_notebook(cells=[new_markdown_cell("# A page\\n\\n**Claim.** It is safe."), *cells]), path)
    return path


def test_hostile_text_is_shown_and_never_run(tiny, tmp_path, page, problems, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "0")
    run = _hostile_run(tmp_path / "runs", NAME, 400)
    _hostile_run(tmp_path / "runs", "b", 900)
    # The site
    whole = _notebook(tmp_path / "01_whole.ipynb", run, tmp_path)
    failed = _notebook(tmp_path / "02_failed.ipynb", run, tmp_path)
    site = render_site([whole, failed], [failed], tmp_path / "site", {"Machine": TEXT}).parent
    for path in sorted(site.glob("*.html")):
        page.goto(path.as_uri())
        page.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
        assert page.evaluate(HARM) == [None, 0, 0], path.name
        charts = page.locator("figure.chart")
        assert charts.count() == (path.name != "index.html")
        assert page.locator("script:not([type])").count() == 2 + 2 * charts.count()
        for chart in charts.all():
            chart.scroll_into_view_if_needed()
            page.wait_for_function("figure => figure.dataset.live", arg=chart.element_handle())
            chart.locator(".live svg").hover()
            told = page.locator("#vg-tooltip-element.visible")
            told.wait_for()
            assert '<img src=x onerror="window.ran = true">' in told.inner_text()
            assert page.evaluate(HARM) == [None, 0, 0], path.name
        text = page.locator("body").inner_text()
        assert "{{7*7}}" in text
        assert '<img src=x onerror="window.ran = true">' in text
        assert "\x1b" not in text or path.name != "index.html"
        assert problems == [], path.name
        assert page.evaluate(TRIED) == [None, ["connect-src", "img-src", "script-src-attr", "script-src-elem"]]
        assert len(problems) >= 4, "Chromium says what it has refused"
        problems.clear()
    # The views, as static HTML and as what their widgets hold
    still = tmp_path / f"{NAME}.png"
    Image.new("RGB", (8, 8)).save(still, "PNG")
    request = I2VRequest(image=str(still), prompt=TEXT, width=64, height=64, frames=9)
    gone = I2VRequest(image=f"{TEXT}.png".replace("\0", ""), prompt=TEXT, width=64, height=64, frames=9)
    generate = Generate(tmp_path / "made", request, TINY, "cpu")
    views = [generate, Generate(tmp_path / "made", gone, TINY, "cpu"), Explorer(gone, TINY), VramMonitor("cpu")]
    views += [Compare([tmp_path / "runs"])]
    for view in views:
        parts = [view._repr_html_(), *_html_of(view)]
        if isinstance(view, Generate):
            view.add_still(f"{TEXT}.txt", b"no picture")
            view.start()
            view.job.wait()
            parts += [view._repr_html_(), *_html_of(view)]
        page.set_content("<!doctype html><body>" + "".join(parts))
        assert page.evaluate(HARM) == [None, 0, 0], view
        assert page.locator("script").count() == 0
        assert problems == [], view
        view.close()


def _html_of(view: Generate | Explorer | VramMonitor | Compare) -> list[str]:
    from ipywidgets import HTML

    todo, found = [view.widget], []
    while todo:
        widget = todo.pop()
        todo += getattr(widget, "children", ())
        if isinstance(widget, HTML):
            found.append(widget.value)
    return [html for html in found if "Copy as code" not in html and "i2v-drop" not in html]
