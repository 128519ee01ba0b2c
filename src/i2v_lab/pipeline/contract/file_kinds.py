"""What a file is that was given as weights but is no safetensors file, and what its tensors are named after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from pathlib import Path

# The first bytes of a file, what it is, and what to do.
KINDS = (
    (b"GGUF", "GGUF", "a GGUF file, whose weights are quantized in blocks; use the safetensors file of the model"),
    (
        b"version https://git-lfs",
        "Git LFS pointer",
        "a Git LFS pointer, not the file itself; fetch it with 'git lfs pull', or download it again",
    ),
    (
        b"PK\x03\x04",
        "pickle",
        "a file of torch.save (pickled checkpoints are not read); use the safetensors file of the model",
    ),
    (b"\x80", "pickle", "a pickle (pickled checkpoints are not read); use the safetensors file of the model"),
    (b"{", "JSON", "JSON, such as the index of a model in several files; name the safetensors file itself"),
    (b"<", "HTML", "a web page, as downloads without access give; download it again"),
)


def kind_of(path: Path) -> tuple[str, str] | None:
    """What a file is by its first bytes, in a word and in a sentence with the remedy.

    Args:
        path: A file that exists.

    Returns:
        ``None`` for a safetensors file, and for one that is not known.
    """
    with path.open("rb") as file:
        start = file.read(32)
    if start[8:9] == b"{":  # safetensors: the header's length, then the header
        return None
    return next(((kind, words) for magic, kind, words in KINDS if start.startswith(magic)), None)


def other_prefix(keys: Collection[str], expected: Collection[str]) -> tuple[str, str] | None:
    """The prefix that most of a file's keys have, and that which they should have, where only this is different.

    Args:
        keys: The file's keys.
        expected: The layout's.

    Example:
        >>> other_prefix(["net.a.weight", "net.b.weight"], ["model.a.weight", "model.b.weight"])
        ('net.', 'model.')
    """
    found = (
        (sum(new + key.removeprefix(old) in expected for key in keys if key.startswith(old)), old, new)
        for old in _prefixes(keys)
        for new in _prefixes(expected)
        if old != new
    )
    count, old, new = max(found, key=lambda each: (each[0], len(each[1]) + len(each[2])), default=(0, "", ""))
    most = count >= len(keys) / 2 and count > len(expected) / 10  # not one tensor with a name like another's
    return (old, new) if most else None


def _prefixes(keys: Collection[str]) -> list[str]:
    """The most frequent beginnings of one to three parts, and none at all."""
    counts = Counter("".join(f"{part}." for part in key.split(".")[:n]) for key in keys for n in range(4))
    return [prefix for prefix, _ in counts.most_common(8)]
