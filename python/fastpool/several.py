"""Several modes of one batch, side by side: torch.ops.fastpool._pool_several where no one kernel has them all."""

from typing import Any

import torch
from torch import Tensor

from .calls import accumulator
from .modes import MODES

MOST = 15  # modes of one call

_PLACES = {name: place for place, name in enumerate(MODES, 1)}


def code_of(modes: tuple[str, ...]) -> int:
    """Their places in the table, counted from 1, four bits each: torch's stable ABI has no cheap list. Raises
    ValueError for too many."""
    if len(modes) > MOST:
        raise ValueError(f"fastpool.pool: modes must name at most {MOST} modes, got {len(modes)}")
    return sum(_PLACES[mode] << 4 * i for i, mode in enumerate(modes))


def modes_of(code: int) -> tuple[str, ...]:
    """Raises ValueError for what is no code."""
    names = list(MODES)
    found = []
    while code > 0:
        if not 1 <= code % 16 <= len(names):
            raise ValueError(f"fastpool.pool: modes must hold places of modes, from 1 to {len(names)}, got {code % 16}")
        found.append(names[code % 16 - 1])
        code //= 16
    if not found:
        raise ValueError(f"fastpool.pool: modes must name at least one of {', '.join(names)}, got none")
    return tuple(found)


def together(modes: tuple[str, ...]) -> bool:
    """Whether a CPU's kernel has them together: some of them look at all tokens, and none has scores
    or is for logits."""
    rows = [MODES[mode] for mode in modes]
    return not all(row.one_token for row in rows) and not any(row.softmax or row.of_logits for row in rows)


def columns_of(modes: tuple[str, ...], width: int, truncate_dim: int | None) -> list[tuple[str, int]]:
    """The modes that the first `truncate_dim` columns of all together are of, and how many of each. Raises ValueError
    where there are not so many."""
    all_columns = width * len(modes)
    if truncate_dim is None:
        truncate_dim = all_columns
    elif not 1 <= truncate_dim <= all_columns:
        raise ValueError(
            f"fastpool.pool: truncate_dim must lie between 1 and the columns of {', '.join(modes)} together, "
            f"{all_columns}, got {truncate_dim}"
        )
    left = [(mode, truncate_dim - i * width) for i, mode in enumerate(modes)]
    return [(mode, min(columns, width)) for mode, columns in left if columns > 0 or width == 0]


def apart(
    code: int,
    hidden: Tensor,
    *args: Any,
    truncate_dim: int | None = None,
    normalize: bool = False,
    out_dtype: torch.dtype | None = None,
    **more: Any,
) -> Tensor:
    """One call for each mode, and what follows of all of them together."""
    names = ("mask", "cu_seqlens", "weights", "scores")
    given = dict(zip(names, args), **more)  # noqa: B905  # torch has checked how many
    dtype = out_dtype or hidden.dtype
    parts = []
    width = hidden.shape[-1] if hidden.dim() > 0 else 0
    for mode, columns in columns_of(modes_of(code), width, truncate_dim):
        own = {name: value for name, value in given.items() if name not in names[2:] or MODES[mode].takes(name)}
        op = getattr(torch.ops.fastpool, mode).default
        cut = {"truncate_dim": columns} if columns != width else {}
        parts.append(op(hidden, **own, **cut, out_dtype=accumulator(hidden.dtype) if normalize else dtype))
    result = torch.cat(parts, dim=-1)
    if not normalize:
        return result
    normalized: Tensor = torch.ops.fastpool.l2_normalize.default(result, out_dtype=dtype)
    return normalized
