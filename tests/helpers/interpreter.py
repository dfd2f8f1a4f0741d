"""Triton's interpreter without the half of its time in which it does nothing.

A launch replaces every builtin of triton.language by one that runs in numpy. So does every call of a function within
the kernel, which looks through all of the module's members again and finds them replaced. Here it looks at one member
first.
"""

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


@cache
def languages(function: Any) -> list[ModuleType]:
    """By which names it knows the builtins."""
    return [lang for lang in (tl, tl.core) if any(value is lang for value in function.__globals__.values())]


def quicken() -> None:
    """For this process, once."""
    replace: Callable[[Any], Any] = interpreter._patch_lang

    def replace_what_is_not(function: Any) -> Any:
        if not any(tl.core.is_builtin(lang.load) for lang in languages(function)):
            return interpreter._LangPatchScope()  # nothing to restore; whoever has launched the kernel does that
        return replace(function)

    interpreter._patch_lang = replace_what_is_not
