"""Weight files that a script names: the shapes and dtypes in their headers, without the values; no pickles."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from diffusers.loaders import lora_base
from safetensors import safe_open

from i2v_lab.errors import ForecastError, shown
from i2v_lab.pipeline.contract.weight_headers import read_headers, weights_refused
from i2v_lab.pipeline.diffusers.configuration_folders import ConfigurationFolders
from i2v_lab.thread_patches import unpatched

LORA_HOMES = ("diffusers.loaders.lora_base", "diffusers.loaders.lora_pipeline", "diffusers.loaders.peft")
NUMBERS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "I64": torch.int64, "I32": torch.int32}
DTYPES = {
    **NUMBERS,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def weight_patches(folders: ConfigurationFolders) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    """What to replace so that weight files give tensors without values, and by what.

    Args:
        folders: Finds the folders of names.
    """
    parameters = inspect.signature(lora_base._fetch_state_dict)

    def fetch(*args: Any, **kwargs: Any) -> Any:
        call = parameters.bind(*args, **kwargs)
        name = call.arguments["pretrained_model_name_or_path_or_dict"]
        if not isinstance(name, dict):
            folder = None if os.path.isfile(str(name)) else folders.find(name, call.arguments.get("revision"))  # noqa: PTH113
            call.arguments |= {"use_safetensors": True, "allow_pickle": False, "local_files_only": True}
            if folder is not None:
                call.arguments["pretrained_model_name_or_path_or_dict"] = str(folder)
            elif not os.path.isfile(str(name)):  # noqa: PTH113
                raise no_weights(name, "a LoRA's rank is in its header")
        return unpatched(lora_base, "_fetch_state_dict")(*call.args, **call.kwargs)

    for home in LORA_HOMES:
        module = importlib.import_module(home)
        if hasattr(module, "_fetch_state_dict"):
            yield module, "_fetch_state_dict", fetch
    yield safetensors.torch, "load_file", load_shapes
    yield torch, "load", _refuse_pickle


def load_shapes(filename: str | os.PathLike[str], device: Any = "cpu", **_: Any) -> dict[str, torch.Tensor]:
    """``safetensors.torch.load_file`` without values, but for single numbers, such as a LoRA's alpha.

    Args:
        filename: Of a safetensors file.
        device: Where the tensors are.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    path = Path(filename)
    found: dict[str, torch.Tensor] = {}
    for key, stored in read_headers([path], "script").items():
        if stored.dtype not in DTYPES:
            words = f"holds {key} in {stored.dtype}, which torch has no dtype of; use a file in bfloat16"
            raise weights_refused("script", path, "dtype", words, tensor=key, dtype=stored.dtype)
        if stored.shape in ((), (1,)) and stored.dtype in NUMBERS:
            with safe_open(path, framework="numpy") as file:
                found[key] = torch.tensor(file.get_tensor(key).tolist(), dtype=DTYPES[stored.dtype], device=device)
        else:
            found[key] = torch.empty(stored.shape, dtype=DTYPES[stored.dtype], device=device)
    return found


def no_weights(name: Any, why: str) -> ForecastError:
    """The error for a weight file that is not on this machine, and whose sizes are nowhere else.

    Args:
        name: What the script names.
        why: What the file would tell.
    """
    return ForecastError(
        f"{shown(str(name))} is not on this machine: {why}, and a forecast downloads nothing; give the path of the "
        "safetensors file, or fetch it into the cache of the Hugging Face hub",
        cause="no weights",
        name=str(name),
    )


def _refuse_pickle(file: Any, *_: Any, **__: Any) -> Any:
    raise ForecastError(
        f"torch.load of {shown(str(file))} reads a pickle, which a forecast does not; use safetensors, of which it "
        "reads the header alone, or make the tensors in the script",
        cause="pickle",
        operator="torch.load",
    )
