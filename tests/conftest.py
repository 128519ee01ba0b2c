"""What many tests need: the tiny model's weights, made once a session, and a still."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forked_python import fork_the_fork_server, start_server
from forked_python import forked_python as forked_command
from PIL import Image
from shared_fixtures import made_once

from i2v_lab.paths import CACHE_VARIABLE

pytest_plugins = ["scheduling"]


def _freeze() -> None:
    """Take what there is out of every later garbage collection: half a million objects of torch and transformers.

    A collection of them takes 0.3 s, and each forecast looks through them for caches; both then see what a test makes.
    """
    gc.collect()
    if "torch" in sys.modules:
        from i2v_lab.profiling.fake.cached_tensors import known_caches

        known_caches()
    gc.freeze()


def pytest_collection_finish() -> None:
    _freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """After a module's fixtures: with what it was the first to import."""
    if nextitem is not None and nextitem.path != item.path:
        _freeze()


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this test session share."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session", autouse=True)
def _cache(session_folder: Path) -> Iterator[None]:
    """The session's own cache, for its processes and their children: weights and forecasts are made once.

    One that is set already stays.
    """
    if CACHE_VARIABLE in os.environ:
        yield
        return
    cache = session_folder / "cache"
    cache.mkdir(exist_ok=True)
    os.environ[CACHE_VARIABLE] = str(cache)
    yield
    del os.environ[CACHE_VARIABLE]


@pytest.fixture(scope="session", autouse=True)
def _data(session_folder: Path) -> Iterator[None]:
    """No profile of a card that its user calibrated, and no last choice in a view."""
    own = {"XDG_DATA_HOME": str(session_folder / "data"), "XDG_STATE_HOME": str(session_folder / "state")}
    before = {name: os.environ[name] for name in own if name in os.environ}
    os.environ |= own
    yield
    for name in own:
        del os.environ[name]
    os.environ |= before


@pytest.fixture(scope="session")
def _forks(session_folder: Path) -> Callable[[], str] | None:
    """The socket of the server of forked processes, one for the whole session, started when it is asked for."""
    if not hasattr(os, "pidfd_open"):
        return None
    session = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
    return cache(lambda: start_server(session, str(session_folder / "forked_python.log")))


@pytest.fixture(scope="session", autouse=True)
def _forked_fork_server(_cache: None, _forks: Callable[[], str] | None) -> Iterator[None]:
    """The library's own worker processes come from that server too: torch is imported once a session."""
    if _forks is None:
        yield
        return
    undo = fork_the_fork_server(_forks)
    yield
    undo()


@pytest.fixture
def forked_by_workers(_forks: Callable[[], str] | None, tmp_path: Path) -> Iterator[None]:
    """The processes of Dask's workers come from that server as well, here and in commands that are started here."""
    if _forks is None:
        yield
        return
    import dask

    preloaded = tmp_path / "forked_by_workers.py"
    preloaded.write_text(
        f"import sys\nsys.path.append({str(Path(__file__).parent)!r})\n"
        f"from forked_python import fork_the_fork_server\nfork_the_fork_server(lambda: {_forks()!r})\n"
    )
    with pytest.MonkeyPatch.context() as patch, dask.config.set({"distributed.worker.preload": [str(preloaded)]}):
        patch.setenv("DASK_DISTRIBUTED__WORKER__PRELOAD", repr([str(preloaded)]))
        yield


@pytest.fixture(scope="session")
def forked_python(_forks: Callable[[], str] | None) -> list[str]:
    """Stands in for ``[sys.executable]`` in a command, and has torch and transformers imported already."""
    return [sys.executable] if _forks is None else forked_command(_forks())


@pytest.fixture(scope="session")
def forked_kernels(forked_python: list[str]) -> Iterator[None]:
    """Within this scope kernels are forked, whoever starts them."""
    from jupyter_client.provisioning import local_provisioner

    launch = local_provisioner.launch_kernel

    def launch_forked(command: list[str], **options: Any) -> Any:
        return launch([*forked_python, *command[1:]] if command[0] == sys.executable else command, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_provisioner, "launch_kernel", launch_forked)
        yield


@pytest.fixture(scope="session")
def tiny(_cache):
    """Weights of ``ltx-2.3-tiny``, as files."""
    from i2v_lab.pipeline.contract.architectures import load_architecture
    from i2v_lab.pipeline.ltx2.weights import resolve_weights

    return resolve_weights(load_architecture("ltx-2.3-tiny"))


@pytest.fixture(scope="session")
def tiny_files(tiny) -> dict[str, Path]:
    """The same as the paths that a user would name."""
    return {
        "checkpoint": Path(tiny.checkpoint),
        "gemma": Path(tiny.gemma_root),
        "upsampler": Path(tiny.upsampler),
        "lora": Path(tiny.lora),
    }


@pytest.fixture(scope="session")
def ltxv_tiny(_cache):
    """Weights of ``ltxv-tiny``, as files."""
    from i2v_lab.pipeline.contract.architectures import load_architecture
    from i2v_lab.pipeline.ltx_video.weights import resolve_weights

    return resolve_weights(load_architecture("ltxv-tiny"))


@pytest.fixture(scope="session")
def still(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small RGB picture with some structure in it."""
    path = tmp_path_factory.mktemp("stills") / "still.png"
    noise = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((300, 200)).save(path)
    return path


@pytest.fixture(scope="session")
def reproduced(session_folder: Path, forked_kernels: None) -> Path:
    """The build folder of one small reproduction of every notebook: made once, however many processes test it.

    Everything in it was measured here, with the tiny model.
    """
    from small_notebooks import SMALL

    from i2v_lab.reproduce.run import reproduce

    def make(out: Path) -> None:
        parameters = session_folder / "parameters.yaml"
        everywhere = {"source": "measure", "model": "ltx-2.3-tiny", "device": "cpu"}
        parameters.write_text(json.dumps({**everywhere, **SMALL}))
        reproduce(files=[parameters], out=out)

    return made_once(session_folder / "reproduced", make)
