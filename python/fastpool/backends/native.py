"""The C++ library: loads it, and tells it which threads asked for something else.

It fills the CPU key of the ops, so torch's dispatcher calls it without any Python in between: nothing is run from here.
"""

import json
import platform
from importlib import import_module
from pathlib import Path
from types import ModuleType

from torch import Tensor

_PACKAGE = Path(__file__).parent.parent
LIBRARY = _PACKAGE / "libfastpool.so"
# Written by setup.py: {"built": bool, "reason": str}.
BUILD_REPORT = _PACKAGE / "native_build.json"

info: ModuleType | None = None  # fastpool._native, once the library is loaded
_why_not: str | None = "the native library has not been loaded"


def load() -> None:
    """Loads the library. The ops must be defined by then. What fails costs this backend, never the import."""
    global info, _why_not
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        _why_not = f"native kernels need Linux on x86-64, this is {platform.system()} on {platform.machine()}"
        return
    if not LIBRARY.exists():
        _why_not = "the native library was not built"
        if BUILD_REPORT.exists():
            _why_not += f": {json.loads(BUILD_REPORT.read_text())['reason']}"
        return
    try:
        # It links the library, which fills the ops as it is loaded: both are there, or neither.
        info = import_module("fastpool._native")
    except (OSError, ImportError, RuntimeError) as error:
        _why_not = f"the native library does not load: {error}"
        return
    _why_not = None


def unavailable() -> str | None:
    """Why this backend serves nothing here, or None."""
    return _why_not


def refuses(tensor: Tensor) -> str | None:
    if _why_not is not None:
        return _why_not
    if tensor.device.type != "cpu":
        return f"this version's native kernels are for CPU tensors, not {tensor.device.type}"
    return None


def redirect_process(on: bool) -> None:
    """Whether calls go through Python's dispatch in threads that have no wish of their own."""
    if info is not None:
        info.redirect_process(on)


def redirect_thread(on: bool | None) -> None:
    """The same for this thread; None: as the process."""
    if info is not None:
        info.redirect_thread(-1 if on is None else int(on))


def set_error(message: str) -> None:
    """Hands the message of a Python error to the C++ op that called."""
    if info is not None:
        info.set_error(message)
