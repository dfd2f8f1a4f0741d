"""The weights of a layer in a model's folder, as sentence-transformers stores them."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard
from zipfile import ZipFile, ZipInfo, is_zipfile

import torch
from torch import Tensor

from ..checks import name_of
from .files import Document, Folder, inside

_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")  # the first one that is there


@dataclass(frozen=True)
class Weights:
    """What the folder `name` of a model holds, in model.safetensors, in the files that model.safetensors.index.json
    names, or in pytorch_model.bin; read when it is asked for."""

    folder: Folder
    name: str  # "2_Dense"; "" is the model's own
    shapes: Mapping[str, tuple[int, ...]]  # by name: "linear.weight"
    kind: str  # of the layer: "Dense"

    def like(self, x: Tensor) -> dict[str, Tensor]:
        """By name, on the device of `x` and in its dtype: constants, whatever mode torch is in.

        Raises:
            FileNotFoundError, ValueError: neither file is there; it holds something else, and what.
            ImportError: it takes safetensors, which is not installed.
        """
        if (x.device, x.dtype) not in self._placed:
            with torch.inference_mode(False), torch.no_grad():
                placed = {key: value.detach().to(x.device, x.dtype) for key, value in self.stored.items()}
            self._placed[x.device, x.dtype] = placed
        return self._placed[x.device, x.dtype]

    @cached_property
    def _placed(self) -> dict[tuple[torch.device, torch.dtype], dict[str, Tensor]]:
        return {}

    @cached_property
    def stored(self) -> dict[str, Tensor]:
        """By name, as they are in the file. Raises what `like` raises."""
        name = self.file
        reads = {".safetensors": self._safetensors, ".json": self._in_parts, ".bin": self._pickled}
        found = reads[PurePosixPath(name).suffix](name)
        for key, shape in self.shapes.items():
            got = found.get(key)
            if not _plain(got) or got.shape != shape:
                what = f"shape {tuple(got.shape)}" if _plain(got) else _odd(got)
                config = inside(self.name, "config.json")
                raise ValueError(f"{name}: {key} must have shape {shape}, as {config} says, got {what}")
        return {key: found[key] for key in self.shapes}

    @property
    def file(self) -> str:
        """The name of the one that holds them, or says which ones do. Raises FileNotFoundError."""
        names = [inside(self.name, name) for name in _FILES]
        found = next((name for name in names if self.folder.has(name)), None)
        if found is None:
            raise FileNotFoundError(f"{self.folder.root}: {names[0]} and {names[-1]} are missing")
        return found

    def _safetensors(self, name: str) -> dict[str, Any]:
        """Those of `shapes` that are there; the others are not read."""
        try:
            from safetensors import safe_open
        except ImportError:
            raise ImportError(f"{name}: reading it needs safetensors: pip install safetensors") from None
        path = self.folder.path(name)
        try:
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys() if key in self.shapes}  # noqa: SIM118  # no dict
        except Exception as error:  # of many kinds
            raise self._unreadable(name, type(error).__name__) from error

    def _in_parts(self, index: str) -> dict[str, Any]:
        files = Document(f"{index}: weight_map", self.folder.document(index).need("weight_map", dict))
        found: dict[str, Any] = {}
        for key in self.shapes:
            name = files.get(key, str)
            if name is not None and not (name.endswith(".safetensors") and name.isprintable() and len(name) < 256):
                raise files.error(key, "the name of a .safetensors file")
            if name is not None and key not in found:
                found |= self._safetensors(inside(self.name, name))
        return found

    def _pickled(self, name: str) -> dict[str, Any]:
        path = self.folder.path(name)
        try:
            # torch compresses nothing, and what is compressed may be of any size.
            compressed = is_zipfile(path) and any(member.compress_type for member in _members(path))
            found = None if compressed else torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # of many kinds, too, and one advises to load it unsafely
            raise self._unreadable(name, type(error).__name__) from error
        if compressed:
            raise ValueError(f"{name}: expected weights as torch saves them, got a compressed archive")
        if not isinstance(found, dict):
            raise ValueError(f"{name}: expected the weights of a {self.kind} layer, got {type(found).__name__}")
        return found

    def _unreadable(self, name: str, error: str) -> ValueError:
        return ValueError(f"{name}: expected the weights of a {self.kind} layer, got what cannot be read ({error})")


def _plain(value: object) -> TypeGuard[Tensor]:
    """A tensor with its numbers side by side, as they are."""
    return (
        isinstance(value, Tensor)
        and not value.is_nested
        and not value.is_quantized
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and _is_number(value.dtype)
    )


def _is_number(dtype: torch.dtype) -> bool:
    """Floating point, and not two numbers in a byte, which torch makes no others of."""
    return dtype.is_floating_point and dtype != torch.float4_e2m1fn_x2


def _odd(value: object) -> str:
    if value is None:
        return "nothing"
    told = "what is no plain tensor"
    if isinstance(value, Tensor) and not _is_number(value.dtype):
        told += f", as {name_of(value.dtype)} is no floating-point number"
    return told


def _members(path: Path) -> list[ZipInfo]:
    with ZipFile(path) as archive:
        return archive.infolist()
