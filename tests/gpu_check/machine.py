"""Facts without which no figure of a GPU means anything."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import shutil
from pathlib import Path

from programs import Deadline, python, run, torch_version

# Asked in a process of its own: a process that has opened the driver must not start others by forking.
_DRIVER = """
import ctypes, json
try:
    cuda = ctypes.CDLL("libcuda.so.1")
except OSError as error:
    print(json.dumps({"missing": "there is no libcuda", "loader": str(error)}))
    raise SystemExit
code = cuda.cuInit(0)
count, version, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256)
if code == 0:
    code = cuda.cuDeviceGetCount(ctypes.byref(count)) or cuda.cuDriverGetVersion(ctypes.byref(version))
if code != 0 or count.value < 1:
    print(json.dumps({"missing": f"the driver answers {code} and shows {count.value} GPUs"}))
    raise SystemExit
cuda.cuDeviceGetName(name, 255, 0)
print(json.dumps({"gpus": count.value, "name": name.value.decode(), "cuda_of_the_driver": version.value / 1000}))
"""

_ASKED = [
    "name",
    "uuid",
    "driver_version",
    "memory.total",
    "memory.used",
    "compute_mode",
    "mig.mode.current",
    "persistence_mode",
    "clocks.sm",
    "temperature.gpu",
    "pcie.link.gen.max",
]


def driver(deadline: Deadline) -> dict:
    """What the CUDA driver says of itself, or `missing` with the reason."""
    end = run([python(), "-c", _DRIVER], deadline)
    try:
        return json.loads(end.out)
    except ValueError:
        return {"missing": f"asking for the driver {end.outcome}: {end.tail(300)}"}


def facts(deadline: Deadline) -> dict:
    return {
        "driver": driver(deadline),
        "nvidia_smi": _nvidia_smi(deadline),
        "kernel_module": _first_line(Path("/proc/driver/nvidia/version")),
        "mps": _mps(),
        "visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "torch": torch_version(),
        "python": platform.python_version(),
        "glibc": platform.libc_ver()[1],
        "kernel": platform.release(),
        "kernel_version": platform.version(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "user": os.getuid(),
        "compute_sanitizer": str(sanitizer() or "not on this machine"),
    }


def sanitizer() -> Path | None:
    found = shutil.which("compute-sanitizer")
    places = [Path(found)] if found else []
    places += [Path("/usr/local/cuda/bin/compute-sanitizer")]
    places += sorted(Path("/").glob("usr/local/cuda-*/bin/compute-sanitizer"), reverse=True)
    return next((place for place in places if place.is_file()), None)


def _nvidia_smi(deadline: Deadline) -> list[dict] | str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "not on this machine"
    end = run([program, f"--query-gpu={','.join(_ASKED)}", "--format=csv,noheader"], Deadline(20, deadline))
    if end.code != 0:
        return f"{end.outcome}: {end.tail(300)}"
    rows = csv.reader(io.StringIO(end.out), skipinitialspace=True)
    return [dict(zip(_ASKED, row, strict=False)) for row in rows]


def _mps() -> dict:
    """Whether a daemon through which processes share the GPU's one context is about."""
    running = False
    for name in Path("/proc").glob("[0-9]*/comm"):
        try:
            running |= name.read_text().startswith("nvidia-cuda-mps")
        except OSError:
            continue  # it has ended
    return {"running": running, "pipe_directory": os.environ.get("CUDA_MPS_PIPE_DIRECTORY")}


def _first_line(path: Path) -> str | None:
    try:
        return path.read_text().splitlines()[0]
    except (OSError, IndexError):
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
