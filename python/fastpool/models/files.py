"""Reads a model folder: JSON only, nothing is executed, and every error names the file and the key."""

import json
import os.path
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

T = TypeVar("T")
_WORDS = {bool: "true or false", int: "a whole number", str: "a string", list: "a list", dict: "an object"}


def _is(value: object, kind: type) -> bool:
    # A bool is an int for Python, not for JSON.
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def inside(folder: str, name: str) -> str:
    """The name of a file in a folder of the model; "" is the model's own."""
    return str(PurePosixPath(folder, name))


@dataclass(frozen=True)
class Document:
    """A JSON object and where it stands: "1_Pooling/config.json", or "modules.json [1]" for an item of a list."""

    name: str
    values: dict[str, Any]

    def error(self, key: str, expected: str) -> ValueError:
        value = self.values.get(key)
        return ValueError(f"{self.name}: {key} must be {expected}, got {'nothing' if value is None else repr(value)}")

    def get(self, key: str, kind: type[T]) -> T | None:
        """The value; None where there is none, or null. Raises ValueError if it is something else than `kind`."""
        value = self.values.get(key)
        if value is None:
            return None
        if not _is(value, kind):
            raise self.error(key, _WORDS[kind])
        return value  # type: ignore[no-any-return]  # its type was checked above

    def need(self, key: str, kind: type[T]) -> T:
        """The same, and it has to be there."""
        value = self.get(key, kind)
        if value is None:
            raise self.error(key, _WORDS[kind])
        return value

    def positive(self, key: str) -> int | None:
        value = self.get(key, int)
        if value is not None and value < 1:
            raise self.error(key, "a whole number above 0")
        return value


@dataclass(frozen=True)
class Folder:
    """A model folder; names in it are relative, with slashes, and "" is the folder itself.

    Raises:
        FileNotFoundError: there is no such folder.
    """

    root: Path

    def __post_init__(self) -> None:
        if not self.root.is_dir():
            what = "is not a folder" if self.root.exists() else "does not exist"
            raise FileNotFoundError(f"{self.root} {what}; expected the folder of a model (nothing is downloaded)")

    def _at(self, name: str) -> Path:
        # Names come from the model's files, and the root of the file system is a name too.
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ValueError(f"{name!r}: expected a name inside the model's folder")
        return self.root / name

    def has(self, name: str) -> bool:
        """Raises ValueError for what is there and no file: taken for missing, it would be answered by a guess."""
        path = self._at(name)
        if path.is_file():
            return True
        if os.path.lexists(path):
            what = "a folder" if path.is_dir() else "a broken link" if path.is_symlink() else "something else"
            raise ValueError(f"{name}: expected a file, got {what}")
        return False

    def path(self, name: str) -> Path:
        """The path of a file that has to be there, or of the folder."""
        if PurePosixPath(name).parts and not self.has(name):
            raise FileNotFoundError(f"{self.root}: {name} is missing")
        return self._at(name)

    def _json(self, name: str, kind: type[T]) -> T:
        try:
            value = json.loads(self.path(name).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:  # ValueError: not JSON, or not UTF-8
            raise ValueError(f"{name}: expected JSON, got {error}") from None
        if not isinstance(value, kind):
            raise ValueError(f"{name}: expected {_WORDS[kind]}, got {type(value).__name__}")
        return value

    def document(self, name: str) -> Document:
        """A JSON object that has to be there."""
        return Document(name, self._json(name, dict))

    def optional(self, name: str) -> Document:
        """A JSON object; an empty one where the file is missing."""
        return self.document(name) if self.has(name) else Document(name, {})

    def modules(self) -> list["Module"] | None:
        """modules.json, in its order; None where it is missing."""
        if not self.has("modules.json"):
            return None
        items = self._json("modules.json", list)
        for i, item in enumerate(items):
            if not isinstance(item, dict):
                raise ValueError(f"modules.json [{i}]: expected an object, got {item!r}")
        return [Module.of(Document(f"modules.json [{i}]", item)) for i, item in enumerate(items)]


@dataclass(frozen=True)
class Module:
    """One step of modules.json."""

    entry: Document
    type: str  # "sentence_transformers.models.Pooling"
    path: str  # "1_Pooling"; may be empty

    @staticmethod
    def of(entry: Document) -> "Module":
        path = entry.get("path", str) or ""
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise entry.error("path", "a folder inside the model's")
        # The system's own error about a name that is too long would not name the key; and errors print names, so
        # none may hold a terminal's escape sequence.
        if len(path.encode(errors="surrogatepass")) > 255 or not path.isprintable():
            raise entry.error("path", "at most 255 bytes of printable characters")
        return Module(entry, entry.need("type", str), path)

    @property
    def name(self) -> str:
        """The class's own name: "Pooling"."""
        return self.type.rpartition(".")[2]

    @property
    def config(self) -> str:
        """The name of its configuration file."""
        return inside(self.path, "config.json")
