"""``from_pretrained`` of diffusers and transformers by configuration alone: without weights, without a network.

Pipelines are put together by diffusers' own code. Models are built from their configuration, with the dtypes that
loading would give: all floating weights in the dtype that is asked for, those in float32 that a class keeps so, and
buffers that are in no checkpoint as they are built.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub.constants
import torch
import transformers
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.loaders import FromOriginalModelMixin, FromSingleFileMixin
from transformers import AutoConfig, GenerationConfig, PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from i2v_lab.errors import ForecastError, shown
from i2v_lab.pipeline.diffusers.configuration_folders import ConfigurationFolders, missing
from i2v_lab.pipeline.diffusers.local_processors import processor_patches
from i2v_lab.pipeline.diffusers.quantized import TORCHAO, load_quantized
from i2v_lab.pipeline.diffusers.stand_ins import NoSafetyChecker
from i2v_lab.pipeline.diffusers.weight_shapes import weight_patches
from i2v_lab.thread_patches import patched_here, unpatched

Assume = Callable[[str, str], None]  # told of what was asked for, and what was answered

# Arguments that say how files are found and read, of which there are none to read.
ABOUT_FILES = (
    "cache_dir",
    "force_download",
    "ignore_mismatched_sizes",
    "local_files_only",
    "low_cpu_mem_usage",
    "max_memory",
    "offload_folder",
    "offload_state_dict",
    "proxies",
    "revision",
    "token",
    "use_safetensors",
    "user_agent",
    "variant",
    "weights_only",
    "disable_mmap",
    "use_flashpack",
    "flashpack_kwargs",
    "trust_remote_code",
    "adapter_kwargs",
    "generation_config",
    "key_mapping",
    "offload_buffers",
    "tqdm_class",
    "_commit_hash",
    "_from_auto",
    "_from_pipeline",
)
# Arguments that change what is on the card, in ways that only loading decides.
NOT_FORECAST = (
    "quantization_config",
    "load_in_8bit",
    "load_in_4bit",
    "gguf_file",
    "state_dict",
    "parallel_config",
    "distributed_config",
    "tp_plan",
    "tp_size",
    "device_mesh",
    "use_kernels",
    "custom_pipeline",
)


@contextmanager
def without_weights(assume: Assume) -> Iterator[None]:
    """Within this scope ``from_pretrained`` builds by configuration, in this thread.

    Args:
        assume: Told of every answer that no file gave.

    Raises:
        ForecastError: A model's configuration is not on this machine, or an argument's memory is not known.
        CheckpointError: A folder names code, or is damaged.

    Example:
        >>> with forecasting("cuda"), without_weights(print):  # doctest: +SKIP
        ...     pipe = WanImageToVideoPipeline.from_pretrained("Wan-AI/Wan2.2-TI2V-5B-Diffusers").to("cuda")
    """
    with ExitStack() as scopes:
        folders = ConfigurationFolders(Path(scopes.enter_context(tempfile.TemporaryDirectory())))
        loader = _Loader(folders, assume)
        for target, name, substitute in loader.patches():
            scopes.enter_context(patched_here(target, name, substitute))
        yield


class _Loader:
    """What takes the place of the class methods that load.

    Args:
        folders: Finds configurations.
        assume: As in :func:`without_weights`.
    """

    def __init__(self, folders: ConfigurationFolders, assume: Assume) -> None:
        self._folders = folders
        self._assume = assume

    def patches(self) -> Iterator[tuple[Any, str, Any]]:
        """What to replace, and by what."""
        yield huggingface_hub.constants, "HF_HUB_OFFLINE", True
        yield ConfigMixin, "load_config", self.load_config
        yield DiffusionPipeline, "from_pretrained", self.pipeline
        yield ModelMixin, "from_pretrained", self.diffusers_model
        yield PreTrainedModel, "from_pretrained", self.transformers_model
        yield FromSingleFileMixin, "from_single_file", self.single_file
        yield FromOriginalModelMixin, "from_single_file", self.single_file
        configuration = transformers.PretrainedConfig
        for kind in (_BaseAutoModelClass, AutoConfig, configuration, GenerationConfig):
            yield kind, "from_pretrained", self._located(kind)
        yield from processor_patches(self._folders, self._assume)
        yield from weight_patches(self._folders)

    def _located(self, kind: type) -> Callable[..., Any]:
        """The original, with the folder in the place of the name."""

        def load(cls: type, name: Any, *args: Any, **kwargs: Any) -> Any:
            file = "generation_config.json" if kind is GenerationConfig else "config.json"
            folder = self._folder(name, kwargs, file)
            return unpatched(kind, "from_pretrained")(cls, str(folder), *args, **kwargs)

        return load

    def _folder(self, name: Any, kwargs: dict[str, Any], file: str, kind: str = "") -> Path:
        where = {key: kwargs.pop(key, None) for key in ("revision", "cache_dir")}
        found = self._folders.find(name, **where) if kind and not kwargs.get("subfolder") else None
        part = self._folders.part_of(found, kind) if found is not None else None
        if part is not None:
            kwargs["subfolder"] = part
        return self._folders.require(name, kwargs.get("subfolder"), file, **where)

    def load_config(self, cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """``ConfigMixin.load_config``."""
        is_tried = cls is diffusers.AutoModel  # it looks for other files where one is missing
        folder = self._folder(pretrained_model_name_or_path, kwargs, "" if is_tried else cls.config_name)
        return unpatched(ConfigMixin, "load_config")(cls, str(folder), *args, **kwargs)

    def pipeline(self, cls: Any, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """``DiffusionPipeline.from_pretrained``."""
        folder = self._folder(pretrained_model_name_or_path, kwargs, cls.config_name)
        quantization = kwargs.get("quantization_config")
        if isinstance(quantization, diffusers.PipelineQuantizationConfig):  # its parts are looked at one by one
            _refuse({**kwargs, "quantization_config": None}, pretrained_model_name_or_path)
        else:
            _refuse(kwargs, pretrained_model_name_or_path)
        device_map = kwargs.pop("device_map", None)
        device = None if device_map is None else _single_device(device_map, pretrained_model_name_or_path)
        kwargs = {key: value for key, value in kwargs.items() if key not in ABOUT_FILES}
        self._check_components(cls, folder, kwargs, pretrained_model_name_or_path)
        if str(cls.load_config(folder).get("_class_name")).startswith("Cosmos") and "safety_checker" not in kwargs:
            self._assume(f"safety checker of {pretrained_model_name_or_path}", "none: it is a package of its own")
            kwargs["safety_checker"] = NoSafetyChecker()
        pipe = unpatched(DiffusionPipeline, "from_pretrained")(cls, str(folder), **kwargs)
        if device is not None:  # what was loaded is there, not what was given
            for part, module in pipe.components.items():
                if part not in kwargs and isinstance(module, torch.nn.Module):
                    module.to(device)
            pipe.hf_device_map = device_map
        return pipe

    def _check_components(self, cls: Any, folder: Path, given: dict[str, Any], name: Any) -> None:
        """Refuse an architecture whose denoiser or autoencoder is another than a pipeline's.

        Its repository may hold what other pipelines are made of besides.
        """
        types = cls._get_signature_types()
        for part, (_, kind) in self._folders.components(folder).items():
            model: Any = getattr(diffusers, kind, object)
            expected = [each for each in types.get(part, ()) if isinstance(each, type) and issubclass(each, ModelMixin)]
            is_other = issubclass(model, ModelMixin) and not issubclass(model, tuple(expected))
            if expected and is_other and part not in given:
                raise missing(name, f"{part}/config.json of {expected[0].__name__}")

    def single_file(self, cls: Any, pretrained_model_link_or_path: Any = None, **kwargs: Any) -> Any:
        """``from_single_file`` of pipelines and models: by the configuration that is named, not by the file."""
        config = kwargs.pop("config", None)
        if not isinstance(config, str | Path) or kwargs.pop("original_config", None) is not None:
            raise ForecastError(
                f"from_single_file({shown(pretrained_model_link_or_path)}) would find out from the weights what they "
                "are of, and a forecast reads none; pass config=, a folder or a name of the hub, and no "
                "original_config",
                cause="no configuration",
                name=str(pretrained_model_link_or_path),
            )
        return cls.from_pretrained(config, **kwargs)

    def diffusers_model(self, cls: Any, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """``ModelMixin.from_pretrained``."""
        folder = self._folder(pretrained_model_name_or_path, kwargs, cls.config_name, cls.__name__)
        quantization = kwargs.get("quantization_config")
        if _is_forecast(quantization):
            del kwargs["quantization_config"]
        _refuse(kwargs, pretrained_model_name_or_path)
        given = _taken(kwargs)
        subfolder = kwargs.pop("subfolder", None)
        config, unused = cls.load_config(folder, subfolder=subfolder, return_unused_kwargs=True, **kwargs)
        _refuse(config, pretrained_model_name_or_path)
        dtype = given["dtype"] if isinstance(given["dtype"], torch.dtype) else None
        if _is_forecast(quantization):
            device_map = given["device_map"]
            device = torch.device("cpu") if device_map is None else _single_device(device_map, folder)
            dtype = dtype or torch.bfloat16  # as diffusers' quantizer
            with torch.device("cpu"), _default_dtype(dtype):
                model = load_quantized(lambda: cls.from_config(config, **unused), quantization, dtype, device)
            model.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
            return _loaded(model, given, pretrained_model_name_or_path)
        with torch.device("cpu"), _default_dtype(dtype):
            model = cls.from_config(config, **unused)
        if dtype is not None:
            kept = cls._keep_in_fp32_modules or ()
            _cast(model, dtype, [kept] if isinstance(kept, str) else kept)
        model.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        return _loaded(model, given, pretrained_model_name_or_path)

    def transformers_model(self, cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """``PreTrainedModel.from_pretrained``."""
        name = pretrained_model_name_or_path
        file = "" if kwargs.get("config") is not None else "config.json"
        folder = self._folder(name, kwargs, file, cls.__name__)
        _refuse(kwargs, name)
        given = _taken(kwargs)
        config = kwargs.pop("config", None)
        chosen = {key: kwargs.pop(key) for key in ("attn_implementation",) if key in kwargs}
        if not isinstance(config, transformers.PretrainedConfig):
            config, kwargs = cls.config_class.from_pretrained(config or folder, return_unused_kwargs=True, **kwargs)
        kwargs.pop("subfolder", None)
        _refuse(vars(config), name)
        dtype = _dtype(given["dtype"], config, name)
        with torch.device("cpu"):
            model = cls._from_config(config, *args, dtype=dtype, **chosen, **kwargs)
        kept = set(model._keep_in_fp32_modules or ()) if dtype == torch.float16 else set()
        if dtype in (torch.float16, torch.bfloat16):
            kept |= set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
        _cast(model, dtype, kept)
        model.tie_weights()
        return _loaded(model, given, name)


def _taken(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take the arguments that are no configuration; those of files are dropped."""
    for key in ABOUT_FILES:
        kwargs.pop(key, None)
    dtype, torch_dtype = kwargs.pop("dtype", None), kwargs.pop("torch_dtype", None)
    return {
        "dtype": torch_dtype if dtype is None else dtype,
        "device_map": kwargs.pop("device_map", None),
        "output_loading_info": kwargs.pop("output_loading_info", False),
    }


def _is_forecast(quantization: Any) -> bool:
    """Whether a quantization is one that can be forecast: of torchao, and of the weights alone."""
    kind = type(getattr(quantization, "quant_type", None)).__name__
    return isinstance(quantization, diffusers.TorchAoConfig) and kind in TORCHAO.values()


def _refuse(values: dict[str, Any], name: Any) -> None:
    for key in NOT_FORECAST:
        if values.get(key):
            value = values[key]
            words = shown(value) if isinstance(value, str | int | bool) else type(value).__name__
            if key == "quantization_config" and hasattr(value, "quant_type"):
                words += f"({type(value.quant_type).__name__})"
            raise ForecastError(
                f"{key}={words} of {shown(name)} is not forecast: what it makes of the weights is decided when they "
                "are loaded; leave it out, or measure a real run",
                cause="decided by loading",
                argument=key,
                name=str(name),
            )


def _single_device(device_map: Any, name: Any) -> torch.device:
    """The one device of a map.

    Raises:
        ForecastError: There are several, or the map is to be found out.
    """
    device = device_map
    if isinstance(device, dict) and len(set(map(str, device.values()))) == 1:
        device = next(iter(device.values()))
    if isinstance(device, int) and not isinstance(device, bool):
        device = f"cuda:{device}"
    if isinstance(device, torch.device) or (isinstance(device, str) and re.fullmatch(r"(cpu|cuda)(:\d+)?", device)):
        return torch.device(device)
    raise ForecastError(
        f"device_map={shown(device_map)} of {shown(name)} is not forecast: it depends on the free memory of a real "
        "card; use device_map='cuda', or enable_model_cpu_offload()",
        cause="decided by loading",
        argument="device_map",
        name=str(name),
    )


def _dtype(asked: Any, config: Any, name: Any) -> torch.dtype:
    """The dtype in which transformers loads a model."""
    if asked is None:  # from version 5 on that of the configuration
        asked = "auto" if int(transformers.__version__.partition(".")[0]) >= 5 else torch.float32
    if asked == "auto":
        parts = [config, *(getattr(config, key, None) for key in getattr(config, "sub_configs", {}))]
        named = (getattr(part, "dtype", None) or getattr(part, "torch_dtype", None) for part in parts if part)
        asked = next(filter(None, named), None)
    if asked is None:
        raise ForecastError(
            f"the configuration of {shown(name)} names no dtype, so that of its weights would be used, which a "
            "forecast does not read; pass dtype=, such as dtype=torch.bfloat16",
            cause="no dtype",
            name=str(name),
        )
    dtype = getattr(torch, asked.removeprefix("torch."), None) if isinstance(asked, str) else asked
    if not isinstance(dtype, torch.dtype):
        raise ForecastError(
            f"dtype={shown(asked)} of {shown(name)} is no dtype of torch; use one such as torch.bfloat16",
            cause="no dtype",
            name=str(name),
        )
    return dtype


@contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    if dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):  # others cannot be the default
        torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _cast(model: torch.nn.Module, dtype: torch.dtype, kept: Any) -> None:
    """Give what a checkpoint holds the dtype that loading gives it; tied weights stay tied."""
    persistent = model.state_dict(keep_vars=True)
    for name, tensor in persistent.items():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if set(name.split(".")) & set(kept) else dtype)


def _loaded(model: Any, given: dict[str, Any], name: Any) -> Any:
    model.eval()
    if given["device_map"] is not None:
        model.to(_single_device(given["device_map"], name))
    if given["output_loading_info"]:
        return model, {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}
    return model
