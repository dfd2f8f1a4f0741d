"""`fastpool env`: what a bug report needs to say about the machine and the build."""

import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from . import functional
from .backends import native
from .dispatch import BACKENDS
from .text import told
from .version import __version__

# Each package with the names it is published under. Asked of the metadata: nothing here imports them.
_PACKAGES = {
    "torch": ("torch",),
    "triton": ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm"),
    "numpy": ("numpy",),
    "sentence-transformers": ("sentence-transformers",),
    "transformers": ("transformers",),
}
_VARIABLES = ("FASTPOOL_BACKEND", "FASTPOOL_VALIDATE", "TRITON_INTERPRET", "OMP_NUM_THREADS")


def _version(published: tuple[str, ...]) -> str | None:
    for name in published:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return None


def _versions() -> dict[str, str | None]:
    python = f"{platform.python_version()} ({platform.python_implementation()})"
    packages = {name: _version(published) for name, published in _PACKAGES.items()}
    # What runs is what counts, should the metadata say something else.
    return {"fastpool": __version__, "python": python, **packages, "torch": str(torch.__version__)}


def _cpu_model() -> str | None:
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or None
    model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return model[1] if model else platform.processor() or None


def _platform() -> dict[str, Any]:
    # A container or taskset may leave a process fewer cores than the machine has.
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "os": platform.platform(),
        "machine": platform.machine(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "usable_cores": usable,
        "torch_threads": torch.get_num_threads(),
    }


def _gpus() -> dict[str, Any]:
    devices = []
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(i)
            devices.append(
                {
                    "name": gpu.name,
                    "capability": f"{gpu.major}.{gpu.minor}",
                    "memory_gb": round(gpu.total_memory / 1e9, 1),
                }
            )
    return {"torch_cuda": torch.version.cuda, "torch_hip": torch.version.hip, "devices": devices}


def _backends() -> dict[str, dict[str, Any]]:
    reasons = {name: module.unavailable() for name, module in BACKENDS.items()}
    return {name: {"available": reason is None, "reason": reason} for name, reason in reasons.items()}


def _native() -> dict[str, Any]:
    """How the native library was built and what it runs on this CPU; where there is none, what became of the build."""
    build = native.build_report()
    found: dict[str, Any] = {
        "folder": str(native.LIBRARY.parent),
        "built": build.get("built"),
        "build_error": build.get("reason") or None,
        "cuda": native.cuda_unavailable() is None,
        "cuda_reason": native.cuda_unavailable(),
    }
    if native.unavailable() is None and native.info is not None:
        info = native.info
        found |= {
            "isa": info.isa(),
            "isas": info.isas(),
            "compiler": info.compiler,
            "torch_version": info.torch_version,
            "cuda_architectures": info.cuda_architectures or None,
        }
    return found


def serves(device: torch.device) -> str:
    """The backend that pools tensors on this device. Raises ValueError where one was asked for that cannot."""
    explanation = functional.explain(torch.zeros(1, 1, 1, device=device), normalize=True)
    if explanation.backend is None:
        asked = explanation.asked
        raise ValueError(f"backend {asked!r} was asked for and cannot serve here: {explanation.reasons[asked]}")
    return explanation.backend


def _without_home(value: Any) -> Any:
    """The value with every home directory in it as ~: a report is made for posting, and need not name its author."""
    if isinstance(value, dict):
        return {key: _without_home(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_home(item) for item in value]
    if not isinstance(value, str):
        return value
    home = os.path.expanduser("~")
    if len(home) > 1:
        value = value.replace(home, "~")
    return re.sub(r"/(home|Users)/[^/\s]+", "~", value)


def collect() -> dict[str, Any]:
    """All of it, as JSON can hold it; None where something is not there."""
    found = {
        "versions": _versions(),
        "platform": _platform(),
        "gpu": _gpus(),
        "backends": _backends(),
        "native": _native(),
        "environment": {name: os.environ.get(name) for name in _VARIABLES},
    }
    cleaned: dict[str, Any] = _without_home(found)
    return cleaned


def _section(title: str, rows: dict[str, str | None]) -> list[str]:
    width = max(map(len, rows))
    return [title, *(f"  {name:<{width}}  {'-' if value is None else told(value)}" for name, value in rows.items()), ""]


def render(found: dict[str, Any]) -> str:
    """What `collect` found, for people."""
    machine, gpu, built = found["platform"], found["gpu"], found["native"]
    lines = _section("Versions", {name: version or "not installed" for name, version in found["versions"].items()})
    lines += _section(
        "Machine",
        {
            "os": f"{machine['os']}, {machine['machine']}",
            "cpu": machine["cpu"],
            "cores": f"{machine['cores']}, {machine['usable_cores']} usable, {machine['torch_threads']} torch threads",
            "torch's CUDA": gpu["torch_cuda"] or (f"HIP {gpu['torch_hip']}" if gpu["torch_hip"] else "none"),
            "gpus": "; ".join(f"{d['name']}, {d['capability']}, {d['memory_gb']} GB" for d in gpu["devices"]) or "none",
        },
    )
    lines += _section(
        "Backends",
        {name: "available" if one["available"] else f"no: {one['reason']}" for name, one in found["backends"].items()},
    )
    native_rows: dict[str, str | None] = {
        "folder": built["folder"],
        "built": {True: "yes", False: "no", None: "unknown"}[built["built"]],
        "build error": built["build_error"] or "none",
    }
    if "isa" in built:
        native_rows |= {
            "instruction set": f"{built['isa']}, of {', '.join(built['isas'])}",
            "compiler": built["compiler"],
            "against torch": built["torch_version"],
            "CUDA for": built["cuda_architectures"] or "no architectures",
        }
    native_rows["CUDA tensors"] = "available" if built["cuda"] else f"no: {built['cuda_reason']}"
    lines += _section("Native library", native_rows)
    lines += _section("Environment", {name: value or "not set" for name, value in found["environment"].items()})
    return "\n".join(lines).rstrip()
