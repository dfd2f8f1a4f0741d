"""Multi-head attention whose queries are learned, folded into queries over raw tokens."""

import math
from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import functional
from ..calls import accumulator
from ..checks import FLOATS, check_float, has_rows
from ..options import count, option
from .ending import Ending, check_ending, end, given
from .precision import own_precision

SPREAD = 0.02  # of a query's first values, as models initialise embeddings


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
        device: of the parameters.
        dtype: of the parameters, torch's default if not given.

    Calls take the arguments of fastpool.mean, in every layout that it knows:
    `pooling(hidden, mask, cu_seqlens, lengths=, starts=, ends=)`. `from_projections` and, for torch's own module,
    AttentionPooling.from_multihead take the weights of a model; what such a model does to the vector afterwards (SigLIP
    an MLP) remains to be done.

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

    >>> vectors = fastpool.nn.MultiheadPooling(384, heads=12)(hidden, mask)
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
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
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
        made = self._made_with(device, dtype)
        self.query = torch.nn.Parameter(torch.empty(self.queries * self.heads, self.width, **made))
        self.value = torch.nn.Parameter(torch.empty(self.heads, self.inner // self.heads, self.width, **made))
        self.output = torch.nn.Linear(self.inner, self.outputs, **made)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all parameters anew, as a new module's are."""
        bound = self.width**-0.5  # torch.nn.Linear's
        torch.nn.init.normal_(self.query, std=SPREAD)
        torch.nn.init.uniform_(self.value, -bound, bound)
        self.output.reset_parameters()

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
        """What scaled_dot_product_attention(query, key(hidden), value(hidden)) gives, in heads, and then output. Its
        parameters have the widest of the weights' dtypes.

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
            ValueError: shapes that do not fit, tensors on several devices, a scale that is not finite.
        """
        name = f"fastpool.nn.{cls.__name__}.from_projections"
        check_ending(name, options)
        for argument, module in (("key", key), ("value", value), ("output", output)):
            check_computes(name, argument, module, torch.nn.Linear)
            check_float(name, f"{argument}.weight", module.weight.dtype)
            check_device(name, f"{argument}.weight", module.weight, "key", key.weight.device)
        inner, width = key.weight.shape
        if value.weight.shape != key.weight.shape:
            raise ValueError(f"{name}: value must map {width} columns to {inner}, as key does, got {value!r}")
        if output.in_features != inner:
            raise ValueError(f"{name}: output must take {inner} columns, which value gives, got {output!r}")
        check_query(name, "query", query, inner)
        check_device(name, "query", query, "key", key.weight.device)
        if scale is not None:
            scale = option(name, "scale", scale, float)
            if not math.isfinite(scale):
                raise ValueError(f"{name}: scale must be finite, got {scale}")
        query = query.detach().reshape(-1, inner)
        dtype = torch.promote_types(torch.promote_types(key.weight.dtype, value.weight.dtype), output.weight.dtype)
        options |= {"device": key.weight.device, "dtype": dtype}
        pooling = cls(width, heads, len(query), inner, output.out_features, **options)
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
        of_heads = means.unflatten(-2, (self.queries, self.heads))
        with own_precision(means):
            values = torch.einsum("...khw,hdw->...khd", of_heads, self.value.to(wide)).flatten(-2)
            # The module itself is called, be it one with hooks or an adapter, but computes in the means' precision.
            widened = {name: one.to(wide) for name, one in self.output.named_parameters() if one.dtype in FLOATS}
            vectors: Tensor = torch.func.functional_call(self.output, widened, values)
        vectors = vectors.squeeze(-2) if self.queries == 1 else vectors
        return end(vectors, self.truncate_dim, self.normalize, self.out_dtype or hidden.dtype)


def check_computes(name: str, argument: str, module: Any, kind: type[torch.nn.Module]) -> None:
    """Raises TypeError for what is no module of this kind, or computes something else with its weights."""
    if not isinstance(module, kind):
        raise TypeError(f"{name}: {argument} must be a torch.nn.{kind.__name__}, got {type(module).__name__}")
    if getattr(module.forward, "__func__", None) is not kind.forward:
        raise TypeError(
            f"{name}: {argument} must compute what torch.nn.{kind.__name__} does, for its weights alone are taken, got "
            f"{type(module).__name__} with a forward of its own; merge an adapter into the weights first"
        )


def check_device(name: str, argument: str, tensor: Tensor, of: str, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name}: {argument} must be on {of}'s device, {device}, got {tensor.device}")


def check_query(name: str, argument: str, query: Any, width: int) -> None:
    if not isinstance(query, Tensor):
        raise TypeError(f"{name}: {argument} must be a torch.Tensor, got {type(query).__name__}")
    check_float(name, argument, query.dtype)
    shape = list(query.shape)
    if len(shape) not in (1, 2, 3) or shape[-1] != width or (len(shape) == 3 and shape[0] != 1) or query.numel() == 0:
        raise ValueError(
            f"{name}: {argument} must have shape [{width}], [queries, {width}] or [1, queries, {width}], got {shape}"
        )
