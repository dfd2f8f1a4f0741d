"""The functions people call: `fastpool.mean(hidden, mask)`.

Each hands its arguments to `torch.ops.fastpool.<mode>`, in the op's own forms of input (layouts.py).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import dispatch, docstrings, several, spans
from .arguments import OPS
from .calls import PoolCall, TokensCall
from .checks import check_float
from .constants import NORM_EPS
from .layouts import OWN, raise_in_callers_words, to_op
from .modes import MODES, Mode
from .options import WRONG, mode_names, option, options_given, refuse
from .recording import below_autograd, skips_autograd
from .signatures import AttentionPooling, Pooling, ScoredPooling, WeightedPooling

__all__ = ["attention", "cls", "explain", "l2_normalize", "last", "max", "mean", "mean_sqrt_len", "softmax_mean"]
__all__ += ["pool", "sum", "weighted_mean"]


def _pooling_function(mode: Mode) -> Callable[..., Tensor]:
    op: Callable[..., Tensor] = getattr(torch.ops.fastpool, mode.name).default
    name = f"fastpool.{mode.name}"
    tensors = tuple(argument.name for argument in mode.arguments if argument.differentiable)

    def call(
        hidden: Tensor,
        before: tuple[Any, ...],
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        behind: tuple[Any, ...],
        own: dict[str, Any],
        lengths: Tensor | None,
        starts: Tensor | None,
        ends: Tensor | None,
        truncate_dim: int | None,
        normalize: bool,
        out_dtype: torch.dtype | None,
        unknown: dict[str, Any],
    ) -> Tensor:
        """With what the mode takes besides: `before` and `behind` what every batch may have, and by name."""
        if unknown:
            refuse(name, unknown)
        names = OWN
        if lengths is not None or getattr(hidden, "is_nested", False):
            hidden, cu_seqlens, starts, ends, names = to_op(name, hidden, cu_seqlens, starts, ends, lengths)
        if (starts is not None or ends is not None) and spans.given(hidden, starts, ends):
            own |= dict(zip(tensors, (*before, *behind), strict=True), truncate_dim=truncate_dim, normalize=normalize)
            own["out_dtype"] = out_dtype
            return spans.on_rows(pool, (mode.name,), hidden, mask, cu_seqlens, starts, ends, names, **own)
        more = own | options_given(name, starts, ends, truncate_dim, normalize, out_dtype)
        args = (hidden, *before, mask, cu_seqlens, *behind)
        try:
            if skips_autograd(hidden, *before, *behind):
                with below_autograd():
                    return op(*args, **more)
            return op(*args, **more)
        except WRONG as error:
            raise_in_callers_words(error, names, (mode.name, args, more))

    # A body for each signature, which is documentation; and that without arguments of its own does not go through
    # `call`, for it is the hot path of small batches.
    if mode.takes_weights:

        def pool(
            hidden: Tensor,
            mask: Tensor | None = None,
            cu_seqlens: Tensor | None = None,
            weights: Tensor | None = None,
            *,
            lengths: Tensor | None = None,
            starts: Tensor | None = None,
            ends: Tensor | None = None,
            truncate_dim: int | None = None,
            normalize: bool = False,
            out_dtype: torch.dtype | None = None,
            **unknown: NoReturn,
        ) -> Tensor:
            more = (lengths, starts, ends, truncate_dim, normalize, out_dtype, unknown)
            return call(hidden, (), mask, cu_seqlens, (weights,), {}, *more)

    elif mode.takes_scores:

        def pool(  # type: ignore[misc]  # another signature
            hidden: Tensor,
            mask: Tensor | None = None,
            cu_seqlens: Tensor | None = None,
            scores: Tensor | None = None,
            *,
            lengths: Tensor | None = None,
            starts: Tensor | None = None,
            ends: Tensor | None = None,
            truncate_dim: int | None = None,
            normalize: bool = False,
            out_dtype: torch.dtype | None = None,
            **unknown: NoReturn,
        ) -> Tensor:
            more = (lengths, starts, ends, truncate_dim, normalize, out_dtype, unknown)
            return call(hidden, (), mask, cu_seqlens, (scores,), {}, *more)

    elif mode.takes_query:

        def pool(  # type: ignore[misc]  # another signature
            hidden: Tensor,
            query: Tensor,
            mask: Tensor | None = None,
            cu_seqlens: Tensor | None = None,
            *,
            lengths: Tensor | None = None,
            starts: Tensor | None = None,
            ends: Tensor | None = None,
            scale: float = 1.0,
            truncate_dim: int | None = None,
            normalize: bool = False,
            out_dtype: torch.dtype | None = None,
            **unknown: NoReturn,
        ) -> Tensor:
            own = {} if scale == 1.0 and type(scale) is float else {"scale": option(name, "scale", scale, float)}
            more = (lengths, starts, ends, truncate_dim, normalize, out_dtype, unknown)
            return call(hidden, (query,), mask, cu_seqlens, (), own, *more)

    else:

        def pool(  # type: ignore[misc]  # another signature
            hidden: Tensor,
            mask: Tensor | None = None,
            cu_seqlens: Tensor | None = None,
            *,
            lengths: Tensor | None = None,
            starts: Tensor | None = None,
            ends: Tensor | None = None,
            truncate_dim: int | None = None,
            normalize: bool = False,
            out_dtype: torch.dtype | None = None,
            **unknown: NoReturn,
        ) -> Tensor:
            if unknown:
                refuse(name, unknown)
            names = OWN
            if lengths is not None or getattr(hidden, "is_nested", False):
                hidden, cu_seqlens, starts, ends, names = to_op(name, hidden, cu_seqlens, starts, ends, lengths)
            if (starts is not None or ends is not None) and spans.given(hidden, starts, ends):
                more: dict[str, Any] = {"truncate_dim": truncate_dim, "normalize": normalize, "out_dtype": out_dtype}
                return spans.on_rows(pool, (mode.name,), hidden, mask, cu_seqlens, starts, ends, names, **more)
            more = options_given(name, starts, ends, truncate_dim, normalize, out_dtype)
            try:
                if skips_autograd(hidden):
                    with below_autograd():
                        return op(hidden, mask, cu_seqlens, **more)
                return op(hidden, mask, cu_seqlens, **more)
            except WRONG as error:
                raise_in_callers_words(error, names, (mode.name, (hidden, mask, cu_seqlens), more))

    pool.__name__ = pool.__qualname__ = mode.name
    pool.__doc__ = docstrings.of_pooling(mode)
    return pool


mean: Pooling = _pooling_function(MODES["mean"])
mean_sqrt_len: Pooling = _pooling_function(MODES["mean_sqrt_len"])
sum: Pooling = _pooling_function(MODES["sum"])
max: Pooling = _pooling_function(MODES["max"])
cls: Pooling = _pooling_function(MODES["cls"])
last: Pooling = _pooling_function(MODES["last"])
weighted_mean: WeightedPooling = _pooling_function(MODES["weighted_mean"])
softmax_mean: ScoredPooling = _pooling_function(MODES["softmax_mean"])
attention: AttentionPooling = _pooling_function(MODES["attention"])
_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    name: globals()[name] for name, mode in MODES.items() if not mode.of_logits
}


def pool(
    hidden: Tensor,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    weights: Tensor | None = None,
    scores: Tensor | None = None,
    *,
    modes: str | Sequence[str],
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    truncate_dim: int | None = None,
    normalize: bool = False,
    out_dtype: torch.dtype | None = None,
    **unknown: NoReturn,
) -> Tensor:
    """Several modes of one batch side by side, [B, len(modes) * H], each with the bits of its own function.

    On CPUs hidden is read once for all of them, where no gradient is recorded and softmax_mean is not among them; else
    each mode is a call of its own.

    Args:
        hidden: token states, and
        mask: which of them are real, and
        cu_seqlens: where segments are, as every pooling function takes them.
        weights: for those of the modes that take them.
        scores: likewise.
        modes: functions' names, such as ("mean", "max"), 15 at most, or one of them; not "attention".
        lengths: the same as ends, for padded input.
        starts: the first row of each segment.
        ends: one behind its last row.
        truncate_dim: use the first `truncate_dim` columns of all together; modes that are cut off are not computed.
        normalize: divide the whole by max(its L2 norm, 1e-12).
        out_dtype: of the result; hidden's dtype if not given.

    Returns:
        [B, truncate_dim or len(modes) * H], rounded once. Gradients flow to hidden, weights and scores; where several
        modes give one, each is rounded before they are added.

    Raises:
        TypeError, ValueError: what the functions raise; weights or scores that none of the modes takes, more columns
            than all together have.
        torch.OutOfMemoryError: the result does not fit in memory.

    >>> fastpool.pool(hidden, mask, modes=("mean", "max"), normalize=True)
    """
    name = "fastpool.pool"
    if unknown:
        refuse(name, unknown)
    chosen = mode_names(name, "modes", modes, without=("query",))
    per_token = {"weights": weights, "scores": scores}
    for argument, value in per_token.items():
        if value is not None and not any(MODES[mode].takes(argument) for mode in chosen):
            raise ValueError(f"{name}: {argument} go to none of the modes: {', '.join(chosen)}")
    own = {mode: {key: value for key, value in per_token.items() if MODES[mode].takes(key)} for mode in chosen}
    if len(chosen) == 1:
        return _FUNCTIONS[chosen[0]](
            hidden, mask, cu_seqlens, **own[chosen[0]], lengths=lengths, starts=starts, ends=ends,
            truncate_dim=truncate_dim, normalize=normalize, out_dtype=out_dtype,
        )  # fmt: skip
    names = OWN
    if lengths is not None or getattr(hidden, "is_nested", False):
        hidden, cu_seqlens, starts, ends, names = to_op(
            f"fastpool.{chosen[0]}", hidden, cu_seqlens, starts, ends, lengths
        )
    if spans.given(hidden, starts, ends):
        more: dict[str, Any] = dict(per_token, truncate_dim=truncate_dim, normalize=normalize, out_dtype=out_dtype)
        return spans.on_rows(partial(pool, modes=chosen), chosen, hidden, mask, cu_seqlens, starts, ends, names, **more)
    more = options_given(name, starts, ends, truncate_dim, normalize, out_dtype)
    try:
        proper = isinstance(hidden, Tensor) and hidden.dim() > 0  # else the first mode's op says what is wrong
        if proper:
            chosen = tuple(mode for mode, _ in several.columns_of(chosen, hidden.shape[-1], more.get("truncate_dim")))
        if len(chosen) == 1 or not proper:
            one: Callable[..., Tensor] = getattr(torch.ops.fastpool, chosen[0]).default
            return one(hidden, mask, cu_seqlens, **own[chosen[0]], **more)
        args = (several.code_of(chosen), hidden, mask, cu_seqlens, weights, scores)
        if torch.compiler.is_exporting() or not several.together(chosen):
            return several.apart(*args, **more)
        op: Callable[..., Tensor] = torch.ops.fastpool._pool_several.default
        if skips_autograd(hidden, weights):
            with below_autograd():
                return op(*args, **more)
        return op(*args, **more)
    except WRONG as error:
        more.pop("truncate_dim", None)
        calls = [(mode, (hidden, mask, cu_seqlens), own[mode] | more) for mode in chosen]
        raise_in_callers_words(error, names, *calls)


def l2_normalize(
    x: Tensor,
    *,
    truncate_dim: int | None = None,
    truncate_dims: Tensor | None = None,
    eps: float = NORM_EPS,
    out_dtype: torch.dtype | None = None,
    **unknown: NoReturn,
) -> Tensor:
    """x / max(norm(x), eps) over the last dimension, any leading shape of up to 63 dimensions.

    With truncate_dims, vectors of different sizes (Matryoshka) come from one call: row i is what
    l2_normalize(x[i], truncate_dim=truncate_dims[i]) gives, bit for bit, and +0 from column truncate_dims[i] on, so
    that dot products of vectors of one size are theirs. What x holds in those columns does not matter; their gradient
    is +0.

    Args:
        x: float16, bfloat16, float32 or float64; any strides; copied first where its last dimension is not contiguous.
        truncate_dim: use the first `truncate_dim` columns only; truncation comes before normalisation.
        truncate_dims: int32 or int64, of x's shape without its last dimension, any stride, on x's device: how many
            columns of each row are used, from 0 (which gives zeros) to `truncate_dim`, or to all there are.
        eps: vectors shorter than this are divided by it instead.
        out_dtype: of the result; x's dtype if not given.

    Returns:
        x's shape with `truncate_dim` columns. Squares are added in float32 (float64 for float64 input) in one canonical
        order (fastpool.reference), a norm too large or too small to square is taken of x scaled by a power of two, and
        the result is rounded once. Zeros over an eps of 0 are NaN.

    Raises:
        TypeError: a wrong dtype, or something that is not a tensor; an option of another type; an argument that there
            is not, such as dim.
        ValueError: a wrong shape, device or value; a tensor whose memory was freed or shrunk. Values of truncate_dims
            on a GPU are clamped instead, unless they are validated (fastpool.validate).
        torch.OutOfMemoryError: the result does not fit in memory.
    """
    if unknown:
        refuse("fastpool.l2_normalize", unknown)
    name = "fastpool.l2_normalize"
    more: dict[str, Any] = {"eps": option(name, "eps", eps, float)}
    if truncate_dim is not None:
        more["truncate_dim"] = option(name, "truncate_dim", truncate_dim, int)
    if truncate_dims is not None:
        more["truncate_dims"] = truncate_dims
    if out_dtype is not None:
        check_float(name, "out_dtype", out_dtype)
        more["out_dtype"] = out_dtype
    op: Callable[..., Tensor] = torch.ops.fastpool.l2_normalize.default
    try:
        if skips_autograd(x):
            with below_autograd():
                return op(x, **more)
        return op(x, **more)
    except RuntimeError as error:
        raise_in_callers_words(error, OWN, ("l2_normalize", (x,), more))


def explain(
    hidden: Tensor,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    weights: Tensor | None = None,
    *,
    mode: str = "mean",
    scores: Tensor | None = None,
    query: Tensor | None = None,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    scale: float = 1.0,
    truncate_dim: int | None = None,
    normalize: bool = False,
    out_dtype: torch.dtype | None = None,
    **unknown: NoReturn,
) -> dispatch.Explanation:
    """Which backend a pooling call with these arguments would take, and why each other one would not.

    Arguments are those of the pooling functions, and `mode` is the function's name, or "tokens". Nothing is pooled.

    Raises:
        TypeError, ValueError: what the call itself would raise.
    """
    if unknown:
        refuse("fastpool.explain", unknown)
    if not isinstance(mode, str):
        raise TypeError(f"fastpool.explain: mode must be a mode's name, got {type(mode).__name__}")
    if mode not in (*MODES, "tokens"):
        raise ValueError(f"fastpool.explain: mode must be one of {', '.join(MODES)}, tokens, got {mode!r}")
    own: dict[str, Any] = {"weights": weights, "scores": scores, "query": query}
    taken = [argument.name for argument in OPS[mode]]
    for argument, value in own.items():
        if value is not None and argument not in taken:
            raise ValueError(f"fastpool.explain: {mode} takes no {argument}")
    if scale != 1.0 and "scale" not in taken:
        raise ValueError(f"fastpool.explain: {mode} takes no scale")
    name, names = f"fastpool.{mode}", OWN
    if lengths is not None or getattr(hidden, "is_nested", False):
        hidden, cu_seqlens, starts, ends, names = to_op(name, hidden, cu_seqlens, starts, ends, lengths)
    if spans.given(hidden, starts, ends) and mode in MODES:
        own |= {"scale": scale, "truncate_dim": truncate_dim, "normalize": normalize, "out_dtype": out_dtype}
        return spans.on_rows(partial(explain, mode=mode), (mode,), hidden, mask, cu_seqlens, starts, ends, names, **own)
    more = options_given(name, starts, ends, truncate_dim, normalize, out_dtype)
    if mode not in MODES:  # of tokens
        return dispatch.explain_call(TokensCall(hidden, mask, cu_seqlens, **more, names=names))
    more |= own | {"scale": option(name, "scale", scale, float)}
    return dispatch.explain_call(PoolCall(mode, hidden, mask, cu_seqlens, **more, names=names))
