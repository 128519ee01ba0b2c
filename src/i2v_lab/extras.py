"""What is not installed by default: modules, and the extra of this package that installs each."""

from __future__ import annotations

from importlib.util import find_spec

from i2v_lab.errors import RunnerUnavailable

EXTRAS = {
    **dict.fromkeys(("ltx_core", "ltx_pipelines", "torchaudio"), "ltx"),
    **dict.fromkeys(("ltx_video", "einops", "imageio"), "ltx-video"),
    **dict.fromkeys(("diffusers", "transformers", "huggingface_hub", "tokenizers", "torchvision"), "diffusers"),
    **dict.fromkeys(("accelerate", "timm", "sentencepiece", "google", "ftfy", "av"), "diffusers"),
    **dict.fromkeys(("jupyterlab", "ipywidgets", "ipykernel", "IPython", "papermill", "nbconvert"), "jupyter"),
    **dict.fromkeys(("nbformat", "nbclient", "matplotlib", "altair", "vl_convert"), "jupyter"),
    **dict.fromkeys(("dask", "distributed", "dask_jobqueue", "cryptography"), "scale"),
    **dict.fromkeys(("torchao", "gguf"), "quantization"),
}
"""The extra by the name that a module is imported by."""


def missing_extra(error: BaseException) -> RunnerUnavailable | None:
    """The error for a module that could not be imported because its extra is not installed; ``None`` for any other.

    Example:
        >>> print(missing_extra(ModuleNotFoundError("No module named 'av.codec'", name="av.codec")))
        this needs the Python module av, which is not installed; run `pip install "i2v-lab[diffusers]"`
        >>> missing_extra(ModuleNotFoundError("No module named 'x'", name="x")) is None
        True
    """
    module = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    return _missing(module) if module in EXTRAS else None


def require_module(module: str) -> None:
    """Refuse what an extra is needed for before anything is done.

    Args:
        module: One of :data:`EXTRAS`.

    Raises:
        RunnerUnavailable: It is not installed; with the command that installs it.

    Example:
        >>> require_module("matplotlib")
    """
    if find_spec(module) is None:
        raise _missing(module)


def _missing(module: str) -> RunnerUnavailable:
    extra = EXTRAS[module]
    return RunnerUnavailable(
        f'this needs the Python module {module}, which is not installed; run `pip install "i2v-lab[{extra}]"`',
        module=module,
        extra=extra,
    )
