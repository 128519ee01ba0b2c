"""Build hooks of the documentation: one reference page a package, made from the source tree."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PACKAGE = "i2v_lab"
GROUND = "ground"  # the page of the modules at the top of the package
SECTION = """## {heading} {{ #{dotted} }}

::: {dotted}
    options:
      show_root_heading: false
      show_root_toc_entry: false
"""


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Add ``reference/<package>.md`` for every package of i2v_lab that the navigation names."""
    root = Path(config.config_file_path).parent / "src" / PACKAGE
    for page in sorted(_reference_pages(config.nav)):
        name = Path(page).stem
        if files.get_file_from_path(page) is None:
            folder = root if name == GROUND else root / name
            files.append(File.generated(config, page, content=_page(root, folder, name)))
    return files


def _reference_pages(nav: Any) -> set[str]:
    if isinstance(nav, dict):
        return set().union(*map(_reference_pages, nav.values()))
    if isinstance(nav, list):
        return set().union(*map(_reference_pages, nav))
    return {nav} if str(nav).startswith("reference/") else set()


def _page(root: Path, folder: Path, name: str) -> str:
    """A title, then every module: its docstring and what is public in it."""
    if name == GROUND:
        title, modules = "Ground floor", sorted(folder.glob("*.py"))
        parts = ["Modules that every package may import; they import none of them."]
    else:
        title, modules = f"{PACKAGE}.{name}", sorted(folder.rglob("*.py"))
        parts = [ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""]
    if not modules:
        raise FileNotFoundError(f"{folder} has no modules; mend the reference pages in mkdocs.yml")
    for module in modules:
        path = module.relative_to(root.parent).with_suffix("")
        if path.name.startswith("__") or not _has_public_names(module):
            continue
        dotted = ".".join(path.parts)
        heading = dotted.removeprefix(f"{PACKAGE}.").removeprefix(f"{name}.")
        parts.append(SECTION.format(heading=heading, dotted=dotted))
    return f"# {title}\n\n" + "\n\n".join(parts) + "\n"


def _has_public_names(module: Path) -> bool:
    tree = ast.parse(module.read_text())
    names = (node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef))
    return any(not name.startswith("_") for name in names)
