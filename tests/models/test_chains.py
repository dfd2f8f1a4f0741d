"""Folders with any modules in any order that sentence-transformers runs: apply gives what its encode gives."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.model_folders import NEW, OLD, write
from helpers.tiny_bert import tiny_bert
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastpool import PoolingConfig
from fastpool.models.pooling import POOLING_MODES

safetensors = pytest.importorskip("safetensors.torch")
sentence_transformers = pytest.importorskip("sentence_transformers")
pytest.importorskip("transformers")

TEXTS = ["one two three", "four", "five four three two one", "two two query"]
WIDTH = 16  # of the tiny BERT
OTHER = NEW | {
    "LayerNorm": "sentence_transformers.sentence_transformer.modules.layer_norm.LayerNorm",
    "Dropout": "sentence_transformers.sentence_transformer.modules.dropout.Dropout",
}
SENTENCE = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
ACTIVATIONS = ("linear.Identity", "activation.Tanh", "activation.GELU", "activation.Sigmoid")
TOKENS, VECTOR, ASIDE = "token_embeddings", "sentence_embedding", "aside"


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("bert"))


@st.composite
def folders(draw: Any) -> dict[str, Any]:
    """The modules of a folder behind its Transformer, as (class, configuration), where the latter lies, and how much of
    the vector is kept."""
    width = {TOKENS: WIDTH}  # what modules have passed on so far, and its columns
    modules: list[tuple[str, dict[str, Any]]] = []

    def layer(name: str, reads: str, gives: str) -> None:
        config: dict[str, Any] = {}
        if name == "Dense":
            same = draw(st.booleans())
            outputs = width[reads] if same else draw(st.integers(3, 9))
            config = {"in_features": width[reads], "out_features": outputs, "use_residual": draw(st.booleans())}
            config |= {"bias": draw(st.booleans()), "activation_function": None}
            config["activation_function"] = f"torch.nn.modules.{draw(st.sampled_from(ACTIVATIONS))}"
            width[gives] = outputs
        elif name == "LayerNorm":
            config = {"dimension": width[reads]}
        elif name == "Normalize":
            width[gives] = width[reads]
        if name in ("Dense", "Normalize") and (reads, gives) != (VECTOR, VECTOR):
            config |= {"module_input_name": reads, "module_output_name": gives}
        modules.append((name, config))

    for name in draw(st.lists(st.sampled_from(["Dense", "Normalize"]), max_size=2)):
        layer(name, TOKENS, TOKENS)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2]))):  # of two, the second one counts
        modes = draw(st.lists(st.sampled_from(list(POOLING_MODES)), min_size=1, max_size=2, unique=True))
        said = draw(st.sampled_from([width[TOKENS], 5]))  # nobody reads it to pool
        key = draw(st.sampled_from(["embedding_dimension", "word_embedding_dimension"]))
        modules.append(("Pooling", {key: said, "pooling_mode": modes if len(modes) > 1 else modes[0]}))
        width[VECTOR] = width[TOKENS] * len(modes)
        for name in draw(st.lists(st.sampled_from(["Dense", "Normalize", "LayerNorm", "Dropout"]), max_size=4)):
            names = [VECTOR] * 6 + [ASIDE] * (ASIDE in width)
            reads, gives = (draw(st.sampled_from(names)) if name == "Dense" else VECTOR), VECTOR
            if name == "Dense" and reads == VECTOR:
                gives = draw(st.sampled_from([VECTOR, VECTOR, VECTOR, ASIDE]))
            layer(name, reads, gives)
    return {
        "modules": modules,
        "home": draw(st.sampled_from(["", "", "0_Transformer", "states of/tokens"])),
        "sentence": f"sentence_{draw(st.sampled_from(SENTENCE))}_config.json",
        "new": draw(st.booleans()),
        "pickled": draw(st.booleans()),
        "truncate_dim": draw(st.none() | st.integers(1, width[VECTOR])),
    }


def weights(name: str, config: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    if name == "LayerNorm":
        return {"norm.weight": drawn(config["dimension"]), "norm.bias": drawn(config["dimension"])}
    inputs, outputs = config["in_features"], config["out_features"]
    found = {"linear.weight": drawn(outputs, inputs) / inputs**0.5}
    if config["bias"]:
        found["linear.bias"] = drawn(outputs)
    if config["use_residual"] and inputs != outputs:
        found["residual.weight"] = drawn(outputs, inputs) / inputs**0.5
    return found


def build(root: Path, bert: Path, drawn: dict[str, Any]) -> Path:
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(bert, root / drawn["home"])
    types = {name: OTHER[name] if drawn["new"] else OLD + name for name in OTHER}
    entries = [{"idx": 0, "name": "0", "path": drawn["home"], "type": types["Transformer"]}]
    files: dict[str, Any] = {str(Path(drawn["home"], drawn["sentence"])): {"max_seq_length": 7}}
    for i, (name, config) in enumerate(drawn["modules"], 1):
        path = f"{i}_{name}"
        entries.append({"idx": i, "name": str(i), "path": path, "type": types[name]})
        if config or name != "Normalize":
            files[f"{path}/config.json"] = config
    files["modules.json"] = entries
    if drawn["truncate_dim"] is not None:
        files["config_sentence_transformers.json"] = {"truncate_dim": drawn["truncate_dim"]}
    write(root, files)
    for i, (name, config) in enumerate(drawn["modules"], 1):
        if name in ("Dense", "LayerNorm"):
            stored = root / f"{i}_{name}" / ("pytorch_model.bin" if drawn["pickled"] else "model.safetensors")
            (torch.save if drawn["pickled"] else safetensors.save_file)(weights(name, config, i), stored)
    return root


@given(folders())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_agrees_with_sentence_transformers(tmp_path_factory, bert, drawn):
    root = build(tmp_path_factory.getbasetemp() / "drawn", bert, drawn)
    theirs = sentence_transformers.SentenceTransformer(str(root), device="cpu")
    config = PoolingConfig.from_pretrained(root)
    # Where they truncate what is normalised, they normalise again only when asked.
    expected = theirs.encode(TEXTS, convert_to_tensor=True, normalize_embeddings=config.normalize)
    with torch.no_grad():
        states = theirs[0](theirs.preprocess(TEXTS))
    got = config.apply(states["token_embeddings"], states["attention_mask"])
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(got / scale, expected / scale, rtol=0, atol=1e-6)
    assert (config.width, config.max_length) == (WIDTH, 7)
    assert json.loads((root / "modules.json").read_text())[0]["path"] == drawn["home"]
