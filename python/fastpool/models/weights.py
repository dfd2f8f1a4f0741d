"""The weights of a layer in a model's folder, as sentence-transformers stores them."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .files import Folder, inside


@dataclass(frozen=True)
class Weights:
    """What the folder `name` of a model holds, in model.safetensors or pytorch_model.bin; read when it is asked for."""

    folder: Folder
    name: str  # "2_Dense"; "" is the model's own
    shapes: Mapping[str, tuple[int, ...]]  # by name: "linear.weight"
    kind: str  # of the layer: "Dense"

    def like(self, x: Tensor) -> dict[str, Tensor]:
        """By name, on the device of `x` and in its dtype.

        Raises:
            FileNotFoundError, ValueError: neither file is there; it holds something else, and what.
            ImportError: it takes safetensors, which is not installed.
        """
        if (x.device, x.dtype) not in self._placed:
            self._placed[x.device, x.dtype] = {key: value.to(x.device, x.dtype) for key, value in self._stored.items()}
        return self._placed[x.device, x.dtype]

    @cached_property
    def _placed(self) -> dict[tuple[torch.device, torch.dtype], dict[str, Tensor]]:
        return {}

    @cached_property
    def _stored(self) -> dict[str, Tensor]:
        name, other = inside(self.name, "model.safetensors"), inside(self.name, "pytorch_model.bin")
        if self.folder.has(name):
            found = self._safetensors(name)
        elif self.folder.has(other):
            name, found = other, self._pickled(other)
        else:
            raise FileNotFoundError(f"{self.folder.root}: {name} and {other} are missing")
        for key, shape in self.shapes.items():
            got = found.get(key)
            if not isinstance(got, Tensor) or got.shape != shape:
                what = f"shape {tuple(got.shape)}" if isinstance(got, Tensor) else "nothing"
                config = inside(self.name, "config.json")
                raise ValueError(f"{name}: {key} must have shape {shape}, as {config} says, got {what}")
        return {key: found[key] for key in self.shapes}

    def _safetensors(self, name: str) -> dict[str, Any]:
        """Those of `shapes` that are there; the others are not read."""
        try:
            from safetensors import safe_open
        except ImportError:
            raise ImportError(f"{name}: reading it needs safetensors: pip install safetensors") from None
        try:
            with safe_open(self.folder.path(name), framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys() if key in self.shapes}  # noqa: SIM118  # no dict
        except Exception as error:  # of many kinds
            raise self._unreadable(name, type(error).__name__) from error

    def _pickled(self, name: str) -> dict[str, Any]:
        try:
            found = torch.load(self.folder.path(name), map_location="cpu", weights_only=True)
        except Exception as error:  # of many kinds, too, and one advises to load it unsafely
            raise self._unreadable(name, type(error).__name__) from error
        if not isinstance(found, dict):
            raise ValueError(f"{name}: expected the weights of a {self.kind} layer, got {type(found).__name__}")
        return found

    def _unreadable(self, name: str, error: str) -> ValueError:
        return ValueError(f"{name}: expected the weights of a {self.kind} layer, got what cannot be read ({error})")
