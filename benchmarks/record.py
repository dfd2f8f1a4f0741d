"""The result file of a run: written after every step, so that a run that is cut off has left what it had."""

import json
from pathlib import Path
from typing import Any

from benchmarks.case_results import from_json, to_json

RESULTS = Path(__file__).parent / "results"


def result_path(machine: str, date: str, commit: str, complete: bool = True) -> Path:
    """results/<machine>/<date>-<commit>.json; -part behind it where not everything was measured."""
    sha, _, changes = commit.partition("+")
    marks = f"{'-' + changes if changes else ''}{'' if complete else '-part'}"
    return RESULTS / machine / f"{date[:10]}-{sha[:8]}{marks}.json"


class Record:
    def __init__(self, path: Path, head: dict[str, object]) -> None:
        self.path = path
        self.content: dict[str, Any] = dict(head)

    def set(self, **parts: object) -> None:
        self.content |= parts
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(to_json(self.content), indent=1, allow_nan=False) + "\n")
        new.replace(self.path)  # a run that is stopped leaves the file of the step before


def load(path: Path) -> dict[str, Any]:
    """A record that run.py wrote, or an end with a sentence."""
    try:
        record = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"{path}: cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise SystemExit(f"{path}: not JSON: {error}") from None
    if not isinstance(record, dict) or record.get("device") not in ("cpu", "cuda") or "commit" not in record:
        raise SystemExit(f'{path}: not a record of benchmarks/run.py, which has a "device", a "commit" and "cases"')
    try:
        for case in record.get("cases", []):
            from_json(case)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SystemExit(f"{path}: its cases are not those of this version of run.py: {error!r}") from None
    return record
