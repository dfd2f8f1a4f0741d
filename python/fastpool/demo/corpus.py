"""Real text that is on every machine: the docstrings of Python's standard library.

The sources are parsed and never imported, so that nothing of what a module does on import happens here.
"""

import ast
import re
import sysconfig
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

# Shorter ones say nothing ("Return self."), longer ones are manuals.
_LENGTHS = range(40, 601)
_NOT_LIBRARY = {"test", "tests", "idlelib", "lib2to3", "turtledemo"}

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Doc:
    """One docstring: "textwrap.dedent" and its text on one line."""

    name: str
    text: str

    @property
    def words(self) -> str:
        """The name as a person would say it: "textwrap dedent"."""
        return " ".join(re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", self.name)).lower()


def _is_library(parts: tuple[str, ...]) -> bool:
    # site-packages and config-3.x are no identifiers.
    return all(part.isidentifier() and not part.startswith("_") and part not in _NOT_LIBRARY for part in parts)


def _documented(node: _Documented, name: str) -> Iterator[Doc]:
    """The docstrings of a module, its classes and their methods, in the order of the source."""
    yield Doc(name, " ".join((ast.get_docstring(node) or "").split()))
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
            yield from _documented(child, f"{name}.{child.name}")


def collect(root: Path | None = None) -> list[Doc]:
    """The public docstrings of sensible length under `root` (the standard library), each text and each name once.

    The order depends on nothing but the files.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    modules = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if parts and _is_library(parts):
            modules[parts] = path

    docs: dict[str, Doc] = {}
    texts = set()
    for parts in sorted(modules):
        with warnings.catch_warnings():  # old sources have escapes that a new Python warns of
            warnings.simplefilter("ignore")
            tree = ast.parse(modules[parts].read_bytes())
        for doc in _documented(tree, ".".join(parts)):
            if len(doc.text) in _LENGTHS and doc.text not in texts and doc.name not in docs:
                texts.add(doc.text)
                docs[doc.name] = doc
    return list(docs.values())


def sample(docs: list[Doc], count: int, keep: Collection[str] = ()) -> list[Doc]:
    """`count` of the docs, in their order: those named in `keep`, the others evenly spaced over the rest."""
    kept = [i for i, doc in enumerate(docs) if doc.name in keep]
    rest = [i for i, doc in enumerate(docs) if doc.name not in keep]
    wanted = min(max(count - len(kept), 0), len(rest))
    spaced = [rest[k * len(rest) // wanted] for k in range(wanted)]
    return [docs[i] for i in sorted(kept + spaced)]
