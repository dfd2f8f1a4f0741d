"""The functions people call: `fastpool.mean(hidden, mask)`.

Each hands its arguments to `torch.ops.fastpool.<mode>`, after putting the two forms of input that are Python's alone
into the op's own: `lengths=` is another name for `ends=`, and a jagged nested tensor is packed rows with offsets.
"""

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import dispatch
from .autograd import below_autograd, skips_autograd
from .calls import Call, PoolCall
from .checks import check_float, check_memory
from .constants import NORM_EPS
from .modes import MODES, Mode
from .ops import call_of
from .options import option
from .signatures import AttentionPooling, Pooling, ScoredPooling, WeightedPooling

__all__ = ["attention", "cls", "explain", "l2_normalize", "last", "max", "mean", "mean_sqrt_len", "softmax_mean"]
__all__ += ["sum", "weighted_mean"]

_DOC = """{formula}, over the real tokens x_1..x_n of each segment: one vector per segment.

    Input is padded or packed. Padded: hidden [B, S, H], real tokens told by any of mask [B, S], starts [B] and ends
    [B] (positions in the row; lengths [B] is another name for ends); without them every token is real. Packed: hidden
    [T, H] with cu_seqlens [B + 1], or with starts [B] and ends [B] (row numbers; segments may overlap, leave gaps,
    stand in any order), and optionally mask [T]. A jagged nested tensor [B, *, H] is packed input too. No layout
    copies tokens, and what stands outside a segment or behind a zero of the mask never reaches the result.

    Args:
        hidden: token states; float16, bfloat16, float32 or float64; any strides. Where the last dimension is not
            contiguous, hidden is copied first, the one copy there is.{query}
        mask: bool, or integers of 0 and 1; set where a token is real; holes and either padding side allowed. One that
            numbers the texts of a row is for fastpool.segments, which gives their starts and ends.
        cu_seqlens: int32 or int64; segment b is the rows [cu_seqlens[b], cu_seqlens[b + 1]).{weights}
        lengths: the same as ends, for padded input.
        starts: int32 or int64; the first row of each segment.
        ends: int32 or int64; one behind its last row.{scale}
        truncate_dim: use the first `truncate_dim` columns only (Matryoshka); truncation comes before normalisation.
        normalize: divide each vector by max(its L2 norm, 1e-12).
        out_dtype: of the result; hidden's dtype if not given.

    Returns:
        {shape}. Sums, divisions and norms are float32 (float64 for float64 input), in one canonical
        order (fastpool.reference), so a sequence's result has the same bits in every batch and layout; it is rounded
        once. A segment without real tokens gives zeros. Gradients flow to hidden{weights_too}; what is no real token
        gets 0.

    Raises:
        TypeError: a wrong dtype, or something that is not a tensor; a floating-point mask above all; an option of
            another type; an argument that there is not, such as dim, which in torch is an axis.
        ValueError: a wrong shape, device or value; a tensor whose memory was freed or shrunk; of values in index
            tensors, integer masks, weights and scores on a GPU, and of results that are not finite, where asked
            (fastpool.validate).
        RuntimeError: the backend asked for cannot serve the call.
        torch.OutOfMemoryError: the result does not fit in memory.
    """
_PER_TOKEN_DOCS = {
    "weights": """
        weights: float16, bfloat16, float32 or float64, shaped like the mask; used where tokens are real. They are
            float32 unless hidden is float64, so of float64 weights the largest of each text must be 0 or within
            float32's normal numbers, 1.2e-38 to 3.4e38 in size; smaller ones beside it may become 0.""",
    "scores": """
        scores: float16, bfloat16, float32 or float64, shaped like the mask, and read where tokens are real; must be
            given. They are float32 unless hidden is float64, so of float64 scores none must be greater than float32's
            largest number, 3.4e38. A token with -inf weighs nothing, and where all have it the result is 0; inf and
            NaN make it NaN.""",
}
_QUERY_DOC = """
        query: float16, bfloat16, float32 or float64; [H] or [K, H] for all segments, or [B, K, H]. Its products are of
            all columns, also where truncate_dim cuts the result. A bias would change nothing: it cancels."""
_SCALE_DOC = """
        scale: what the products are multiplied by."""
_SHAPE_DOC = """[B, truncate_dim or H] with one query [H], else [B, K, truncate_dim or H]; each of K queries has
        the bits that it has alone"""


# What the op's arguments are in a call with a nested hidden, whose own parts they are.
_OF_NESTED = {
    "hidden": "hidden.values()",
    "cu_seqlens": "hidden.offsets()",
    "starts": "hidden.offsets()[:-1]",
    "ends": "hidden.offsets()[:-1] + hidden.lengths()",
}
_WRONG = (RuntimeError, TypeError, ValueError)
Names = Mapping[str, str]  # what the caller calls an argument of the op's; those of the same name are missing
_OWN: Names = {}


def _to_op(
    op: str, hidden: Any, cu_seqlens: Any, starts: Any, ends: Any, lengths: Any
) -> tuple[Any, Any, Any, Any, Names]:
    """hidden, cu_seqlens, starts, ends as the op takes them, and their names. Raises TypeError or ValueError."""
    names = _OWN
    if lengths is not None:
        if ends is not None:
            raise ValueError(f"{op}: lengths is another name for ends, got both")
        if isinstance(hidden, Tensor) and (hidden.is_nested or hidden.dim() != 3):
            raise ValueError(f"{op}: lengths goes with padded [B, S, H] hidden")
        ends, names = lengths, {"ends": "lengths"}
    if isinstance(hidden, Tensor) and hidden.is_nested:
        if hidden.layout != torch.jagged or hidden.dim() != 3:
            raise TypeError(
                f"{op}: a nested hidden must be jagged (layout=torch.jagged) with shape [B, *, H], "
                f"got layout {hidden.layout} and {hidden.dim()} dimensions"
            )
        if cu_seqlens is not None or starts is not None or ends is not None:
            raise ValueError(f"{op}: a nested hidden says itself where segments start and end, got bounds too")
        if getattr(hidden, "_ragged_idx", 1) != 1:
            raise ValueError(f"{op}: a nested hidden must be ragged in dimension 1, [B, *, H]")
        jagged: Any = hidden  # torch's types do not know its methods
        offsets, held = jagged.offsets(), jagged.lengths()
        hidden, names = hidden.values(), _OF_NESTED
        if held is None:
            cu_seqlens = offsets
        else:  # a view with gaps between its sequences
            check_memory(op, "hidden.offsets()", offsets)
            check_memory(op, "hidden.lengths()", held)
            starts, ends = offsets[:-1], offsets[:-1] + held
    return hidden, cu_seqlens, starts, ends, names


def _raise_in_callers_words(op: str, error: Exception, names: Names, *args: Any, **kwargs: Any) -> NoReturn:
    """The op's error: it calls arguments by the names that the caller gave them, and where torch's parser came first,
    it says what the op itself would have said. What a signal's handler has raised stays as it is."""
    try:
        refused = bool(names) and type(error) in (TypeError, ValueError)
        if refused or (type(error) is RuntimeError and "() Expected a value of type " in str(error)):
            _refuse_in_callers_words(call_of(op, *args, **kwargs), names)
        raise error
    finally:
        del error  # or this frame, which it knows, would keep it and all tensors


def _refuse_in_callers_words(call: Call, names: Names) -> None:
    if isinstance(call, PoolCall):
        call.names = names
    try:
        dispatch.check(call)
        if dispatch.validates():
            with torch.no_grad():
                dispatch.run(call)  # what is wrong with a result is seen once there is one
    except (TypeError, ValueError) as proper:
        raise proper from None


def refuse(name: str, unknown: dict[str, Any]) -> NoReturn:
    """Raises the TypeError for keyword arguments that a function or module does not have."""
    if "dim" in unknown or "dims" in unknown:
        raise TypeError(
            f"{name} has no dim: nothing here works along an axis of the caller's choice. To keep the first columns, "
            "write truncate_dim (truncate_dims, where each row of l2_normalize keeps its own number); vectors are "
            "always normalised over the last dimension"
        )
    raise TypeError(f"{name}() got an unexpected keyword argument {next(iter(unknown))!r}")


def _given(name: str, starts: Any, ends: Any, truncate_dim: Any, normalize: Any, out_dtype: Any) -> dict[str, Any]:
    """The keyword arguments that are not their defaults: each one costs torch's parser 0.3 us."""
    more = {}
    if starts is not None:
        more["starts"] = starts
    if ends is not None:
        more["ends"] = ends
    if truncate_dim is not None:
        more["truncate_dim"] = option(name, "truncate_dim", truncate_dim, int)
    if normalize is not False:
        more["normalize"] = option(name, "normalize", normalize, bool)
    if out_dtype is not None:
        if type(out_dtype) is not torch.dtype:  # for which torch's parser takes any number
            check_float(name, "out_dtype", out_dtype)
        more["out_dtype"] = out_dtype
    return more


def _pooling_function(mode: Mode) -> Callable[..., Tensor]:
    op: Callable[..., Tensor] = getattr(torch.ops.fastpool, mode.name).default
    name = f"fastpool.{mode.name}"

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
        names = _OWN
        if lengths is not None or getattr(hidden, "is_nested", False):
            hidden, cu_seqlens, starts, ends, names = _to_op(name, hidden, cu_seqlens, starts, ends, lengths)
        more = own | _given(name, starts, ends, truncate_dim, normalize, out_dtype)
        args = (hidden, *before, mask, cu_seqlens, *behind)
        try:
            if skips_autograd(hidden, *before, *behind):
                with below_autograd():
                    return op(*args, **more)
            return op(*args, **more)
        except _WRONG as error:
            _raise_in_callers_words(mode.name, error, names, *args, **more)

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
            own = {"scale": option(name, "scale", scale, float)}
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
            names = _OWN
            if lengths is not None or getattr(hidden, "is_nested", False):
                hidden, cu_seqlens, starts, ends, names = _to_op(name, hidden, cu_seqlens, starts, ends, lengths)
            more = _given(name, starts, ends, truncate_dim, normalize, out_dtype)
            try:
                if skips_autograd(hidden):
                    with below_autograd():
                        return op(hidden, mask, cu_seqlens, **more)
                return op(hidden, mask, cu_seqlens, **more)
            except _WRONG as error:
                _raise_in_callers_words(mode.name, error, names, hidden, mask, cu_seqlens, **more)

    pool.__name__ = pool.__qualname__ = mode.name
    formula = mode.formula[0].upper() + mode.formula[1:] if mode.formula.startswith("the ") else mode.formula
    own = [argument.name for argument in mode.arguments]
    pool.__doc__ = _DOC.format(
        formula=formula,
        query=_QUERY_DOC if mode.takes_query else "",
        weights="".join(_PER_TOKEN_DOCS.get(one, "") for one in own),
        scale=_SCALE_DOC if mode.takes_query else "",
        shape=_SHAPE_DOC if mode.takes_query else "[B, truncate_dim or H]",
        weights_too="".join(f" and {one.name}" for one in mode.arguments if one.differentiable),
    )
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
        _raise_in_callers_words("l2_normalize", error, _OWN, x, **more)


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

    Arguments are those of the pooling functions, and `mode` is the function's name. Nothing is pooled.

    Raises:
        TypeError, ValueError: what the call itself would raise.
    """
    if unknown:
        refuse("fastpool.explain", unknown)
    if not isinstance(mode, str):
        raise TypeError(f"fastpool.explain: mode must be a mode's name, got {type(mode).__name__}")
    if mode not in MODES:
        raise ValueError(f"fastpool.explain: mode must be one of {', '.join(MODES)}, got {mode!r}")
    own: dict[str, Any] = {"weights": weights, "scores": scores, "query": query}
    for argument, value in own.items():
        if value is not None and not MODES[mode].takes(argument):
            raise ValueError(f"fastpool.explain: {mode} takes no {argument}")
    name, names = f"fastpool.{mode}", _OWN
    if lengths is not None or getattr(hidden, "is_nested", False):
        hidden, cu_seqlens, starts, ends, names = _to_op(name, hidden, cu_seqlens, starts, ends, lengths)
    more = own | _given(name, starts, ends, truncate_dim, normalize, out_dtype)
    more["scale"] = option(name, "scale", scale, float)
    return dispatch.explain_call(PoolCall(mode, hidden, mask, cu_seqlens, **more, names=names))
