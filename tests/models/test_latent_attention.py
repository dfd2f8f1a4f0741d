"""Folders of NV-Embed and its like: each token through latent attention, then the mean."""

import json
import pickle
from typing import Any

import pytest
import torch
from helpers.model_folders import BERT, MEAN, model, read, write
from helpers.nv_embed import CONFIG, token_states, weights

from fastpool import PoolingConfig
from fastpool.cli import main
from fastpool.models import LatentAttention, engines
from fastpool.models.files import Folder

NV_EMBED = {
    **{"architectures": ["NVEmbedModel"], "auto_map": {"AutoModel": "modeling_nvembed.NVEmbedModel"}},
    **{"model_type": "nvembed", "hidden_size": 8, "padding_side": "right", "is_mask_instruction": True},
    "latent_attention_config": CONFIG,
}
SAID = "config.json: latent_attention_config"
INSTRUCTION = "leaves the instruction out, but for its last token"


def nv_embed(**changes: Any) -> dict[str, Any]:
    return {"config.json": {**NV_EMBED, **changes}}


def test_what_it_says(tmp_path):
    config = read(tmp_path, nv_embed())
    assert (config.modes, config.normalize, config.include_prompt, config.width) == (("mean",), True, False, 8)
    assert config.padding_side == "right"
    sources = {one.what: (one.source, one.certainty) for one in config.decisions}
    assert sources["modes"] == sources["token_layers"] == (SAID, "stated")
    assert sources["normalize"] == (f"{SAID}: output_normalize", "stated")
    assert sources["include_prompt"] == ("config.json: is_mask_instruction", "stated")
    assert engines.describe(config) == "each token through latent attention, mean without the prompt, normalised"
    assert any("embedding_model" in text for text in config.warnings)
    assert any(INSTRUCTION in text for text in config.warnings)
    assert config.contradictions == ()


@pytest.mark.parametrize("changes", [{"is_mask_instruction": False}, {"padding_side": "left"}])
def test_instructions_that_are_pooled(tmp_path, changes):
    config = read(tmp_path, nv_embed(**changes))
    assert config.include_prompt
    assert not any(INSTRUCTION in text for text in config.warnings)


def test_what_is_left_out_is_nv_embed_s(tmp_path):
    config = read(tmp_path, {"config.json": {"architectures": ["NVEmbedModel"]}})
    layer = config.token_layers[0]
    assert (layer.inputs, layer.latents, layer.heads, layer.head_columns) == (4096, 512, 8, 4096)
    assert (config.width, config.normalize, config.include_prompt) == (4096, True, False)


def test_null_is_nothing(tmp_path):
    config = read(tmp_path, {"config.json": {**BERT, "latent_attention_config": None}})
    assert (config.modes, config.token_layers, config.width, config.include_prompt) == (("mean",), (), 8, True)
    config = read(tmp_path, nv_embed(latent_attention_config=None, hidden_size=4096))
    assert config.token_layers[0].inputs == 4096


def test_a_pooling_module_settles_it(tmp_path):
    """The Transformer module runs the model's own code up to the latent attention."""
    files = model({**MEAN, "include_prompt": False}, "Normalize", config=NV_EMBED)
    config = read(tmp_path, files)
    assert (config.modes, config.normalize, config.include_prompt) == (("mean",), True, False)
    assert len(config.token_layers) == 1
    assert any(INSTRUCTION in text for text in config.warnings)
    files["1_Pooling/config.json"] = {"embedding_dimension": 8, "pooling_mode": "cls"}
    config = read(tmp_path, files)
    assert config.modes == ("cls",)
    assert any(text.startswith(f"{SAID} says mean, 1_Pooling/config.json: pooling_mode says cls") for text in
               config.contradictions)  # fmt: skip


STORED = ("one file", "parts", "pickle")


def store(root: Any, stored: str, own: dict[str, torch.Tensor]) -> None:
    own = {**own, "embedding_model.norm.weight": torch.ones(8)}
    if stored == "pickle":
        torch.save(own, root / "pytorch_model.bin")
        return
    save = pytest.importorskip("safetensors.torch").save_file
    if stored == "one file":
        save(own, root / "model.safetensors")
        return
    names = sorted(own)
    parts = {"model-00001-of-00002.safetensors": names[:7], "model-00002-of-00002.safetensors": names[7:]}
    for file, held in parts.items():
        save({name: own[name] for name in held}, root / file)
    held_by = {name: file for file, held in parts.items() for name in held}
    (root / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": held_by}))


@pytest.mark.parametrize("stored", STORED)
def test_apply(tmp_path, stored):
    own = weights("latent_attention_model.", dtype=torch.float16)
    write(tmp_path, nv_embed())
    store(tmp_path, stored, own)
    config = read(tmp_path, {})
    hidden, starts = torch.randn(2, 6, 8), torch.tensor([2, 0])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    plain = {name.removeprefix("latent_attention_model."): value for name, value in own.items()}
    expected = torch.stack([token_states(hidden[0, 2:], plain).mean(0), token_states(hidden[1, :3], plain).mean(0)])
    expected = expected / expected.norm(dim=-1, keepdim=True)
    padded = hidden.where(mask[..., None] != 0, torch.nan)
    rows = torch.cat([hidden[0], hidden[1, :3]])
    bounds = {"starts": torch.tensor([2, 6]), "ends": torch.tensor([6, 9])}
    for result in (config.apply(padded, mask, starts=starts), config.apply(rows, **bounds)):
        torch.testing.assert_close(result, expected.float(), rtol=0, atol=1e-5)
    for dtype in (torch.bfloat16, torch.float64):
        assert config.apply(hidden.to(dtype), mask, starts=starts).dtype == dtype
    hidden.requires_grad_()
    with torch.inference_mode():
        config.apply(hidden.detach(), mask)
    config.apply(hidden, mask, starts=starts).sum().backward()
    assert hidden.grad[0, 2:].any()
    assert not hidden.grad[0, :2].any()


@pytest.mark.parametrize(
    ("stored", "dtype", "tolerance"),
    [
        (torch.float16, torch.float32, 2e-5),
        (torch.float32, torch.float32, 2e-5),
        (torch.float64, torch.float32, 2e-5),
        (torch.float64, torch.float64, 1e-12),
    ],
)
def test_what_is_folded(tmp_path, stored, dtype, tolerance):
    """Constants, in float32, or float64 where weights and states are; kept once where these agree."""
    own = weights("latent_attention_model.", dtype=stored)
    write(tmp_path, nv_embed())
    torch.save(own, tmp_path / "pytorch_model.bin")
    config, hidden = read(tmp_path, {}), torch.randn(2, 3, 8, dtype=dtype)
    assert not config.apply(hidden).requires_grad
    states = config.token_layers[0](hidden[0])
    plain = {name.removeprefix("latent_attention_model."): value for name, value in own.items()}
    torch.testing.assert_close(states, token_states(hidden[0], plain).to(dtype), rtol=0, atol=tolerance)
    if (stored == torch.float64) is (dtype == torch.float64):
        sizes = [one.numel() * one.element_size() for one in config.token_layers[0]._folded.parameters()]
        assert sum(sizes) < len(pickle.dumps(config)) < sum(sizes) + 8_000


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"latent_attention_config": [1]}, r"config\.json: latent_attention_config must be an object, got \[1\]"),
        ({"latent_attention_config": {**CONFIG, "hidden_dim": 9}}, f"{SAID}: hidden_dim must be latent_dim, 8, got 9"),
        ({"latent_attention_config": {**CONFIG, "num_latents_value": 0}}, "num_latents_value must be .*above 0, got 0"),
        ({"latent_attention_config": {**CONFIG, "output_normalize": 1}}, "output_normalize must be true or false"),
        ({"padding_side": "up"}, "config.json: padding_side must be 'left' or 'right', got 'up'"),
        ({"is_mask_instruction": "no"}, "is_mask_instruction must be true or false, got 'no'"),
        ({"hidden_size": 9}, f"{SAID}: latent_dim must be 9, the columns before it, got 8"),
    ],
)
def test_what_is_malformed(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        read(tmp_path, nv_embed(**changes))


def test_weights_that_are_not_there(tmp_path):
    config = read(tmp_path, nv_embed())
    hidden = torch.randn(2, 3, 8)
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors and pytorch_model\.bin are missing"):
        config.apply(hidden)
    own = weights("latent_attention_model.")
    store(tmp_path, "parts", own)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00002\.safetensors is missing"):
        read(tmp_path, {}).apply(hidden)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(own, "../a.safetensors")}))
    with pytest.raises(ValueError, match="expected a name inside the model's folder"):
        read(tmp_path, {}).apply(hidden)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(own, 3)}))
    with pytest.raises(
        ValueError, match=r"index\.json: weight_map: latent_attention_model\.\S+ must be a string, got 3"
    ):
        read(tmp_path, {}).apply(hidden)
    for name in ("", ".", "a.bin", "a\0.safetensors", "\ud800.safetensors", "a" * 256 + ".safetensors"):
        index.write_text(json.dumps({"weight_map": dict.fromkeys(own, name)}))
        with pytest.raises(
            ValueError, match=r"index\.json: weight_map: \S+ must be the name of a \.safetensors file, got "
        ):
            read(tmp_path, {}).apply(hidden)
    index.write_text(json.dumps({"weight_map": {}}))
    words = r"model\.safetensors\.index\.json: latent_attention_model\.latents must have shape \(6, 8\), .*got nothing"
    with pytest.raises(ValueError, match=words):
        read(tmp_path, {}).apply(hidden)
    with pytest.raises(ValueError, match="no folder to read the weights from"):
        PoolingConfig(("mean",), token_layers=(LatentAttention("", 8, 6, 2, 5),)).apply(hidden)


def test_engines(tmp_path):
    """None does it but by the model's own code, which sentence-transformers runs where it is told to."""
    files = model({**MEAN, "include_prompt": False}, "Normalize", config=NV_EMBED)
    config = read(tmp_path, files)
    answers = {one.engine: one for one in engines.answers(Folder(tmp_path), config)}
    theirs = answers.pop("sentence-transformers")
    assert (theirs.differs, theirs.setting) == (False, "Pooling(8, 'mean', include_prompt=False), Normalize()")
    assert any("trust_remote_code=True" in note for note in theirs.notes)
    assert all(one.differs and one.setting is None for one in answers.values())
    read(tmp_path / "b", nv_embed())
    config = read(tmp_path / "b", {})
    theirs = engines.answers(Folder(tmp_path / "b"), config)[0]
    assert theirs.by_itself == "each token through latent attention, mean, not normalised"


def test_inspect_prints_it(tmp_path, capsys):
    pytest.importorskip("rich")
    write(tmp_path, nv_embed())
    assert main(["inspect", str(tmp_path)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "each token through latent attention" in out
    assert main(["inspect", "--json", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    layers = next(one for one in found["decisions"] if one["what"] == "token_layers")["value"]
    assert layers == [
        {"layer": "LatentAttention", "name": SAID, "inputs": 8, "latents": 6, "heads": 2, "head_columns": 5}
    ]
