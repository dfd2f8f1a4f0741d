"""Where the texts of a packed row are, read from the tensors that tell a transformer so."""

from typing import NoReturn

import torch
from torch import Tensor

from .checks import MASK_DTYPES, check_memory, check_tensor, name_of, require

_OP = "fastpool.segments"


def segments(ids: Tensor | None = None, *, position_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """starts and ends of the texts that share rows, from a numbered mask or from position_ids.

    Text i is the rows [starts[i], ends[i]) of hidden.flatten(0, 1), of hidden itself where that is [T, H], in the
    order of rows:

    >>> ids = torch.tensor([[1, 1, 1, 2, 2, 3, 0, 0]])
    >>> fastpool.segments(ids)
    (tensor([0, 3, 5]), tensor([3, 5, 6]))
    >>> hidden = torch.randn(1, 8, 384)
    >>> starts, ends = fastpool.segments(ids)
    >>> fastpool.mean(hidden.flatten(0, 1), starts=starts, ends=ends).shape
    torch.Size([3, 384])
    >>> fastpool.segments(position_ids=torch.tensor([0, 1, 2, 0, 1, 0, -1, -1]))
    (tensor([0, 3, 5]), tensor([3, 5, 6]))

    A text ends with its row. One without tokens cannot be told of, so a row of padding alone gives no text.

    Args:
        ids: an integer type, [B, S] or [T]: the number of each token's text, 0 where padding is. Along a row numbers
            go up, and a text is in one piece: a number that comes back, as in 1, 0, 1 or 1, 2, 1, is an error, since
            rows [start, end) could not leave out what stands between. (Sequence indices that count from 0 need a 1
            added.)
        position_ids: instead of ids; an integer type, [B, S] or [T]: 0 where a text begins, then 1, 2, 3, ...;
            negative where padding is. Padding that has positions of its own has to be told apart first:
            position_ids.masked_fill(attention_mask == 0, -1).

    Returns:
        starts and ends, int64, [texts] each, on the device of what was given. How many texts there are is known
        once the values have been read, so on a GPU the call waits for it, once; and a compiler cannot take it into a
        whole graph.

    Raises:
        TypeError: both or neither were given, something that is not a tensor, or no integer type (bool cannot number).
        ValueError: a wrong shape, memory that was freed, a value that does not fit the one before it, with its place.
    """
    require((ids is None) != (position_ids is None), TypeError, f"{_OP}: give either ids or position_ids")
    name, given = ("ids", ids) if position_ids is None else ("position_ids", position_ids)
    check_tensor(_OP, name, given, optional=False)
    assert given is not None
    require(
        given.dtype in MASK_DTYPES and given.dtype != torch.bool,
        TypeError,
        f"{_OP}: {name} must be an integer type, got {name_of(given.dtype)}",
    )
    require(
        given.dim() in (1, 2), ValueError, f"{_OP}: {name} must be padded [B, S] or packed [T], got {list(given.shape)}"
    )
    check_memory(_OP, name, given)
    rows = given.long() if given.dim() == 2 else given.long()[None]
    real, begins, wrong = _by_number(rows) if position_ids is None else _by_position(rows)
    if given.dtype == torch.uint64:  # of which the larger half is no int64
        wrong |= rows < 0
    goes_on = torch.nn.functional.pad((real & ~begins)[:, 1:], (0, 1))
    # The one look at the data. Beginnings and ends come in pairs, so an odd number says that something is wrong.
    marks = torch.cat([begins.flatten(), (real & ~goes_on).flatten(), wrong.any().view(1)])
    found = marks.nonzero().squeeze(1)
    if len(found) % 2 == 1:
        _raise(name, given, rows, wrong)
    texts = len(found) // 2
    return found[:texts], found[texts:] - (rows.numel() - 1)


def _before(rows: Tensor, first: int) -> Tensor:
    """The value to the left of each; `first` in the first column."""
    return torch.nn.functional.pad(rows, (1, 0), value=first)[:, :-1]


def _by_number(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which values belong to a text, which begin one, and which are wrong. [B, S] each."""
    before = _before(rows, 0)
    begins = (rows > 0) & (rows != before)
    highest = before if before.numel() == 0 else before.cummax(1).values
    return rows > 0, begins, (rows < 0) | (begins & (rows <= highest))


def _by_position(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which values belong to a text, which begin one, and which are wrong. [B, S] each."""
    wrong = (rows > 0) & (rows != _before(rows, -1) + 1)
    return rows >= 0, (rows == 0) | wrong, wrong


def _raise(name: str, given: Tensor, rows: Tensor, wrong: Tensor) -> NoReturn:
    """Names the first value that is wrong."""
    row, column = wrong.nonzero()[0].tolist()
    at = f"{row}, {column}" if given.dim() == 2 else str(column)
    value = (given[row] if given.dim() == 2 else given)[column].item()
    must = (
        "number a row's texts upwards from 1, each in one piece, with 0 for padding"
        if name == "ids"
        else "count each text's tokens from 0 up by one, or be negative where padding is"
    )
    before = f" after {rows[row, :column][-3:].tolist()}" if column > 0 else ""
    raise ValueError(f"{_OP}: {name} must {must}, got {name}[{at}] = {value}{before}")
