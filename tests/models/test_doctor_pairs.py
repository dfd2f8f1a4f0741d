"""The pairs of `fastpool doctor`: its own, and those of a file."""

import json
from pathlib import Path

import pytest
from helpers.doctor_cases import write

from fastpool.doctor import pairs


def test_own_pairs():
    own = pairs.read()
    assert own.kind == "pairs"
    assert own.related == [True] * 64 + [False] * 64
    assert len({*own.a, *own.b}) == 128
    assert all(text == text.strip() for text in own.a)
    # The same texts, none with its own partner.
    assert (own.a[64:], sorted(own.b[64:])) == (own.a[:64], sorted(own.b[:64]))
    assert not {*zip(own.a[:64], own.b[:64], strict=True)} & {*zip(own.a[64:], own.b[64:], strict=True)}


def test_pairs_without_labels_are_shuffled(tmp_path):
    file = write(tmp_path / "p.tsv", *(f"a{i}\tb{i}" for i in range(50)))
    found = pairs.read(file)
    assert (found.kind, sum(found.related), len(found.a)) == ("pairs", 50, 100)
    assert sorted(found.a[50:]) == sorted(found.a[:50])
    offsets = [int(b[1:]) - int(a[1:]) for a, b in zip(found.a[50:], found.b[50:], strict=True)]
    assert 0 not in offsets
    assert len(set(offsets)) > 10
    assert pairs.read(file) == found


def test_shuffled_pairs_are_never_given_ones(tmp_path):
    # Two texts a and many partners: shuffling often meets a given pair again.
    lines = [f"a{i % 2}\tb{i}" for i in range(40)]
    found = pairs.read(write(tmp_path / "p.tsv", *lines))
    unrelated = list(zip(found.a, found.b, strict=True))[40:]
    assert 8 <= len(unrelated) < 40
    assert not {f"{a}\t{b}" for a, b in unrelated} & set(lines)


LABELS = [(f"a{i}", f"b{i}", i % 3 == 0) for i in range(30)]


@pytest.mark.parametrize("name", ["p.tsv", "p.jsonl"])
def test_labels(tmp_path, name):
    tsv = [f"{a}\t{b}\t{int(label)}" for a, b, label in LABELS]
    jsonl = [json.dumps({"a": a, "b": b, "label": int(label)}) for a, b, label in LABELS]
    found = pairs.read(write(tmp_path / name, "", *(tsv if name == "p.tsv" else jsonl), ""))
    assert (found.kind, found.a[3], found.b[3]) == ("labels", "a3", "b3")
    assert found.related == [label for _, _, label in LABELS]
    assert found.source == str(tmp_path / name)


@pytest.mark.parametrize("name", ["p.tsv", "p.jsonl"])
def test_scores(tmp_path, name):
    scores = [i / 4 for i in range(21)]
    tsv = [f"a\tb\t{score}" for score in scores]
    jsonl = [json.dumps({"score": score, "a": "a", "b": "b"}) for score in scores]
    found = pairs.read(write(tmp_path / name, *(tsv if name == "p.tsv" else jsonl)))
    assert (found.kind, found.scores, found.middle) == ("scores", scores, 2.5)
    assert found.related == [score > 2.5 for score in scores]


def test_scores_may_be_0_and_1(tmp_path):
    lines = [json.dumps({"a": a, "b": b, "score": int(label)}) for a, b, label in LABELS]
    assert pairs.read(write(tmp_path / "p.jsonl", *lines)).kind == "scores"


def test_windows_files_and_strange_separators_are_text(tmp_path):
    file = tmp_path / "p.tsv"
    file.write_bytes(b"\xef\xbb\xbf" + "".join(f"a{i}\u2028\tb{i}\r\n" for i in range(9)).encode())
    found = pairs.read(file)
    assert (found.a[0], found.b[0]) == ("a0\u2028", "b0")


@pytest.mark.parametrize(
    ("name", "line", "words"),
    [
        ("p.tsv", "alone", "expected text_a, text_b and maybe a label or score, with tabs between, got 1 columns"),
        ("p.tsv", "a\tb\t1\tmore", "got 4 columns"),
        ("p.tsv", "a\tb\tscore", "label or score must be a number, got 'score'"),
        ("p.tsv", "a\tb\tnan", "label or score must be a number, got nan"),
        ("p.tsv", "a\t \t1", "expected two texts, got an empty text_b"),
        ("p.tsv", "a\tb", "expected label or score, as in the lines before"),
        ("p.jsonl", "a\tb", 'expected {"a": ..., "b": ...} and maybe "label" or "score", got no JSON'),
        ("p.jsonl", '["a", "b"]', "got list"),
        ("p.jsonl", '{"a": "a"}', "got a"),
        ("p.jsonl", '{"a": "a", "b": "b", "scores": 1}', "got a, b, scores"),
        ("p.jsonl", '{"a": "a", "b": "b", "score": 1, "label": 1}', "got both"),
        ("p.jsonl", '{"a": "a", "b": 2}', "b must be a string, got 2"),
        ("p.jsonl", '{"a": "a", "b": "b", "label": 2}', "label must be 0 or 1, got 2"),
        ("p.jsonl", '{"a": "a", "b": "b", "label": "yes"}', "label must be 0 or 1, got 'yes'"),
        ("p.jsonl", '{"a": "a", "b": "b", "score": null}', "score must be a number, got None"),
        ("p.jsonl", '{"a": "a", "b": "b", "score": 1' + "0" * 400 + "}", "int too large"),
        ("p.jsonl", '{"a": "a", "b": "b", "score": 1}', "expected label, as in the lines before"),
        ("p.jsonl", r'{"a": "a", "b": "x\ud800", "label": 1}', r"text_b holds '\ud800', which is no character"),
    ],
)
def test_malformed_lines_are_errors(tmp_path, name, line, words):
    good = "a\tb\t1" if name == "p.tsv" else '{"a": "a", "b": "b", "label": 1}'
    file = write(tmp_path / name, good, "", line)
    with pytest.raises(ValueError, match="line 3") as error:
        pairs.read(file)
    assert str(error.value).startswith(f"{file}, line 3: ")
    assert words in str(error.value)


def test_files_that_do_not_end_or_cannot_be(tmp_path, monkeypatch):
    monkeypatch.setattr(pairs, "_LARGEST", 1000)
    for name, words in (("/dev/zero", "expected at most 1000 characters, got more"), ("a\0b", "a\0b: expected UTF-8")):
        with pytest.raises(ValueError, match=words):
            pairs.read(Path(name))
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        pairs.read(tmp_path)


@pytest.mark.parametrize("line", ['{"a": 1, "b": ["X"]}', '{"a": "a", "b": "b", "score": "X"}', "a\tb\tX", "X\tX\tX"])
def test_long_values_are_cut_in_messages(tmp_path, line):
    name = "p.jsonl" if line[0] == "{" else "p.tsv"
    with pytest.raises(ValueError, match="line 1") as error:
        pairs.read(write(tmp_path / name, line.replace("X", "x" * 10**5)))
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "header",
    ["text1\ttext2", "text_a\ttext_b\tscore", "Sentence 1\tSentence 2\tlabel", "sentence1\tsentence2\tgold score"]
    + [
        "query\tdocument",
        "Question1\tQuestion2",
        "anchor\tpositive",
        "A\tB",
        '"text1"\t"text2"',
        "premise\thypothesis\t",
    ],
)
def test_a_header_row_is_an_error(tmp_path, header):
    file = write(
        tmp_path / "p.tsv", "", header, *(f"a{i}\tb{i}" + f"\t{i}" * (header.count("\t") - 1) for i in range(20))
    )
    words = r"line 2: expected pairs from the first line on .*, got the header row "
    with pytest.raises(ValueError, match=words) as error:
        pairs.read(file)
    assert str(error.value).endswith(repr(header))


@pytest.mark.parametrize(
    ("first", "labels"),
    [("query\tcats", False), ("sentences in a row\ttext", False), ("a0\tb0", False), ("query\tdocument", True)],
)
def test_texts_are_no_header_row(tmp_path, first, labels):
    """Nor is a row of names behind the first."""
    rows = [first, *(f"cat {i}\tdog {i}" for i in range(8)), "text1\ttext2", *(f"sun {i}\tmoon {i}" for i in range(8))]
    lines = [row + (f"\t{i % 2}" if labels else "") for i, row in enumerate(rows)]
    found = pairs.read(write(tmp_path / "p.tsv", *lines))
    assert [found.a[0], found.b[0]] == first.split("\t")
    assert (found.a[9], found.b[9]) == ("text1", "text2")


@pytest.mark.parametrize(
    ("lines", "counts"),
    [
        ([], "0 and 0"),
        (["a\tb\t1"] * 20, "20 and 0"),
        (["a\tb\t1"] * 20 + ["a\tb\t0"] * 7, "20 and 7"),
        (["one\tother"] * 20, "20 and 0"),  # shuffling gives the same pair again
    ],
)
def test_too_few_pairs_are_an_error(tmp_path, lines, counts):
    file = write(tmp_path / "p.tsv", *lines)
    with pytest.raises(ValueError, match="at least 8 related and 8 unrelated") as error:
        pairs.read(file)
    assert str(error.value) == f"{file}: expected at least 8 related and 8 unrelated pairs, got {counts}"


@pytest.mark.parametrize(
    ("lines", "counts"), [(["a\tb\t3"] * 20, "20 and 1"), ([f"a\tb\t{score}" for score in range(15)], "15 and 15")]
)
def test_scores_that_order_too_little_are_an_error(tmp_path, lines, counts):
    file = write(tmp_path / "p.tsv", *lines)
    with pytest.raises(ValueError, match="at least 16") as error:
        pairs.read(file)
    assert str(error.value) == f"{file}: expected at least 16 pairs and 2 different scores, got {counts}"


def test_scores_need_not_fall_on_both_sides_of_the_middle(tmp_path):
    file = write(tmp_path / "p.tsv", *(f"a\tb\t{score}" for score in [0, *(4 + i / 20 for i in range(20))]))
    found = pairs.read(file)
    assert (found.kind, sum(found.related), len(found.related)) == ("scores", 20, 21)


def test_other_encodings_are_an_error(tmp_path):
    file = tmp_path / "p.tsv"
    file.write_bytes("é\tà\n".encode("latin-1"))
    with pytest.raises(ValueError, match="expected UTF-8"):
        pairs.read(file)
    with pytest.raises(FileNotFoundError):
        pairs.read(tmp_path / "none.tsv")
