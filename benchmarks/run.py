"""The benchmark: what pooling costs above reading its input once.

run.py                          every case, a few minutes; on a GPU where there is one, else on the CPU
run.py --quick                  the usual dtypes, fewer rounds; on a GPU fewer cases, and no torch.compile
run.py --filter "H1024 bf16"    the cases whose name holds this
"""

import argparse
import importlib
from pathlib import Path

import torch


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds, about a minute")
    parser.add_argument("--shapes", choices=("native", "all"), help="native: each shape in its usual dtype alone")
    parser.add_argument("--filter", default="", metavar="TEXT", help="cases whose name holds TEXT")
    where = "write every figure there; on a GPU, without it, to results/<gpu>/<date>-<commit>.json"
    parser.add_argument("--json", type=Path, metavar="PATH", help=where)
    parser.add_argument("--commit", metavar="SHA", help="what was measured, where git cannot tell")
    return parser.parse_args(arguments)


def main() -> None:
    arguments = parse()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU here")
    # The peers of one may not be installed where the other runs.
    importlib.import_module("run_gpu" if arguments.device == "cuda" else "run_cpu").main(arguments)


if __name__ == "__main__":
    main()
