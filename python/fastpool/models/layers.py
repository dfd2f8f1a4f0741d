"""What stands around Pooling in a model's folder: sentence-transformers' Dense, LayerNorm and Normalize, and NV-Embed's
latent attention. Each reads its configuration at once, and its weights when it is first called."""

import copy
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from .. import functional, nn
from ..nn import latent
from .files import Document, Folder, Module, held, inside
from .weights import Weights

# Named by their class in torch.nn, with its defaults, as sentence-transformers makes them. The folder's word is
# looked up here and never imported.
_ACTIVATIONS = (
    *(
        "CELU",
        "ELU",
        "GELU",
        "Hardshrink",
        "Hardsigmoid",
        "Hardswish",
        "Hardtanh",
        "Identity",
        "LeakyReLU",
        "LogSigmoid",
    ),
    *("Mish", "ReLU", "ReLU6", "SELU", "SiLU", "Sigmoid", "Softplus", "Softshrink", "Softsign", "Tanh", "Tanhshrink"),
)


@dataclass(frozen=True)
class Normalize:
    """x / max(norm(x), 1e-12)."""

    name: str = field(default="", repr=False, compare=False)  # of its entry: "modules.json [2]"

    def __str__(self) -> str:
        return "normalised"

    def columns(self, given: int | None) -> int | None:
        return given

    def __call__(self, x: Tensor) -> Tensor:
        return functional.l2_normalize(x)


@dataclass(frozen=True)
class Dense:
    """activation(x W^T + b), plus x (x R^T where the widths differ) if residual. [..., inputs] -> [..., outputs]"""

    name: str  # of its folder: "2_Dense"
    inputs: int
    outputs: int
    bias: bool = True
    activation: str = "Tanh"
    residual: bool = False
    folder: Folder | None = field(default=None, repr=False, compare=False)

    @staticmethod
    def read(folder: Folder, module: Module, document: Document) -> "Dense":
        """Raises ValueError, naming file and key."""
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

    def __str__(self) -> str:
        return f"Dense to {self.outputs}"

    @property
    def source(self) -> str:
        """What says how many columns it takes."""
        return f"{inside(self.name, 'config.json')}: in_features"

    def columns(self, given: int | None) -> int:
        _check(self.source, self.inputs, given)
        return self.outputs

    def __call__(self, x: Tensor) -> Tensor:
        weights = self._weights.like(x)
        activation: torch.nn.Module = getattr(torch.nn, self.activation)()
        result: Tensor = activation(torch.nn.functional.linear(x, weights["linear.weight"], weights.get("linear.bias")))
        if not self.residual:
            return result
        if "residual.weight" in weights:
            x = torch.nn.functional.linear(x, weights["residual.weight"])
        return result + x

    @cached_property
    def _weights(self) -> Weights:
        shapes: dict[str, tuple[int, ...]] = {"linear.weight": (self.outputs, self.inputs)}
        if self.bias:
            shapes["linear.bias"] = (self.outputs,)
        if self.residual and self.inputs != self.outputs:
            shapes["residual.weight"] = (self.outputs, self.inputs)
        return Weights(held(self.name, self.folder), self.name, shapes, "Dense")


@dataclass(frozen=True)
class LayerNorm:
    """(x - mean(x)) / sqrt(var(x) + 1e-5) * weight + bias over the columns. [..., inputs] -> the same"""

    name: str  # of its folder: "2_LayerNorm"
    inputs: int
    folder: Folder | None = field(default=None, repr=False, compare=False)

    @staticmethod
    def read(folder: Folder, module: Module, document: Document) -> "LayerNorm":
        """Raises ValueError, naming file and key."""
        inputs = document.positive("dimension")
        if inputs is None:
            raise document.error("dimension", "a whole number above 0")
        return LayerNorm(module.path, inputs, folder)

    def __str__(self) -> str:
        return "LayerNorm"

    @property
    def source(self) -> str:
        """What says how many columns it takes."""
        return f"{inside(self.name, 'config.json')}: dimension"

    def columns(self, given: int | None) -> int:
        _check(self.source, self.inputs, given)
        return self.inputs

    def __call__(self, x: Tensor) -> Tensor:
        weights = self._weights.like(x)
        return torch.nn.functional.layer_norm(x, (self.inputs,), weights["norm.weight"], weights["norm.bias"])

    @cached_property
    def _weights(self) -> Weights:
        shapes = {"norm.weight": (self.inputs,), "norm.bias": (self.inputs,)}
        return Weights(held(self.name, self.folder), self.name, shapes, "LayerNorm")


_PREFIX = "latent_attention_model."  # of its weights


@dataclass(frozen=True)
class LatentAttention:
    """fastpool.nn.LatentAttention's `states`: what each token becomes before the mean. [..., inputs] -> the same"""

    name: str  # of its configuration: "config.json: latent_attention_config"
    inputs: int
    latents: int
    heads: int
    head_columns: int
    home: str = field(default="", repr=False)  # the folder of its weights, the whole model's
    folder: Folder | None = field(default=None, repr=False, compare=False)

    @staticmethod
    def read(folder: Folder, home: str, document: Document) -> "LatentAttention":
        """Raises ValueError, naming file and key."""
        said = {key: document.positive(key) or default for key, default in latent.SIZES.items()}
        latents, heads, head_columns, inputs, other = said.values()
        if other != inputs:
            raise document.error("hidden_dim", f"latent_dim, {inputs}")
        return LatentAttention(document.name, inputs, latents, heads, head_columns, home, folder)

    def __str__(self) -> str:
        return "through latent attention"

    @property
    def source(self) -> str:
        """What says how many columns it takes."""
        return f"{self.name}: latent_dim"

    def columns(self, given: int | None) -> int:
        _check(self.source, self.inputs, given)
        return self.inputs

    def __call__(self, x: Tensor) -> Tensor:
        at = (x.device, x.dtype)
        if at not in self._placed:
            folded = self._folded.keys.weight
            same = at == (folded.device, folded.dtype)
            with torch.inference_mode(False):
                self._placed[at] = self._folded if same else copy.deepcopy(self._folded).to(*at)
        return self._placed[at].states(x)

    @cached_property
    def _placed(self) -> dict[tuple[torch.device, torch.dtype], nn.LatentAttention]:
        return {}

    @cached_property
    def _folded(self) -> nn.LatentAttention:
        sizes = (self.latents, self.heads, self.head_columns, self.inputs, self.inputs)
        config = dict(zip(latent.SIZES, sizes, strict=True))
        shapes = {_PREFIX + key: shape for key, shape in latent.shapes(config).items()}
        with torch.inference_mode(False):
            weights = Weights(held(self.name, self.folder), self.home, shapes, "LatentAttention").stored
            return nn.LatentAttention.from_state_dict(config, weights, _PREFIX).requires_grad_(False)


Layer = Normalize | Dense | LayerNorm | LatentAttention


def columns(layers: tuple[Layer, ...], given: int | None) -> int | None:
    """Those that come out of the layers. Raises ValueError where one does not take what the one before it gives."""
    for layer in layers:
        given = layer.columns(given)
    return given


def _check(source: str, inputs: int, given: int | None) -> None:
    if given not in (None, inputs):
        raise ValueError(f"{source} must be {given}, the columns before it, got {inputs}")


def _activation(document: Document) -> str:
    said = document.get("activation_function", str)
    if said is None:
        return "Tanh"  # sentence-transformers' default
    name = said.rpartition(".")[2]
    if not said.startswith("torch.nn.") or name not in _ACTIVATIONS:
        raise document.error("activation_function", f"one of torch.nn's {', '.join(_ACTIVATIONS)}")
    return name
