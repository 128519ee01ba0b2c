"""Pictures that a script reads, and files that it writes: a forecast has no network, and nothing to write."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import PIL.Image

from i2v_lab.errors import ForecastError, shown
from i2v_lab.paths import data_dir
from i2v_lab.pipeline.contract.media import load_still
from i2v_lab.thread_patches import patched_here, unpatched

STILL = "stills/lighthouse.png"
# Homes of a function, all of which scripts import it from.
LOADERS = ("diffusers.utils", "diffusers.utils.loading_utils", "transformers.image_utils")
EXPORTERS = ("diffusers.utils", "diffusers.utils.export_utils", "diffusers.pipelines.ltx2.export_utils")
WRITERS = {
    "export_to_video": EXPORTERS,
    "export_to_gif": EXPORTERS,
    "export_to_obj": EXPORTERS,
    "export_to_ply": EXPORTERS,
    "encode_video": EXPORTERS,
    "mimsave": ("imageio", "imageio.v2"),
    "mimwrite": ("imageio", "imageio.v2"),
    "imwrite": ("imageio", "imageio.v2", "imageio.v3"),
    "write_video": ("torchvision.io",),
    "save_image": ("torchvision.utils",),
    "save_file": ("safetensors.torch",),
    "save": ("numpy", "torch", "torchaudio"),
    "savez": ("numpy",),
}
SAVERS = (("diffusers", "DiffusionPipeline"), ("diffusers", "ModelMixin"), ("transformers", "PreTrainedModel"))


@contextmanager
def script_media(assume: Callable[[str, str], None]) -> Iterator[None]:
    """Within this scope ``load_image`` needs no network, and what writes a video or picture does nothing.

    Args:
        assume: Told of every picture that is another one, and of every file that is not written.

    Raises:
        ForecastError: A video is to be read from an address.
    """

    def not_written(target: Any, name: str, label: str) -> Callable[..., Any]:
        def write(*args: Any, **kwargs: Any) -> Any:
            if any(hasattr(value, "write") for value in (*args, *kwargs.values())):  # a file, or memory
                return unpatched(target, name)(*args, **kwargs)
            paths = [os.fspath(value) for value in (*args, *kwargs.values()) if isinstance(value, str | os.PathLike)]
            assume(f"{label}({shown(paths[0]) if paths else ''})", "nothing is written")
            return paths[0] if paths else None

        return write

    def silence(target: Any, name: str, label: str) -> None:
        scopes.enter_context(patched_here(target, name, not_written(target, name, label)))

    with ExitStack() as scopes:
        for home in LOADERS:
            for name, substitute in (("load_image", _load_image), ("load_video", _load_video)):
                with suppress(ImportError):
                    module = importlib.import_module(home)
                    if hasattr(module, name):
                        scopes.enter_context(patched_here(module, name, substitute(module, assume)))
        for name, homes in WRITERS.items():
            for home in homes:
                with suppress(ImportError):
                    module = importlib.import_module(home)
                    if hasattr(module, name):
                        silence(module, name, name if name != "save" else f"{home}.save")
        for home, kind in SAVERS:
            silence(getattr(importlib.import_module(home), kind), "save_pretrained", "save_pretrained")
        silence(PIL.Image.Image, "save", "Image.save")
        yield


def _load_image(home: Any, assume: Callable[[str, str], None]) -> Callable[..., Any]:
    def load(image: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_address(image):
            return unpatched(home, "load_image")(image, *args, **kwargs)
        still = PIL.Image.fromarray(load_still(data_dir() / STILL))
        assume(f"load_image({shown(image)})", f"a still of {still.width}x{still.height}, since there is no network")
        return still

    return load


def _load_video(home: Any, assume: Callable[[str, str], None]) -> Callable[..., Any]:
    def load(video: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_address(video):
            return unpatched(home, "load_video")(video, *args, **kwargs)
        raise ForecastError(
            f"load_video({shown(video)}) would use the network, which a forecast does not, and how many frames it has "
            "is not known; download it, and pass its path",
            cause="no network",
            operator="load_video",
        )

    return load


def _is_address(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(("http://", "https://"))
