"""What the parameters cell of a notebook declares, and which values may be given for it."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from i2v_lab.errors import InvalidRequest

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


class Typed(str):
    """A value as somebody typed it: which type it has depends on the parameter that it is for."""


@dataclass(frozen=True)
class Parameter:
    """One assignment of a notebook's ``parameters`` cell.

    Attributes:
        name: Its target.
        annotation: Its type, as it is written; ``None`` without one.
        default: The value it assigns; as it is written if that is no literal.
        types: What a value must be an instance of; ``None`` if the annotation does not say.
    """

    name: str
    annotation: str | None
    default: Any
    types: tuple[type, ...] | None

    def value(self, given: Any) -> Any:
        """What to pass for a given value: text that was typed is read, anything else is left as it is.

        A parameter declared as ``str`` takes text verbatim. For others it is read as papermill does (``True``,
        ``False``, ``None``, integers, floats), then as JSON, and stays text if it is neither.
        """
        if not isinstance(given, Typed):
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
        """Whether a value is of the declared type; a truth value is not a number, an integer is a float."""
        if self.types is None:
            return True
        return isinstance(value, self.types) and (not isinstance(value, bool) or bool in self.types)

    def __str__(self) -> str:
        return f"{self.name}: {self.annotation} = {self.default!r}" if self.annotation else self.name


def declared_parameters(notebook: Path) -> dict[str, Parameter]:
    """What a notebook's ``parameters`` cell assigns, by name and in its order.

    Python's own parser reads the cell. Papermill's inspection goes line by line, does not see ``x: int | None = None``,
    and takes seconds to import.

    Raises:
        InvalidRequest: The file cannot be read as a notebook, or the cell not as Python.
    """
    try:
        cells = json.loads(notebook.read_bytes())["cells"]
        tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
        body = ast.parse("".join(tagged[0]["source"])).body if tagged else []
    except (ValueError, KeyError, TypeError, AttributeError, SyntaxError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InvalidRequest(f"{notebook.name} cannot be read as a notebook ({reason}); restore it") from error
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
    """Which values each notebook is to run with; a notebook gets only what it declares.

    Args:
        notebooks: Those that are to run.
        known: All there are; a file may have values for those that do not run.
        given: From the command line; wins over the files.
        files: YAML mappings from parameters to values, or from the name of a notebook to such a mapping for it alone.
            A later file wins over an earlier one, and within one the notebook's own mapping over what is for all.
        named: Whether the notebooks were chosen by name: then each of them must declare each of ``given``.

    Returns:
        For each of ``notebooks`` its values by name.

    Raises:
        InvalidRequest: No notebook declares a parameter, one that was named does not, or a value is of another type.
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
                    f"{name}={value!r} is not of the type that {stem}.ipynb declares; "
                    f"give it one as in {declared[stem][name]}",
                    **{name: value},
                )
    return [plans[stem] for stem in stems]


def _check_name(name: str, declared: Mapping[str, Mapping[str, Parameter]], *, in_each: bool, where: str = "") -> None:
    if name == OUT_DIR:
        raise InvalidRequest(f"{where}parameter {name!r} follows from --out; use --out FOLDER", parameter=name)
    lacking = [stem for stem, parameters in declared.items() if name not in parameters]
    if not lacking or (len(lacking) < len(declared) and not in_each):
        return
    who = f"{lacking[0]}.ipynb declares no" if in_each or len(declared) == 1 else "no notebook declares a"
    there = dict.fromkeys(each for stem in lacking for each in declared[stem] if each != OUT_DIR)
    raise InvalidRequest(f"{where}{who} parameter {name!r}; use one of: {', '.join(there) or 'none'}", parameter=name)


def _read_file(
    file: Path, declared: Mapping[str, Mapping[str, Parameter]]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=_NoDates)  # noqa: S506 - a SafeLoader
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InvalidRequest(f"{str(file)!r} cannot be read as YAML ({reason}); correct it", file=str(file)) from error
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise InvalidRequest(f"{str(file)!r} is no mapping; write a line NAME: VALUE for each parameter")
    alone = {stem: {} if values is None else values for stem, values in content.items() if stem in declared}
    everywhere = {name: value for name, value in content.items() if name not in alone}
    for name in everywhere:
        _check_name(name, declared, in_each=False, where=f"{file}: ")
    for stem, values in alone.items():
        if not isinstance(values, dict):
            raise InvalidRequest(f"{file}: {stem}={values!r} is no mapping; write lines NAME: VALUE below {stem}:")
        for name in values:
            _check_name(name, {stem: declared[stem]}, in_each=True, where=f"{file}: ")
    return everywhere, alone


class _NoDates(yaml.SafeLoader):
    """Leaves dates as text: YAML 1.1 would make objects of them that no parameters cell can hold."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as in its base
        first: [rule for rule in rules if rule[0] != "tag:yaml.org,2002:timestamp"]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
