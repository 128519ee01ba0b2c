"""Jupyter kernels of this interpreter, whatever kernel specs are installed: another ``python3`` may be found first."""

from __future__ import annotations

import sys
from typing import Any

from ipykernel.kernelspec import RESOURCES
from jupyter_client.kernelspec import NATIVE_KERNEL_NAME, KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager


class InterpreterKernelSpecs(KernelSpecManager):
    """Kernel specs in which ``python3`` is the interpreter of this process; all others are those installed.

    Example:
        >>> InterpreterKernelSpecs().get_kernel_spec("python3").argv[0] == sys.executable
        True
    """

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        """Return the spec of a kernel.

        Raises:
            NoSuchKernel: There is no kernel of that name.
        """
        if kernel_name != NATIVE_KERNEL_NAME:
            return super().get_kernel_spec(kernel_name)
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name="i2v-lab", language="python", resource_dir=RESOURCES)  # its logos


class InterpreterKernelManager(AsyncKernelManager):
    """Starts kernels of this interpreter; for the ``kernel_manager_class`` of an nbclient ``NotebookClient``.

    Example:
        >>> import nbformat
        >>> from nbclient import NotebookClient
        >>> client = NotebookClient(nbformat.v4.new_notebook(), kernel_manager_class=InterpreterKernelManager)
    """

    def __init__(self, **traits: Any) -> None:
        super().__init__(kernel_spec_manager=InterpreterKernelSpecs(), **traits)
