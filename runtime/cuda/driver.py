"""The CUDA driver API with errors as exceptions. Imported lazily: nothing else of the runtime knows `cuda.bindings`."""

from __future__ import annotations

from typing import Any

from qcn_compile.errors import CapacityError, DeviceError

INSTALL = "a GPU build needs the CUDA bindings: pip install 'qcn-compile[cuda]'"
OUT_OF_MEMORY = "CUDA_ERROR_OUT_OF_MEMORY"


def bindings() -> Any:
    """The module `cuda.bindings.driver`. Raises DeviceError that says how to get it."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise DeviceError(f"{error}; {INSTALL}") from None
    return driver


class Driver:
    """Calls of the driver API by name. Raises CapacityError when memory is short, DeviceError for all else."""

    def __init__(self, api: Any = None) -> None:
        self.api = bindings() if api is None else api

    def __call__(self, name: str, *args: Any) -> Any:
        """The results of a call: nothing, one value, or a tuple."""
        try:
            code, *values = getattr(self.api, name)(*args)
        except RuntimeError as error:  # libcuda itself is absent
            raise DeviceError(f"{name}: {error}; this machine has no NVIDIA driver: run on one that has") from None
        if int(code) != 0:
            self._fail(name, code)
        return values[0] if len(values) == 1 else tuple(values) if values else None

    def _fail(self, name: str, code: Any) -> None:
        label = getattr(code, "name", str(int(code)))
        if label == OUT_OF_MEMORY:
            raise CapacityError(f"{name}: the GPU has not enough free memory; lower --context-length or "
                                "--max-running-requests, or end other programs that use it")
        raise DeviceError(f"{name} failed with {label}; see the driver's log (dmesg, nvidia-smi -q)")
