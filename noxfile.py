"""Tests at both ends of the version ranges of pyproject.toml, each in an environment of its lock file.

``make ranges`` runs all of them, ``.venv/bin/nox -s quick-highest`` one. Packages come from the registry that uv is
configured for, interpreters from the machine.
"""

import nox

nox.options.default_venv_backend = "uv"
nox.options.download_python = "never"
nox.options.error_on_missing_interpreters = True

LTX_VIDEO = "ltx-video==0.1.2"
# The last of each minor version of the range, and the one before it.
RELEASES = ("0.38.0", "0.39.0", "0.40.0", "0.41.0", "0.42.1")


def run_tests(session: nox.Session, lock: str, *selection: str) -> None:
    """Install the packages of a lock file and this one, as ``make setup`` does, and run some of the tests."""
    session.install("--no-deps", "--requirement", lock)
    session.install("--no-deps", "--editable", ".", LTX_VIDEO)
    command = ("python", "-m", "pytest", "-n", "2", "--dist", "worksteal")
    session.run(*command, *selection, *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session(name="quick-lowest", python="3.11")
def quick_lowest(session: nox.Session) -> None:
    """Run the quick tests with exactly the lower bounds."""
    run_tests(session, "locks/lowest.txt", "-m", "not slow")


@nox.session(python="3.11")
def conformance(session: nox.Session) -> None:
    """Compare with upstream's own pipelines, bit for bit, with the transformers that they were written for."""
    run_tests(session, "locks/lowest.txt", "tests/conformance")


@nox.session(name="quick-highest")
def quick_highest(session: nox.Session) -> None:
    """Run the quick tests with the newest of everything."""
    run_tests(session, "locks/highest.txt", "-m", "not slow")


@nox.session(default=False)
@nox.parametrize("release", RELEASES)
def releases(session: nox.Session, release: str) -> None:
    """Forecast every model of diffusers with a release of it, into ``data/published/releases.csv``."""
    session.install("--no-deps", "--requirement", "locks/setup.txt")
    session.install("--no-deps", "--editable", ".", f"diffusers=={release}")
    session.run("python", "-W", "ignore", "-m", "i2v_lab.studies.releases", *session.posargs)
