"""benchmarks/host_time.py counts what a call costs the host; its figures are no test's affair."""

import pytest
import torch

pytest.importorskip("triton")  # a reason to skip: there is no Triton for every platform

import fastpool
from benchmarks import host_time  # after the skip
from fastpool import known
from fastpool.testing import same_bits


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter, which it needs, is chosen before a GPU's")
def test_every_part_of_every_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing of it stays: afterwards kernels run again, and values are checked."""
    planned = []
    remembered = known._remembered
    monkeypatch.setattr(known, "_remembered", lambda key: planned.append(key) or remembered(key))
    found = host_time.triton(repeats=3)
    assert list(found) == list(host_time.cases())
    assert all(
        set(row) == {"Python, again", "Python, new", "op, again", "without C++", "op, new"} for row in found.values()
    )
    # New: each time, and once for what is warmed up; again: the first time at most.
    assert len(planned) >= len(found) * 2 * 3
    hidden = torch.randn(2, 5, 8)
    with fastpool.backend("triton"):
        assert same_bits(fastpool.mean(hidden), fastpool.sum(hidden) / 5)
        with pytest.raises(ValueError, match="lengths must lie between 0 and 5"):
            fastpool.mean(hidden, lengths=torch.tensor([1, 6]))
