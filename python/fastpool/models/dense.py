"""sentence-transformers' Dense module: what a model's folder says about it, and the layer itself."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import Document, Folder, Module, inside

# Named by their class in torch.nn, with its defaults, as sentence-transformers makes them. The folder's word is
# looked up here and never imported.
_ACTIVATIONS = ("ELU", "GELU", "Identity", "LeakyReLU", "Mish", "ReLU", "SELU", "SiLU", "Sigmoid", "Softplus", "Tanh")


@dataclass(frozen=True)
class Dense:
    """activation(x W^T + b), plus x (x R^T where the widths differ) if it is residual. [B, inputs] -> [B, outputs]"""

    name: str  # of its folder: "2_Dense"
    inputs: int
    outputs: int
    bias: bool = True
    activation: str = "Tanh"
    residual: bool = False
    folder: Folder | None = field(default=None, repr=False, compare=False)

    @staticmethod
    def read(folder: Folder, module: Module) -> "Dense":
        """Raises FileNotFoundError or ValueError, naming file and key."""
        document = folder.document(module.config)
        for key in ("module_input_name", "module_output_name"):
            if (document.get(key, str) or "sentence_embedding") != "sentence_embedding":
                raise document.error(key, "'sentence_embedding' (a Dense layer over tokens is not supported)")
        inputs, outputs = document.positive("in_features"), document.positive("out_features")
        if inputs is None or outputs is None:
            raise document.error("in_features" if inputs is None else "out_features", "a whole number above 0")
        bias = document.get("bias", bool)
        return Dense(
            name=module.path,
            inputs=inputs,
            outputs=outputs,
            bias=True if bias is None else bias,
            activation=_activation(document),
            residual=document.get("use_residual", bool) or False,
            folder=folder,
        )

    @property
    def config(self) -> str:
        """The name of its configuration file."""
        return inside(self.name, "config.json")

    def __call__(self, x: Tensor) -> Tensor:
        weights = self._on(x.device, x.dtype)
        activation: torch.nn.Module = getattr(torch.nn, self.activation)()
        result: Tensor = activation(torch.nn.functional.linear(x, weights["linear.weight"], weights.get("linear.bias")))
        if not self.residual:
            return result
        if "residual.weight" in weights:
            x = torch.nn.functional.linear(x, weights["residual.weight"])
        return result + x

    def _on(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        if (device, dtype) not in self._placed:
            self._placed[device, dtype] = {key: value.to(device, dtype) for key, value in self._weights.items()}
        return self._placed[device, dtype]

    @cached_property
    def _placed(self) -> dict[tuple[torch.device, torch.dtype], dict[str, Tensor]]:
        return {}

    @cached_property
    def _weights(self) -> dict[str, Tensor]:
        shapes: dict[str, tuple[int, ...]] = {"linear.weight": (self.outputs, self.inputs)}
        if self.bias:
            shapes["linear.bias"] = (self.outputs,)
        if self.residual and self.inputs != self.outputs:
            shapes["residual.weight"] = (self.outputs, self.inputs)
        name, found = self._stored()
        for key, shape in shapes.items():
            got = found.get(key)
            if not isinstance(got, Tensor) or got.shape != shape:
                what = f"shape {tuple(got.shape)}" if isinstance(got, Tensor) else "nothing"
                raise ValueError(f"{name}: {key} must have shape {shape}, as {self.config} says, got {what}")
        return {key: found[key] for key in shapes}

    def _stored(self) -> tuple[str, dict[str, Any]]:
        if self.folder is None:
            raise ValueError(f"{self.name}: no folder to read the weights from; use PoolingConfig.from_pretrained")
        name, other = inside(self.name, "model.safetensors"), inside(self.name, "pytorch_model.bin")
        if self.folder.has(name):
            try:
                from safetensors.torch import load_file
            except ImportError:
                raise ImportError(f"{name}: reading it needs safetensors: pip install safetensors") from None
            return name, _loaded(name, load_file, self.folder.path(name))
        if not self.folder.has(other):
            raise FileNotFoundError(f"{self.folder.root}: {name} and {other} are missing")
        load = partial(torch.load, map_location="cpu", weights_only=True)
        return other, _loaded(other, load, self.folder.path(other))


def _loaded(name: str, load: Callable[[Path], Any], path: Path) -> dict[str, Any]:
    try:
        found = load(path)
    except OSError:
        raise  # names the file itself
    except Exception as error:  # of many kinds, and torch's advises to load it unsafely
        raise ValueError(
            f"{name}: expected the weights of a Dense layer, got what cannot be read ({type(error).__name__})"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"{name}: expected the weights of a Dense layer by name, got {type(found).__name__}")
    return found


def _activation(document: Document) -> str:
    said = document.get("activation_function", str)
    if said is None:
        return "Tanh"  # sentence-transformers' default
    name = said.rpartition(".")[2]
    if not said.startswith("torch.nn.") or name not in _ACTIVATIONS:
        raise document.error("activation_function", f"one of torch.nn's {', '.join(_ACTIVATIONS)}")
    return name
