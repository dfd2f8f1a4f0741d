"""Writes docs/benchmarks.md, and the figures of README, from the committed result files.

    python -m benchmarks.report [--check]

--check: writes nothing, and exits with 1 where they are not what the result files say.

The newest complete result file of each folder of results/ counts.
"""

import argparse
import re
import sys
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks import ROOT
from benchmarks.record import RESULTS
from benchmarks.render_markdown import Run

REPORT, README = ROOT / "docs" / "benchmarks.md", ROOT / "README.md"
BEGIN, END = "<!-- benchmarks: written by benchmarks/report.py -->", "<!-- end of benchmarks -->"


def newest_of_each(results: Path) -> list[Run]:
    """The newest complete run of each folder of results; GPUs first."""
    found = []
    for folder in sorted(results.iterdir()):
        complete = [run for run in map(Run, sorted(folder.glob("*.json"))) if run.record["complete"]]
        if complete:
            found.append(max(complete, key=lambda run: run.record["date"]))
    return sorted(found, key=lambda run: run.device != "cuda")


def render(name: str, **values: object) -> str:
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        undefined=StrictUndefined,
        autoescape=False,  # Markdown, of our own figures
        trim_blocks=True,
    )
    text = templates.get_template(name).render(values)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def with_headline(text: str, figures: str) -> str:
    """README with its block of figures replaced."""
    block = re.compile(f"{re.escape(BEGIN)}\n.*?{re.escape(END)}", re.DOTALL)
    if len(block.findall(text)) != 1:
        raise ValueError(f"README needs one block between {BEGIN} and {END}")
    return block.sub(lambda _: f"{BEGIN}\n{figures}{END}", text)


def wanted() -> dict[Path, str]:
    """What the files should hold."""
    runs = newest_of_each(RESULTS)
    on_cpu = [run for run in runs if run.device == "cpu"]
    if not on_cpu:
        raise SystemExit(f"{RESULTS / 'cpu'} holds no complete result: make bench leaves one")
    headline = render("readme.md", run=on_cpu[0])
    return {REPORT: render("report.md", runs=runs), README: with_headline(README.read_text(), headline)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a file is stale")
    arguments = parser.parse_args()
    texts = wanted()
    stale = [path for path, text in texts.items() if not path.exists() or path.read_text() != text]
    if arguments.check:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not what the result files say: run python -m benchmarks.report")
        sys.exit(bool(stale))
    for path, text in texts.items():
        path.write_text(text)
        print(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
