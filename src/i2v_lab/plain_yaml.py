"""YAML of plans and parameters, whose reading ends soon and without surprise, whatever is in the file."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 2**20  # of a file
MAX_NODES = 100_000  # with the nodes of an alias counted wherever it stands


def load_yaml(path: str | Path, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """The content of a YAML file.

    Args:
        path: A regular file in UTF-8.
        loader: PyYAML's safe loader, or a subclass of it.

    Raises:
        OSError: It cannot be read, or is no regular file.
        ValueError: It is not YAML or not UTF-8, larger than 1 MiB, nested too deeply, or grows too large by its
            aliases, which may be nested.

    Example:
        >>> load_yaml("data/plans/h200.yaml")["groups"][0]["rounds"]  # doctest: +SKIP
        3
    """
    file = Path(path)
    status = file.stat()
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(21, "Is a directory", str(path))
    if not stat.S_ISREG(status.st_mode):  # to open a pipe would wait for a writer
        raise OSError(22, "not a regular file", str(path))
    if status.st_size > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES} bytes")
    text = file.read_text(encoding="utf-8")
    try:
        reader = loader(text)
        node = reader.get_single_node()
        if node is None:
            return None
        _count(node, {})
        return reader.construct_document(node)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def _count(node: yaml.Node, counted: dict[int, int]) -> int:
    """The number of nodes below a node, and itself, with those of an alias counted wherever it stands."""
    if id(node) in counted:
        if counted[id(node)] == 0:
            raise ValueError("an alias of what it stands in")
        return counted[id(node)]
    counted[id(node)] = 0
    children: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.MappingNode):
        children = [each for pair in node.value for each in pair]
    total = 1 + sum(_count(child, counted) for child in children)
    if total > MAX_NODES:
        raise ValueError(f"more than {MAX_NODES} values, by aliases of aliases")
    counted[id(node)] = total
    return total
