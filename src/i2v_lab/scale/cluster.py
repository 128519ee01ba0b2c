"""Workers as Dask starts them: processes of this machine, or jobs of a Slurm cluster. Encrypted wherever it can be.

The scheduler is in this process, so that nothing is left to wait for workers if it is killed: every worker ends with
its connection.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shlex
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from i2v_lab.errors import WorkersUnavailable
from i2v_lab.files import private_folder
from i2v_lab.locks import say
from i2v_lab.scale.workers import REMEDY, Workers
from i2v_lab.stopping import on_stop

LOOPBACK = "127.0.0.1"
SETTINGS = {
    "distributed.scheduler.allowed-failures": 0,  # of a task: dispatch counts them
    "distributed.scheduler.worker-saturation": 1.0,
    "distributed.worker.daemon": False,  # a run is a process of its own, which a daemon may not have
    "distributed.worker.profile.enabled": False,  # it samples the stack a hundred times a second
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": False,
    "distributed.nanny.pre-spawn-environ": dict.fromkeys(
        ("MALLOC_TRIM_THRESHOLD_", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    ),  # as without workers
    "distributed.admin.tick.interval": "500ms",
    "distributed.admin.tick.limit": "1h",
    "distributed.comm.timeouts.connect": "30s",
}
KEYS = (
    "tls_ca_file",
    *(f"tls_{role}_{part}" for role in ("scheduler", "worker", "client") for part in ("key", "cert")),
)
LOCAL_SETTINGS = {
    "distributed.deploy.lost-worker-timeout": "60s",  # a process that is started again takes some seconds to be back
}
NO_DASHBOARD = {"dashboard": False, "dashboard_address": f"{LOOPBACK}:0"}  # the server of its metrics has no keys
SHORT = Path("/tmp")  # noqa: S108 - for a private folder
MOST_TEMPORARY_BYTES = 40  # a socket's path has 107; multiprocessing's name takes 32, that of the scratch folder 30
CLOSE_S = 5
STILL_S = 10  # longer than a command that is stopped goes on


@contextmanager
def started(workers: Workers, folder: Path) -> Iterator[tuple[Any, Any]]:
    """Start workers for this scope.

    Args:
        workers: How many, and where.
        folder: For the temporary keys of a cluster; one that its nodes share with this machine.

    Yields:
        Dask's cluster and its client.

    Raises:
        WorkersUnavailable: They cannot be started, or encryption is asked for and cannot be had.
    """
    import dask
    from distributed import Client  # first: its defaults come with it, and stay only if they are there before the scope
    from distributed.utils import LoopRunner

    if not workers.local:
        import dask_jobqueue  # noqa: F401 - likewise

    configuration = dask.config.merge(dask.config.config, workers.cluster)
    settings = SETTINGS | (LOCAL_SETTINGS if workers.local else {})
    with ExitStack() as scopes:
        scratch = scopes.enter_context(private_folder(_temporary(), "i2v-lab"))
        scopes.enter_context(dask.config.set({**configuration, **settings, "temporary-directory": str(scratch)}))
        logging.getLogger("distributed").setLevel(logging.CRITICAL)  # lost workers are reported run by run
        # Where the nodes of a cluster find the keys of this command.
        shared = folder if workers.local else scopes.enter_context(private_folder(folder, "keys"))
        runner, clusters = LoopRunner(), list[Any]()
        runner.start()
        scopes.callback(runner.stop)
        scopes.enter_context(on_stop(partial(_stop, runner.loop, clusters, workers.local), children_first=False))
        try:
            start = partial(_local, workers, scratch) if workers.local else partial(_slurm, workers, shared)
            clusters.append(start(runner.loop))
        except (OSError, RuntimeError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise WorkersUnavailable(f"the workers could not be started ({reason}); start fewer") from error
        scopes.callback(_close, clusters[0])
        client = Client(clusters[0], set_as_default=False)
        scopes.callback(_close, client)
        yield clusters[0], client


def _temporary() -> Path:
    """Where the scratch folder is made: its path is not too long for the sockets of the runs' processes below it."""
    folder = Path(tempfile.gettempdir())
    return folder if len(os.fsencode(folder)) <= MOST_TEMPORARY_BYTES else SHORT


def _close(opened: Any) -> None:
    with suppress(Exception):  # of a worker that has gone, say; there is nothing left to do about it
        opened.close(CLOSE_S)


def _security(protocol: str | None, loopback: bool) -> Any:
    """Keys of this run alone, or those that the configuration names; ``None`` where there are none, said in a line."""
    import dask
    from distributed.security import Security

    if dask.config.get("distributed.comm.tls.scheduler.cert", None):
        return Security()
    if protocol is not None and not protocol.startswith("tls"):
        say(f"i2v-lab: protocol={protocol}: what workers are told and tell is not encrypted, as the cluster file asks")
        return None
    if importlib.util.find_spec("cryptography") is not None:
        return Security.temporary()
    if not loopback:
        raise WorkersUnavailable(
            f"cryptography is not installed, without which workers of other machines are not encrypted; {REMEDY}, or "
            "name keys of your own in distributed.comm.tls",
            package="cryptography",
        )
    say(f"i2v-lab: cryptography is not installed: workers listen on {LOOPBACK} alone, but without encryption")
    return None


def _in_files(security: Any, folder: Path) -> Any:
    """The same keys in files of a folder, for workers that are started by a command line."""
    from distributed.security import Security

    files = {}
    for name in KEYS:
        text = getattr(security, name)
        if text and "\n" in text:
            files[name] = str(folder / name)
            with os.fdopen(os.open(files[name], os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(text)
    return Security(**files, require_encryption=True) if files else security


def _local(workers: Workers, scratch: Path, loop: Any) -> Any:
    from distributed import Nanny, Scheduler, SpecCluster

    security = _security(None, loopback=True)
    shared = {"host": LOOPBACK, "security": security, "protocol": "tls" if security else "tcp", **NO_DASHBOARD}
    specification = {}
    for number in range(workers.count):
        environment = {"TMPDIR": str(scratch)}
        if workers.cards:
            environment["CUDA_VISIBLE_DEVICES"] = workers.cards[number]
        if workers.threads is not None:
            environment["OMP_NUM_THREADS"] = str(workers.threads)
        options = {
            **shared,
            "nthreads": 1,
            "memory_limit": 0,
            "local_directory": str(scratch),
            "env": environment,
            "silence_logs": logging.CRITICAL,
        }
        specification[number] = {"cls": Nanny, "options": options}
    scheduler = {"cls": Scheduler, "options": {**shared, "port": 0}}
    return SpecCluster(
        workers=specification,
        scheduler=scheduler,
        loop=loop,
        security=security,
        silence_logs=logging.CRITICAL,
        name="i2v-lab",
    )


def _slurm(workers: Workers, shared: Path, loop: Any) -> Any:
    from dask_jobqueue import SLURMCluster

    slurm = {str(key).replace("_", "-"): value for key, value in workers.cluster["jobqueue"]["slurm"].items()}
    options = {str(key): value for key, value in (slurm.get("scheduler-options") or {}).items()}
    loopback = not (slurm.get("interface") or options.keys() & {"host", "interface", "contact_address"})
    if loopback:
        options["host"] = LOOPBACK
    security = _security(slurm.get("protocol"), loopback)
    security = None if security is None else _in_files(security, shared)
    # One run at a time on each worker, and no limit but the job's; of two equal options the last counts.
    extra = [*(slurm.get("worker-extra-args") or []), "--nthreads", "1", "--memory-limit", "0", "--no-dashboard"]
    extra += ["--dashboard-address", NO_DASHBOARD["dashboard_address"]]
    if loopback:
        extra += ["--host", LOOPBACK]
    cluster = SLURMCluster(
        processes=1,
        loop=loop,
        security=security,
        protocol="tls://" if security else "tcp://",
        scheduler_options={**NO_DASHBOARD, **options},
        worker_extra_args=extra,
        job_script_prologue=[*(slurm.get("job-script-prologue") or []), *_exports(workers.threads)],
        silence_logs=logging.CRITICAL,
    )
    cluster.scale(jobs=workers.count)
    return cluster


def _stop(loop: Any, clusters: Sequence[Any], local: bool) -> None:
    """The command is stopped: nothing is started again, and jobs are cancelled."""
    loop.add_callback(time.sleep, STILL_S)
    if not local:
        jobs = [job.job_id for each in clusters for job in list(each.workers.values()) if getattr(job, "job_id", None)]
        subprocess.run(["scancel", *jobs], check=False, capture_output=True, timeout=1)  # noqa: S603, S607


def _exports(threads: int | None) -> list[str]:
    """Dask's settings, and the threads of libraries, for the processes of a job."""
    names = {
        f"DASK_{key.upper().replace('.', '__').replace('-', '_')}": str(value)
        for key, value in SETTINGS.items()
        if key.startswith(("distributed.worker", "distributed.nanny"))
    }
    if threads is not None:
        names["OMP_NUM_THREADS"] = str(threads)
    return [f"export {name}={shlex.quote(value)}" for name, value in names.items()]
