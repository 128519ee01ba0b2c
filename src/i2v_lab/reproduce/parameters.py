"""Parameters that a notebook declares, and the values that are given for them."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from i2v_lab.errors import InvalidRequest, did_you_mean
from i2v_lab.plain_yaml import load_yaml

OUT_DIR = "out_dir"

_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
    "list": (list,),
    "tuple": (list, tuple),
    "dict": (dict,),
    "None": (type(None),),
}


class Text(str):
    """A value from the command line, to be parsed by the declared type of its parameter."""


@dataclass(frozen=True)
class Parameter:
    """One assignment of a notebook's ``parameters`` cell.

    Attributes:
        name: Target of the assignment.
        annotation: Source of the type annotation; ``None`` without one.
        default: The assigned value; its source if that is no literal.
        types: Types that a value may have; ``None`` if the annotation does not restrict them.
    """

    name: str
    annotation: str | None
    default: Any
    types: tuple[type, ...] | None

    def value(self, given: Any) -> Any:
        """Parse a given value if it is :class:`Text`; return any other unchanged.

        A parameter declared as ``str`` takes text verbatim. For others it is parsed as by papermill (``True``,
        ``False``, ``None``, integers, floats), then as JSON, and is text if it is neither.
        """
        if not isinstance(given, Text):
            return given
        if self.types and str in self.types and not (given == "None" and type(None) in self.types):
            return str(given)
        words = {"True": True, "False": False, "None": None}
        if given in words:
            return words[given]
        for read in (int, float, json.loads):
            try:
                return read(given)
            except ValueError:
                continue
        return str(given)

    def accepts(self, value: Any) -> bool:
        """Return whether a value has the declared type; an integer is a float, but a bool is not an integer."""
        if self.types is None:
            return True
        return isinstance(value, self.types) and (not isinstance(value, bool) or bool in self.types)

    def __str__(self) -> str:
        return f"{self.name}: {self.annotation} = {self.default!r}" if self.annotation else self.name


def declared_parameters(notebook: Path) -> dict[str, Parameter]:
    """Return the parameters that the ``parameters`` cell of a notebook assigns, by name and in its order.

    The cell is parsed by :mod:`ast`: ``papermill.inspect_notebook`` (2.7) parses it line by line, and finds neither
    ``x: int | None = None`` nor ``x: str = "a = b"``.

    Raises:
        InvalidRequest: The file cannot be read as a notebook, or the cell not as Python.
    """
    try:
        cells = json.loads(notebook.read_bytes())["cells"]
        tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
        body = ast.parse("".join(tagged[0]["source"])).body if tagged else []
    except (ValueError, KeyError, TypeError, AttributeError, SyntaxError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InvalidRequest(
            f"{notebook.name} cannot be read as a notebook ({reason}); restore it", notebook=notebook.name
        ) from error
    found = {}
    for line in body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value is not None:
            name, annotation = line.target.id, line.annotation
            found[name] = Parameter(name, ast.unparse(annotation), _literal(line.value), _types(annotation))
        elif isinstance(line, ast.Assign):
            for target in line.targets:
                if isinstance(target, ast.Name):
                    found[target.id] = Parameter(target.id, None, _literal(line.value), None)
    return found


def checks_parameters(notebook: Path) -> bool:
    """Whether a cell of a notebook calls :func:`~i2v_lab.studies.parameters.check_parameters`."""
    cells = json.loads(notebook.read_bytes())["cells"]
    return any("check_parameters(" in "".join(cell["source"]) for cell in cells if cell.get("cell_type") == "code")


def _literal(value: ast.expr) -> Any:
    try:
        return ast.literal_eval(value)
    except ValueError:
        return ast.unparse(value)


def _types(annotation: ast.expr) -> tuple[type, ...] | None:
    match annotation:
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            types, others = _types(left), _types(right)
            return types + others if types is not None and others is not None else None
        case ast.Subscript(value=ast.Name(id=name)) | ast.Name(id=name) | ast.Constant(value=str(name)):
            return _TYPES.get(name)
        case ast.Constant(value=None):
            return _TYPES["None"]
    return None


def plan_parameters(
    notebooks: Sequence[Path],
    known: Sequence[Path],
    given: Mapping[str, Any],
    files: Sequence[Path] = (),
    *,
    named: bool = False,
) -> list[dict[str, Any]]:
    """Return the values that each notebook is executed with: those for parameters that it declares.

    Args:
        notebooks: The selected notebooks.
        known: All notebooks; a file may have values for notebooks that are not selected.
        given: Values from the command line, which take precedence over files.
        files: YAML mappings from parameters to values, or from the name of a notebook to such a mapping for it alone.
            A later file takes precedence over an earlier one, and the mapping of a notebook over values for all.
        named: Whether the notebooks were selected by name; each must then declare each of ``given``.

    Returns:
        The values by name, for each of ``notebooks``.

    Raises:
        InvalidRequest: No notebook declares a parameter, a named notebook does not, a value has another type, or it
            breaks a rule of :func:`~i2v_lab.studies.parameters.check_parameters`, where a notebook's cells call that.
    """
    declared = {path.stem: declared_parameters(path) for path in dict.fromkeys([*known, *notebooks])}
    stems = [path.stem for path in notebooks]
    for name in given:
        _check_name(name, {stem: declared[stem] for stem in stems}, in_each=named)
    plans: dict[str, dict[str, Any]] = {stem: {} for stem in stems}
    for file in files:
        everywhere, alone = _read_file(file, declared)
        for stem, plan in plans.items():
            plan |= {name: value for name, value in everywhere.items() if name in declared[stem]}
            plan |= alone.get(stem, {})
    for stem, plan in plans.items():
        plan |= {name: declared[stem][name].value(text) for name, text in given.items() if name in declared[stem]}
        for name, value in plan.items():
            if not declared[stem][name].accepts(value):
                raise InvalidRequest(
                    f"{name}={value!r} does not have the type that {stem}.ipynb declares: "
                    f"{declared[stem][name]}; give one that does",
                    **{name: value},
                )
            try:
                json.dumps(value, ensure_ascii=False, default=str).encode()
            except UnicodeEncodeError as error:
                raise InvalidRequest(f"{name}={value!r} is not UTF-8; write it in UTF-8", **{name: value}) from error
    for notebook in notebooks:
        if checks_parameters(notebook):
            from i2v_lab.studies.parameters import check_parameters

            defaults = {name: parameter.default for name, parameter in declared[notebook.stem].items()}
            check_parameters(defaults | plans[notebook.stem])
    return [plans[stem] for stem in stems]


def _check_name(name: str, declared: Mapping[str, Mapping[str, Parameter]], *, in_each: bool, where: str = "") -> None:
    if name == OUT_DIR:
        raise InvalidRequest(f"{where}parameter {name!r} is set by --out; use --out FOLDER", parameter=name)
    lacking = [stem for stem, parameters in declared.items() if name not in parameters]
    if not lacking or (len(lacking) < len(declared) and not in_each):
        return
    subject = f"{lacking[0]}.ipynb declares no" if in_each or len(declared) == 1 else "no notebook declares a"
    there = dict.fromkeys(each for stem in lacking for each in declared[stem] if each != OUT_DIR)
    raise InvalidRequest(
        f"{where}{subject} parameter {name!r}; {did_you_mean(name, there) if there else 'there is none'}",
        parameter=name,
    )


def _read_file(
    file: Path, declared: Mapping[str, Mapping[str, Parameter]]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    try:
        content = load_yaml(file, _NoDates)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InvalidRequest(f"{str(file)!r} cannot be read as YAML ({reason}); correct it", file=str(file)) from error
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise InvalidRequest(
            f"{str(file)!r} is no mapping; write a line NAME: VALUE for each parameter", file=str(file)
        )
    alone = {stem: {} if values is None else values for stem, values in content.items() if stem in declared}
    everywhere = {name: value for name, value in content.items() if name not in alone}
    for name in everywhere:
        _check_name(name, declared, in_each=False, where=f"{file}: ")
    for stem, values in alone.items():
        if not isinstance(values, dict):
            raise InvalidRequest(
                f"{file}: {stem}={values!r} is no mapping; write lines NAME: VALUE below {stem}:", file=str(file)
            )
        for name in values:
            _check_name(name, {stem: declared[stem]}, in_each=True, where=f"{file}: ")
    return everywhere, alone


class _NoDates(yaml.SafeLoader):
    """Loads dates as text: a date object of YAML 1.1 cannot be written into a parameters cell."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as in its base
        first: [rule for rule in rules if rule[0] != "tag:yaml.org,2002:timestamp"]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
