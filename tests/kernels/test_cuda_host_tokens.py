"""Token outputs by the CUDA kernels, compiled for a CPU (tests/cpp/cuda_host), against the reference, bit for bit."""

from typing import Any

import pytest
import torch
from helpers.cuda_host import NATIVE, NEVER, Host, hostile_calls, raw
from helpers.token_outputs import LENGTHS, MORE
from torch import Tensor

import fastpool
from fastpool.calls import accumulator
from fastpool.testing import DTYPES, LAYOUTS, same_bits, sequences, special_values


def reference(arguments: dict[str, Any], **more: Any) -> tuple[Tensor, Tensor]:
    with fastpool.backend("reference"):
        values, cu_seqlens = NATIVE.tokens(**raw(arguments), **more)
    return values, cu_seqlens


def check(host: Host, arguments: dict[str, Any], clamped: dict[str, Any] | None = None, **more: Any) -> None:
    """Values, and the gradient of all of them; `clamped`: the same call, for the reference."""
    host.tune()  # another order of blocks and threads
    taken, total = raw(arguments), more.pop("total", None)
    expected, offsets = reference(clamped or arguments, **more)
    found = len(expected)
    if total is not None:
        kept = min(found, total)
        expected = torch.cat([expected[:kept], expected.new_zeros(total - kept, expected.shape[1])])
        offsets = offsets.clamp(max=total)
    values, cu_seqlens = host.ops.tokens(**taken, **more, total=total)
    assert same_bits(values, expected)
    assert torch.equal(cu_seqlens, offsets)
    if more.get("normalize") or "out_dtype" in more:
        return  # the same gradient
    hidden = taken["hidden"]
    gradient = torch.randn(expected.shape, dtype=accumulator(hidden.dtype))
    gradient[:, ::3] = -0.0
    given = [taken.get(name) for name in ("mask", "cu_seqlens", "starts", "ends")]
    of_host = host.ops._tokens_backward(gradient, hidden.new_empty(hidden.shape[-1:]).expand(hidden.shape), *given)
    longer = torch.zeros(max(found, len(gradient)), gradient.shape[1], dtype=gradient.dtype)
    longer[: len(gradient)] = gradient  # what was cut off gives nothing, as zeros do
    given = [raw(clamped or arguments).get(name) for name in ("mask", "cu_seqlens", "starts", "ends")]
    with fastpool.backend("reference"):
        of_reference = NATIVE._tokens_backward(longer, hidden, *given)
    assert same_bits(of_host, of_reference)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(host: Host, layout: str, dtype: torch.dtype) -> None:
    for width in (24, 77):  # rows of whole 16-byte pieces, and not
        arguments = LAYOUTS[layout].make(sequences(LENGTHS, width, dtype, holes=LAYOUTS[layout].holes), None)
        for more in MORE:
            check(host, arguments, **more)
        for total in (0, 5, 20, 300):
            check(host, arguments, total=total)
            check(host, arguments, total=total, normalize=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_and_wide(host: Host, dtype: torch.dtype) -> None:
    """Several rounds of a block over a segment's rows, over columns, and over segments."""
    hidden, mask = torch.randn(2, 700, 1100).to(dtype), torch.rand(2, 700) > 0.4
    check(host, {"hidden": hidden[:, :40], "mask": mask[:, :40]}, normalize=True)
    check(host, {"hidden": hidden[..., :8], "mask": mask})
    starts = torch.arange(600) % 37
    check(host, {"hidden": hidden[0, :, :5], "starts": starts, "ends": starts + 3})
    check(host, {"hidden": hidden[0, :40, :1100], "mask": mask[0, :40], "starts": starts[:9], "ends": starts[:9] + 3})


def test_overlapping_segments(host: Host) -> None:
    hidden, mask = torch.randn(300, 19), torch.rand(300) > 0.3
    starts = torch.tensor([200, 0, 100, 0, 90, 150, 299, 300])
    ends = torch.tensor([300, 299, 260, 40, 90, 160, 300, 300])
    for given in ({}, {"mask": mask}):
        arguments = {"hidden": hidden, "starts": starts, "ends": ends, **given}
        for total in (None, 100, 450, 900):
            check(host, arguments, total=total)


def test_special_values(host: Host) -> None:
    for dtype in DTYPES:
        hidden = special_values(6, 40, 36).to(dtype)
        check(host, {"hidden": hidden, "mask": torch.rand(6, 40) > 0.3}, normalize=True)
        check(host, {"hidden": hidden, "mask": torch.rand(6, 40) > 0.3})


def test_nothing(host: Host) -> None:
    index = torch.zeros(0, dtype=torch.int64)
    for arguments in (
        {"hidden": torch.ones(0, 5, 4)},
        {"hidden": torch.ones(3, 0, 4)},
        {"hidden": torch.ones(3, 5, 0)},
        {"hidden": torch.ones(3, 5, 4), "mask": torch.zeros(3, 5, dtype=torch.int64)},
        {"hidden": torch.ones(0, 4), "cu_seqlens": torch.zeros(1, dtype=torch.int32)},
        {"hidden": torch.ones(7, 4), "starts": index, "ends": index},
    ):
        check(host, arguments)
        check(host, arguments, total=3, normalize=True)


def test_bounds_that_point_anywhere(host: Host) -> None:
    """They are clamped; where cu_seqlens decrease, results may be anything, and nothing else is read or written."""
    for arguments, clamped in hostile_calls(60):
        if clamped is not None:
            check(host, arguments, clamped)
            check(host, arguments, clamped, total=50)
        else:
            values, cu_seqlens = host.ops.tokens(**arguments)
            assert len(values) == cu_seqlens[-1]
            given = None, arguments["cu_seqlens"], None, None
            host.ops._tokens_backward(torch.ones(50, 16), arguments["hidden"], *given)


def test_who_waits(host: Host) -> None:
    """The host, once, where data alone tells how many tokens there are; and never in a graph."""
    hidden, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    packed = {"hidden": hidden.flatten(0, 1), "cu_seqlens": torch.tensor([0, 5, 10])}
    for arguments, waits in (
        ({"hidden": hidden}, 0),
        ({"hidden": hidden, "mask": mask}, 1),
        ({"hidden": hidden, "ends": torch.tensor([2, 5])}, 1),
        (packed, 1),
    ):
        before = host.control.waits
        host.ops.tokens(**arguments)
        assert host.control.waits - before == waits
        host.ops.tokens(**arguments, total=10)
        assert host.control.waits - before == waits
        host.control.capturing = True
        host.ops.tokens(**arguments, total=10)
        if waits:
            with pytest.raises(RuntimeError, match=r"fastpool\.tokens: in a CUDA graph total must be given"):
                host.ops.tokens(**arguments)
        host.control.capturing = False
        assert host.control.waits - before == waits


def test_launches(host: Host) -> None:
    hidden, mask = torch.randn(2, 5, 8), torch.ones(2, 5).bool()
    for arguments, launches in (({"hidden": hidden}, 3), ({"hidden": hidden, "mask": mask}, 4)):
        before = host.control.launches
        host.ops.tokens(**arguments, normalize=True)
        assert host.control.launches - before == launches


def test_calls_of_any_size_run_here(host: Host) -> None:
    """No other backend of a GPU has them; one that is asked for gets them all the same."""
    hidden = torch.randn(2, 5, 8)
    host.set_python_from(0, 1)
    try:
        before = host.control.launches
        host.ops.tokens(hidden)
        assert host.control.launches - before == 3
    finally:
        host.set_python_from(0, NEVER)
    host.override_thread(1)  # OTHER
    try:
        before = host.control.launches
        values, _ = host.ops.tokens(hidden)
        assert host.control.launches == before
    finally:
        host.override_thread(-1)
    assert same_bits(values, hidden.flatten(0, 1))
