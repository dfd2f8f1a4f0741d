"""Multi-head attention whose queries are learned, folded into queries over raw tokens."""

import math
from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import functional
from ..calls import accumulator
from ..checks import FLOATS, check_float, has_rows
from ..options import count, option
from .attention import SPREAD
from .ending import Ending, check_ending, end, given
from .precision import own_precision


class MultiheadPooling(Ending):
    """A multi-head attention whose queries are learned and whose keys and values are a text's tokens, folded: attention
    heads of the vision models SigLIP, AIMv2, CoCa and their like are such.

    Head h of a query attends with scores s = x . query_h to the tokens themselves, by one fastpool.attention with a
    query for each head, so that tokens are read once, and their keys and values never made: a value is a matrix's
    product, and a mean of products is the product of the mean. The result is
    output([value_1 y_1, value_2 y_2, ...] + bias), y_h being the mean of head h.

    Args:
        width: columns of hidden, H.
        heads: of each query.
        queries: how many vectors a text gets.
        inner: columns of all heads' values together, which `heads` must divide; width if not given.
        outputs: columns of a vector; inner if not given.
        truncate_dim: keep the first `truncate_dim` columns only (Matryoshka).
        normalize: divide each vector by max(its L2 norm, 1e-12).
        out_dtype: of the result; hidden's dtype if not given.

    Calls take the arguments of fastpool.mean, in every layout that it knows:
    `pooling(hidden, mask, cu_seqlens, lengths=, starts=, ends=)`. `from_multihead` and `from_projections` take the
    weights of a model; what such a model does to the vector afterwards (SigLIP an MLP) remains to be done.

    Parameters are `query` [queries * heads, H], each with its scale in it, `value` [heads, inner / heads, H], and
    `output`, a torch.nn.Linear, or what stands there later, such as an adapter around it.

    Returns:
        [B, truncate_dim or outputs]; with several queries [B, queries, truncate_dim or outputs]. All is computed in
        float32 (float64 for float64 hidden), also under autocast, and rounded once; the two products after the
        attention are torch's, and their bits may depend on the batch's size. A text without real tokens gives the bias
        of `output`. Gradients flow to hidden and to the parameters.

    Raises:
        TypeError: an argument of the wrong type; in calls, what the functions raise.
        ValueError: a count below 1, heads that do not divide inner, truncate_dim beyond outputs; in calls, hidden of
            another width, and what the functions raise.

    >>> attention, probe = torch.nn.MultiheadAttention(384, 12, batch_first=True), torch.randn(1, 1, 384)
    >>> vectors = fastpool.nn.MultiheadPooling.from_multihead(attention, probe)(hidden, mask)
    """

    def __init__(
        self,
        width: int,
        heads: int,
        queries: int = 1,
        inner: int | None = None,
        outputs: int | None = None,
        truncate_dim: int | None = None,
        normalize: bool = False,
        out_dtype: torch.dtype | None = None,
        **unknown: NoReturn,
    ) -> None:
        super().__init__(truncate_dim, normalize, out_dtype, unknown)
        self.width = count(self._name, "width", width)
        self.heads = count(self._name, "heads", heads)
        self.queries = count(self._name, "queries", queries)
        self.inner = count(self._name, "inner", self.width if inner is None else inner)
        self.outputs = count(self._name, "outputs", self.inner if outputs is None else outputs)
        if self.inner % self.heads:
            raise ValueError(f"{self._name}: heads must divide inner, {self.inner}, got {self.heads}")
        self._keep_at_most(self.outputs)
        self.query = torch.nn.Parameter(torch.empty(self.queries * self.heads, self.width))
        self.value = torch.nn.Parameter(torch.empty(self.heads, self.inner // self.heads, self.width))
        self.output = torch.nn.Linear(self.inner, self.outputs)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all parameters anew, as a new module's are."""
        bound = self.width**-0.5  # torch.nn.Linear's
        torch.nn.init.normal_(self.query, std=SPREAD)
        torch.nn.init.uniform_(self.value, -bound, bound)
        self.output.reset_parameters()

    @classmethod
    def from_multihead(
        cls, attention: torch.nn.MultiheadAttention, probe: Tensor, **options: Any
    ) -> "MultiheadPooling":
        """What attention(probe, hidden, hidden)[0] gives for each text, without its dropout.

        Args:
            attention: its weights are copied; kdim and vdim may differ from embed_dim, but not from each other.
            probe: the learned query, [E], or several, [queries, E]; a leading dimension of 1 is left out.
            options: truncate_dim, normalize and out_dtype.

        Raises:
            TypeError: something else than such a module or a tensor of float numbers; an option that there is not.
            ValueError: a probe of another shape; keys and values that are not the tokens' alone (add_bias_kv,
                add_zero_attn), or of two widths.
        """
        name = f"fastpool.nn.{cls.__name__}.from_multihead"
        check_ending(name, options)
        if not isinstance(attention, torch.nn.MultiheadAttention):
            raise TypeError(f"{name}: attention must be a torch.nn.MultiheadAttention, got {type(attention).__name__}")
        for extra, has in (("add_bias_kv", attention.bias_k is not None), ("add_zero_attn", attention.add_zero_attn)):
            if has:
                raise ValueError(f"{name}: attention must attend to tokens alone, got one with {extra}=True")
        if attention.kdim != attention.vdim:
            raise ValueError(
                f"{name}: attention must take keys and values of one width, got kdim {attention.kdim} and "
                f"vdim {attention.vdim}"
            )
        _check_query(name, "probe", probe, attention.embed_dim)
        if attention.in_proj_weight is None:
            weights = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
        else:
            weights = attention.in_proj_weight.chunk(3)
        biases = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
        query, key, value = (_linear(weight, bias) for weight, bias in zip(weights, biases, strict=True))
        with torch.no_grad():
            projected = query(probe.to(query.weight.dtype))
        return cls.from_projections(projected, key, value, attention.out_proj, attention.num_heads, **options)

    @classmethod
    def from_projections(
        cls,
        query: Tensor,
        key: torch.nn.Linear,
        value: torch.nn.Linear,
        output: torch.nn.Linear,
        heads: int,
        scale: float | None = None,
        **options: Any,
    ) -> "MultiheadPooling":
        """What scaled_dot_product_attention(query, key(hidden), value(hidden)) gives, in heads, and then output.

        Args:
            query: as it meets the keys, so already projected: [inner], or several, [queries, inner]; a leading
                dimension of 1 is left out.
            key: H to inner; its bias changes nothing, as it cancels.
            value: H to inner.
            output: inner to outputs.
            heads: of inner columns, side by side.
            scale: of the products; (inner / heads)^-0.5 if not given.
            options: truncate_dim, normalize and out_dtype.

        Raises:
            TypeError: something else than modules and a tensor of float numbers; a module whose weight is of another
                kind, or whose forward is not torch.nn.Linear's, such as an adapter's; an option that there is not.
            ValueError: shapes that do not fit, a scale that is not finite.
        """
        name = f"fastpool.nn.{cls.__name__}.from_projections"
        check_ending(name, options)
        for argument, module in (("key", key), ("value", value), ("output", output)):
            if not isinstance(module, torch.nn.Linear):
                raise TypeError(f"{name}: {argument} must be a torch.nn.Linear, got {type(module).__name__}")
            if getattr(module.forward, "__func__", None) is not torch.nn.Linear.forward:
                raise TypeError(
                    f"{name}: {argument} must compute what torch.nn.Linear does, for its weights alone are taken, got "
                    f"{type(module).__name__} with a forward of its own; merge an adapter into the weights first"
                )
            check_float(name, f"{argument}.weight", module.weight.dtype)
        inner, width = key.weight.shape
        if value.weight.shape != key.weight.shape:
            raise ValueError(f"{name}: value must map {width} columns to {inner}, as key does, got {value!r}")
        if output.in_features != inner:
            raise ValueError(f"{name}: output must take {inner} columns, which value gives, got {output!r}")
        _check_query(name, "query", query, inner)
        if scale is not None:
            scale = option(name, "scale", scale, float)
            if not math.isfinite(scale):
                raise ValueError(f"{name}: scale must be finite, got {scale}")
        query = query.detach().reshape(-1, inner)
        pooling = cls(width, heads, len(query), inner, output.out_features, **options)
        pooling.to(key.weight.device, key.weight.dtype)
        each = inner // pooling.heads
        with torch.no_grad():  # products of weights, once, so in float64
            queries = query.double().unflatten(-1, (pooling.heads, each)) * (each**-0.5 if scale is None else scale)
            keys = key.weight.double().unflatten(0, (pooling.heads, each))
            pooling.query.copy_(torch.einsum("khd,hdw->khw", queries, keys).flatten(0, 1))
            pooling.value.copy_(value.weight.unflatten(0, (pooling.heads, each)))
            pooling.output.weight.copy_(output.weight)
            # Weights of a mean add up to 1, so that of the values' bias nothing but itself is left.
            biases = [] if value.bias is None else [output.weight.double() @ value.bias.double()]
            biases += [] if output.bias is None else [output.bias.double()]
            pooling.output.bias.zero_().add_(sum(biases))
        return pooling

    def extra_repr(self) -> str:
        options = given(queries=(self.queries, 1), inner=(self.inner, self.width), outputs=(self.outputs, self.inner))
        return ", ".join([str(self.width), f"heads={self.heads}", *options, *self._options()])

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
        wide = accumulator(hidden.dtype) if has_rows(hidden) else None  # else the function says what is wrong
        means = functional.attention(
            hidden, self.query, mask, cu_seqlens, lengths=lengths, starts=starts, ends=ends, out_dtype=wide
        )
        of_heads = means.unflatten(1, (self.queries, self.heads))
        with own_precision(means):
            values = torch.einsum("bkhw,hdw->bkhd", of_heads, self.value.to(wide)).flatten(-2)
            # The module itself is called, be it one with hooks or an adapter, but computes in the means' precision.
            widened = {name: one.to(wide) for name, one in self.output.named_parameters() if one.dtype in FLOATS}
            vectors: Tensor = torch.func.functional_call(self.output, widened, values)
        vectors = vectors.squeeze(1) if self.queries == 1 else vectors
        return end(vectors, self.truncate_dim, self.normalize, self.out_dtype or hidden.dtype)


def _check_query(name: str, argument: str, query: Any, width: int) -> None:
    if not isinstance(query, Tensor):
        raise TypeError(f"{name}: {argument} must be a torch.Tensor, got {type(query).__name__}")
    check_float(name, argument, query.dtype)
    shape = list(query.shape)
    if len(shape) not in (1, 2, 3) or shape[-1] != width or (len(shape) == 3 and shape[0] != 1) or query.numel() == 0:
        raise ValueError(
            f"{name}: {argument} must have shape [{width}], [queries, {width}] or [1, queries, {width}], got {shape}"
        )


def _linear(weight: Tensor, bias: Tensor | None) -> torch.nn.Linear:
    """A module of these very weights."""
    module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    module.weight = torch.nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        module.bias = torch.nn.Parameter(bias.detach(), requires_grad=False)
    return module
