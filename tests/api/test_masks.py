"""Integer masks hold 0 and 1: one that numbers the texts of a row must not be read as one text."""

from typing import Any

import pytest
import torch

import fastpool
from fastpool import dispatch
from fastpool.backends import native
from fastpool.calls import PoolCall
from fastpool.modes import MODES
from fastpool.testing import cpu_backends, function_of, gradients, required, same_bits

UNSIGNED = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)
SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)


def words(mode: str, at: str, value: int) -> str:
    return (
        f"fastpool.{mode}: mask must hold 0 and 1 alone, got mask[{at}] = {value}; "
        "where it numbers the texts of a row, fastpool.segments(ids) gives their starts and ends"
    )


def check(mode: str, arguments: dict[str, Any], at: str, value: int) -> None:
    """Function, where gradients are recorded too, and raw op."""
    arguments = {**arguments, **required(mode, arguments["hidden"].shape)}
    recorded = {**arguments, "hidden": arguments["hidden"].clone().requires_grad_()}
    for given in (arguments, recorded):
        with pytest.raises(ValueError) as caught:  # noqa: PT011  # compared below
            function_of(mode)(**given)
        assert str(caught.value) == words(mode, at, value)
    with pytest.raises(ValueError) as raw:  # noqa: PT011  # compared below
        getattr(torch.ops.fastpool, mode)(**arguments)
    assert str(raw.value).splitlines()[0] == words(mode, at, value)


@pytest.mark.parametrize("backend", cpu_backends())
@pytest.mark.parametrize("mode", MODES)
def test_every_place(mode: str, backend: str) -> None:
    """Within and beside a leaf, at either end, behind padding, with any stride."""
    places = (0, 1, 31, 32, 70, 99) if backend == "native" else (0, 40, 99)
    with fastpool.backend(backend):
        for at in places:
            mask = torch.ones(3, 100, dtype=torch.int64)
            mask[2, at] = 2
            for layout in (mask, mask.T.contiguous().T):
                check(mode, {"hidden": torch.randn(3, 100, 8), "mask": layout}, f"2, {at}", 2)
        mask = torch.zeros(2, 100, dtype=torch.int64)
        mask[1, 50] = 7  # the only real token
        check(mode, {"hidden": torch.randn(2, 100, 8), "mask": mask}, "1, 50", 7)
        mask[1, 50], mask[1, 49], mask[1, 51] = -1, 1, 1
        check(mode, {"hidden": torch.randn(2, 100, 8), "mask": mask}, "1, 50", -1)


@pytest.mark.parametrize("backend", cpu_backends())
@pytest.mark.parametrize("dtype", [*UNSIGNED, *SIGNED], ids=str)
def test_every_dtype(dtype: torch.dtype, backend: str) -> None:
    largest = torch.iinfo(dtype)
    for value in (2, largest.max, *((-1, largest.min) if dtype in SIGNED else ())):
        wrapped = value if value < 2**63 else value - 2**64  # torch takes no larger numbers
        mask = torch.tensor([[0, 1, 1, 0], [0, 1, wrapped, 0]]).to(dtype)
        with fastpool.backend(backend):
            check("mean", {"hidden": torch.randn(2, 4, 8), "mask": mask}, "1, 2", value)
            check(
                "mean", {"hidden": torch.randn(4, 8), "mask": mask[1], "cu_seqlens": torch.tensor([0, 4])}, "2", value
            )


@pytest.mark.parametrize("backend", cpu_backends())
def test_where_it_is_looked_at(backend: str) -> None:
    """Within segments, in their order."""
    hidden, mask = torch.randn(10, 8), torch.ones(10, dtype=torch.int32)
    mask[2], mask[7] = 3, 4
    with fastpool.backend(backend):
        bounds = {"starts": torch.tensor([5, 0]), "ends": torch.tensor([9, 4])}
        check("mean", {"hidden": hidden, "mask": mask, **bounds}, "7", 4)
        outside = {"starts": torch.tensor([8, 0]), "ends": torch.tensor([9, 2])}
        assert same_bits(fastpool.mean(hidden, mask, **outside), fastpool.mean(hidden, **outside))
        padded = {"hidden": hidden[None], "mask": mask[None], "starts": torch.tensor([3])}
        check("max", padded, "0, 7", 4)
        fastpool.max(**padded, ends=torch.tensor([7]))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_on_threads(threads: int) -> None:
    """Long and short segments, split and whole."""
    torch.set_num_threads(threads)
    hidden, mask = torch.randn(4, 5000, 64), torch.ones(4, 5000, dtype=torch.int64)
    for b, at in ((0, 0), (1, 2500), (3, 4999)):
        mask[b, at] = 2
        for mode in ("mean", "last"):
            check(mode, {"hidden": hidden, "mask": mask}, f"{b}, {at}", 2)
        mask[b, at] = 1


@pytest.mark.parametrize("backend", cpu_backends())
def test_bool_masks_need_no_look(backend: str) -> None:
    """Whatever byte stands for true."""
    hidden, bytes = torch.randn(2, 70, 8), torch.randint(0, 256, (2, 70), dtype=torch.uint8)
    bytes[:, 3:40] = torch.tensor([1, 2] * 18 + [4])
    with fastpool.backend(backend):
        for mode in MODES:
            own = required(mode, hidden.shape)
            found = function_of(mode)(hidden, mask=bytes.view(torch.bool), **own)
            assert same_bits(found, function_of(mode)(hidden, mask=bytes != 0, **own))


@pytest.mark.parametrize("backend", cpu_backends())
def test_gradients_have_seen_it(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward call has checked the mask, which costs the backward one nothing."""
    looks: list[str] = []
    monkeypatch.setattr("fastpool.calls.segments.check_mask_values", lambda op, *given: looks.append(op))
    with fastpool.backend(backend):
        hidden, mask = torch.randn(2, 5, 8), torch.ones(2, 5).long()
        gradients(fastpool.mean, {"hidden": hidden, "mask": mask}, torch.ones(2, 8))
    assert looks == ([] if backend == "native" else ["fastpool.mean"])


def test_on_a_gpu_where_asked() -> None:
    """A meta tensor has no values to check, which shows whether they were asked for."""
    call = PoolCall("mean", torch.empty(1, 2, 8, device="meta"), torch.ones(1, 2, device="meta").long())
    dispatch.check(call)
    fastpool.validate()
    with pytest.raises((NotImplementedError, RuntimeError)):
        dispatch.check(call)


def test_explain_and_compiled_calls_say_so_too() -> None:
    hidden, mask = torch.randn(1, 4, 8), torch.tensor([[1, 1, 2, 2]])
    with pytest.raises(ValueError, match="mask must hold 0 and 1 alone"):
        fastpool.explain(hidden, mask)
    assert native.unavailable() is None
    compiled = torch.compile(lambda hidden, mask: fastpool.mean(hidden, mask), fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="mask must hold 0 and 1 alone"):
        compiled(hidden, mask)
    assert compiled(hidden, mask.clamp(max=1)).shape == (1, 8)
