"""What a model's folder says, as people are told it: nothing in it reaches a terminal but what can be seen, and
whatever its length, what is printed is bounded."""

import json
import warnings
from typing import Any

import pytest
from helpers.model_folders import BERT, DENSE, MEAN, OLD, QWEN, model, modules, write

from fastpool import PoolingConfig
from fastpool.cli import main
from fastpool.models import engines
from fastpool.models.files import Folder
from fastpool.text import shown, told, visible

HOSTILE = "\033[2J\u202e\a\ud800\nforged: all is well\r\x85"
VISIBLE = r"\x1b[2J\u202e\x07\ud800\nforged: all is well\r\x85"
LONG = "x" * 10**6


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain 'text', \\ and all", "plain 'text', \\ and all"),
        ("höhe Ωμέγα 日本語 עברית हिन्दी é 🙂", "höhe Ωμέγα 日本語 עברית हिन्दी é 🙂"),
        ("\0\t\r\n\v\033\x7f\x85\x9b", r"\x00\t\r\n\x0b\x1b\x7f\x85\x9b"),
        ("\u200b\u200f\u202a\u202e\u2066\u2069\u2028\ufeff", r"\u200b\u200f\u202a\u202e\u2066\u2069\u2028\ufeff"),
        ("\ud800\udcff\ue000\U000e0041", r"\ud800\udcff\ue000\U000e0041"),
    ],
)
def test_what_can_be_seen_stays_and_what_cannot_is_escaped(text, expected):
    assert visible(text) == told(text) == expected
    assert visible(expected) == expected


@pytest.mark.parametrize(
    "value",
    [LONG, [LONG] * 9, {LONG: LONG}, 10**4000, [[[[LONG] * 9] * 9] * 9] * 9, HOSTILE * 10**5, list(range(10**6))],
)
def test_values_are_shortened(value):
    assert len(shown(value)) <= 200
    assert shown(value).isprintable()
    assert "..." in shown(value)


def test_messages_keep_their_beginning_and_end():
    said = told("config.json: key must be a number, got " + LONG + ", which is none")
    assert said.startswith("config.json: key must be")
    assert said.endswith("x, which is none")
    assert len(said) <= 1000


def of(text: str) -> dict[str, dict[str, Any]]:
    """Folders that say this wherever it comes into what people are told."""
    word = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"word": 0}, "unk_token": "word"}}
    last = {"embedding_dimension": 8, "pooling_mode": "lasttoken"}
    pooled = {"modules.json": modules("Transformer", "Pooling", "Dense"), "1_Pooling/config.json": MEAN}
    return {
        "architecture": {"config.json": {**BERT, "architectures": [text]}},
        "causal": model(MEAN, config={**BERT, "architectures": [f"{text}ForCausalLM"]}),
        "classifier": {"config.json": {"architectures": [f"{text}ForSequenceClassification"]}},
        "nv-embed": {"config.json": {"architectures": [f"NVEmbed{text}"]}},
        "family": model(MEAN, config={**BERT, "model_type": text}),
        "code": {"config.json": {**BERT, "auto_map": {"AutoModel": text}}},
        "code, pooling": {"config.json": {**BERT, "auto_map": {"AutoModel": [text]}}, "1_Pooling/config.json": MEAN},
        "width": model(MEAN, config={**BERT, "hidden_size": text}),
        "widths": model(MEAN, config={**BERT, "hidden_size": {text: [text]}}),
        "pooling word": {"config.json": {**BERT, "pooling": text}},
        "llm2vec": {"config.json": QWEN, "llm2vec_config.json": {"pooling_mode": text}},
        "pooling key": model({**MEAN, f"pooling_mode_{text}": True}),
        "other pooling key": model({**MEAN, text: True}),
        "pooling modes": model({**MEAN, "pooling_mode": ["mean"] * len(text)}),
        "type": {"modules.json": [{"type": text}], "config.json": BERT},
        "entry": {"modules.json": [text], "config.json": BERT},
        "path": {"modules.json": [{"type": OLD + "Transformer", "path": text}], "config.json": BERT},
        "input": {**pooled, "config.json": BERT, "2_Dense/config.json": {**DENSE, "module_input_name": text}},
        "activation": {**pooled, "config.json": BERT, "2_Dense/config.json": {**DENSE, "activation_function": text}},
        "prompt": model(MEAN, config_sentence_transformers={"prompts": {"q": text}}),
        "prompt name": model(MEAN, config_sentence_transformers={"prompts": {text: ""}, "default_prompt_name": text}),
        "no such prompt": model(MEAN, config_sentence_transformers={"prompts": {text: ""}, "default_prompt_name": "q"}),
        "similarity": model(MEAN, config_sentence_transformers={"similarity_fn_name": text}),
        "kind of model": model(MEAN, config_sentence_transformers={"model_type": text}),
        "task": model(MEAN, sentence_bert_config={"transformer_task": text}),
        "length": model(MEAN, sentence_bert_config={"max_seq_length": text}),
        "padding": model(MEAN, tokenizer_config={"padding_side": text}),
        "eos": model(last, tokenizer_config={"add_eos_token": True, "eos_token": text}, tokenizer=word),
        "cls": model({**MEAN, "pooling_mode": "cls"}, tokenizer_config={"cls_token": text}, tokenizer=word),
        "adapter": {"adapter_config.json": {"base_model_name_or_path": text, "auto_mapping": {
            "base_model_class": text, "parent_library": f"transformers.models.{text}"}}},
    }  # fmt: skip


@pytest.mark.parametrize("text", [HOSTILE, LONG], ids=["hostile", "long"])
@pytest.mark.parametrize("what", list(of("x")))
def test_a_folder_does_nothing_to_the_terminal(what, text, tmp_path, capsys, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "10000")  # nothing is folded
    root = write(tmp_path, of(text)[what])
    said = ""
    for more in ([], ["--check"]):
        assert main(["inspect", str(root), *more]) in (0, 1, 2)
        said += "".join(capsys.readouterr())
    assert all(c.isprintable() or c == "\n" for c in said)
    assert not any(line.startswith("forged") for line in said.splitlines())
    main(["inspect", str(root), "--json"])
    out, err = capsys.readouterr()
    assert (out + err).isascii()
    assert len(out + err) < 60_000
    if text is LONG:
        monkeypatch.delenv("COLUMNS")
        main(["inspect", str(root)])
        assert len("".join(capsys.readouterr())) < 200_000  # boxes and all
    elif what not in ("prompt", "pooling modes"):  # which are told by Python's repr, and not at all
        assert visible("\033[2J") in said


@pytest.mark.parametrize("text", [HOSTILE, LONG], ids=["hostile", "long"])
@pytest.mark.parametrize("what", list(of("x")))
def test_nor_to_that_of_a_program(what, text, tmp_path):
    """Which prints errors and warnings as they come, and what a configuration says of itself."""
    root = write(tmp_path, of(text)[what])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            config = PoolingConfig.from_pretrained(root)
        except (FileNotFoundError, ValueError) as error:
            alone = error.__suppress_context__ and error.__cause__ is None
            said = [str(error), "" if alone else "Python would print that one, too\n"]
        else:
            said = [*config.warnings, *config.contradictions, *(decision.source for decision in config.decisions)]
            for answer in engines.answers(Folder(root), config):
                said += [answer.by_itself, answer.setting or "", *answer.notes]
    said += [str(warning.message) for warning in caught]
    assert said
    assert all(words.isprintable() and len(words) <= 4000 for words in said)


def test_what_is_not_text_for_people_stays_as_it_is(tmp_path, capsys):
    """Prompts and an architecture of a configuration, and JSON's values as long as they are of use."""
    prompts = {"query": "q\n\033" + "x" * 20_000, "\u202e": "p"}
    files = model(MEAN, config_sentence_transformers={"prompts": prompts})
    root = write(tmp_path, {**files, "config.json": {**BERT, "architectures": ["Bert\033"]}})
    config = PoolingConfig.from_pretrained(root)
    assert (dict(config.prompts), config.architecture) == (prompts, "Bert\033")
    assert config.decision("prompts").value == prompts
    assert main(["inspect", "--json", str(root)]) == 0
    found = {one["what"]: one["value"] for one in json.loads(capsys.readouterr().out)["decisions"]}
    assert found["prompts"] == prompts


def test_folders_and_files_with_hostile_names(tmp_path, capsys):
    root = write(tmp_path / HOSTILE.replace("\ud800", ""), {"config.json": {**BERT, "hidden_size": "x"}})
    with pytest.raises(ValueError, match="hidden_size"):
        PoolingConfig.from_pretrained(root)
    assert main(["inspect", str(root), str(root / "none")]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 2)
    assert all(line.startswith("fastpool inspect: ") and line.isprintable() for line in err.splitlines())


def test_a_folder_of_such_a_name_that_can_be_read(tmp_path, capsys):
    root = write(tmp_path / HOSTILE.replace("\ud800", ""), {"config.json": BERT})
    with pytest.warns(UserWarning, match="is a guess") as warned:
        PoolingConfig.from_pretrained(root)
    assert all(str(warning.message).isprintable() for warning in warned)
    assert main(["inspect", str(root), "--check"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert r"\nforged" in lines[0]
    assert all(line.isprintable() for line in lines)


def test_more_modules_than_any_model_has(tmp_path):
    """Each is a warning, or a layer."""
    entries = [{"type": OLD + "Transformer"}, {"type": OLD + "Pooling"}, *([{"type": OLD + "Normalize"}] * 99)]
    root = write(tmp_path, {**model(MEAN), "modules.json": entries})
    with pytest.raises(ValueError, match=r"modules\.json: expected at most 100 modules, got 101"):
        PoolingConfig.from_pretrained(root)
    write(tmp_path, {"modules.json": entries[:-1]})
    assert PoolingConfig.from_pretrained(root).normalize
