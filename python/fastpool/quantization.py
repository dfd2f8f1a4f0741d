"""Embeddings in a byte or a bit per column: `fastpool.quantize(embeddings, "int8", ranges=ranges)`."""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from .calls import accumulator
from .checks import check_float, check_memory, check_tensor, name_of, place, require
from .kinds import KINDS, How, Kind
from .layouts import OWN, raise_in_callers_words
from .options import option, optional_count, refuse
from .reference.quantize import low_and_step

__all__ = ["dequantize", "quantization_ranges", "quantize"]


def _kind(name: str, kind: Any) -> Kind:
    """Raises TypeError or ValueError for what is none."""
    require(isinstance(kind, str), TypeError, f"{name}: kind must be a kind's name, got {type(kind).__name__}")
    require(kind in KINDS, ValueError, f"{name}: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    return KINDS[kind]


def quantize(
    x: Tensor,
    kind: str,
    *,
    ranges: Tensor | None = None,
    truncate_dim: int | None = None,
    zero_bit: bool = False,
    **unknown: NoReturn,
) -> Tensor:
    """Embeddings as bytes, or as bits: a quarter, or a 32nd, of float32's memory.

    - "uint8": clip(floor((x - min) / step), 0, 255) with min, max = ranges and step = (max - min) / 255, or 1 where
      that is 0; "int8": 128 less.
    - "ubinary": a bit for each column, 1 where x > 0 (with zero_bit where x >= 0), eight to a byte, the first column in
      its highest bit, the last byte filled up with 0; "binary": 128 less, as a signed byte.
    - "int8_tanh": 127 tanh(x) to the nearest whole number, in ties to the even one. For models trained with it.

    The first four are sentence-transformers' bytes (quantize_embeddings), the last is pplx-embed's formula. Where x is
    0, sentence-transformers has a bit of 0, and vLLM and pplx-embed have 1, which is zero_bit: nothing but agreement
    with the vectors that are in an index already speaks for either.

    Args:
        x: [..., D], float16, bfloat16, float32 or float64; any strides; copied first where its last dimension is not
            contiguous. Not normalised here: "int8_tanh" takes the pooled vector as it is.
        kind: one of these names.
        ranges: float32 [2, D], or [2, truncate_dim]: the minimum and the maximum of each column; of "int8" and "uint8"
            alone, which must be given them. They belong to an index as its model does: take them once from a sample
            of its documents' embeddings (quantization_ranges), keep them, and use them for queries too.
        truncate_dim: use the first `truncate_dim` columns only (Matryoshka), of x and of ranges.
        zero_bit: the bit of 0, of "binary" and "ubinary" alone.

    Returns:
        [..., D or truncate_dim] int8 or uint8; of the binary kinds [..., ceil(D / 8)]. Computed in float32 (in float64
        for float64 x, with ranges and steps of float32, as numpy does it). What lies outside of ranges gets the
        nearest bucket, infinities too; NaN is byte 0 in every kind, and a bit of 0. Not differentiable.

    Raises:
        TypeError: a wrong dtype, or something that is not a tensor; an option of another type; an argument that there
            is not, such as dim.
        ValueError: a wrong shape, device, kind or value; int8 and uint8 without ranges, other kinds with them; a
            minimum or maximum that is not finite, or runs backwards, or with a difference that overflows (on a GPU
            under validation, as x that is not finite is on any device: fastpool.validate).
        torch.OutOfMemoryError: the result does not fit in memory.

    >>> embeddings = fastpool.mean(hidden, mask, normalize=True)
    >>> ranges = fastpool.quantization_ranges(embeddings)  # of many documents, once; kept with the index
    >>> in_bytes = fastpool.quantize(embeddings, "int8", ranges=ranges)
    >>> in_bits = fastpool.quantize(embeddings, "ubinary")
    """
    if unknown:
        refuse("fastpool.quantize", unknown)
    name = "fastpool.quantize"
    code = list(KINDS).index(_kind(name, kind).name)
    more: dict[str, Any] = {"zero_bit": option(name, "zero_bit", zero_bit, bool)}
    if ranges is not None:
        more["ranges"] = ranges
    if truncate_dim is not None:
        more["truncate_dim"] = option(name, "truncate_dim", truncate_dim, int)
    op: Callable[..., Tensor] = torch.ops.fastpool.quantize.default
    try:
        return op(x, code, **more)
    except RuntimeError as error:
        raise_in_callers_words(error, OWN, ("quantize", (x, code), more))


def quantization_ranges(x: Tensor) -> Tensor:
    """The minimum and the maximum of each column over all rows of x: what quantize takes as its ranges.

    Ranges of several parts are quantization_ranges(torch.cat([ranges, others])).

    Args:
        x: [..., D], float16, bfloat16, float32 or float64: embeddings, truncated and normalised as those to be
            quantised; as many as the extremes of a column take to settle, thousands.

    Returns:
        [2, D] float32. Waits for a GPU.

    Raises:
        TypeError: x is no dense tensor of such a dtype.
        ValueError: it has no rows, or one that is not finite; or a column is wider than float32.

    >>> ranges = fastpool.quantization_ranges(fastpool.mean(hidden, mask, normalize=True))
    """
    name = "fastpool.quantization_ranges"
    check_tensor(name, "x", x, optional=False)
    check_float(name, "x", x.dtype)
    require(x.dim() >= 1, ValueError, f"{name}: x must have at least one dimension, got shape []")
    require(not x.is_meta, ValueError, f"{name}: x must have values, which a meta tensor has not")
    check_memory(name, "x", x)
    rows = x.shape[:-1].numel()
    require(rows > 0, ValueError, f"{name}: x must have at least one row, got shape {list(x.shape)}")
    if x.shape[-1] == 0:
        return x.new_empty(2, 0, dtype=torch.float32)
    flat = x.detach().reshape(rows, x.shape[-1])
    ranges = torch.stack([flat.amin(0), flat.amax(0)]).to(torch.float32)
    if not bool((ranges[1] - ranges[0]).isfinite().all()):
        _refuse_values(name, x)
    return ranges


def _refuse_values(name: str, x: Tensor) -> NoReturn:
    """Raises the ValueError for ranges that are not finite."""
    for at in (~x.isfinite()).nonzero()[:1].tolist():
        raise ValueError(f"{name}: x must be finite, got x{place(*at)} = {x[tuple(at)].item()}")
    raise ValueError(f"{name}: the minimum and maximum of a column, and their difference, must fit float32, and do not")


def dequantize(
    q: Tensor,
    kind: str,
    *,
    ranges: Tensor | None = None,
    columns: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Numbers that quantised vectors stand for.

    - "int8", "uint8": the middle of a bucket, min + (bucket + 1/2) * (max - min) / 255, which is at most half a bucket
      from what lay within ranges. (sentence-transformers takes the lower edge when it scores again, which is up to a
      bucket off.)
    - "binary", "ubinary": 1 for a bit of 1, else -1.
    - "int8_tanh": q / 127, which is tanh(x) and what such a model's vectors are compared by.

    Args:
        q: [..., N] int8 or uint8, as `quantize` gives them.
        kind: what they were quantised to.
        ranges: of "int8" and "uint8" alone: those that they were quantised with; [2, N] float32.
        columns: of the binary kinds alone: how many there were; 8 N if not given.
        dtype: of the result.

    Returns:
        [..., N], or [..., columns].

    Raises:
        TypeError: a wrong dtype, or something that is not a tensor.
        ValueError: a wrong shape, kind or device; ranges or columns that are missing or not the kind's.

    >>> in_bits = fastpool.quantize(torch.randn(9, 20), "binary")
    >>> signs = fastpool.dequantize(in_bits, "binary", columns=20)
    """
    name = "fastpool.dequantize"
    row, columns = _kind(name, kind), optional_count(name, "columns", columns)
    check_tensor(name, "q", q, optional=False)
    check_tensor(name, "ranges", ranges, optional=True)
    check_float(name, "dtype", dtype)
    require(
        q.dtype == row.dtype, TypeError, f"{name}: q of {kind} must be {name_of(row.dtype)}, got {name_of(q.dtype)}"
    )
    require(q.dim() >= 1, ValueError, f"{name}: q must have at least one dimension, got shape []")
    check_memory(name, "q", q)
    width = q.shape[-1]
    given = ranges is not None
    require(
        given == (row.how is How.BUCKETS), ValueError, f"{name}: {kind} {'takes no' if given else 'needs its'} ranges"
    )
    if row.how is How.BITS:
        most = 8 * width if columns is None else columns
        require(
            row.out_columns(most) == width,
            ValueError,
            f"{name}: columns must lie between {max(8 * width - 7, 1)} and {8 * width}, got {columns}",
        )
        bits = (q.view(torch.uint8)[..., None] ^ row.flip) >> torch.arange(7, -1, -1, device=q.device) & 1
        return (bits.flatten(-2)[..., :most].to(torch.int8) * 2 - 1).to(dtype)
    require(columns is None, ValueError, f"{name}: columns goes with binary and ubinary, got kind {kind}")
    if row.how is How.TANH:
        return (q.to(accumulator(dtype)) / 127).to(dtype)
    assert ranges is not None
    require(
        ranges.shape == (2, width) and ranges.dtype == torch.float32 and ranges.device == q.device,
        ValueError,
        f"{name}: ranges must be float32 [2, {width}] on q's device, {q.device}, "
        f"got {name_of(ranges.dtype)} {list(ranges.shape)} on {ranges.device}",
    )
    check_memory(name, "ranges", ranges)
    low, step = low_and_step(ranges)
    bucket = (q.view(torch.uint8) ^ row.flip).to(accumulator(dtype))
    # Where the width underflows to 0 all values are alike, too.
    return torch.where((ranges[1] - low) / 255 > 0, low + (bucket + 0.5) * step, low).to(dtype)
