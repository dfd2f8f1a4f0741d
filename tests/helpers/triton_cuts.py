"""The Triton kernels, with a GPU or in the interpreter, with the work cut up as a test likes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastpool import known
from fastpool.testing import Target, function_of, same_bits
from fastpool.triton_kernels import plan
from fastpool.triton_kernels.config import Config

TRITON = Target("triton", "cuda" if torch.cuda.is_available() else "cpu")
needs_interpreter = pytest.mark.skipif(
    TRITON.device == "cuda", reason="turns the interpreter's knobs; on a GPU the order of programs is the GPU's own"
)

Cut = Callable[..., None]


def cut_up(
    monkeypatch: pytest.MonkeyPatch,
    leaves: int,
    levels: int,
    warps: int = 1,
    programs: int | None = None,
    columns: int | None = None,
) -> None:
    """Has every call cut up like this, instead of as the heuristic would."""
    monkeypatch.setattr(plan, "choose", lambda shape, device: Config(leaves, levels, warps, loads=8))
    if programs is not None:
        monkeypatch.setattr(plan, "MAX_PROGRAMS", programs)
    if columns is not None:
        monkeypatch.setattr(plan, "row_columns", lambda width, element_size, warp_size: columns)
    known.forget()


def assert_reference_bits(mode: str, arguments: dict[str, Any], what: object = None, **more: Any) -> None:
    function = function_of(mode)
    expected = Target("reference", "cpu").run(function, **arguments, **more)
    assert same_bits(TRITON.run(function, **arguments, **more), expected), what
