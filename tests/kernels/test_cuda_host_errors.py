"""What the CUDA ops refuse, on a CPU (tests/cpp/cuda_host): in Python's words; without it, by the argument's name."""

from typing import Any

import pytest
import torch
from helpers.cuda_host import NATIVE, Host

from fastpool.backends import native

HIDDEN = torch.randn(2, 5, 8)
REFUSED: list[tuple[str, str, dict[str, Any]]] = [
    ("mean", "hidden", {"hidden": HIDDEN.long()}),
    ("mean", "mask", {"hidden": HIDDEN, "mask": HIDDEN[..., 0]}),
    ("mean", "truncate_dim", {"hidden": HIDDEN, "truncate_dim": 9}),
    ("l2_normalize", "truncate_dims", {"x": HIDDEN, "truncate_dims": torch.ones(2)}),
    ("l2_normalize", "truncate_dims", {"x": HIDDEN, "truncate_dims": torch.ones(2).int()}),
    ("l2_normalize", "truncate_dims", {"x": HIDDEN, "truncate_dims": torch.ones(2, 8).int()}),
]


@pytest.mark.parametrize(("op", "argument", "arguments"), REFUSED)
def test_errors_are_pythons(host: Host, op: str, argument: str, arguments: dict[str, Any]) -> None:
    """An argument that is refused is explained by the op's Python kernel, whose error is kept for the op's object: such
    these ops have none. Without Python, it is named."""
    with pytest.raises((TypeError, ValueError), match=f"^fastpool.{op}: {argument} must ") as proper:
        getattr(NATIVE, op)(**arguments)
    with pytest.raises(RuntimeError):
        getattr(host.ops, op)(**arguments)
    assert isinstance(native.take_kept(str(proper.value)), proper.type)
    host.set_python(False)
    try:
        with pytest.raises(RuntimeError, match=f"fastpool.{op}: not a valid argument: {argument}"):
            getattr(host.ops, op)(**arguments)
    finally:
        host.set_python(True)
