"""What a measurement ran on: processor, BLAS library, environment, GPU; and memory in use."""

from __future__ import annotations

import importlib
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from minihyperflows.engine.backend import cupy
from minihyperflows.engine.blas import blas_libraries

# What makes a BLAS library choose other kernels or another number of threads.
VARIABLES = ("OPENBLAS_CORETYPE", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")

# What nvidia-smi is asked for; the units are MHz, W and degrees Celsius.
SMI_FIELDS = {
    "driver": "driver_version",
    "clock": "clocks.sm",
    "memory_clock": "clocks.mem",
    "highest_clock": "clocks.max.sm",
    "power": "power.draw",
    "temperature": "temperature.gpu",
}


def describe_machine() -> dict[str, Any]:
    """Processor, cores, load, BLAS libraries and the variables that steer them, as JSON types.

    ``load`` is the mean number of processes that were running during the last minute; None on
    Windows.
    """
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count() or 1,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "blas": [_blas_entry(library) for library in blas_libraries()],
        "environment": {name: os.environ.get(name) for name in VARIABLES},
    }


def _blas_entry(library: dict[str, Any]) -> dict[str, Any]:
    """The entry without the path of the file, which names somebody's folders."""
    return {
        "library": library["internal_api"],
        "version": library.get("version"),
        "core_type": library.get("architecture"),
        "threads": library["num_threads"],
    }


def cpu_model() -> str:
    """The processor's name as the system gives it; its architecture where there is none."""
    try:
        if sys.platform == "linux":
            name = _cpu_of_linux()
        elif sys.platform == "darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            name = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        else:
            name = platform.processor()
    except OSError:  # not readable, or no such command
        name = ""
    return name or platform.machine()


def _cpu_of_linux() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1].strip() if found else ""


def peak_memory() -> int | None:
    """The most memory that this process has had resident so far, in bytes; None where unknown.

    Linux has two such numbers. A new process inherits that of getrusage from the one that started
    it, so it does not serve. VmHWM starts anew with each program.
    """
    if sys.platform == "linux":
        found = re.search(
            r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE
        )
        if found:
            return 1024 * int(found[1])
    try:
        resource = importlib.import_module("resource")
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


# -- the GPU -------------------------------------------------------------------------------------


def describe_gpu() -> dict[str, Any]:
    """The GPU in use, as JSON types, with its state now (``SMI_FIELDS``) where nvidia-smi tells."""
    xp = cupy()
    properties = xp.cuda.runtime.getDeviceProperties(xp.cuda.Device().id)
    return {
        "name": properties["name"].decode(),
        "memory": properties.get("totalGlobalMem"),
        "multiprocessors": properties.get("multiProcessorCount"),
        "compute_capability": f"{properties.get('major')}.{properties.get('minor')}",
        **gpu_state(),
    }


def gpu_state() -> dict[str, str | None]:
    """Driver, clocks, power and temperature as nvidia-smi gives them; None where it does not."""
    command = ["nvidia-smi", f"--query-gpu={','.join(SMI_FIELDS.values())}"]
    command += ["--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return dict.fromkeys(SMI_FIELDS)
    values = [value.strip() for value in done.stdout.strip().split(",")]
    if done.returncode or len(values) != len(SMI_FIELDS):
        return dict.fromkeys(SMI_FIELDS)
    return dict(zip(SMI_FIELDS, values, strict=True))


def gpu_memory() -> int:
    """Bytes of the GPU's memory that are taken now, by whomever."""
    free, total = cupy().cuda.runtime.memGetInfo()
    return int(total - free)
