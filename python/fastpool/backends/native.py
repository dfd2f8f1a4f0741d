"""The C++ libraries: loads them, and tells them which threads asked for something else.

They fill the CPU key and the CUDA key of the ops, so torch's dispatcher calls them without any Python in between. Only
calls that Python's dispatch has had to look at first are run from here.
"""

import json
import platform
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..arguments import given
from ..calls import Call, Result

_PACKAGE = Path(__file__).parent.parent
LIBRARY = _PACKAGE / "libfastpool.so"
CUDA_LIBRARY = _PACKAGE / "libfastpool_cuda.so"
# Written by setup.py: {"built": bool, "reason": str, "cuda": {"built": bool, "reason": str}}.
BUILD_REPORT = _PACKAGE / "native_build.json"

info: ModuleType | None = None  # fastpool._native, once the library is loaded
_why_not: str | None = "the native library has not been loaded"
_why_not_cuda: str | None = "the CUDA library has not been loaded"


# The library's own functions once it is loaded, so that no signal can interrupt them. They tell what this thread asks
# for, and give the exception of a `keeping` kernel that became, in this thread, a RuntimeError of this text on its way
# through C++, or None, and keep none any more.
override_thread: Callable[[int], None] = lambda requested: None  # noqa: E731  # a variable: load() sets it
take_kept: Callable[[str], BaseException | None] = lambda text: None  # noqa: E731  # likewise

INHERIT, NATIVE, OTHER, AUTOMATIC = -1, 0, 1, 2  # requested backends, as in csrc/native.h
NEVER = 2**63 - 1  # bytes


def build_report() -> dict[str, Any]:
    """What setup.py wrote about the build; nothing where it did not."""
    try:
        found: dict[str, Any] = json.loads(BUILD_REPORT.read_text())
    except (OSError, ValueError):
        found = {}
    return found


def _because(reason: str | None) -> str:
    return f": {reason}" if reason else ""


def load() -> None:
    """Loads the libraries. The ops must be defined by then. What fails costs this backend, never the import."""
    global override_thread, take_kept, _why_not, _why_not_cuda
    _why_not = _load_cpu()
    if info is not None:
        override_thread, take_kept = info.override_thread, info.take_kept
    _why_not_cuda = _why_not or _load_cuda()


def _load_cpu() -> str | None:
    global info
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"native kernels need Linux on x86-64, this is {platform.system()} on {platform.machine()}"
    if not LIBRARY.exists():
        return f"the native library was not built{_because(build_report().get('reason'))}"
    try:
        # It links the library, which fills the ops as it is loaded: both are there, or neither.
        info = import_module("fastpool._native")
    except (OSError, ImportError, RuntimeError) as error:
        return f"the native library does not load: {error}"
    return None


def _load_cuda() -> str | None:
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    if not CUDA_LIBRARY.exists():
        return f"the CUDA library was not built{_because(build_report().get('cuda', {}).get('reason'))}"
    try:
        torch.ops.load_library(str(CUDA_LIBRARY))
    except (OSError, RuntimeError) as error:
        return f"the CUDA library does not load: {error}"
    return None


def unavailable() -> str | None:
    """Why this backend serves nothing here, or None."""
    return _why_not


def cuda_unavailable() -> str | None:
    """Why it serves no CUDA tensors, or None."""
    return _why_not_cuda


def supports(call: Call) -> str | None:
    """None where this backend can serve the call, else why not."""
    kind = call.tensor.device.type
    if kind == "cuda":
        return _why_not_cuda
    if _why_not is None and kind != "cpu":
        return f"native kernels are for CPU and CUDA tensors, not {kind}"
    return _why_not


def _direct(call: Call) -> Result:
    """Runs a call that Python's dispatch has looked at, by the op that this library fills, whatever this thread or
    process asks for."""
    assert info is not None
    op = getattr(torch.ops.fastpool, call.op_name).default
    by_place, by_name = given(call.op_name, call.values())
    try:
        info.set_direct(True)
        result: Result = op(*by_place, **by_name)
    finally:
        info.set_direct(False)
    return result


pool = pool_backward = l2_normalize = l2_normalize_backward = quantize = tokens = tokens_backward = _direct


def override_process(requested: int) -> None:
    """The backend of threads that have not requested one themselves, as one of these codes."""
    if info is not None:
        info.override_process(requested)


_python_first: set[str] = set()


def set_python_first(why: str, on: bool) -> None:
    """Whether all calls go through Python's dispatch, for this reason. They do as long as there is any."""
    (_python_first.add if on else _python_first.discard)(why)
    if info is not None:
        info.set_python_first(bool(_python_first))


def set_python_from(device_index: int, bytes: int) -> None:
    """From how many bytes of token states on calls on this CUDA device go through Python's dispatch where no backend is
    asked for; until it is told, all of them."""
    if info is not None:
        info.set_python_from(device_index, bytes)


def threads_before_fork() -> int:
    """How many threads the thread had at hand that forked this process, if it had pooled; 0 if not several."""
    return 0 if info is None else int(info.threads_before_fork())


def set_threads_before_fork(threads: int) -> None:
    """The same where another backend had pooled: this library leaves threads alone then, too."""
    if info is not None:
        info.set_threads_before_fork(threads)


def keeping(kernel: Callable[..., Result]) -> Callable[..., Result]:
    """The kernel, to be called by the library: what it raises is kept for `take_kept`."""
    return kernel if info is None else info.keeping(kernel)
