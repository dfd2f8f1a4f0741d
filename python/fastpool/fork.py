"""Children of a process that has pooled, with several threads at hand.

A fork copies torch's pool of threads and none of the threads: the child's next parallel loop, one of torch's own too,
waits for them for ever. So such a child has one thread. The native library sees to itself, even where torch is asked
for more later (csrc/threads.cpp); torch is told here, as the child begins, since a model may run before anything is
pooled. The child's first call says so.

The pool belongs to the thread that began it, so what counts is what the thread that forks has done before. Any call
counts, however small, since what it pooled came from a model, which had threads. What was done by torch alone nobody
can ask for; where that was all, the child is left as torch leaves it.
"""

import os
import sys
import threading
import warnings
from typing import Any

import torch

from . import known
from .backends import native

_thread = threading.local()  # threads: how many the reference has used in this one
_before_fork = 0  # threads that were lost; in a child's own children too
_unsaid: dict[str, int] = {}


def start() -> None:
    """Called once, with the native library loaded."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_in_child)


def used_threads() -> None:
    """This thread runs loops of torch's for a call."""
    if (threads := torch.get_num_threads()) > 1:
        _thread.threads = threads


def _in_child() -> None:
    global _before_fork
    _before_fork = native.threads_before_fork() or getattr(_thread, "threads", 0) or _before_fork
    if not _before_fork:
        return
    native.set_threads_before_fork(_before_fork)
    if torch.get_num_threads() == 1:  # as somebody wants it
        return
    torch.set_num_threads(1)
    # Graphs are compiled for a number of threads, so again, and Inductor's processes are no longer there to do it.
    inductor: Any = sys.modules.get("torch._inductor.config")
    if inductor is not None:
        inductor.compile_threads = 1
    _unsaid["threads"] = _before_fork
    known.forget()  # so that the next call is one that `dispatch` has to look at
    native.set_python_first("fork", True)


def warn() -> None:
    """What a child has to say, once."""
    threads = _unsaid.pop("threads", 0)
    if not threads:
        return
    native.set_python_first("fork", False)
    torch.set_num_threads(1)  # the way a worker begins may have been to ask for more
    warnings.warn(
        f"fastpool and torch run with one thread in process {os.getpid()}: before it was forked, fastpool had pooled "
        f"with {threads} threads at hand, which a fork leaves behind, and torch's own operations would wait for them "
        "for ever. To have threads, fork before the first call, or start processes by spawn or forkserver. If one "
        "thread is what each process should have, call torch.set_num_threads(1) in the parent before it pools, and "
        "nothing is said",
        RuntimeWarning,
        stacklevel=_callers_level(),
    )


def _callers_level() -> int:
    """The stack level, for `warn`, of the line that has called fastpool."""
    level, frame = 0, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("fastpool", "torch"):
        level, frame = level + 1, frame.f_back
    return level + 1
