"""A Jupyter kernel of this very interpreter: one that is named python3 already may be another's."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from i2v_lab.files import write_text


def write_kernel_spec(folder: Path, name: str, env: Mapping[str, str], options: tuple[str, ...] = ()) -> Path:
    """Write a kernel spec that Jupyter finds once ``folder`` is on ``JUPYTER_PATH``.

    Args:
        folder: Gets ``kernels/NAME/kernel.json``.
        name: What notebooks call it.
        env: Added to the kernel's environment.
        options: Of ``ipykernel_launcher``.

    Example:
        >>> write_kernel_spec(Path("jupyter"), "python3", {}).as_posix()
        'jupyter/kernels/python3/kernel.json'
    """
    argv = [sys.executable, "-m", "ipykernel_launcher", *options, "-f", "{connection_file}"]
    values = {"argv": argv, "display_name": "i2v-lab", "language": "python", "env": dict(env)}
    return write_text(folder / "kernels" / name / "kernel.json", json.dumps(values))
