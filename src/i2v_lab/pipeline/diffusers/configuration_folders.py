"""Where the configuration of a model that a script names is on this machine; nothing is ever downloaded.

A name of the Hugging Face hub, such as ``Wan-AI/Wan2.2-TI2V-5B-Diffusers``, is looked for as a folder, in the user's
cache of the hub, and among this package's architectures, whose ``repository`` lists the names they were published by.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import diffusers
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from i2v_lab.errors import ForecastError, shown
from i2v_lab.pipeline.contract.architectures import Architecture, architecture_names, load_architecture
from i2v_lab.pipeline.contract.weight_folders import require_files
from i2v_lab.pipeline.diffusers import stand_ins
from i2v_lab.pipeline.diffusers.components import find_class

STAND_IN = "stand_in.json"  # of a component for which there is no file


class ConfigurationFolders:
    """Finds the folder of a name, and writes those of this package's architectures.

    Args:
        written: An empty folder for the latter.
    """

    def __init__(self, written: Path) -> None:
        self._written = written
        self._found: dict[tuple[str, ...], Path] = {}

    def find(self, name: str | os.PathLike[str], revision: str | None = None, cache_dir: Any = None) -> Path | None:
        """The folder of a model's configuration; ``None`` if there is none on this machine.

        Args:
            name: A folder or a name of the hub.
            revision: Of the files in the user's cache.
            cache_dir: That cache, where it is not the usual one.

        Raises:
            CheckpointError: Files of the folder name code, or are damaged.
        """
        key = (str(name), str(revision), str(cache_dir))
        if key not in self._found:
            folder = self._folder(str(name), revision, cache_dir)
            if folder is None:
                return None
            self._found[key] = folder
        return self._found[key]

    def require(self, name: Any, subfolder: str | None, file: str, **where: Any) -> Path:
        """:meth:`find`, or refuse.

        Args:
            name: As in :meth:`find`, or a file.
            subfolder: Of a component.
            file: That has to be there; empty if any will do.
            **where: ``revision`` and ``cache_dir``, as in :meth:`find`.

        Raises:
            ForecastError: No configuration is on this machine; the message says where to put it.
            CheckpointError: As in :meth:`find`.
        """
        if not isinstance(name, str | os.PathLike):
            raise missing(name, file)
        if os.path.isfile(name):  # noqa: PTH113 - which takes too long a name for none
            return Path(name)
        folder = self.find(name, **where)
        if folder is None or (file and not (folder / (subfolder or "") / file).is_file()):
            raise missing(name, f"{subfolder}/{file or 'config.json'}" if subfolder else file or "config.json")
        return folder

    def stand_in(self, folder: Path | None, part: str | None) -> dict[str, Any] | None:
        """What an architecture has in place of a vocabulary; else ``None``.

        Args:
            folder: As :meth:`find` returned it.
            part: Its subfolder.
        """
        path = (folder or Path()) / (part or "") / STAND_IN
        if not path.is_relative_to(self._written) or not path.is_file():
            return None
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return config

    def part_of(self, folder: Path, kind: str) -> str | None:
        """The subfolder of an architecture's only component of a class; ``None`` elsewhere.

        Some repositories hold one component, without a subfolder.

        Args:
            folder: As :meth:`find` returned it.
            kind: Name of the class.
        """
        parts = [name for name, (_, each) in self.components(folder).items() if each == kind]
        return parts[0] if len(parts) == 1 else None

    def components(self, folder: Path) -> dict[str, tuple[str, str]]:
        """Library and class of each component of an architecture; empty for any other folder."""
        path = folder / "model_index.json"
        if not folder.is_relative_to(self._written) or not path.is_file():
            return {}
        index = json.loads(path.read_text(encoding="utf-8"))
        return {name: tuple(value) for name, value in index.items() if isinstance(value, list)}

    def name_of(self, path: Any, part: str | None = None) -> str:
        """The name that a script gave for a folder that was found, or for a part of it."""
        given = str(path)
        for key, folder in reversed(self._found.items()):
            if Path(given).is_relative_to(folder) and key[0] != str(folder):
                given = "/".join([key[0], *Path(given).relative_to(folder).parts])
                break
        return f"{given}/{part}" if part else given

    def _folder(self, name: str, revision: str | None, cache_dir: Any) -> Path | None:
        if os.path.isdir(name):  # noqa: PTH112 - which takes too long a name for none
            require_files(Path(name), (), "script", "configuration")
            return Path(name)
        try:
            cached = Path(snapshot_download(name, revision=revision, cache_dir=cache_dir, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError, ValueError):
            cached = None
        if cached is not None and any(path.suffix in (".json", ".safetensors") for path in cached.rglob("*")):
            require_files(cached, (), "script", "configuration")
            return cached
        for known in architecture_names():
            architecture = load_architecture(known)
            if architecture.pipeline and name.lower() in map(str.lower, architecture.repository):
                folder = self._written / known
                if not folder.exists():
                    write_configuration(architecture, folder)
                return folder
        return None


def missing(name: Any, files: str) -> ForecastError:
    """The error for a configuration that is not on this machine.

    Args:
        name: What the script names.
        files: What is missing in words.
    """
    given = str(name)
    if os.path.isdir(given):  # noqa: PTH112 - which takes too long a name for none
        remedy = "put it there, or name another folder"
    elif given.startswith(("/", ".", "~")) or given.count("/") > 1:
        remedy = "check the path of the folder"
    else:
        remedy = (
            "name a folder that holds the model's JSON files, or fetch them without the weights: "
            f"hf download {given} --include '*.json' '*.txt' '*.model'"
        )
    return ForecastError(
        f"{shown(given)} has no {files} on this machine, and a forecast downloads nothing; {remedy}",
        cause="no configuration",
        name=given,
    )


def write_configuration(architecture: Architecture, folder: Path) -> None:
    """Write an architecture as the JSON files of its pipeline, as they are on the hub.

    Args:
        architecture: Of a pipeline of diffusers.
        folder: Made.

    Raises:
        RunnerUnavailable: The installed packages lack one of its classes.
    """
    index: dict[str, Any] = {"_class_name": architecture.pipeline, **architecture.arguments}
    default = architecture.dtypes.get("", architecture.dtypes.get("default", "float32"))
    for name, section in architecture.config.items():
        config = {key: value for key, value in section.items() if key != "_class_name"}
        named = section["_class_name"]
        kind = find_class(architecture, named)
        library = kind.__module__.partition(".")[0]
        if kind.__module__ == stand_ins.__name__:
            file, library, config["_class_name"] = STAND_IN, "transformers", named
            named = "ProcessorMixin" if "Processor" in named else "PreTrainedTokenizerFast"
        elif library == "diffusers":
            file, config["_class_name"] = kind.config_name, named
            library = library if hasattr(diffusers, named) else kind.__module__.split(".")[2]  # its pipeline's package
        elif issubclass(kind, transformers.PreTrainedModel):
            file = "config.json"
            config |= {"architectures": [named], "model_type": kind.config_class.model_type}
            config.setdefault("torch_dtype", architecture.dtypes.get(name, default))
        else:
            file = "preprocessor_config.json"
            config["image_processor_type"] = named
        if kind is not stand_ins.NoSafetyChecker:  # which no class method loads
            index[name] = [library, named]
        (folder / name).mkdir(parents=True)
        (folder / name / file).write_text(json.dumps(config), encoding="utf-8")
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
