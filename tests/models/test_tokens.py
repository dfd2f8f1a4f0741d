"""What the tokenizer does to the token that is pooled: inspect and doctor tokenise a word to see."""

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
from helpers.model_folders import QWEN, model, write
from helpers.tiny_bert import tiny_bert

from fastpool import PoolingConfig
from fastpool.cli import main
from fastpool.models.files import Folder
from fastpool.models.tokens import checked

tokenizers = pytest.importorskip("tokenizers")

LAST, CLS = {"pooling_mode": "lasttoken"}, {"pooling_mode": "cls"}
VOCABULARY = {"[PAD]": 0, "<s>": 1, "</s>": 2, "[CLS]": 3, "[SEP]": 4, "wo": 5, "##rd": 6, "[UNK]": 7}


def tokenizer(template: str | None, **changes: Any) -> dict[str, Any]:
    """tokenizer.json whose word has two tokens, with special tokens around them as the template says."""
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(VOCABULARY, unk_token="[UNK]"))
    made.add_special_tokens([token for token in VOCABULARY if token[0] in "<["])
    made.enable_padding(length=9)  # what a batch is filled up with is not looked at
    if template is not None:
        names = [token for token in template.split() if token in VOCABULARY]
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single=template, special_tokens=[(name, VOCABULARY[name]) for name in names]
        )
    return {**json.loads(made.to_str()), **changes}


def warned(root: Path, files: dict[str, Any]) -> tuple[str, ...]:
    config = PoolingConfig.from_pretrained(write(root, files))
    found = checked(Folder(root), config)
    told = found.contradictions[len(config.contradictions) :]
    assert told == found.warnings[len(config.warnings) :]
    return told


@pytest.mark.parametrize(
    ("template", "said", "words"),
    [
        ("<s> $A </s>", {"add_eos_token": True, "eos_token": "</s>"}, None),
        ("<s> $A", {"add_eos_token": True, "eos_token": "</s>"}, "append </s>: the last token of 'word' is '##rd'"),
        ("<s> $A", {"add_eos_token": True, "eos_token": {"content": "</s>"}}, "does not append </s>"),
        (None, {"add_eos_token": True}, "does not append an EOS"),
        ("$A </s>", {"add_eos_token": True}, None),
        ("$A [SEP]", {"add_eos_token": True, "eos_token": "</s>"}, "the last token of 'word' is '[SEP]'"),
        ("<s> $A", {"add_eos_token": False, "eos_token": "</s>"}, None),  # not asked for
        ("<s> $A", {"eos_token": "</s>"}, None),
        ("$A", {"add_eos_token": True, "tokenizer_class": "T5TokenizerFast"}, "T5Tokenizer appends one itself"),
    ],
)  # fmt: skip
def test_last_without_the_eos_that_is_asked_for(tmp_path, template, said, words):
    files = model(LAST, config=QWEN, tokenizer_config=said, tokenizer=tokenizer(template))
    found = warned(tmp_path, files)
    assert [words in text for text in found] == ([True] if words else [])
    assert all(text.startswith("tokenizer_config.json: add_eos_token is true, but tokenizer.json") for text in found)


def test_an_eos_for_sentence_transformers_alone(tmp_path):
    """It takes arguments for the tokenizer from its own file, which engines do not read."""
    said = {"processor_kwargs": {"add_eos_token": True}}
    files = model(LAST, config=QWEN, sentence_bert_config=said, tokenizer=tokenizer("<s> $A"))
    (text,) = warned(tmp_path, files)
    assert text.startswith("sentence_bert_config.json: add_eos_token is true, but tokenizer.json does not append")
    assert "sentence-transformers appends it, engines do not" in text


@pytest.mark.parametrize(
    ("template", "said", "words"),
    [
        ("[CLS] $A [SEP]", {"cls_token": "[CLS]"}, None),
        ("[CLS] $A [SEP]", {}, None),
        ("<s> $A </s>", {"bos_token": "<s>"}, None),
        (None, {"cls_token": "[CLS]"}, "puts no [CLS] first: the first token of 'word' is 'wo'; cls pools that one"),
        ("$A [SEP] [CLS]", {"cls_token": "[CLS]"}, "the first token of 'word' is 'wo'"),  # XLNet's
        ("[SEP] $A", {"cls_token": "[CLS]"}, "the first token of 'word' is '[SEP]'"),  # a language's, NLLB's
        (
            None,
            {"tokenizer_class": "BertTokenizerFast"},
            "transformers' BertTokenizer puts one itself, but what goes by",
        ),
    ],
)
def test_cls_without_a_cls(tmp_path, template, said, words):
    files = model(CLS, tokenizer_config=said, tokenizer=tokenizer(template))
    found = warned(tmp_path, files)
    assert [words in text for text in found] == ([True] if words else [])


def test_only_what_is_pooled_is_looked_at(tmp_path):
    said = {"add_eos_token": True, "cls_token": "[CLS]"}
    for i, mode in enumerate(["mean", "max", "weightedmean"]):
        files = model({"pooling_mode": mode}, tokenizer_config=said, tokenizer="no JSON")
        assert warned(tmp_path / str(i), files) == ()
    both = model({"pooling_mode": ["cls", "lasttoken"]}, tokenizer_config=said, tokenizer=tokenizer(None))
    assert len(warned(tmp_path / "both", both)) == 2
    assert warned(tmp_path / "none", model(CLS, tokenizer_config=said)) == ()


def test_a_tokenizer_beside_a_transformer_of_its_own_folder(tmp_path):
    files = model(CLS, tokenizer=tokenizer("[CLS] $A"))
    files["modules.json"][0]["path"] = "0_Transformer"
    files["0_Transformer/tokenizer.json"] = tokenizer(None)
    (text,) = warned(tmp_path, files)
    assert "0_Transformer/tokenizer.json puts no CLS first" in text


@pytest.mark.parametrize("content", ["no JSON", "{}", [], {"model": {"type": "BPE", "vocab": {}, "merges": []}}])
def test_a_tokenizer_that_cannot_be_used_stops_nobody(tmp_path, content):
    config = PoolingConfig.from_pretrained(write(tmp_path, model(CLS, tokenizer=content)))
    found = checked(Folder(tmp_path), config)
    assert found.contradictions == ()
    assert all("tokenizer.json: the tokenizers library cannot use it" in text for text in found.warnings)


def test_a_tokenizer_that_would_make_a_word_as_long_as_memory(tmp_path):
    """Nor is the word cut where tokenizer.json cuts texts."""
    grows = {"type": "Replace", "pattern": {"String": "w"}, "content": "w" * 1000}
    made = tokenizer("[CLS] $A", normalizer={"type": "Sequence", "normalizers": [grows] * 4})
    made["truncation"] = {"max_length": 1, "strategy": "LongestFirst", "direction": "Left", "stride": 0}
    assert warned(tmp_path, model(CLS, tokenizer_config={"cls_token": "[CLS]"}, tokenizer=made)) == ()


def test_a_tokenizer_has_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr("fastpool.models.tokens._LARGEST", 100)
    with pytest.raises(ValueError, match=r"tokenizer\.json: expected at most 100 bytes, got \d+"):
        warned(tmp_path, model(CLS, tokenizer=tokenizer(None)))


def test_a_class_that_takes_special_tokens_away(tmp_path):
    """transformers' GPT-NeoX tokenizer adds none, whatever tokenizer.json says."""
    said = {"tokenizer_class": "GPTNeoXTokenizerFast", "add_eos_token": True, "eos_token": "</s>", "bos_token": "<s>"}
    both = {"pooling_mode": ["cls", "lasttoken"]}
    neox = {**QWEN, "model_type": "gpt_neox"}
    files = model(both, config=neox, tokenizer_config=said, tokenizer=tokenizer("<s> $A </s>"))
    last, first = warned(tmp_path, files)
    assert "transformers' GPTNeoXTokenizer takes it away" in last
    assert "transformers' GPTNeoXTokenizer takes it away" in first


def test_without_the_library_it_is_said(tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name: str, *arguments: Any) -> Any:
        if name == "tokenizers":
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", missing)
    config = PoolingConfig.from_pretrained(write(tmp_path, model(CLS, tokenizer=tokenizer(None))))
    found = checked(Folder(tmp_path), config)
    assert found.warnings == ("tokenizer.json: what it does to the pooled token was not tried: pip install tokenizers",)


def test_inspect_and_doctor_say_it(tmp_path, capsys):
    pytest.importorskip("sentence_transformers")
    write(
        tiny_bert(tmp_path), {k: v for k, v in model({**CLS, "embedding_dimension": 16}).items() if k != "config.json"}
    )
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer(None)))
    words = "cls pooling, but tokenizer.json puts no [CLS] first"
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    assert [words in text for text in json.loads(capsys.readouterr().out)["contradictions"]] == [True]
    assert main(["doctor", str(tmp_path), "--json"]) in (0, 1)
    assert any(words in text for text in json.loads(capsys.readouterr().out)["warnings"])


def test_bert_as_it_is_saved(tmp_path):
    """No false alarm."""
    write(tiny_bert(tmp_path), {"modules.json": model(CLS)["modules.json"], "1_Pooling/config.json": CLS})
    assert checked(Folder(tmp_path), PoolingConfig.from_pretrained(tmp_path)).warnings == ()
