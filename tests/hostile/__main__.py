"""The command: `make hostile`."""

import argparse
import sys
from secrets import randbelow

from .runner import CAMPAIGNS, run

SECONDS = 300


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make hostile", description=__doc__)
    parser.add_argument("--only", metavar="CAMPAIGN", choices=CAMPAIGNS, help=f"one of {', '.join(CAMPAIGNS)}")
    parser.add_argument("--seed", metavar="N", type=int, help="of what is drawn; another one each time if not given")
    parser.add_argument("--seconds", metavar="N", type=float, help=f"for all campaigns together ({SECONDS})")
    parser.add_argument("--first", metavar="N", type=int, default=0, help="the number of the first input (0)")
    parser.add_argument("--count", metavar="N", type=int, help="so many inputs of each campaign, however long it takes")
    asked = parser.parse_args(argv)
    seed = randbelow(10**6) if asked.seed is None else asked.seed
    chosen = CAMPAIGNS if asked.only is None else (asked.only,)
    seconds = None
    if asked.count is None or asked.seconds is not None:
        seconds = (SECONDS if asked.seconds is None else asked.seconds) / len(chosen)
    print(f"seed {seed}", flush=True)
    failed = False
    for campaign in chosen:
        report = run(campaign, seed, asked.first, asked.count, seconds)
        for failure in report.failures:
            print(failure, end="\n\n")
        print(report, flush=True)
        failed |= bool(report.failures)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
