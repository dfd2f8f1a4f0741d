"""Latent attention, as NV-Embed and Giga-Embeddings have it: each token attends to learned latents, and the mean of
what comes out is the text's vector."""

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as formula

from .. import functional
from ..calls import accumulator
from ..checks import check_float, check_tensor, has_rows
from ..options import count
from ..token_rows import in_layout_of, real_rows
from .ending import Ending, check_ending, given
from .precision import in_dtype_of, own_precision

_WIDER = 4  # times as many columns within the feed-forward layer
# NV-Embed's keys, and its own values where they are left out.
SIZES = {"num_latents_value": 512, "num_cross_heads": 8, "cross_dim_head": 4096, "latent_dim": 4096, "hidden_dim": 4096}
# Our modules, and what their weights are called there.
_WHOLE = {
    "norm": "cross_attend_blocks.0.norm.",
    "feed_norm": "cross_attend_blocks.1.norm.",
    "up": "cross_attend_blocks.1.fn.net.0.",
    "down": "cross_attend_blocks.1.fn.net.2.",
}
# What is folded.
_LATENTS, _NORM = "latents", "cross_attend_blocks.0.norm_context."
_QUERY, _KEY_VALUE, _OUTPUT = (f"cross_attend_blocks.0.fn.{one}.weight" for one in ("to_q", "to_kv", "to_out"))


def shapes(sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """The weights of a model with these SIZES: their names there, and their shapes."""
    latents, heads, each, width, _ = (sizes[key] for key in SIZES)
    found: dict[str, tuple[int, ...]] = {
        _LATENTS: (latents, width),
        _QUERY: (heads * each, width),
        _KEY_VALUE: (2 * heads * each, width),
        _OUTPUT: (width, heads * each),
    }
    inner = _WIDER * width
    linear = {"up": (2 * inner, width), "down": (width, inner)}
    for name, prefix in (*_WHOLE.items(), ("", _NORM)):
        weight = linear.get(name, (width,))
        found |= {f"{prefix}weight": weight, f"{prefix}bias": weight[:1]}
    return found


class LatentAttention(Ending):
    """The mean over a text's real tokens of states(x) = x' + down(a * gelu(b)), where a and b are the halves of
    up(feed_norm(x')), and x' = x + values(softmax(keys(norm(x)))), a softmax over the latents of each head.

    That is a multi-head attention of each token to `latents` learned vectors, then a feed-forward layer, in the form in
    which `from_state_dict` folds it: a head's product of a token's query with a latent's key is one of the token with a
    vector, and what a head adds to the token is a mean of vectors. A 4096-wide token costs 67 million operations so,
    and not 604; the feed-forward layer's 403 million stay.

    Args:
        width: columns of hidden, H.
        latents: vectors that each head attends to.
        heads: of the attention.
        inner: columns within the feed-forward layer; 4 * width if not given.
        truncate_dim: keep the first `truncate_dim` columns only (Matryoshka); truncation comes before normalisation.
        normalize: divide each vector by max(its L2 norm, 1e-12).
        out_dtype: of the result; hidden's dtype if not given.
        device: of the parameters.
        dtype: of the parameters, torch's default if not given.

    Calls take the arguments of fastpool.mean, in every layout that it knows:
    `attention(hidden, mask, cu_seqlens, lengths=, starts=, ends=)`.

    Modules are `norm` and `feed_norm` (torch.nn.LayerNorm), `keys`, `values`, `up` and `down` (torch.nn.Linear).

    Returns:
        [B, truncate_dim or H]. Products of matrices are torch's, in the parameters' dtype also under autocast, so their
        bits may depend on the batch; the mean is fastpool's, in float32 or wider. Gradients flow to hidden and to the
        parameters, whatever stands in padding.

    Raises:
        TypeError: an argument of the wrong type; in calls, what fastpool.mean raises.
        ValueError: a count below 1, truncate_dim beyond width; in calls, hidden of another width, and what
            fastpool.mean raises.

    >>> vectors = fastpool.nn.LatentAttention(384, latents=16, heads=2, normalize=True)(hidden, mask)
    """

    def __init__(
        self,
        width: int,
        latents: int = 512,
        heads: int = 8,
        inner: int | None = None,
        truncate_dim: int | None = None,
        normalize: bool = False,
        out_dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        **unknown: NoReturn,
    ) -> None:
        super().__init__(truncate_dim, normalize, out_dtype, unknown)
        self.width = count(self._name, "width", width)
        self.latents = count(self._name, "latents", latents)
        self.heads = count(self._name, "heads", heads)
        self.inner = count(self._name, "inner", _WIDER * self.width if inner is None else inner)
        self._keep_at_most(self.width)
        made = self._made_with(device, dtype)
        self.norm = torch.nn.LayerNorm(self.width, **made)
        self.keys = torch.nn.Linear(self.width, self.heads * self.latents, bias=False, **made)
        self.values = torch.nn.Linear(self.heads * self.latents, self.width, bias=False, **made)
        self.feed_norm = torch.nn.LayerNorm(self.width, **made)
        self.up = torch.nn.Linear(self.width, 2 * self.inner, **made)
        self.down = torch.nn.Linear(self.inner, self.width, **made)

    @classmethod
    def from_state_dict(
        cls, config: Mapping[str, Any], state: Mapping[str, Tensor], prefix: str = "", **options: Any
    ) -> "LatentAttention":
        """The latent attention of a model, in float32 (float64 where its weights are).

        Args:
            config: what config.json has as `latent_attention_config`, with NV-Embed's own defaults: num_latents_value,
                num_cross_heads, cross_dim_head, latent_dim, hidden_dim, output_normalize.
            state: its weights by name, "latents", "cross_attend_blocks.0.norm.weight", and so on.
            prefix: of these names; "latent_attention_model." in a whole model's.
            options: truncate_dim, normalize (output_normalize if not given) and out_dtype.

        Raises:
            KeyError: a weight is missing, and which.
            TypeError: a number of the configuration that is none; a weight that is no tensor of float numbers; an
                option that there is not.
            ValueError: one that does not fit, or a weight of another shape, and which.
        """
        name = f"fastpool.nn.{cls.__name__}.from_state_dict"
        check_ending(name, options)
        for argument, value in (("config", config), ("state", state)):
            if not isinstance(value, Mapping):
                raise TypeError(f"{name}: {argument} must be a mapping, got {type(value).__name__}")
        sizes = {key: count(name, key, config.get(key, default)) for key, default in SIZES.items()}
        latents, heads, columns, width, _ = sizes.values()
        if sizes["hidden_dim"] != width:
            raise ValueError(f"{name}: hidden_dim must be latent_dim, {width}, got {sizes['hidden_dim']}")
        stored: dict[str, Tensor] = {}
        for key, shape in shapes(sizes).items():
            if prefix + key not in state:
                raise KeyError(f"{name}: state must have {prefix + key}; where its names begin otherwise, give prefix=")
            stored[key] = state[prefix + key]
            check_tensor(name, prefix + key, stored[key], optional=False)
            check_float(name, prefix + key, stored[key].dtype)
            if stored[key].shape != shape:
                raise ValueError(f"{name}: {prefix + key} must have shape {shape}, got {tuple(stored[key].shape)}")
        wide = accumulator(stored[_LATENTS].dtype)
        found = {key: weight.detach().to(wide) for key, weight in stored.items()}
        options.setdefault("normalize", config.get("output_normalize", True))
        module = cls(width, latents, heads, **options, device=found[_LATENTS].device, dtype=wide)
        for ours, theirs in _WHOLE.items():
            module.get_submodule(ours).load_state_dict({one: found[theirs + one] for one in ("weight", "bias")})
        with torch.no_grad():
            normed = formula.layer_norm(found[_LATENTS], (width,), found[f"{_NORM}weight"], found[f"{_NORM}bias"])
            key, value = (normed @ found[_KEY_VALUE].T).unflatten(1, (2, heads, columns)).unbind(1)
            query = found[_QUERY].unflatten(0, (heads, columns)) * columns**-0.5
            output = found[_OUTPUT].unflatten(1, (heads, columns))
            module.keys.weight.copy_(torch.einsum("lhd,hdw->hlw", key, query).flatten(0, 1))
            module.values.weight.copy_(torch.einsum("lhd,whd->whl", value, output).flatten(1))
        return module

    def extra_repr(self) -> str:
        inner = given(inner=(self.inner, _WIDER * self.width))
        return ", ".join([str(self.width), f"latents={self.latents}", f"heads={self.heads}", *inner, *self._options()])

    def states(self, x: Tensor) -> Tensor:
        """What each token becomes, [..., H] to [..., H], in the parameters' dtype."""
        x = in_dtype_of(x, self.keys.weight, self.norm.weight)
        with own_precision(x):
            scores = self.keys(self.norm(x)).unflatten(-1, (self.heads, self.latents))
            x = x + self.values(scores.softmax(-1).flatten(-2))
            a, b = self.up(self.feed_norm(x)).chunk(2, -1)
            result: Tensor = x + self.down(a * formula.gelu(b))
        return result

    def forward(
        self,
        hidden: Tensor,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        starts: Tensor | None = None,
        ends: Tensor | None = None,
    ) -> Tensor:
        self._check_width(hidden, self.width)
        bounds: dict[str, Any] = {"lengths": lengths, "starts": starts, "ends": ends}
        more = bounds | {"truncate_dim": self.truncate_dim, "normalize": self.normalize}
        if not has_rows(hidden):
            return functional.mean(hidden, mask, cu_seqlens, **more)  # which says what is wrong
        states = in_layout_of(hidden, self.states(real_rows("mean", hidden, mask, cu_seqlens, **bounds)))
        return functional.mean(states, mask, cu_seqlens, out_dtype=self.out_dtype or hidden.dtype, **more)
