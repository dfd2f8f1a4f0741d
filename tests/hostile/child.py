"""A process that tries inputs of one campaign, one after the other, and says so line by line: runner.py starts it.

    try N         input N begins
    say TEXT      what it is
    answered, refused
    wrong TEXT    what the library did; the process ends, since who knows what is left behind
    end           all were tried, or time is up

A process that ends without one of the last two has died of the input that it began last.
"""

import faulthandler
import json
import os
import sys
import time
import traceback
import warnings
from importlib import import_module
from random import Random

LIMIT = 120  # seconds; an input that takes longer hangs


def main(campaign: str, seed: str, first: str, count: str, seconds: str) -> None:
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else is printed

    def tell(kind: str, text: str = "") -> None:
        channel.write(f"{kind} {json.dumps(text)}\n" if text else f"{kind}\n")

    warnings.simplefilter("ignore")
    faulthandler.enable()
    attempt = import_module(campaign).attempt
    until = time.monotonic() + float(seconds)
    for index in range(int(first), int(first) + int(count)):
        if time.monotonic() > until:
            break
        tell(f"try {index}")
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        try:
            answered = attempt(Random(f"{campaign} {seed} {index}"), lambda text: tell("say", text))
        except BaseException:
            tell("wrong", traceback.format_exc())
            return
        tell("answered" if answered else "refused")
    tell("end")


if __name__ == "__main__":
    main(*sys.argv[1:])
