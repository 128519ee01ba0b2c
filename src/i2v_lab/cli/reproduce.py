"""``i2v-lab reproduce``: execute the notebooks headlessly and render the site."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from i2v_lab.cli import options
from i2v_lab.cli.options import as_text
from i2v_lab.errors import InvalidRequest, ReproduceError
from i2v_lab.extras import require_module

EXAMPLES = """
**Examples**

All notebooks that are not up to date:

    i2v-lab reproduce

One notebook with other values; all of them with values from a file, two at a time:

    i2v-lab reproduce 03_no_grad_fix -p frames 49 -p prompt "rain on a lake"
    i2v-lab reproduce -f params.yaml --jobs 2

All of them, each with a card of its own:

    i2v-lab reproduce --workers auto

params.yaml, with a value for every notebook that declares it, and one for a single notebook:

    seed: 3
    03_no_grad_fix:
      frames: 49
"""

PAIR = "\0"
BUILD = Path("build")
MOST_NAME = 48  # characters of parameters in the name of a folder


class ReproduceCommand(TyperCommand):
    """Joins the two words of ``-p NAME VALUE``: typer has no option that takes two words and may be repeated."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Join the two words of each ``-p`` before ``--``, then parse as usual."""
        words, joined = iter(args), []
        for word in words:
            joined.append(word)
            if word == "--":
                break
            if word in ("-p", "--parameter"):
                pair = [value for value in (next(words, None), next(words, None)) if value is not None]
                joined.extend([PAIR.join(pair)] if pair else [])
        return super().parse_args(ctx, [*joined, *words])


def _pair(text: str) -> tuple[str, str]:
    name, separator, value = text.partition(PAIR)
    if not separator or not name.isidentifier():
        raise InvalidRequest(
            f"parameter={name!r} is not a name and a value; give two words, -p NAME VALUE", parameter=name
        )
    return name, as_text(value, name)


def build_folder(parameters: Sequence[str], files: Sequence[Path]) -> Path:
    """Where notebooks with these parameters are built: apart from those with none.

    Args:
        parameters: Each a name and a value, as :class:`ReproduceCommand` joins them.
        files: Of parameters.

    Example:
        >>> build_folder([], []).name, build_folder([f"source{PAIR}recorded"], [Path("params.yaml")]).name
        ('build', 'build-params-source-recorded')
    """
    given = [*(file.stem for file in files), *(word for pair in parameters for word in pair.split(PAIR))]
    if not given:
        return BUILD
    name = re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(given)).strip("-.")
    if len(name) > MOST_NAME or not name or name != "-".join(given):  # told apart from what it was shortened from
        digest = hashlib.sha256(repr([*parameters, *map(str, files)]).encode(errors="surrogateescape")).hexdigest()
        name = f"{name[:MOST_NAME]}-{digest[:6]}".lstrip("-")
    return BUILD.with_name(f"{BUILD.name}-{name}")


def reproduce(
    notebooks: Annotated[list[str] | None, typer.Argument(help="Names or numbers, such as 03. [default: all]")] = None,
    parameter: Annotated[
        list[str] | None,
        typer.Option(
            "--parameter",
            "-p",
            metavar="NAME VALUE",
            help="Two words; may be repeated. For every notebook that declares it; takes precedence over files.",
        ),
    ] = None,
    parameters_file: Annotated[
        list[Path] | None,
        typer.Option(
            "--parameters-file",
            "-f",
            metavar="YAML",
            help="Values by name; may be repeated, the last takes precedence.",
        ),
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Number of notebooks to execute at a time.")] = 1,
    workers: options.Workers = None,
    cluster: options.Cluster = None,
    force: Annotated[bool, typer.Option("--force", help="Execute also the notebooks that are up to date.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Build folder. [default: build; with parameters one named by them, such as build-seed-3]"),
    ] = None,
) -> None:
    """Execute the notebooks headlessly and render figures, tables, videos and a site.

    A notebook is up to date if its source, its parameters, the package, its data, the versions of its dependencies and
    its output files have not changed since it was executed. A notebook that fails does not stop the others. With
    workers, notebooks are executed side by side, each with a card of its own where there are cards.
    """
    from dataclasses import replace

    from i2v_lab.reproduce.parameters import Text
    from i2v_lab.reproduce.report import print_summary
    from i2v_lab.reproduce.run import reproduce as run
    from i2v_lab.scale.workers import chosen_workers

    require_module("papermill")
    if out is None:
        out = build_folder(parameter or [], parameters_file or [])
    try:
        str(out.absolute()).encode()
    except UnicodeError:
        raise InvalidRequest(f"out='{out}' is not UTF-8 text, which the notebooks need; use another", out=out) from None
    given = {name: Text(value) for name, value in map(_pair, parameter or [])}
    if jobs > 1 and (workers or cluster):
        raise InvalidRequest(
            f"jobs={jobs} and workers={workers} are two numbers of notebooks at a time; give one of them",
            jobs=jobs,
            workers=workers,
        )
    chosen = chosen_workers(workers, cluster, on_cards=True)
    if chosen is not None:
        chosen = replace(chosen, threads=None)  # as without workers: how many change what is computed, in its last bits
    try:
        outcomes = run(notebooks or [], given, out, files=parameters_file or [], jobs=jobs, workers=chosen, force=force)
    except ReproduceError as error:
        print_summary(error.fields["outcomes"], out)
        raise
    print_summary(outcomes, out)
