"""A small BERT with random weights, for what needs a model that loads and runs, and SPLADE models."""

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


def tiny_masked_bert(folder: Path) -> Path:
    """The same with the head of a masked language model, whose logits are those of WORDS."""
    import transformers

    tiny_bert(folder)
    torch.manual_seed(1)
    transformers.BertForMaskedLM(transformers.BertConfig.from_pretrained(folder)).save_pretrained(folder)
    return folder


def sparse_encoder(masked: Path, pooling: str = "max", activation: str = "relu", **options: Any) -> Any:
    """sentence-transformers' SparseEncoder around a folder with a masked language model."""
    from sentence_transformers import SparseEncoder
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    steps = [Transformer(str(masked), transformer_task="fill-mask")]
    steps.append(SpladePooling(pooling, activation_function=activation))
    return SparseEncoder(modules=steps, device="cpu", **options)
