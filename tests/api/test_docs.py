"""The pages say what is so: what they name exists, and what they count and promise is what the code has."""

import argparse
import importlib
import inspect
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers.markdown import PAGES, ROOT, anchors, blocks, links, prose, spans, text

import fastpool
from fastpool import cli, constants
from fastpool.doctor import pairs
from fastpool.integrations import sentence_transformers
from fastpool.models import chain, elsewhere, engines
from fastpool.triton_kernels import config, counters

ALL = "\n".join(map(text, PAGES))
SOURCES = ("python", "csrc", "triton_kernels", "benchmarks", "tests", "examples", "scripts", "docs", ".ci")
THEIR_FILES = {  # files of other programs and of models, and what only looks like a file
    "docs/infinity.md": ["/health", "/embeddings"],
    "docs/model-folders.md": ["modules.json", "config.json", "tokenizer.json", "llm2vec_config.json",
                              "sentence_*_config.json", "projections.safetensors", "model.safetensors"],
    "docs/quantization.md": ["/v2/embed"],
    "docs/text-embeddings-inference.md": ["text_embeddings_server/models/pooling.py", "backends/python/server",
                                          "requirements.txt", "rocm/pytorch", "1_Pooling/config.json",
                                          "models/pooling.py"],
}  # fmt: skip
THEIR_OPTIONS = {
    "docs/design.md": ["-ffast-math"],
    "docs/infinity.md": ["--engine", "--pooling-method", "--dtype", "--compile"],
    "docs/model-folders.md": ["--pooling"],
    "docs/text-embeddings-inference.md": ["--pooling", "--pool"],
}
HANDED_ON = {  # options that the Makefile's variables take, and who reads them
    "AOT": "python/fastpool/cli.py",
    "BENCH": "benchmarks/run.py",
    "HOSTILE": "tests/hostile/__main__.py",
}


def source(path: str) -> str:
    return (ROOT / path).read_text()


def found_in(path: str, pattern: str) -> Any:
    """What a source has there: a number, or a text."""
    found = re.search(pattern, source(path))
    assert found is not None, (path, pattern)
    number = re.fullmatch(r"(\d+)(?: << (\d+))?", found[1])
    return found[1] if number is None else int(number[1]) << int(number[2] or 0)


def known_versions(engine: str) -> list[str]:
    """Those that a plug-in knows."""
    return re.findall(r'"([\d.]+)"', found_in(f"python/fastpool/integrations/{engine}.py", r"\n    start\((.+)\)"))


def kept_bytes() -> int:
    streams, each = (
        found_in("csrc/cuda/kernels.h", rf"{name} = ([\d <]+)") for name in ("kKeptStreams", "kKeptCounters")
    )
    return streams * 2 * each * 4


def spelled(names: Iterable[str], last: str, quote: str = "") -> str:
    """a, b and c"""
    *most, end = (f"{quote}{name}{quote}" for name in names)
    return f"{', '.join(most)} {last} {end}"


KERNEL, LEAVES, PROJECT = "csrc/cpu/rows.h", "csrc/cpu/leaves.h", "pyproject.toml"
NUMBERS: list[tuple[str, str, Callable[[], Any]]] = [  # a page, its words with {} for what the code has, and that
    ("README.md", "Python {} or later", lambda: found_in(PROJECT, r'requires-python = ">=(.+)"')),
    ("README.md", "pip install torch # {} or later", lambda: found_in(PROJECT, r'"torch>=(.+)"')),
    ("README.md", "pybind11 \"setuptools>={}\"", lambda: found_in(PROJECT, r'"setuptools>=(\d+)"')),
    ("README.md", "nvcc before {} ", lambda: found_in("CMakeLists.txt", r"VERSION_GREATER_EQUAL (\d+\.\d+)")),
    ("README.md", "(L2, eps {:g})", lambda: constants.NORM_EPS),
    ("README.md", "at most {} dimensions", lambda: found_in("python/fastpool/calls/normalize.py", r"at most (\d+) dim")),
    ("README.md", "({} of its own", lambda: len(pairs.OWN.read_text().splitlines())),
    ("README.md", "beyond float16's {:,.0f}", lambda: torch.finfo(torch.float16).max),
    ("README.md", "| sentence-transformers {0[0]} to {0[3]} |", lambda: sentence_transformers._MAJORS),
    ("README.md", "| vLLM {0[0]}, {0[1]} |", lambda: known_versions("vllm")),
    ("README.md", "| SGLang {0[0]} to {0[2]} |", lambda: known_versions("sglang")),
    ("README.md", "with the settings of {}", lambda: spelled(engines.NAMES, "and")),
    ("README.md", "less than {} MiB", lambda: config.NATIVE_BELOW_BYTES >> 20),
    ("README.md", "than {0[0]} columns ({0[1]} of float64)", lambda: [config.max_columns(size) for size in (4, 8)]),
    ("README.md", "{} MB for all streams in CUDA C++", lambda: kept_bytes() >> 20),
    ("README.md", "from {} KB a stream in Triton", lambda: 2 * 4 * counters.LEAST >> 10),
    ("CONTRIBUTING.md", "for {} seconds", lambda: found_in("tests/hostile/__main__.py", r"SECONDS = (\d+)")),
    ("docs/design.md", "Leaves of {} tokens", lambda: constants.LEAF),
    ("docs/design.md", "{} KB (at most", lambda: found_in(KERNEL, r"kAheadBytes = ([\d <]+)") >> 10),
    ("docs/design.md", "(at most {} leaves) ahead", lambda: found_in(LEAVES, r"kSize = (\d+)") - 1),
    ("docs/design.md", "rows of up to {} KB are not", lambda: found_in(KERNEL, r"kShortRow = ([\d <]+)") >> 10),
    ("docs/model-folders.md", "`make test` tries {}", lambda: found_in("tests/hostile/test_hostile.py", r"count=(\d+)")),
    ("docs/model-folders.md", "| {} in `config.json`", lambda: spelled(elsewhere._KEYS, "or", "`")),
    ("docs/model-folders.md", "then {} in any number", lambda: spelled(chain.CLASSES[1:], "and")),
    ("docs/onnx.md", "of opset {} or later", lambda: importlib.import_module("fastpool.onnx.graph").op.version),
    ("docs/sentence-transformers.md", "| {} in every test", lambda: found_in(PROJECT, r'sentence-transformers>=([\d.]+)')),
    ("docs/sglang.md", "| SGLang | {0[0]}, {0[1]} and {0[2]} ", lambda: known_versions("sglang")),
    ("docs/vllm.md", "| vLLM | {0[0]} and {0[1]},", lambda: known_versions("vllm")),
]  # fmt: skip

# A page, what it says of a command's exit status, the command ("": all), and what its --help says of it.
STATUSES: list[tuple[str, str, str, str]] = [
    ("README.md", "exits with 1 on a guess, a contradiction, or an engine", "inspect", "exit with 1 if a pooling is guessed, if a folder contradicts itself, or if an engine"),
    ("README.md", "exits with 1 if another is better by more than sampling error", "doctor", "Exits with 1 if another pooling beats the configured one by more than sampling error"),
    ("README.md", "inf or NaN it exits with 2", "doctor", "with 2 if that cannot be measured, as where token states are inf or NaN"),
    ("README.md", "Every command exits with | | | |---|---| | 0 | it has run | | 1 | it has run and found what its `--help` says", "", "Every command exits with 0, or with 1 where its --help says so"),
    ("README.md", "| 2 | it cannot be run, or its output cannot be written", "", "with 2 if it cannot be run, or stdout cannot be written"),
    ("README.md", "| 130 | Ctrl-C", "", "with 130 after Ctrl-C"),
    ("README.md", "| 141 | no answer: what reads the output has left before its end", "", "with 141, and no answer, if what reads stdout leaves before the end"),
    ("docs/model-folders.md", "exits with | | | |---|---| | 0 |", "inspect", ""),
    ("docs/model-folders.md", "| 1 | a pooling is guessed, a folder contradicts itself, or an engine", "inspect", "exit with 1 if a pooling is guessed, if a folder contradicts itself, or if an engine"),
    ("docs/model-folders.md", "| 2 | a folder cannot be read, or wants something else than pooling", "inspect", "Exits with 2 if a folder cannot be read or wants something else than pooling"),
]  # fmt: skip


def plain(words: str) -> str:
    """On one line, with one space between words."""
    return " ".join(words.split())


@pytest.mark.parametrize(("page", "words", "value"), NUMBERS, ids=lambda one: one if isinstance(one, str) else "")
def test_numbers_and_versions(page: str, words: str, value: Callable[[], Any]) -> None:
    assert words.format(value()) in plain(text(page))


def commands() -> dict[str, argparse.ArgumentParser]:
    actions = cli._parser()._actions
    return dict(next(action.choices for action in actions if isinstance(action, argparse._SubParsersAction)))


@pytest.mark.parametrize(("page", "words", "command", "helps"), STATUSES, ids=range(len(STATUSES)))
def test_exit_statuses(page: str, words: str, command: str, helps: str) -> None:
    """Those that a page states are those of --help, which the tests of each command hold to what it does."""
    parser = commands()[command] if command else cli._parser()
    assert words in plain(text(page))
    told = [parser.description or "", parser.epilog or "", *(action.help or "" for action in parser._actions)]
    assert helps in " ".join(told)


def test_no_other_status_is_stated() -> None:
    for page in PAGES:
        said = plain(text(page)).count("exits with")
        assert said == sum(words.count("exits with") for one, words, *_ in STATUSES if one == page), page


def exists(name: str, page: str) -> bool:
    """A file or folder: from the root, from the page, or by the end of its path."""
    if (ROOT / name).exists() or ((ROOT / page).parent / name).exists():
        return True
    return any(any((ROOT / folder).rglob(name.rstrip("/"))) for folder in SOURCES)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.relative_to(ROOT).as_posix()), link


@pytest.mark.parametrize("page", PAGES)
def test_files_are_there(page: str) -> None:
    named = [
        one
        for one in spans(page)
        if re.fullmatch(r"[\w.*\-]*/[\w.*/\-]*|[\w*\-]+\.(py|h|cpp|cuh?|c|md|sh|json|txt|safetensors)", one)
    ]
    named = [one for one in named if not one.startswith("path/of/")]
    drawn = re.findall(r"[\w/]+\.(?:py|h|cpp|cuh?)\b", "".join(block.code for block in blocks(page, "")))
    theirs = THEIR_FILES.get(page, [])
    assert [one for one in (*named, *drawn) if one not in theirs and not exists(one, page)] == []
    assert set(theirs) <= set(named)


def shell_lines(page: str) -> Iterator[str]:
    """Of shell blocks and of a workflow's steps, without comments; and what stands in backticks."""
    for block in blocks(page, "sh", "yaml"):
        for line in block.code.splitlines():
            line = line.partition("  #")[0].strip().removeprefix("- run: ")
            yield from (one.strip() for one in line.split("&&"))
    yield from spans(page)


def options_of(words: list[str]) -> list[str]:
    return [word for word in words if re.match(r"--\w", word)]


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_options_are_there(page: str) -> None:
    targets = re.findall(r"^([\w\- ]+):(?!=)", source("Makefile"), re.MULTILINE)
    targets = [one for line in targets for one in line.split()]
    ours = {name: set(parser._option_string_actions) for name, parser in commands().items()}
    theirs = set(THEIR_OPTIONS.get(page, []))
    for line in shell_lines(page):
        line = re.sub(r"^(?:\w+=\S* )+(?=make )", "", line)
        for variable, value in re.findall(r"\b([A-Z]+)=\"([^\"]*)\"", line):
            assert f"$({variable})" in source("Makefile"), line
            for option in options_of(value.split()) if variable in HANDED_ON else ():
                assert f'"{option}"' in source(HANDED_ON[variable]), line
        if line.startswith("make "):
            assert line.split()[1] in targets or page in THEIR_FILES, line
        elif re.match(r"fastpool \w", line):
            command, *words = shlex.split(line)[1:]
            assert set(options_of(words)) <= ours[command], line
            named = [value for option, value in pairwise(words) if option == "--engine"]
            assert set(named) <= {name.lower() for name in engines.NAMES}, line
        elif module := re.match(r"python -m (benchmarks\.\w+)", line):
            path = module[1].replace(".", "/") + ".py"
            assert all(f'"{option}"' in source(path) for option in options_of(line.split())), line
        elif script := re.match(r"python ([\w/]+\.py)", line):
            assert exists(script[1], page) or page in THEIR_FILES, line
        elif re.match("--?[a-z]", line):
            option = line.split()[0]
            assert option in theirs or any(option in known for known in ours.values()), line


def test_environment_variables() -> None:
    """Those that are read are on some page, and the other way round."""
    files = [ROOT / "setup.py", ROOT / "tests" / "conftest.py", *(ROOT / "python" / "fastpool").rglob("*.py")]
    read = set(re.findall(r"environ(?:\.get\(|\[)\"(FASTPOOL_\w+)\"", "".join(file.read_text() for file in files)))
    read |= {f"FASTPOOL_{engine.upper()}" for engine in ("vllm", "sglang") if known_versions(engine)}
    assert set(re.findall(r"\bFASTPOOL_[A-Z_]*[A-Z]\b", ALL)) == read


def test_marks() -> None:
    marks = re.findall(r'^  "(\w+): ', source("pyproject.toml"), re.MULTILINE)
    paragraph = next(one for one in prose("CONTRIBUTING.md").split("\n\n") if one.startswith("Marks: "))
    assert sorted(re.findall(r"`(\w+)` \(", paragraph)) == sorted(marks)


def test_extras_and_what_a_build_needs() -> None:
    extras = re.findall(r"^(\w+) = \[\"", source("pyproject.toml"), re.MULTILINE)
    named = {extra for extras in re.findall(r"\bfastpool\[([\w,]+)\]", ALL) for extra in extras.split(",")}
    assert {"demo", "doctor", "onnx"} <= set(extras)
    assert named <= set(extras)
    build = found_in(PROJECT, r"requires = \[(.+)\]\nbuild-backend")
    needed = re.findall(r'"([\w-]+)', build)
    for page in PAGES:
        for line in re.findall(r"pip install cmake.*", text(page)):
            assert set(needed) - {"setuptools"} <= set(re.findall(r"[\w-]+", line)), line


def resolved(name: str) -> object:
    """What a dotted name of ours leads to."""
    parts = name.split(".")
    if parts[0] == "torch":
        return reduce(getattr, parts[1:], torch)
    for i in range(len(parts), 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:i]))
        except ModuleNotFoundError:
            continue
        return reduce(getattr, parts[i:], module)
    raise AssertionError(name)


@pytest.mark.parametrize("page", PAGES)
def test_names_are_there(page: str) -> None:
    pattern = r"(?:torch\.ops\.)?fastpool(?:\.[A-Za-z_]\w*)+"
    for span in spans(page):
        if found := re.match(pattern, span):
            resolved(found[0])


def test_a_new_mode_is_still_such_a_diff() -> None:
    """What the page's diffs take away or leave stands in the files that they change."""
    page = text("docs/add-a-mode.md")
    diffs = re.findall(r"^\d\. `([^`]+)`(?:(?!\n\d\. ).)*?```diff\n(.*?)```", page, re.MULTILINE | re.DOTALL)
    assert len(diffs) == len(blocks("docs/add-a-mode.md", "diff")) == 3
    for path, diff in diffs:
        kept = [line[1:] for line in diff.splitlines() if line[0] in " -"]
        assert set(kept) <= set(source(path).splitlines()), path


def test_names_stand_in_the_files_that_a_page_says() -> None:
    """`this` and `that` in `file` and `other.py`."""
    some = r"`[\w./]+`(?: and `[\w./]+`)*"
    found = 0
    for page in PAGES:
        for names, files in re.findall(rf"({some}) in ({some})", prose(page)):
            for file in set(re.findall(r"`([^`]+)`", files)) - set(THEIR_FILES.get(page, [])):
                paths = [path for folder in SOURCES for path in (ROOT / folder).rglob(file.removeprefix(folder + "/"))]
                assert paths or (ROOT / file).exists(), file
                sources = [path.read_text() for path in paths if path.is_file()]
                for name in re.findall(r"`(\w+)`", names):
                    found += 1
                    assert any(re.search(rf"\b{name}\b", one) for one in sources), (page, name, file)
    assert found > 10


PUBLIC = [getattr(module, name) for module in (fastpool, fastpool.chunks, fastpool.nn) for name in module.__all__]
PUBLIC = [one for one in PUBLIC if callable(one) and "Args:" in (one.__doc__ or "")]


@pytest.mark.parametrize("function", PUBLIC, ids=lambda one: one.__name__)
def test_docstrings_have_every_argument(function: Callable[..., Any]) -> None:
    args = (inspect.getdoc(function) or "").partition("Args:\n")[2].partition("\n\n")[0]
    said = re.findall(r"^    (\w+): ", args, re.MULTILINE)
    assert sorted(said) == sorted(set(inspect.signature(function).parameters) - {"unknown"})
