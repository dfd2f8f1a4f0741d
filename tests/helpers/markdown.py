"""What the project's pages hold, for the tests that keep them true."""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")))
_FENCE = re.compile(
    r"^(?:<!-- not run: (?P<why>[^\n]+) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    language: str
    code: str
    line: int  # of its page, the first one
    not_run: str | None  # why, where a comment before the fence says so


@cache
def text(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(page: str, *languages: str) -> list[Block]:
    found = [
        Block(one["language"], one["code"], text(page).count("\n", 0, one.start("code")) + 1, one["why"])
        for one in _FENCE.finditer(text(page))
    ]
    return [block for block in found if block.language in languages]


def prose(page: str) -> str:
    """All but fenced blocks."""
    return _FENCE.sub("", text(page))


def spans(page: str) -> list[str]:
    """What stands in backticks in the prose."""
    return list(dict.fromkeys(one.replace("\n", " ") for one in re.findall(r"`([^`]+)`", prose(page))))


def links(page: str) -> list[str]:
    """Where links and pictures lead, but for other sites."""
    return [one for one in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if not one.startswith("http")]


def anchors(page: str) -> set[str]:
    """What links call a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
