"""Builds of C++ for tests, in a folder of the checkout, where what has not changed is not compiled again."""

import fcntl
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Some build from a checkout that they may only read.
BUILD = ROOT / "build" if os.access(ROOT, os.W_OK) else Path(tempfile.gettempdir(), f"fastpool-build-{os.getuid()}")


def build(name: str, *options: str, target: str = "all") -> Path:
    """The folder of what CMakeLists.txt builds with these options. One process builds at a time: tests that run in
    several share the folder."""
    folder = BUILD / name
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DFASTPOOL_WERROR=ON", *options]
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
        for command in (configure, ["cmake", "--build", str(folder), "--target", target]):
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder
