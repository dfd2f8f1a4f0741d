"""What several ops ask of a tensor, and the words for what is not so: a TypeError or ValueError with the op's name, the
argument's, what was expected and what came. What one op asks alone stands with it, in calls/.
"""

import torch
from torch import Tensor

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
    require(
        truncate_dim is None or isinstance(truncate_dim, int | torch.SymInt),
        TypeError,
        f"{op}: truncate_dim must be an int, got {type(truncate_dim).__name__}",
    )
    require(
        truncate_dim is None or 1 <= truncate_dim <= x.shape[-1],
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
    wrong = (mask != 0) & (mask != 1)
    if not wrong.any():
        return
    for b, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        sequence = (b,) if mask.dim() == 2 else ()
        for i in wrong[sequence][start:end].nonzero()[:1, 0].tolist():
            at = (*sequence, start + i)
            raise ValueError(
                f"{op}: mask must hold 0 and 1 alone, got mask[{', '.join(map(str, at))}] = {mask[at].item()}; "
                "where it numbers the texts of a row, fastpool.segments(ids) gives their starts and ends"
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
