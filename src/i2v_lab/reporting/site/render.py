"""The write-up as a site: every executed notebook as one self-contained page, and an index."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
import nbformat
from markupsafe import Markup
from nbconvert import HTMLExporter
from nbconvert.filters import markdown2html

from i2v_lab.display import printable
from i2v_lab.files import write_text
from i2v_lab.reporting.figures.chart import MIME as CHART
from i2v_lab.reporting.results import MIME
from i2v_lab.reporting.site.charts import (
    behind_chart,
    behind_figure,
    chart_scripts,
    chart_style,
    data_block,
    is_chart,
    place_of,
    with_charts,
)
from i2v_lab.reporting.site.contents import Found, searchable, searchable_text, with_anchors
from i2v_lab.reporting.site.downloads import command, downloads, figure_rows
from i2v_lab.reporting.site.inline_svg import inline_svg
from i2v_lab.reporting.site.story import Page, headline, read_page
from i2v_lab.reporting.site.terms import link_terms

TEMPLATES = Path(__file__).parent / "templates"
WIDGET = "application/vnd.jupyter.widget-view+json"
PAPERMILL_ERROR = "papermill-error-cell-tag"  # on cells that papermill adds; the page reports the error itself
FIT = "fit.html"  # the answer page, if it is there
TERMS_PLACE = "<!-- terms -->"
NO_PROVENANCE: Mapping[str, str] = {}


def render_site(
    executed: Sequence[Path], failed: Sequence[Path], folder: Path, provenance: Mapping[str, str] = NO_PROVENANCE
) -> Path:
    """Render executed notebooks and their index.

    Args:
        executed: Notebooks with outputs.
        failed: Those among them that did not run to the end.
        folder: For ``index.html`` and one page for each notebook.
        provenance: Facts about this build for the footer of every page, by name.

    Returns:
        The path of the index.

    Raises:
        OSError: A notebook cannot be read, or a page cannot be written.

    Example:
        >>> render_site([Path("build/04_flat_across_resolution.ipynb")], [], Path("build/site"))  # doctest: +SKIP
        PosixPath('build/site/index.html')
    """
    pages = [read_page(notebook, notebook in failed) for notebook in executed]
    answer = folder / FIT
    environment = site_environment(provenance)
    environment.globals.update(pages=pages, fit=FIT if answer.is_file() else None)
    exporter: Any = HTMLExporter(
        template_name="article", extra_template_basedirs=[str(TEMPLATES)], exclude_anchor_links=True
    )
    page_template = environment.get_template("page.html.j2")
    entries: list[Found] = []
    for index, (page, notebook) in enumerate(zip(pages, executed, strict=True)):
        cells, behind = notebook_body(exporter, notebook, page, pages, folder.parent)
        body, sections = with_anchors(cells)
        entries += searchable(plain_markdown(page.title), page.href, body)
        html = page_template.render(
            page=page,
            body=Markup(with_charts(explain_terms(body, environment), behind)),  # noqa: S704 - what our own notebooks show
            sections=sections,
            **chart_parts(environment, 'class="drawn chart"' in body),
            previous=pages[index - 1] if index else None,
            following=pages[index + 1] if index + 1 < len(pages) else None,
        )
        write_text(folder / page.href, html)
    if answer.is_file():
        entries += searchable_text(answer.read_text(encoding="utf-8"), FIT)
    index_template = environment.get_template("site_index.html.j2")
    shown = {"headline": headline(pages), "stems": {page.stem[:2]: page for page in pages}}
    entries += searchable_text(index_template.render(**shown, entries=[]), "index.html")
    whole = index_template.render(**shown, entries=[asdict(entry) for entry in entries])
    head, main, rest = whole.partition("<main")
    return write_text(folder / "index.html", head + main + explain_terms(rest, environment))


def chart_parts(environment: jinja2.Environment, shown: bool) -> dict[str, Any]:
    """What a page with charts has besides: their style, their scripts, and a policy that allows these.

    Args:
        environment: The site's.
        shown: Whether the page has charts; the scripts take 0.9 MB.
    """
    if not shown:
        return {"chart_style": "", "chart_scripts": ()}
    own = (str(environment.globals["theme_script"]), str(environment.globals["script"]))
    scripts = chart_scripts()
    return {
        "chart_style": Markup(chart_style()),  # noqa: S704 - our own
        "chart_scripts": [Markup(script) for script in scripts],  # noqa: S704 - Vega's and our own
        "policy": content_security_policy(*own, *scripts),
    }


def explain_terms(body: str, environment: jinja2.Environment) -> str:
    """Link units and phases where they first appear, and put their definitions in the place for them.

    Args:
        body: HTML with :data:`TERMS_PLACE` in it.
        environment: The site's.
    """
    linked, terms = link_terms(body)
    definitions = environment.get_template("terms.html.j2").render(terms=terms) if terms else ""
    return linked.replace(TERMS_PLACE, definitions, 1)


def site_environment(provenance: Mapping[str, str] = NO_PROVENANCE) -> jinja2.Environment:
    """The templates of the site, with what every page has: style, scripts, policy and provenance.

    Args:
        provenance: Facts about this build for the footer, by name.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: printable(value) if type(value) is str else value,  # not what is Markup already
    )
    environment.filters["inline"] = inline_markdown
    environment.filters["plain"] = plain_markdown
    environment.filters["data"] = data_block
    theme, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("theme.js", "page.js"))
    environment.globals.update(
        css=Markup((TEMPLATES / "style.css").read_text(encoding="utf-8")),  # noqa: S704 - our own
        theme_script=Markup(theme),  # noqa: S704 - our own
        script=Markup(script),  # noqa: S704 - our own
        policy=content_security_policy(theme, script),
        terms_place=Markup(TERMS_PLACE),  # noqa: S704 - our own
        provenance=dict(provenance),
        pages=[],
        fit=None,
    )
    return environment


def content_security_policy(*scripts: str) -> str:
    """The policy of a page: these scripts, what the page itself holds, and nothing from any network.

    Styles are inline: figures and bars have ``style`` attributes. JSON in a ``script`` element is no script.

    Args:
        *scripts: The text of each of the page's ``script`` elements, every character of it.

    Example:
        >>> content_security_policy("").partition(";")[0]
        "default-src 'none'"
    """
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    sources = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {sources}; style-src 'unsafe-inline'; img-src data:; media-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def notebook_body(exporter: Any, notebook: Path, page: Page, pages: Sequence[Page], out: Path) -> tuple[str, list[str]]:
    """A notebook's cells as HTML: code folded, figures inline and labelled, links to other notebooks as pages.

    Args:
        exporter: Of nbconvert, with the site's template.
        notebook: The executed file.
        page: Its page.
        pages: All of them; links to their notebooks lead to them.
        out: The build folder; the files of figures and tables that are there can be downloaded.

    Returns:
        The HTML, and for each figure in it what goes to its place: :func:`~i2v_lab.reporting.site.charts.with_charts`.
    """
    node = nbformat.read(notebook, as_version=4)
    node.cells = [cell for cell in node.cells if PAPERMILL_ERROR not in cell.metadata.get("tags", [])]
    behind = _prepare_outputs(node.cells, page.title, out)
    first = next((cell for cell in node.cells if cell.cell_type == "markdown" and "# " in cell.source), None)
    if first is not None:
        first.metadata["with_verdict"] = True
    body, _ = exporter.from_notebook_node(node, resources={"page": page, "command": command(node, notebook.stem)})
    stems = "|".join(re.escape(other.stem) for other in pages)
    return re.sub(rf'href="(?:\./)?({stems})\.ipynb(#[^"]*)?"', r'href="\1.html\2"', body), behind


def _prepare_outputs(cells: Sequence[Any], title: str, out: Path) -> list[str]:
    """Label outputs with the heading above them, make ids of figures unique, and remove pandas' own style.

    Returns:
        What is behind each figure.
    """
    heading, count, figures = plain_markdown(title), 0, 0
    errors = []
    behind: list[str] = []
    for cell in cells:
        if cell.cell_type == "markdown":
            found = re.findall(r"^#{1,4} +(.+)$", cell.source, re.MULTILINE)
            if found:
                heading, count = plain_markdown(found[-1]), 0
            continue
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                errors.append(output)
            data = output.get("data", {})
            if not data or MIME in data:
                continue
            if "text/html" in data:
                data.pop(WIDGET, None)  # widgets need a kernel; the HTML beside it does not
            if "image/svg+xml" in data or "image/png" in data or "text/html" in data:
                count += 1
            label = heading if count < 2 else f"{heading} ({count})"
            output.metadata["label"] = label
            output.metadata["downloads"] = downloads(output.metadata, out)
            if "image/svg+xml" in data:
                output.metadata["chart"] = is_chart(data)
                output.metadata["behind"] = place_of(len(behind))
                rows = figure_rows(output.metadata, out)
                behind.append(behind_chart(data[CHART]) if is_chart(data) else behind_figure(rows, label))
            if "image/svg+xml" in data:
                figures += 1
                data["image/svg+xml"] = inline_svg(data["image/svg+xml"], f"figure-{figures}", label)
            if "text/html" in data:
                html = re.sub(r"<style scoped>.*?</style>\s*", "", data["text/html"], flags=re.DOTALL)
                data["text/html"] = with_scopes(re.sub(r'<table border="1"', "<table", html))
    if errors:
        errors[-1]["anchor"] = True  # the one that ended the notebook, if it failed
    return behind


def with_scopes(html: str) -> str:
    """Tables whose headings say what they head: above ``tbody`` a column, in it a row.

    Example:
        >>> with_scopes("<thead><th>peak</th></thead><tbody><th>decode_video</th>")
        '<thead><th scope="col">peak</th></thead><tbody><th scope="row">decode_video</th>'
    """
    parts = re.split(r"(?=<thead>|<tbody>)", html)
    return "".join(
        re.sub(r"<th(?=[ >])(?![^>]*\sscope=)", f'<th scope="{"row" if part.startswith("<tbody>") else "col"}"', part)
        for part in parts
    )


def inline_markdown(text: str) -> Markup:
    """One line of Markdown as HTML without a paragraph around it."""
    html = markdown2html(text).strip()
    return Markup(re.sub(r"^<p>(.*)</p>$", r"\1", html, flags=re.DOTALL))  # noqa: S704 - a line of a notebook of ours


def plain_markdown(text: str) -> str:
    """One line of Markdown as plain text, for titles and labels."""
    return str(Markup(inline_markdown(text)).striptags())  # noqa: S704 - its tags are removed at once
