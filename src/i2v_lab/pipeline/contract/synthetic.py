"""Synthetic weights of any runner: random tensors under the names and shapes of the real weight files.

Peak memory does not depend on the values of weights, so these replace the real ones wherever memory is studied. A small
model's are written to files in the cache; a large model's are made on demand, tensor by tensor, and never stored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file

from i2v_lab.pipeline.contract import random_tensors
from i2v_lab.pipeline.contract.architectures import Architecture
from i2v_lab.pipeline.contract.random_tensors import DTYPE, synthetic_tensor, uninitialized_tensor
from i2v_lab.pipeline.contract.weight_cache import cached_folder
from i2v_lab.pipeline.contract.weight_files import Layout, element_count

SCHEME = "synthetic:"  # begins the path of a weight file whose tensors are made on demand
FILE_LIMIT_BYTES = 2**30  # a checkpoint up to this size is written to a file; a larger one is made on demand


def is_on_demand(path: str) -> bool:
    """Whether a weight file's path names tensors that are made on demand.

    Example:
        >>> is_on_demand("synthetic:checkpoint"), is_on_demand("checkpoint.safetensors")
        (True, False)
    """
    return path.startswith(SCHEME)


@dataclass(frozen=True)
class SyntheticWeights:
    """The synthetic weight files of one runner's models.

    Attributes:
        package: The distribution whose modules determine the layouts; its version is part of the cache key.
        files: Each weight file's path below the folder of weights. ``checkpoint`` is the one that decides whether
            weights are written to files.
        layout: Shapes of all tensors of a weight file, by their names.
        metadata: The safetensors metadata of a weight file.
        write_tokenizer: Writes what the text encoder's folder holds besides weights below the folder of weights.
        source: The module file that writes it; its text is part of the cache key.
        dtypes: Of weight files that are not in bfloat16.
    """

    package: str
    files: Mapping[str, str]
    layout: Callable[[Architecture, str], Layout]
    metadata: Callable[[Architecture, str], dict[str, str]]
    write_tokenizer: Callable[[Architecture, Path], None]
    source: str
    dtypes: Mapping[str, torch.dtype]

    def fit_in_files(self, architecture: Architecture) -> bool:
        """Whether the checkpoint has at most :data:`FILE_LIMIT_BYTES`."""
        return element_count(self.layout(architecture, "checkpoint")) * DTYPE.itemsize <= FILE_LIMIT_BYTES

    def folder(self, architecture: Architecture, *, with_weights: bool) -> Path:
        """The cache's folder with the tokenizer, and with the weight files too if ``with_weights``.

        Raises:
            OutputError: The cache cannot be written.
        """
        sources = (__file__, str(random_tensors.__file__), self.source)
        code = "".join(Path(source).read_text(encoding="utf-8") for source in sources)
        recipe = f"{architecture.to_json()}:{code}:{version(self.package)}"

        def fill(folder: Path) -> None:
            self.write_tokenizer(architecture, folder)
            if with_weights:
                self._write_weights(architecture, folder)

        return cached_folder(architecture.name, recipe, fill, "" if with_weights else "-tokenizer")

    def paths(self, folder: Path | None = None) -> dict[str, str]:
        """The path of each weight file, by its name: below ``folder``, or on demand where that is ``None``."""
        return {file: f"{SCHEME}{file}" if folder is None else str(folder / name) for file, name in self.files.items()}

    def _write_weights(self, architecture: Architecture, folder: Path) -> None:
        for file, name in self.files.items():
            dtype = self.dtypes.get(file, DTYPE)
            layout = self.layout(architecture, file)
            tensors = {key: synthetic_tensor(key, shape).to(dtype) for key, shape in layout.items()}
            save_file(tensors, folder / name, metadata=self.metadata(architecture, file))


class TensorsOnDemand:
    """The tensors of weight files that do not exist: each is made when it is asked for.

    Args:
        architecture: Whose weights.
        layout: Shapes of all tensors of a weight file, by their names.
        values: Without, tensors are left uninitialized, which is enough where only memory is studied.
    """

    def __init__(
        self, architecture: Architecture, layout: Callable[[Architecture, str], Layout], *, values: bool = True
    ) -> None:
        self._architecture = architecture
        self._layout = layout
        self._values = values

    def keys(self, path: str) -> list[str]:
        """The names of all tensors of the weight file ``synthetic:<file>``."""
        return list(self._shapes(path))

    def tensor(self, path: str, key: str, device: torch.device, dtype: torch.dtype = DTYPE) -> torch.Tensor:
        """One tensor, made on ``device``."""
        shape = self._shapes(path)[key]
        if not self._values:
            return uninitialized_tensor(key, shape, device, dtype)
        return synthetic_tensor(key, shape, device).to(dtype)

    def _shapes(self, path: str) -> Layout:
        return self._layout(self._architecture, path.removeprefix(SCHEME))


def config_metadata(config: Mapping[str, object] | None) -> dict[str, str]:
    """The safetensors metadata of a weight file: its configuration as JSON where it carries one."""
    return {"format": "pt"} if config is None else {"config": json.dumps(config)}
