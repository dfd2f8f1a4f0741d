"""Pooling of several layers of a model, weighted."""

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from ..calls import accumulator
from ..checks import has_rows
from ..modes import MODES
from ..options import count, mode_names
from .ending import Ending, end, given
from .pooling import Pooling

# sentence-transformers' WeightedLayerPooling has these.
LAYERS, START = 12, 4


class WeightedLayers(Ending):
    """sum(w_l * pooled_l) / sum(w_l) over the layers l of a model from `layer_start` on, with learned weights w.

    Each layer is pooled by itself and then weighed: the same as pooling the weighted mean of the layers' token states,
    as sentence-transformers' WeightedLayerPooling does, but nothing of their size is made. That holds where pooling
    adds, so max is no mode here.

    Args:
        mode: a function's name ("mean", "cls", ...), or a sequence of them, side by side, as for Pooling; not "max",
            and none that needs scores.
        num_hidden_layers: layers of the model, its embedding layer not counted.
        layer_start: the first one that counts; 0 is the embedding layer.
        truncate_dim: keep the first `truncate_dim` columns only (Matryoshka); truncation comes before normalisation.
        normalize: divide each vector by max(its L2 norm, 1e-12).
        out_dtype: of the result; that of the layers if not given.
        device: of the parameters.
        dtype: of the parameters, torch's default if not given.

    Calls take what a model of transformers gives as hidden_states (with output_hidden_states=True), that is
    num_hidden_layers + 1 tensors of one layout, and then the arguments of Pooling:
    `pooling(hidden_states, mask, cu_seqlens, weights, lengths=, starts=, ends=)`.

    The parameter is `layer_weights` [num_hidden_layers + 1 - layer_start], ones at first.

    Returns:
        [B, truncate_dim or len(mode) * H]. All is computed in float32 (float64 for float64 layers) and rounded once, a
        text's vector with the same bits in every batch. Where layer_weights add up to 0, so that there is no mean, it
        is NaN or infinite. Gradients flow to the layers, to weights and to layer_weights.

    Raises:
        TypeError: an argument of the wrong type, a tensor in place of several; in calls, what the functions raise.
        ValueError: an unknown mode, or max; a count below 1, a layer_start that leaves no layer; in calls, another
            number of layers, layers of different shapes, and what Pooling raises.

    >>> layers = [hidden] * 13
    >>> vectors = fastpool.nn.WeightedLayers("mean", normalize=True)(layers, mask)
    """

    def __init__(
        self,
        mode: str | Sequence[str] = "mean",
        num_hidden_layers: int = LAYERS,
        layer_start: int = START,
        truncate_dim: int | None = None,
        normalize: bool = False,
        out_dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        **unknown: NoReturn,
    ) -> None:
        super().__init__(truncate_dim, normalize, out_dtype, unknown)
        names = mode_names(self._name, "mode", mode, without=("scores", "query"))
        self.mode = mode if isinstance(mode, str) else names
        for name in names:
            if MODES[name].gradient_finds_maximum:
                raise ValueError(
                    f"{self._name}: mode must be one that adds, got {name!r}; pool weighted states instead"
                )
        self.num_hidden_layers = count(self._name, "num_hidden_layers", num_hidden_layers)
        self.layer_start = count(self._name, "layer_start", layer_start, least=0)
        if self.layer_start > self.num_hidden_layers:
            raise ValueError(
                f"{self._name}: layer_start must be at most num_hidden_layers, {self.num_hidden_layers}, "
                f"got {self.layer_start}"
            )
        weights = torch.empty(self.num_hidden_layers + 1 - self.layer_start, **self._made_with(device, dtype))
        self.layer_weights = torch.nn.Parameter(weights)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Ones, as in a new module."""
        torch.nn.init.ones_(self.layer_weights)

    def extra_repr(self) -> str:
        options = given(num_hidden_layers=(self.num_hidden_layers, LAYERS), layer_start=(self.layer_start, START))
        return ", ".join([repr(self.mode), *options, *self._options()])

    def forward(
        self,
        hidden_states: Sequence[Tensor],
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        weights: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        starts: Tensor | None = None,
        ends: Tensor | None = None,
    ) -> Tensor:
        if isinstance(hidden_states, Tensor) or not isinstance(hidden_states, Sequence):
            kind = type(hidden_states).__name__
            raise TypeError(f"{self._name}: hidden_states must be a sequence of a model's layers, got {kind}")
        if len(hidden_states) != self.num_hidden_layers + 1:
            raise ValueError(
                f"{self._name}: hidden_states must be {self.num_hidden_layers + 1} layers, the embedding layer first, "
                f"got {len(hidden_states)}"
            )
        layers = hidden_states[self.layer_start :]
        wide = accumulator(layers[0].dtype) if has_rows(layers[0]) else None  # else the function says what is wrong
        if wide is not None:
            for i, layer in enumerate(layers, self.layer_start):
                if has_rows(layer) and _shape(layer) != _shape(layers[0]):
                    raise ValueError(
                        f"{self._name}: hidden_states[{i}] must have the shape of "
                        f"hidden_states[{self.layer_start}], {_shape(layers[0])}, got {_shape(layer)}"
                    )
            self._keep_at_most((1 if isinstance(self.mode, str) else len(self.mode)) * layers[0].shape[-1])
        pooling = Pooling(self.mode, self.truncate_dim, out_dtype=wide)
        bounds = {"lengths": lengths, "starts": starts, "ends": ends}
        # Neither stacked nor a matrix's product: autocast lets this be, and bits do not depend on the batch.
        first, *others = layers
        pooled = pooling(first, mask, cu_seqlens, weights, **bounds)
        shares = self.layer_weights.to(pooled.dtype)
        total = shares[0] * pooled
        for share, layer in zip(shares[1:], others, strict=True):
            total = total + share * pooling(layer, mask, cu_seqlens, weights, **bounds)
        return end(total / shares.sum(), self.truncate_dim, self.normalize, self.out_dtype or layers[0].dtype)


def _shape(layer: Tensor) -> tuple[int, ...]:
    """But for the tokens of jagged ones, which are symbols, each layer's its own."""
    return (layer.shape[0], layer.shape[-1]) if layer.is_nested else tuple(layer.shape)
