"""Results and gradients have the bits that they had: digests.py, over the backends that take seconds."""

import re

import digests
import pytest
import torch

from fastpool.modes import MODES
from fastpool.testing import LAYOUTS


@pytest.mark.parametrize("backend", [name for name in digests.here() if name != "triton"])
def test_bits_are_what_they_were(backend: str) -> None:
    with digests.on(backend):
        assert digests.changed() == []


OWN = ("weights", "scores", "query")


def test_every_mode_on_record_has_all_its_digests() -> None:
    known = digests.golden()
    on_record = {mode for mode in MODES if f"{mode}, special values" in known}
    assert on_record >= {"mean", "mean_sqrt_len", "sum", "max", "cls", "last", "weighted_mean"}
    expected = {
        name for name, _ in digests.cases() if re.split(",| of ", name)[0] in {*on_record, "l2_normalize", "quantize"}
    }
    assert set(known) == expected
    for mode in on_record:
        for layout in LAYOUTS:
            assert any(f"{name}, float32, {layout}" in known for name in (mode, *(f"{mode} of {one}" for one in OWN)))


def test_another_bit_is_another_digest() -> None:
    result = torch.tensor([1.0, -0.0, torch.nan])
    found = set()
    for changed in (result, result.double(), result[None], result + 0.0, torch.nextafter(result, torch.tensor(2.0))):
        digest = digests.Digest()
        digest.add(changed)
        found.add(str(digest))
    assert len(found) == 5
    nan = digests.Digest()
    nan.add(torch.tensor([1.0, -0.0, -torch.nan]))
    assert str(nan) in found  # which NaN is not promised
