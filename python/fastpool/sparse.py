"""Sparse vectors over a vocabulary: SPLADE's pooling of logits, and what is kept of its result."""

from collections.abc import Callable
from functools import partial
from itertools import repeat
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import spans
from .calls import accumulator
from .checks import check_float, check_memory, check_tensor, name_of, require
from .functional import l2_normalize
from .layouts import Names, raise_in_callers_words, to_op
from .modes import MODES, Activation, Mode, Reduce
from .options import WRONG, count, option, options_given, refuse
from .recording import below_autograd, skips_autograd
from .token_rows import in_layout_of, real_rows

__all__ = ["sparse_csr", "splade", "splade_linear"]

_LOGITS: Names = {"hidden": "logits"}
_POOLING = {reduce.name.lower(): reduce for reduce in Reduce}
_ACTIVATION = {one.name.lower(): one for one in Activation if one}
_MODES: dict[tuple[Reduce, Activation], Mode] = {
    (mode.reduce, mode.activation): mode for mode in MODES.values() if mode.of_logits
}


def splade_mode(owner: str, pooling: Any, activation: Any) -> Mode:
    """The mode that they say. Raises TypeError or ValueError."""
    for name, value, known in (("pooling", pooling, _POOLING), ("activation", activation, _ACTIVATION)):
        if not isinstance(value, str):
            raise TypeError(f"{owner}: {name} must be a name, got {type(value).__name__}")
        if value not in known:
            raise ValueError(f"{owner}: {name} must be one of {', '.join(known)}, got {value!r}")
    return _MODES[_POOLING[pooling], _ACTIVATION[activation]]


def splade(
    logits: Tensor,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    pooling: str = "max",
    activation: str = "relu",
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    truncate_dim: int | None = None,
    normalize: bool = False,
    out_dtype: torch.dtype | None = None,
    **unknown: NoReturn,
) -> Tensor:
    """max or sum of ln(1 + max(x, 0)) over the logits x_1..x_n of each segment's real tokens: one vector over the
    vocabulary per segment, most of it 0 (SPLADE, Formal et al., arXiv 2107.05720 and 2109.10086).

    Input is padded [B, S, V] or packed [T, V], as fastpool.mean has it, with every way of saying what is real. Nothing
    as large as the logits is allocated; fastpool.splade_linear makes the logits themselves in parts. Models that leave
    [CLS] and [SEP] out (vLLM may, sentence-transformers does not) say so by `starts` and `ends`, or by the mask.

    Args:
        logits: of each token, for each word of the vocabulary; float16, bfloat16, float32 or float64; any strides,
            copied first where the last dimension is not contiguous.
        mask: bool, or integers of 0 and 1; set where a token is real.
        cu_seqlens: int32 or int64, of packed input.
        pooling: "max", or "sum" as the first SPLADE had it.
        activation: "relu": ln(1 + max(x, 0)); "log1p_relu": ln(1 + y) of that once more (arXiv 2504.14839). The names
            are sentence-transformers'.
        lengths: the same as ends, for padded input.
        starts: int32 or int64; the first row of each segment.
        ends: int32 or int64; one behind its last row.
        truncate_dim: use the first `truncate_dim` columns only, where the model's vocabulary is padded.
        normalize: divide each vector by max(its L2 norm, 1e-12).
        out_dtype: of the result; logits' dtype if not given.

    Returns:
        [B, truncate_dim or V]. Logarithms and sums are float32 (float64 for float64 logits), the same bits on every
        backend, in every batch and layout; rounded once. The maximum is taken first, of which the logarithm is that of
        the maximum. A segment without real tokens gives zeros, a NaN stays one. Gradients flow to logits: of a maximum
        to the first token that has it, of a sum to every token; from logits of 0 down, and in padding, they are 0.

    Raises:
        TypeError: a wrong dtype, or something that is not a tensor; pooling or activation that is no name; an option of
            another type; an argument that there is not.
        ValueError: a wrong shape, device or value, as of fastpool.mean; an unknown pooling or activation. Messages name
            the op that was called, such as fastpool.splade_max_relu.
        RuntimeError: the backend asked for cannot serve the call.
        torch.OutOfMemoryError: the result does not fit in memory.

    >>> fastpool.splade(logits, mask)
    """
    name = "fastpool.splade"
    if unknown:
        refuse(name, unknown)
    mode = splade_mode(name, pooling, activation).name
    name = f"fastpool.{mode}"
    op: Callable[..., Tensor] = getattr(torch.ops.fastpool, mode).default
    hidden, names = logits, _LOGITS
    if lengths is not None or getattr(logits, "is_nested", False):
        hidden, cu_seqlens, starts, ends, theirs = to_op(name, logits, cu_seqlens, starts, ends, lengths, "logits")
        names = {**names, **theirs}
    if spans.given(hidden, starts, ends):
        function = partial(splade, pooling=pooling, activation=activation)
        own: dict[str, Any] = {"truncate_dim": truncate_dim, "normalize": normalize, "out_dtype": out_dtype}
        return spans.on_rows(function, (mode,), hidden, mask, cu_seqlens, starts, ends, names, **own)
    more = options_given(name, starts, ends, truncate_dim, normalize, out_dtype)
    try:
        if skips_autograd(hidden):
            with below_autograd():
                return op(hidden, mask, cu_seqlens, **more)
        return op(hidden, mask, cu_seqlens, **more)
    except WRONG as error:
        raise_in_callers_words(error, names, (mode, (hidden, mask, cu_seqlens), more))


_CHUNK_BYTES = 64 << 20  # of logits at a time, where nobody says how many columns
_LEAST_CHUNK = 1024  # columns, below which a matrix product does not pay


def splade_linear(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    pooling: str = "max",
    activation: str = "relu",
    chunk: int | None = None,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    normalize: bool = False,
    out_dtype: torch.dtype | None = None,
    **unknown: NoReturn,
) -> Tensor:
    """fastpool.splade of the logits hidden @ weight.T + bias, of which `chunk` columns exist at a time: of 8,192 tokens
    and 250,002 words all of them are 4 GB in bfloat16.

    Where there are several chunks, the gradient computes each again. Logits are torch's own matrix product, whose bits
    depend on the batch.

    Args:
        hidden: what the decoder of a masked language model's head takes, after the head's transform: padded [B, S, H],
            packed [T, H] or jagged [B, *, H].
        weight: [V, H], the decoder's, of hidden's dtype, or of any under torch.autocast.
        bias: [V], likewise.
        mask: which tokens are real, and
        cu_seqlens: where segments are, as fastpool.splade takes them.
        pooling: "max" or "sum".
        activation: "relu" or "log1p_relu".
        chunk: columns of the vocabulary at a time; if not given, as many as make 64 MiB of logits, but 1,024 at least.
        lengths: the same as ends, for padded input.
        starts: int32 or int64; the first row of each segment.
        ends: int32 or int64; one behind its last row.
        normalize: divide each vector by max(its L2 norm, 1e-12).
        out_dtype: of the result; hidden's dtype if not given.

    Returns:
        [B, V], or [B, n, V] of spans. Gradients flow to hidden, weight and bias; those of chunks are added in the
        accumulator's dtype. Transforms of torch.func take it where one chunk is all.

    Raises:
        TypeError, ValueError: what fastpool.splade raises; a weight or bias of another shape, dtype or device; chunk
            below 1.

    >>> fastpool.splade_linear(hidden, torch.randn(30522, 384), mask=mask)
    """
    name = "fastpool.splade_linear"
    if unknown:
        refuse(name, unknown)
    mode = splade_mode(name, pooling, activation).name
    check_states(name, hidden)
    bounds = {"lengths": lengths, "starts": starts, "ends": ends}
    recorded = torch.is_grad_enabled() and any(getattr(one, "requires_grad", False) for one in (hidden, weight, bias))
    states = real_rows(mode, hidden, mask, cu_seqlens, **bounds, recorded=recorded)
    _check_linear(name, hidden, weight, bias)
    normalize = option(name, "normalize", normalize, bool)
    if out_dtype is not None:
        check_float(name, "out_dtype", out_dtype)
    words, dtype = weight.shape[0], out_dtype or hidden.dtype
    if chunk is None:
        tokens = max(1, states.shape[:-1].numel())
        chunk = max(_LEAST_CHUNK, _CHUNK_BYTES // (tokens * hidden.element_size()))
    chunk = count(name, "chunk", chunk)
    more: dict[str, Any] = {"pooling": pooling, "activation": activation, **bounds}
    more["out_dtype"] = accumulator(hidden.dtype) if normalize else dtype
    if (
        recorded and hidden.requires_grad
    ):  # so that it is the accumulator's dtype in which chunks add up their gradients
        states = states.to(accumulator(hidden.dtype))

    def pooled(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = in_layout_of(hidden, states.to(hidden.dtype))
        return splade(torch.nn.functional.linear(rows, weight, bias), mask, cu_seqlens, **more)

    parts = []
    biases: Any = repeat(None) if bias is None else bias.split(chunk)
    for part in zip(weight.split(chunk), biases, strict=False):
        one = checkpoint(pooled, states, *part, use_reentrant=False) if recorded and words > chunk else None
        parts.append(pooled(states, *part) if one is None else one)
    result = torch.cat(parts, -1)
    return l2_normalize(result, out_dtype=dtype) if normalize else result


def check_states(name: str, hidden: Tensor) -> None:
    """Raises TypeError or ValueError for what are no token states, whatever layout they have."""
    if isinstance(hidden, Tensor) and hidden.is_nested:
        require(hidden.layout == torch.jagged, TypeError, f"{name}: a nested hidden must be jagged")
    else:
        check_tensor(name, "hidden", hidden, optional=False)
        check_memory(name, "hidden", hidden)
    check_float(name, "hidden", hidden.dtype)
    require(
        hidden.dim() in (2, 3),
        ValueError,
        f"{name}: hidden must be padded [B, S, H] or packed [T, H], got shape {list(hidden.shape)}",
    )


def _check_linear(name: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raises TypeError or ValueError."""
    for what, tensor in (("weight", weight), ("bias", bias)):
        check_tensor(name, what, tensor, optional=what == "bias")
        if tensor is not None:
            check_memory(name, what, tensor)
    device = hidden.device.type
    casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    width = hidden.shape[-1]
    require(
        weight.dim() == 2 and weight.shape[0] > 0 and weight.shape[1] == width,
        ValueError,
        f"{name}: weight must have shape [V, {width}], as wide as hidden, got {list(weight.shape)}",
    )
    for what, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        check_float(name, what, tensor.dtype)
        require(
            tensor.dtype == hidden.dtype or casts,
            TypeError,
            f"{name}: {what} must be {name_of(hidden.dtype)} as hidden is, got {name_of(tensor.dtype)}",
        )
        require(
            tensor.device == hidden.device,
            ValueError,
            f"{name}: {what} must be on hidden's device, {hidden.device}, got {tensor.device}",
        )
    require(
        bias is None or bias.shape == weight.shape[:1],
        ValueError,
        f"{name}: bias must have shape [{weight.shape[0]}], a value for each row of weight, "
        f"got {None if bias is None else list(bias.shape)}",
    )


def sparse_csr(x: Tensor, top: int | None = None) -> Tensor:
    """Vectors [B, V] as a sparse CSR tensor.

    Args:
        x: float16, bfloat16, float32 or float64, as fastpool.splade gives it.
        top: keep the `top` largest of each vector, of equal ones those of lower columns, NaN before all. Each row then
            has exactly so many values, zeros among them where it has fewer, so that shapes do not depend on data and a
            GPU need not wait.

    Returns:
        A torch.sparse_csr tensor of x's shape and dtype, columns in ascending order; without `top`, of everything that
        is not 0. Gradients flow to x.

    Raises:
        TypeError: x is no dense floating-point tensor; top is no int.
        ValueError: x is not [B, V]; top is below 1, or beyond V.

    >>> fastpool.sparse_csr(fastpool.splade(logits, mask), top=64)
    """
    name = "fastpool.sparse_csr"
    check_tensor(name, "x", x, optional=False)
    check_float(name, "x", x.dtype)
    require(x.dim() == 2, ValueError, f"{name}: x must have shape [B, V], got {list(x.shape)}")
    check_memory(name, "x", x)
    if top is None:
        return x.to_sparse_csr()
    top, (rows, width) = count(name, "top", top), x.shape
    require(top <= width, ValueError, f"{name}: top must be at most x's columns, {width}, got {top}")
    columns = x.detach().sort(dim=1, descending=True, stable=True).indices[:, :top].sort(dim=1).values
    begins = torch.arange(0, rows * top + 1, top, device=x.device)
    values = x.gather(1, columns).flatten()
    return torch.sparse_csr_tensor(begins, columns.flatten(), values, size=x.shape, check_invariants=False)
