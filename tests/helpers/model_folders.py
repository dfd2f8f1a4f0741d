"""Model folders, as the tests of fastpool.PoolingConfig write them."""

import json
import warnings
from pathlib import Path
from typing import Any

from fastpool import PoolingConfig

OLD = "sentence_transformers.models."
NEW = {
    "Transformer": "sentence_transformers.base.modules.transformer.Transformer",
    "Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
    "Dense": "sentence_transformers.base.modules.dense.Dense",
    "Normalize": "sentence_transformers.base.modules.normalize.Normalize",
}
BERT = {"architectures": ["BertModel"], "model_type": "bert", "hidden_size": 8}
QWEN = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 8}
DENSE = {"in_features": 8, "out_features": 4, "bias": True, "activation_function": "torch.nn.modules.linear.Identity"}
MEAN = {"embedding_dimension": 8, "pooling_mode": "mean"}
STRINGS = (
    *(("cls", "cls"), ("max", "max"), ("mean", "mean"), ("lasttoken", "last")),
    *(("mean_sqrt_len_tokens", "mean_sqrt_len"), ("weightedmean", "weighted_mean")),
)


def modules(*names: str, types: dict[str, str] | None = None) -> list[dict[str, Any]]:
    types = types or {name: OLD + name for name in ("Transformer", "Pooling", "Dense", "Normalize", "Dropout")}
    return [
        {"idx": i, "name": str(i), "path": f"{i}_{name}" if i else "", "type": types.get(name, name)}
        for i, name in enumerate(names)
    ]


def write(root: Path, files: dict[str, Any]) -> Path:
    """Files of a model folder: JSON, or text as it is."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return root


def read(root: Path, files: dict[str, Any]) -> PoolingConfig:
    """What a folder of these files says; guesses are in its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return PoolingConfig.from_pretrained(write(root, files))


def model(pooling: dict[str, Any], *after: str, **files: Any) -> dict[str, Any]:
    """A folder as sentence-transformers writes it."""
    return {
        "modules.json": modules("Transformer", "Pooling", *after),
        "1_Pooling/config.json": pooling,
        "config.json": BERT,
        **{name.replace("__", "/") + ".json": content for name, content in files.items()},
    }


def steps(*names: str) -> dict[str, Any]:
    """The same with these modules."""
    return {**model(MEAN), "modules.json": modules(*names)}


def dense(**changes: Any) -> dict[str, Any]:
    return model(MEAN, "Dense", **{"2_Dense__config": {**DENSE, **changes}})
