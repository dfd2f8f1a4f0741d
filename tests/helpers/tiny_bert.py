"""A small BERT with random weights, for what needs a model that loads and runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "one", "two", "three", "four", "five", "query"]


def tiny_bert(
    folder: Path, dtype: torch.dtype = torch.float32, change: Callable[[Any], object] = lambda model: None
) -> Path:
    """Two layers of 16 columns and their tokenizer in this folder, which is there; saved in `dtype` after `change`."""
    import transformers

    (folder / "vocab.txt").write_text("\n".join(WORDS))
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, **shape)
    model = transformers.BertModel(config).to(dtype)
    change(model)
    model.save_pretrained(folder)
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder
