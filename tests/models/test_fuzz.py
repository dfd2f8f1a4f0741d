"""Model folders with anything in their files: what is wrong comes out as FileNotFoundError or ValueError that names a
file, from reading, from what engines make of it, from tokenising and from applying it; nothing else does.

`make fuzz` tries many more of them than the tests do."""

import io
import json
import os
import shutil
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.model_folders import BERT, DENSE, MEAN, OLD, QWEN, modules
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastpool import PoolingConfig
from fastpool.models import engines
from fastpool.models.files import Folder
from fastpool.models.tokens import checked

save = pytest.importorskip("safetensors.torch").save
EXAMPLES = int(os.environ.get("FUZZ", "300"))
TOKENIZER = {
    "version": "1.0",
    "model": {"type": "WordLevel", "vocab": {"word": 0, "[CLS]": 1}, "unk_token": "word"},
    "post_processor": {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}], "pair": [],
                       "special_tokens": {}},
}  # fmt: skip
TYPES = {name: OLD + name for name in ("Transformer", "Pooling", "Dense", "LayerNorm", "Normalize")}
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
]  # fmt: skip
NAMES = sorted({name for folder in FOLDERS for name in folder})

WORDS = sorted(
    {
        "mean",
        "last",
        "cls",
        "..",
        "/",
        "",
        "a" * 300,
        "\0",
        "\ud800",
        "1_Pooling",
        "sentence_embedding",
        "0_Transformer",
    }
    | {*TYPES.values(), OLD + "Router", "x.Transformer", "token_embeddings", "torch.nn.modules.linear.Identity"}
)
NUMBERS = st.sampled_from([0, 1, 2, 4, 8, 16, -1, 2**31, 2**63, 10**400, 0.5, 512.0, float("nan"), float("inf")])
SCALARS = st.none() | st.booleans() | NUMBERS | st.sampled_from(WORDS) | st.text(max_size=8)
KEYS = sorted({key for folder in FOLDERS for file in folder.values() if isinstance(file, dict) for key in file})
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=6,
)
BYTES = st.binary(max_size=64) | st.sampled_from(
    [b"[" * 5000, b'{"a":' * 5000, b"\xef\xbb\xbf{}", b"1e999", b"-", b"9" * 9999]
)

tried = 0


def places(document: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Of every value in a document, the keys that lead there."""
    inner = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    return [at, *(place for key, value in inner for place in places(value, (*at, key)))]


@st.composite
def damaged(draw: Any) -> dict[str, Any]:
    """One of the folders with some of its values, files and keys changed, gone or added."""
    files = deepcopy(draw(st.sampled_from(FOLDERS)))
    for _ in range(draw(st.integers(1, 4))):
        name = draw(st.sampled_from(sorted(files) or NAMES))
        what = draw(st.sampled_from(["value", "value", "value", "key", "gone", "file", "bytes", "cut"]))
        content = files.get(name, {})
        if what == "file":
            files[draw(st.sampled_from(NAMES))] = draw(JSON)
        elif what == "bytes":
            files[name] = draw(BYTES)
        elif what == "cut" or isinstance(content, bytes):
            whole = content if isinstance(content, bytes) else json.dumps(content).encode()
            at = draw(st.integers(0, len(whole)))
            files[name] = whole[:at] + (b"" if what == "cut" else draw(BYTES) + whole[at + draw(st.integers(0, 8)) :])
        else:
            place = draw(st.sampled_from(places(content)))
            if not place:
                files[name] = draw(JSON)
                continue
            *way, last = place
            holder = content
            for key in way:
                holder = holder[key]
            if what == "gone":
                del holder[last]
            elif what == "key" and isinstance(holder, dict):
                holder[draw(st.sampled_from(KEYS))] = draw(JSON)
            else:
                holder[last] = draw(JSON)
    return files


def build(root: Path, files: dict[str, Any]) -> Path:
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for name, content in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return root


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
    return None


@given(damaged())
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
def test_errors_name_a_file(tmp_path_factory, files):
    global tried
    tried += 1
    root = build(tmp_path_factory.getbasetemp() / "damaged", files)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # guesses
        config = outcome(lambda: PoolingConfig.from_pretrained(root), root)
    if config is None:
        return
    outcome(lambda: checked(Folder(root), config), root)
    outcome(lambda: engines.answers(Folder(root), config), root)
    width = config.width if config.width is not None and config.width < 100 else 8
    # Where the folder does not say how many columns there are, 8 may be the wrong number, and the call's fault.
    names = ["fastpool."] if config.width is None else []
    result = outcome(lambda: config.apply(torch.randn(2, 3, width)), root, *names)
    assert result is None or result.shape[0] == 2


@pytest.fixture(scope="module", autouse=True)
def _say_how_many(request: pytest.FixtureRequest) -> Any:
    yield
    if "FUZZ" in os.environ:
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\n{tried} folders were tried")
