"""What a result depends on besides the code: the machine, the versions and the commit. Nothing that names its owner."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

import fastpool
from benchmarks import ROOT

_CACHE = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def _bytes(size: str) -> int:
    return int(size[:-1]) * _UNITS[size[-1]] if size[-1] in _UNITS else int(size)


def caches() -> dict[str, int]:
    """Bytes of the first core's data caches by level; empty where Linux does not say."""
    found = {}
    for index in sorted(_CACHE.glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            found[f"L{level}"] = _bytes(size)
    return found


def last_cache_bytes() -> int:
    return max(caches().values(), default=64 << 20)


def cpu_model() -> str:
    """The CPU as Linux names it, with family and model: the name alone may be as vague as "AMD EPYC"."""
    fields: dict[str, str] = {}
    if (info := Path("/proc/cpuinfo")).exists():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    return f"{fields['model name']} (family {fields.get('cpu family')}, model {fields.get('model')})"


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_machine() -> dict[str, object]:
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "cpu": cpu_model(),
        "architecture": platform.machine(),
        "cores": cores(),
        "caches_bytes": caches(),
        "system": platform.system(),
        "huge_pages": pages.read_text().strip() if pages.exists() else "unknown",
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def describe_gpu() -> dict[str, object]:
    properties = torch.cuda.get_device_properties()
    return {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cpu": cpu_model(),
        "system": platform.system(),
    }


_GPU_STATE = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "power.limit")


def gpu_state() -> dict[str, str]:
    """The driver and the clocks (MHz) at this moment; empty where nvidia-smi does not say."""
    card = f"GPU-{torch.cuda.get_device_properties().uuid}"  # an index would be that of all cards, hidden ones too
    command = ["nvidia-smi", f"--id={card}", f"--query-gpu={','.join(_GPU_STATE)}", "--format=csv,noheader,nounits"]
    try:
        line = subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(_GPU_STATE, (value.strip() for value in line.splitlines()[0].split(",")), strict=False))


def describe_versions(*more: str) -> dict[str, str]:
    """The versions of Python, fastpool, torch and what it depends on."""
    versions = {"python": platform.python_version()}
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    for name in ("fastpool", "torch", *more):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "unknown"
    return versions


def describe_commit() -> str:
    """The commit of this checkout, with "+changes" if files differ from it, results aside; "unknown" outside of one,
    and where fastpool does not come from it."""
    if not Path(fastpool.__file__).is_relative_to(ROOT / "python"):
        return "unknown"

    def git(*command: str) -> str:
        run = ["git", "--no-optional-locks", *command]
        return subprocess.run(run, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--", ":/", ":!/benchmarks/results")
        return git("rev-parse", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
