"""What several ops ask of a tensor, and the words for what is not so: a TypeError or ValueError with the op's name, the
argument's, what was expected and what came. What one op asks alone stands with it, in calls/.
"""

import torch
from torch import Tensor

PLAIN = (Tensor, torch.nn.Parameter)  # what a subclass looks like is its own affair
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FLOAT_NAMES = "float16, bfloat16, float32 or float64"
MASK_DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.uint16,
    torch.int16,
    torch.uint32,
    torch.int32,
    torch.uint64,
    torch.int64,
)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def place(*at: int) -> str:
    """Of an element, behind its tensor's name."""
    return "[" + ", ".join(map(str, at)) + "]"


def require(ok: bool, error: type[Exception], message: str) -> None:
    if not ok:
        raise error(message)


def check_tensor(op: str, name: str, value: object, optional: bool) -> None:
    if optional and value is None:
        return
    require(isinstance(value, Tensor), TypeError, f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    assert isinstance(value, Tensor)
    require(
        value.layout == torch.strided and not value.is_nested,
        TypeError,
        f"{op}: {name} must be a dense strided tensor, got "
        + ("a nested one" if value.is_nested else f"layout {value.layout}"),
    )


def raised_in_python(error: Exception) -> bool:
    """Whether a call of C that failed has not failed by itself: a signal's handler may raise whatever it likes."""
    return error.__traceback__ is not None and error.__traceback__.tb_next is not None


def lacks_memory(tensor: Tensor) -> str | None:
    """In words, where the tensor's memory does not hold its elements: a storage may be freed or shrunk under it, which
    it does not notice. None where it does, or does not tell (as where graphs are made, and in torch.func's
    transforms)."""
    if torch.compiler.is_compiling() or type(tensor) not in PLAIN or tensor.is_meta or tensor.numel() == 0:
        return None
    try:
        held = tensor.untyped_storage().nbytes()
    except RuntimeError as error:
        if raised_in_python(error):
            raise
        return None
    last = tensor.storage_offset() + sum((n - 1) * by for n, by in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (last + 1) * tensor.element_size()
    if needed <= held:
        return None
    return f"{needed:,} bytes, got a storage of {held:,}, which has been freed or shrunk"


def check_memory(op: str, name: str, tensor: Tensor) -> None:
    lacking = lacks_memory(tensor)
    require(lacking is None, ValueError, f"{op}: {name} must have memory for its elements, {lacking}")


def has_rows(hidden: object) -> bool:
    """Whether it is a tensor of token states in one of the layouts; else the functions say what is wrong."""
    if not isinstance(hidden, Tensor) or hidden.dtype not in FLOATS or hidden.dim() not in (2, 3):
        return False
    if hidden.layout != torch.jagged:
        return hidden.layout == torch.strided and not hidden.is_nested and lacks_memory(hidden) is None
    return hidden.dim() == 3 and getattr(hidden, "_ragged_idx", 1) == 1 and lacks_memory(hidden.values()) is None


def check_float(op: str, name: str, dtype: object) -> None:
    require(
        isinstance(dtype, torch.dtype),
        TypeError,
        f"{op}: {name} must be {_FLOAT_NAMES}, got {type(dtype).__name__}",
    )
    assert isinstance(dtype, torch.dtype)
    require(dtype in FLOATS, TypeError, f"{op}: {name} must be {_FLOAT_NAMES}, got {name_of(dtype)}")


def check_index_dtype(op: str, name: str, tensor: Tensor) -> None:
    require(
        tensor.dtype in (torch.int32, torch.int64),
        TypeError,
        f"{op}: {name} must be int32 or int64, got {name_of(tensor.dtype)}",
    )


def check_columns(op: str, x: Tensor, truncate_dim: int | None) -> None:
    if truncate_dim is not None:
        require(
            1 <= truncate_dim <= x.shape[-1],
            ValueError,
            f"{op}: truncate_dim must lie between 1 and the last dimension, {x.shape[-1]}, got {truncate_dim}",
        )


def check_leading(op: str, name: str, tensor: Tensor, input: str, like: Tensor) -> None:
    expected = like.shape[:-1]
    require(
        tensor.shape == expected,
        ValueError,
        f"{op}: {name} must have {input}'s shape without its last dimension, {list(expected)}, "
        f"got {list(tensor.shape)}",
    )


def check_mask_values(op: str, mask: Tensor, starts: Tensor, ends: Tensor) -> None:
    """An integer mask, [B, S] or [T], within segments. Synchronises."""
    wrong = ((mask != 0) & (mask != 1)).nonzero()
    if mask.dim() == 2:
        b, i = wrong.unbind(1)
        wrong = wrong[(i >= starts[b]) & (i < ends[b])]
    elif len(wrong) > 0:  # the first one behind each start, where it stands before the end
        rows = wrong[:, 0]
        first = torch.searchsorted(rows, starts).clamp(max=len(rows) - 1)
        wrong = wrong[first[(rows[first] >= starts) & (rows[first] < ends)]]
    for at in wrong[:1].tolist():
        raise ValueError(
            f"{op}: mask must hold 0 and 1 alone, got mask{place(*at)} = {mask[tuple(at)].item()}; "
            "where it numbers the texts of a row, fastpool.segments(ids) gives their starts and ends"
        )


def _have(tokens: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """Which segments have any of these tokens, [B, S] or [T]."""
    each = (torch.arange(len(starts), device=starts.device),) if tokens.dim() == 2 else ()
    before = torch.nn.functional.pad(tokens.cumsum(-1), (1, 0))
    first, behind = (*each, starts), (*each, ends)
    return before[behind] > before[first]


def check_weight_values(
    op: str, weights: Tensor, states: torch.dtype, mask: Tensor | None, starts: Tensor, ends: Tensor
) -> None:
    """float64 weights, [B, S] or [T], that become float32, at real tokens of segments. Where even the largest of a
    segment is beyond that dtype's normal numbers, all of them would be inf, 0 or imprecise; what is not finite passes.
    Synchronises."""
    float32 = torch.finfo(torch.float32)
    sizes = weights.detach().abs()
    sizes = sizes.where(sizes.isfinite() if mask is None else sizes.isfinite() & (mask != 0), 0.0)
    order = sizes.view(torch.int64)  # the same, and a subnormal is not 0, whatever torch.set_flush_denormal says
    too_large = _have(sizes > float32.max, starts, ends)
    too_small = _have(order > 0, starts, ends) & ~_have(sizes >= float32.smallest_normal, starts, ends)
    wrong = too_large | too_small
    if not wrong.any():
        return
    b = int(wrong.nonzero()[0])
    row, start = (b,) if weights.dim() == 2 else (), int(starts[b])
    at = (*row, start + int(order[row][start : int(ends[b])].argmax()))
    raise ValueError(
        f"{op}: weights beside {name_of(states)} states are float32, so a segment's largest must be 0 or lie between "
        f"{float32.smallest_normal:g} and {float32.max:g} in size, got weights{place(*at)} = "
        f"{weights[at].item()}; scale them, or give float64 states"
    )


def check_score_values(
    op: str, scores: Tensor, states: torch.dtype, mask: Tensor | None, starts: Tensor, ends: Tensor
) -> None:
    """float64 scores, [B, S] or [T], that become float32, at real tokens of segments: above that dtype's largest number
    they would be inf. Below its smallest they are -inf, and weigh nothing, as beside any other score; what is not
    finite passes. Synchronises."""
    largest = torch.finfo(torch.float32).max
    wrong = scores.isfinite() & (scores > largest)
    if mask is not None:
        wrong &= mask != 0
    having = _have(wrong, starts, ends)
    if not having.any():
        return
    b = int(having.nonzero()[0])
    row, start = (b,) if scores.dim() == 2 else (), int(starts[b])
    at = (*row, start + int(wrong[row][start : int(ends[b])].int().argmax()))
    raise ValueError(
        f"{op}: scores beside {name_of(states)} states are float32, so none must be greater than {largest:g}, "
        f"got scores{place(*at)} = {scores[at].item()}; subtract their largest, or give float64 states"
    )


def check_query_values(op: str, query: Tensor, states: torch.dtype) -> None:
    """A float64 query that becomes float32, where what is beyond that dtype would be inf. Synchronises."""
    largest = torch.finfo(torch.float32).max
    for at in (query.isfinite() & (query.abs() > largest)).nonzero()[:1].tolist():
        raise ValueError(
            f"{op}: a query beside {name_of(states)} states is float32, so none of its elements must be greater than "
            f"{largest:g} in size, got query{place(*at)} = {query[tuple(at)].item()}; scale it, or give float64 states"
        )


def check_dense(
    op: str, name: str, tensor: object, shape: list[int], dtype: torch.dtype, input: str, like: Tensor
) -> None:
    """A gradient or a result, as autograd hands it to a backward op."""
    check_tensor(op, name, tensor, optional=False)
    assert isinstance(tensor, Tensor)
    require(tensor.dtype == dtype, TypeError, f"{op}: {name} must be {name_of(dtype)}, got {name_of(tensor.dtype)}")
    require(
        tensor.device == like.device,
        ValueError,
        f"{op}: {name} must be on {input}'s device, {like.device}, got {tensor.device}",
    )
    require(list(tensor.shape) == shape, ValueError, f"{op}: {name} must have shape {shape}, got {list(tensor.shape)}")
    require(
        tensor.is_contiguous(),
        ValueError,
        f"{op}: {name} must be contiguous, got strides {list(tensor.stride())}",
    )
