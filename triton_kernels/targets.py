"""GPUs that programs are compiled for, by their names."""

import os
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from triton.backends.compiler import GPUTarget

from ..text import shown


def parse_target(text: str) -> GPUTarget:
    """cuda:90 or hip:gfx942. Raises ValueError for anything else."""
    if cuda := re.fullmatch("cuda:([0-9]{1,6})", text):
        return GPUTarget("cuda", int(cuda[1]), 32)
    if hip := re.fullmatch("hip:(gfx[0-9a-f]+)", text):
        return GPUTarget("hip", hip[1], 64 if hip[1].startswith("gfx9") else 32)
    raise ValueError(f"a target must look like cuda:90 or hip:gfx942, got {shown(text)}")


# What compiles a kernel that does nothing, given by its file, for a target; and that kernel, in Triton's own language.
_PROBE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
file, backend, arch, warp_size = sys.argv[1:]
triton.compile(file, target=GPUTarget(backend, int(arch) if backend == "cuda" else arch, int(warp_size)))
"""
_KERNEL = "module { tt.func public @probe(%x: !tt.ptr<f32>) { tt.return } }"


def check_target(target: GPUTarget) -> None:
    """Raises ValueError for a GPU that this Triton's compilers do not know. They are asked in a process of their own,
    as some of them abort theirs."""
    with TemporaryDirectory() as folder:
        file = Path(folder, "probe.ttir")
        file.write_text(_KERNEL)
        command = [sys.executable, "-c", _PROBE, file, target.backend, str(target.arch), str(target.warp_size)]
        environment = {**os.environ, "TRITON_CACHE_DIR": folder}
        done = subprocess.run(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True)
    if done.returncode:
        said = last_words(done.stderr.decode(errors="replace"))
        raise ValueError(f"this Triton cannot compile for {target.backend}:{target.arch}: {said}")


def last_words(text: str) -> str:
    """The last line of what compilers say, but how to say it again."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("Repro command:")]
    return lines[-1] if lines else "it does not say why"
