"""Model folders with anything in their files: what is wrong comes out as FileNotFoundError or ValueError that names a
file, from reading, from what engines make of it, from tokenising and from applying it; nothing else does."""

import io
import json
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import torch
from helpers.model_folders import BERT, DENSE, MEAN, OLD, QWEN, modules
from helpers.nv_embed import CONFIG, weights
from safetensors.torch import save

from fastpool import PoolingConfig
from fastpool.models import engines
from fastpool.models.files import Folder
from fastpool.models.tokens import checked

TOKENIZER = {
    "version": "1.0",
    "model": {"type": "WordLevel", "vocab": {"word": 0, "[CLS]": 1}, "unk_token": "word"},
    "post_processor": {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}], "pair": [],
                       "special_tokens": {}},
}  # fmt: skip
TYPES = {
    name: OLD + name
    for name in ("Transformer", "Pooling", "Dense", "LayerNorm", "Normalize", "WeightedLayerPooling", "WordWeights")
}
TYPES |= {name: f"sentence_transformers.sparse_encoder.models.{name}" for name in ("MLMTransformer", "SpladePooling")}
TYPES["MultiVectorMask"] = "sentence_transformers.multi_vector_encoder.modules.multi_vector_mask.MultiVectorMask"
SURROUNDINGS: dict[str, Any] = {
    "tokenizer_config.json": {"padding_side": "left", "model_max_length": 512, "add_eos_token": True, "eos_token": "."},
    "tokenizer.json": TOKENIZER,
    "config_sentence_transformers.json": {"prompts": {"q": "q: "}, "default_prompt_name": "q", "truncate_dim": 3,
                                          "similarity_fn_name": "cosine", "model_type": "SentenceTransformer"},
    "sentence_bert_config.json": {"max_seq_length": 512, "transformer_task": "feature-extraction",
                                  "module_output_name": "token_embeddings", "tokenizer_args": {"add_eos_token": True}},
}  # fmt: skip


def _pickled(weights: dict[str, torch.Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    return buffer.getvalue()


LATENT = weights("latent_attention_model.")
FOLDERS: list[dict[str, Any]] = [
    {
        **SURROUNDINGS,
        "modules.json": modules("Transformer", "Pooling", "Dense", "LayerNorm", "Normalize", types=TYPES),
        "1_Pooling/config.json": {**MEAN, "pooling_mode": ["cls", "lasttoken"], "include_prompt": True},
        "2_Dense/config.json": {**DENSE, "in_features": 16, "module_input_name": "sentence_embedding"},
        "2_Dense/model.safetensors": save({"linear.weight": torch.ones(4, 16), "linear.bias": torch.ones(4)}),
        "3_LayerNorm/config.json": {"dimension": 4},
        "3_LayerNorm/pytorch_model.bin": _pickled({"norm.weight": torch.ones(4), "norm.bias": torch.ones(4)}),
        "4_Normalize/config.json": {"module_input_name": "sentence_embedding"},
        "config.json": {**BERT, "is_matryoshka": True, "matryoshka_dimensions": [2, 4], "pooling": "avg"},
    },
    {
        **SURROUNDINGS,
        "config.json": {**QWEN, "auto_map": {"AutoModel": "a.B"}, "is_causal": True, "use_bidirectional_attention": 0},
        "1_Pooling/config.json": {"word_embedding_dimension": 8, "pooling_mode_lasttoken": True},
    },
    {**SURROUNDINGS, "config.json": {"text_config": {**QWEN, "pooling": "last"}, "pooling_type": "CLS"}},
    {
        **SURROUNDINGS,
        "adapter_config.json": {"base_model_name_or_path": "some/base", "auto_mapping": {
            "base_model_class": "MistralModel", "parent_library": "transformers.models.mistral.modeling_mistral"}},
        "llm2vec_config.json": {"pooling_mode": "mean", "max_length": 512, "skip_instruction": True},
    },
    {
        "config.json": {"architectures": ["NVEmbedModel"], "hidden_size": 8, "padding_side": "right",
                        "is_mask_instruction": True, "latent_attention_config": CONFIG},
        "model.safetensors.index.json": {"weight_map": dict.fromkeys(LATENT, "model-1.safetensors")},
        "model-1.safetensors": save(LATENT),
    },
    {
        "modules.json": modules("Transformer", "WeightedLayerPooling", "WordWeights", "Pooling", types=TYPES),
        "1_WeightedLayerPooling/config.json": {"embedding_dimension": 8, "layer_start": 1, "num_hidden_layers": 2},
        "1_WeightedLayerPooling/model.safetensors": save({"layer_weights": torch.ones(2)}),
        "2_WordWeights/config.json": {"vocab": ["a", "B"], "word_weights": {"a": 2, "b": 5}, "unknown_word_weight": 3},
        "3_Pooling/config.json": MEAN,
        "config.json": {**BERT, "output_hidden_states": True},
    },
    {
        "modules.json": modules("Transformer", "Dense", "MultiVectorMask", "Normalize", types=TYPES),
        "1_Dense/config.json": {**DENSE, "module_input_name": "token_embeddings"},
        "2_MultiVectorMask/config.json": {"skiplist_words": ["!"], "skiplist_tasks": ["document"],
                                          "keep_only_token_ids": [1]},
        "3_Normalize/config.json": {"module_input_name": "token_embeddings"},
        "sentence_bert_config.json": {"query_length": 4, "document_length": 8,
                                      "query_expansion": {"strategy": "min", "attend": True, "length": 4}},
        "config_sentence_transformers.json": {"model_type": "MultiVectorEncoder", "similarity_fn_name": "maxsim"},
        "config.json": BERT,
    },
    {
        "modules.json": modules("Transformer", "pylate.models.Dense.Dense", types=TYPES),
        "1_pylate.models.Dense.Dense/config.json": DENSE,
        "config_sentence_transformers.json": {"model_type": "ColBERT", "similarity_fn_name": "MaxSim",
                                              "query_prefix": "[Q] ", "document_prefix": "[D] ", "query_length": 4,
                                              "document_length": 8, "skiplist_words": ["!"],
                                              "attend_to_expansion_tokens": True, "do_query_expansion": True},
        "config.json": BERT,
    },
    {
        "modules.json": modules("Transformer", "Pooling", "st_quantize.FlexibleQuantizer", types=TYPES),
        "1_Pooling/config.json": MEAN,
        "config.json": {**QWEN, "model_type": "bidirectional_pplx_qwen3", "use_bidirectional_attention": True},
    },
    {
        "modules.json": modules("MLMTransformer", "SpladePooling", types=TYPES),
        "1_SpladePooling/config.json": {"pooling_strategy": "sum", "activation_function": "relu",
                                        "embedding_dimension": 8},
        "sentence_bert_config.json": {"transformer_task": "fill-mask"},
        "config_sentence_transformers.json": {"model_type": "SparseEncoder", "max_active_dims": 4},
        "config.json": {"architectures": ["BertForMaskedLM"], "model_type": "bert", "vocab_size": 8,
                        "cls_token_id": 1, "sep_token_id": 2},
    },
]  # fmt: skip
NAMES = sorted({name for folder in FOLDERS for name in folder})
KEYS = sorted({key for folder in FOLDERS for file in folder.values() if isinstance(file, dict) for key in file})
WORDS = (
    *(
        "mean",
        "last",
        "cls",
        "..",
        "/",
        "",
        "a" * 300,
        "\0",
        "\ud800",
        "\033[2J\u202e\nfastpool: ",
        "1_Pooling",
        "0_Transformer",
    ),
    *("sentence_embedding", "token_embeddings", "torch.nn.modules.linear.Identity"),
    *(*TYPES.values(), OLD + "Router", "x.Transformer"),
)
NUMBERS = (0, 1, 2, 4, 8, 16, -1, 2**31, 2**63, 10**400, 0.5, 512.0, float("nan"), float("inf"))
BYTES = (b"[" * 5000, b'{"a":' * 5000, b"\xef\xbb\xbf{}", b"1e999", b"-", b"9" * 9999)
LETTERS = 'aZ0_.-/\\ \t\n"{}é漢\u2028\U0001f600'


def text(random: Random, longest: int = 8) -> str:
    return "".join(random.choices(LETTERS, k=random.randint(0, longest)))


def anything(random: Random, depth: int = 0) -> Any:
    """What a JSON file may hold."""
    kind = random.randrange(6 if depth < 3 else 5)
    if kind < 5:
        scalars = (None, random.random() < 0.5, random.choice(NUMBERS), random.choice(WORDS), text(random))
        return scalars[kind]
    few = range(random.randint(0, 4))
    if random.random() < 0.5:
        return [anything(random, depth + 1) for _ in few]
    keys = [random.choice(KEYS) if random.random() < 0.5 else text(random, 5) for _ in few]
    return {key: anything(random, depth + 1) for key in keys}


def some_bytes(random: Random) -> bytes:
    return random.choice(BYTES) if random.random() < 0.5 else random.randbytes(random.randint(0, 64))


def places(document: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Of every value in a document, the keys that lead there."""
    inner = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    return [at, *(place for key, value in inner for place in places(value, (*at, key)))]


def damage(files: dict[str, Any], random: Random) -> None:
    """Changes, adds or takes away a value, a key or a file."""
    name = random.choice(sorted(files) or NAMES)
    what = random.choice(("value", "value", "value", "key", "gone", "file", "bytes", "cut"))
    content = files.get(name, {})
    if what == "file":
        files[random.choice(NAMES)] = anything(random)
    elif what == "bytes":
        files[name] = some_bytes(random)
    elif what == "cut" or isinstance(content, bytes):
        whole = content if isinstance(content, bytes) else json.dumps(content).encode()
        at = random.randint(0, len(whole))
        rest = b"" if what == "cut" else some_bytes(random) + whole[at + random.randint(0, 8) :]
        files[name] = whole[:at] + rest
    elif place := random.choice(places(content)):
        *way, last = place
        holder = content
        for key in way:
            holder = holder[key]
        if what == "gone":
            del holder[last]
        elif what == "key" and isinstance(holder, dict):
            holder[random.choice(KEYS)] = anything(random)
        else:
            holder[last] = anything(random)
    else:
        files[name] = anything(random)


def build(root: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def outcome(step: Callable[[], Any], root: Path, *names: str) -> Any:
    """What it gives; None where it is an error, which is one of the two kinds and names a file of the folder, or what
    `names` has."""
    try:
        return step()
    except (FileNotFoundError, ValueError) as error:
        words, kind = str(error), type(error)
    assert kind in (FileNotFoundError, ValueError)
    assert any(name in words for name in (".json", ".safetensors", ".bin", str(root), *names)), words
    assert len(words) < 2000
    assert words.isprintable()
    return None


def attempt(random: Random, say: Callable[[str], None]) -> bool:
    files = deepcopy(random.choice(FOLDERS))
    for _ in range(random.choice((1, 1, 1, 2, 3, 4))):
        damage(files, random)
    say(repr(files))
    with TemporaryDirectory() as folder:
        root = Path(folder)
        build(root, files)
        return read(root)


def read(root: Path) -> bool:
    """Whether the folder could be read. Whatever follows may fail as well."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # guesses
        config = outcome(lambda: PoolingConfig.from_pretrained(root), root)
    if config is None:
        return False
    outcome(lambda: checked(Folder(root), config), root)
    outcome(lambda: engines.answers(Folder(root), config), root)
    width = config.width if config.width is not None and config.width < 100 else 8
    # Where the folder does not say how many columns there are, 8 may be the wrong number, and the call's fault.
    names = ["fastpool."] if config.width is None else []
    hidden: Any = torch.randn(2, 3, width)
    more = {} if config.word_weights is None else {"input_ids": torch.zeros(2, 3, dtype=torch.int64)}
    if config.layer_weights is not None:
        hidden = [hidden] * (min(config.layer_weights.num_hidden_layers, 99) + 1)
        names += ["fastpool."] if config.layer_weights.num_hidden_layers > 99 else []
    result = outcome(lambda: config.apply(hidden, **more), root, *names)
    assert result is None or result.shape[0] == 2
    return True
