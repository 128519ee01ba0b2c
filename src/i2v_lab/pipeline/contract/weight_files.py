"""Verification of weight files, of any runner, before a tensor is loaded: presence, headers, shapes, values."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open

from i2v_lab.errors import CheckpointError
from i2v_lab.paths import cache_dir
from i2v_lab.pipeline.contract.architectures import Architecture
from i2v_lab.pipeline.contract.file_kinds import other_prefix
from i2v_lab.pipeline.contract.scaled_fp8 import own_keys
from i2v_lab.pipeline.contract.weight_dtypes import verify_dtypes, verify_scales
from i2v_lab.pipeline.contract.weight_headers import read_headers, unknown_refused, weights_refused

Progress = Callable[[str, int, int], None]  # a file's name, tensors verified, tensors in all
Layout = Mapping[str, tuple[int, ...]]  # shapes of a weight file's tensors, by their names in the file


def require_together(given: Mapping[str, Path | None], needed: Sequence[str], options: Mapping[str, str]) -> None:
    """Refuse paths of some weight files without those of the others.

    Args:
        given: Paths by the weight file's name; ``None`` for one that is not given.
        needed: Names of the weight files that a run reads.
        options: The command-line option of each weight file.

    Raises:
        CheckpointError: Some are missing; ``fields`` has their options as ``missing``.
    """
    missing = [options[name] for name in needed if given[name] is None]
    if missing:
        named = ", ".join(options[name] for name, path in given.items() if path)
        raise CheckpointError(
            f"{named} given without {', '.join(missing)}: real weights come together; add the missing, or give none",
            missing=missing,
        )


def element_count(layout: Layout) -> int:
    """The number of elements of all tensors of a layout."""
    return sum(torch.Size(shape).numel() for shape in layout.values())


def verify_tensors(
    paths: Sequence[Path],
    option: str,
    model: str,
    expected: Layout,
    config_matches: Callable[[Path], bool] | None,
    unread: Collection[str] = (),
) -> None:
    """Check weight files against a layout: headers, names, dtypes, shapes and configuration. Reads no weight.

    Every key counts: it is in the layout, a companion of a float8 weight, or in ``unread``.

    Args:
        paths: The files, which together hold the layout's tensors.
        option: The command-line option that named them.
        model: The architecture's name.
        expected: The layout.
        config_matches: Whether the configuration in a file's metadata is that of its tensors; ``None`` for files that
            carry no configuration.
        unread: Tensors that published files have and no run reads.

    Raises:
        CheckpointError: A file does not match; ``fields`` has the ``option``, the ``path``, the ``fault``, and the
            first ``tensor`` of a wrong shape or ``dtype``, or that is not known, or the names of those that are
            ``missing``.
    """
    stored = read_headers(paths, option)
    remedy = architecture_remedy(model)
    path = paths[0] if len(paths) == 1 else paths[0].parent
    missing = [key for key in expected if key not in stored]
    own = own_keys(stored)
    if sum(key in expected for key in own) < len(own) / 2 or not own:  # most tensors are not of this model
        prefixes = other_prefix(own, expected)
        if prefixes is not None:
            words = (
                f"has the tensors of {model} under '{prefixes[0]}' instead of '{prefixes[1]}', as another program "
                "names them; use the original file, or rename them"
            )
            raise weights_refused(option, path, "architecture", words, prefix=prefixes[0], expected=prefixes[1])
        raise weights_refused(option, path, "architecture", f"is of another architecture than {model}; {remedy}")
    verify_dtypes({key: stored[key] for key in expected if key in stored}, option)
    wrong = [key for key in expected if key in stored and stored[key].shape != expected[key]]
    if wrong:
        words = (
            f"is of another architecture than {model}: {wrong[0]} has shape {stored[wrong[0]].shape}, not "
            f"{expected[wrong[0]]}; {remedy}"
        )
        raise weights_refused(option, path, "architecture", words, tensor=wrong[0])
    unknown = [key for key in own if key not in expected and key not in unread]
    if unknown:
        raise unknown_refused(option, stored, unknown)
    if missing:
        words = f"lacks {len(missing)} of {len(expected)} tensors, the first {missing[0]}; download or export it again"
        raise weights_refused(option, path, "incomplete", words, missing=missing)
    verify_scales(paths, stored, expected, option)
    if config_matches is not None and not config_matches(path):
        words = (
            "has no 'config' in its safetensors metadata that describes its tensors; use the original file, or export "
            "it again with its metadata"
        )
        raise weights_refused(option, path, "config", words)


def config_matches(
    architecture: Architecture, section: str, layout: Callable[[Architecture], Layout], path: Path
) -> bool:
    """Whether the configuration in a file's metadata, by which its runner builds modules, gives the model's layout.

    Args:
        architecture: The model.
        section: The attribute of the architecture that the file's metadata holds.
        layout: Computes the file's layout for an architecture.
        path: The safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            config = json.loads(file.metadata()["config"])
        if config == getattr(architecture, section):
            return True
        described = layout(replace(architecture, **{section: config}))
    except Exception:  # the runners' classes raise whatever a malformed configuration leads them to
        return False
    return described == layout(architecture)


def architecture_remedy(model: str) -> str:
    """The remedy of an error about weights of another architecture."""
    return f"use the weights of {model}, or name their architecture with --model"


def verify_values(option: str, paths: Sequence[Path], progress: Progress = lambda *_: None) -> None:
    """Check every value of weight files for NaN and infinity.

    A file that passed is recorded in the cache by path, size and modification time, and not read again.

    Args:
        option: The command-line option that named the files.
        paths: The safetensors files.
        progress: Called after each tensor.

    Raises:
        CheckpointError: A value is not finite; ``fields`` has the ``option``, the ``path``, the ``fault``, the
            ``tensor``, and its ``kind``, NaN or infinity.
    """
    for path in paths:
        stamp = _stamp(path)
        verified = False
        with suppress(OSError):
            verified = stamp.exists()
        if verified:
            continue
        _read_values(path, option, progress)
        with suppress(OSError):  # where the cache cannot be written, the file is read again next time
            stamp.parent.mkdir(parents=True, exist_ok=True)
            stamp.touch()


def _read_values(path: Path, option: str, progress: Progress) -> None:
    with safe_open(path, framework="pt") as file:
        keys = list(file.keys())
        for index, key in enumerate(keys, start=1):
            tensor = file.get_tensor(key)
            if tensor.is_floating_point() and tensor.element_size() == 1:  # isfinite has no float8 kernel
                tensor = tensor.to(torch.bfloat16)
            if not torch.isfinite(tensor).all():
                kind = "NaN" if torch.isnan(tensor).any() else "infinity"
                words = f"holds {kind} in {key}; download or export it again"
                raise weights_refused(option, path, "values", words, tensor=key, kind=kind)
            progress(path.name, index, len(keys))


def _stamp(path: Path) -> Path:
    status = path.stat()
    identity = json.dumps([os.fspath(path.resolve()), status.st_size, status.st_mtime_ns])
    return cache_dir() / "verified" / hashlib.sha256(identity.encode()).hexdigest()[:24]
