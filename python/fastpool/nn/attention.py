"""Pooling by learned attention: a softmax over a text's tokens of scores that the module learns."""

from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import functional
from ..checks import has_rows
from ..options import count
from ..token_rows import real_rows, rows
from .ending import Ending, check_ending, given
from .multihead import SPREAD, MultiheadPooling, check_computes, check_device, check_query
from .precision import in_dtype_of, own_precision

SCORERS = ("linear", "tanh")


class AttentionPooling(Ending):
    """sum(e^s * x) / sum(e^s) over the real tokens x of a text, with scores s that are learned.

    Scorer "linear": s = x . query, in one read of hidden, by fastpool.attention. There is no bias: added to every score
    of a text, it cancels. Several queries give several vectors, each of which has the bits that it has alone.

    Scorer "tanh": s = score . tanh(project x + bias), in the parameters' dtype also under autocast, with torch's own
    matrix product, which holds [B, S, inner] or [T, inner] meanwhile; then fastpool.softmax_mean. One query only.

    Args:
        width: columns of hidden, H.
        queries: how many vectors a text gets.
        scorer: "linear" or "tanh".
        inner: columns within the scorer "tanh"; width if not given.
        truncate_dim: keep the first `truncate_dim` columns only (Matryoshka); scores are of all columns.
        normalize: divide each vector by max(its L2 norm, 1e-12).
        out_dtype: of the result; hidden's dtype if not given.
        device: of the parameters.
        dtype: of the parameters, torch's default if not given.

    Calls take the arguments of fastpool.mean, in every layout that it knows:
    `pooling(hidden, mask, cu_seqlens, lengths=, starts=, ends=)`. `from_multihead` folds a multi-head attention.

    Parameters are `query` [H], or [queries, H]; with "tanh" `project` and `score`, torch.nn.Linear modules. They may
    have another dtype than hidden.

    Returns:
        [B, truncate_dim or H]; with several queries [B, queries, truncate_dim or H]. Sums are float32 (float64 for
        float64 hidden) in one canonical order. A text without real tokens gives zeros. Gradients flow to hidden and to
        the parameters, whatever stands in padding.

    Raises:
        TypeError: an argument of the wrong type; in calls, what the functions raise.
        ValueError: a count below 1, an unknown scorer, an argument that the scorer does not have, truncate_dim beyond
            the columns there are; in calls, hidden of another width, and what the functions raise.

    >>> pooling = fastpool.nn.AttentionPooling(384, normalize=True)
    >>> pooling(hidden, mask).sum().backward()
    """

    def __init__(
        self,
        width: int,
        queries: int = 1,
        scorer: str = "linear",
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
        self.queries = count(self._name, "queries", queries)
        if not isinstance(scorer, str):
            raise TypeError(f"{self._name}: scorer must be a str, got {type(scorer).__name__}")
        if scorer not in SCORERS:
            raise ValueError(f"{self._name}: scorer must be one of {', '.join(SCORERS)}, got {scorer!r}")
        self.scorer = scorer
        self._keep_at_most(self.width)
        made = self._made_with(device, dtype)
        if scorer == "linear":
            if inner is not None:
                raise ValueError(f"{self._name}: inner goes with scorer 'tanh', got {inner!r} with 'linear'")
            several = (self.queries,) if self.queries > 1 else ()
            self.query = torch.nn.Parameter(torch.empty(*several, self.width, **made))
        else:
            if self.queries > 1:
                raise ValueError(f"{self._name}: scorer 'tanh' has one query, got queries={self.queries}")
            inner = count(self._name, "inner", self.width if inner is None else inner)
            self.project = torch.nn.Linear(self.width, inner, **made)
            self.score = torch.nn.Linear(inner, 1, bias=False, **made)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all parameters anew, as a new module's are."""
        if self.scorer == "linear":
            torch.nn.init.normal_(self.query, std=SPREAD)
        else:
            self.project.reset_parameters()
            self.score.reset_parameters()

    @classmethod
    def from_multihead(cls, attention: torch.nn.MultiheadAttention, probe: Tensor, **options: Any) -> MultiheadPooling:
        """A learned query's multi-head attention to a text's tokens, folded: a module that gives for each text what
        attention(probe, hidden, hidden)[0] does, without its dropout.

        Args:
            attention: its weights are copied; kdim and vdim may differ from embed_dim, but not from each other.
            probe: the learned query, [E], or several, [queries, E]; a leading dimension of 1 is left out.
            options: truncate_dim, normalize and out_dtype.

        Raises:
            TypeError: something else than such a module or a tensor of float numbers; a module whose forward is not
                torch.nn.MultiheadAttention's; an option that there is not.
            ValueError: a probe of another shape; keys and values that are not the tokens' alone (add_bias_kv,
                add_zero_attn), or of two widths; tensors on several devices.

        >>> attention, probe = torch.nn.MultiheadAttention(384, 12, batch_first=True), torch.randn(1, 1, 384)
        >>> vectors = fastpool.nn.AttentionPooling.from_multihead(attention, probe)(hidden, mask)
        """
        name = f"fastpool.nn.{cls.__name__}.from_multihead"
        check_ending(name, options)
        check_computes(name, "attention", attention, torch.nn.MultiheadAttention)
        for extra, has in (("add_bias_kv", attention.bias_k is not None), ("add_zero_attn", attention.add_zero_attn)):
            if has:
                raise ValueError(f"{name}: attention must attend to tokens alone, got one with {extra}=True")
        if attention.kdim != attention.vdim:
            raise ValueError(
                f"{name}: attention must take keys and values of one width, got kdim {attention.kdim} and "
                f"vdim {attention.vdim}"
            )
        check_query(name, "probe", probe, attention.embed_dim)
        check_device(name, "probe", probe, "attention", attention.out_proj.weight.device)
        if attention.in_proj_weight is None:
            weights = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
        else:
            weights = attention.in_proj_weight.chunk(3)
        biases = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
        query, key, value = (_linear(weight, bias) for weight, bias in zip(weights, biases, strict=True))
        with torch.no_grad():
            projected = query(probe.to(query.weight.dtype))
        return MultiheadPooling.from_projections(
            projected, key, value, attention.out_proj, attention.num_heads, **options
        )

    def extra_repr(self) -> str:
        inner = self.project.out_features if self.scorer == "tanh" else self.width
        options = given(queries=(self.queries, 1), scorer=(self.scorer, "linear"), inner=(inner, self.width))
        return ", ".join([str(self.width), *options, *self._options()])

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
        bounds: dict[str, Any] = {"lengths": lengths, "starts": starts, "ends": ends}
        more = bounds | {"truncate_dim": self.truncate_dim, "normalize": self.normalize, "out_dtype": self.out_dtype}
        self._check_width(hidden, self.width)
        if self.scorer == "linear":
            return functional.attention(hidden, self.query, mask, cu_seqlens, **more)
        scores = None
        if has_rows(hidden):  # else the function says what is wrong
            like = rows(hidden)[..., 0]
            scores = self._scores(real_rows("softmax_mean", hidden, mask, cu_seqlens, scores=like, **bounds))
        return functional.softmax_mean(hidden, mask, cu_seqlens, scores, **more)

    def _scores(self, x: Tensor) -> Tensor:
        """Of each row."""
        x = in_dtype_of(x, self.project.weight, self.score.weight)
        with own_precision(x):
            scores: Tensor = self.score(torch.tanh(self.project(x)))
        return scores.squeeze(-1)


def _linear(weight: Tensor, bias: Tensor | None) -> torch.nn.Linear:
    """A module of these very weights."""
    module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    module.weight = torch.nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        module.bias = torch.nn.Parameter(bias.detach(), requires_grad=False)
    return module
