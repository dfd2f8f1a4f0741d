"""What can be wrong with a call: each of these puts one mistake into a call's arguments and says which argument the
refusal must name, or nothing where it cannot make the mistake."""

from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor

from .calls import Call, batch_of

Given = dict[str, Any]
BOUNDS = ("starts", "ends", "lengths", "cu_seqlens")
HUGE = (2**31 - 1, 2**31, 2**62, 2**63 - 1, -1, -(2**31), -(2**63))


def _said(given: Given, name: str) -> str:
    """How messages call it: of a nested hidden, by its parts."""
    return "hidden.values()" if name == "hidden" and "offsets" in given else name


def _present(given: Given, names: tuple[str, ...], random: Random) -> str | None:
    there = [name for name in names if isinstance(given.get(name), Tensor)]
    return random.choice(there) if there else None


def states(given: Given) -> str:
    return "x" if "x" in given else "hidden"


def rows_of(given: Given) -> int:
    return given["hidden"].shape[-2]


def mask_value(given: Given, random: Random) -> str | None:
    """Within a segment, where alone it is looked at."""
    mask = given.get("mask")
    if mask is None or mask.dtype == torch.bool or "gradient" in given:  # which the forward call has looked at
        return None
    inside = torch.zeros(mask.shape, dtype=torch.bool)
    cuts = given.get("cu_seqlens", given.get("offsets"))
    starts, ends = given.get("starts"), given.get("ends", given.get("lengths"))
    if cuts is not None:
        starts, ends = cuts[:-1], cuts[1:]
    for b in range(mask.shape[0] if mask.dim() == 2 else len(starts)):
        span = slice(None if starts is None else int(starts[b]), None if ends is None else int(ends[b]))
        (inside[b] if mask.dim() == 2 else inside)[span] = True
    if not inside.any():
        return None
    most = torch.iinfo(mask.dtype).max
    value = random.choice([2, 3, most, *([-1, torch.iinfo(mask.dtype).min] if mask.dtype.is_signed else [])])
    place = random.choice(inside.nonzero().tolist())
    mask[tuple(place)] = torch.tensor(value - 2**64 if value >= 2**63 else value).to(mask.dtype)
    return "mask must hold 0 and 1 alone"


def bound_value(given: Given, random: Random) -> str | None:
    name = _present(given, BOUNDS, random)
    if name is None or given[name].dim() != 1 or len(given[name]) - (name == "cu_seqlens") < 1:
        return None
    values, rows = given[name], rows_of(given)
    value = random.choice((rows + 1, -1, random.choice(HUGE)))
    if values.dtype == torch.int32 and not -(2**31) <= value < 2**31:
        value = rows + 1
    values[random.randrange(len(values))] = value
    return f"{name} must lie between"


def bounds_cross(given: Given, random: Random) -> str | None:
    """Start behind end, or cu_seqlens that decreases."""
    if "x" in given or (rows := rows_of(given)) == 0:
        return None
    if (cuts := given.get("cu_seqlens")) is not None and len(cuts) > 1:
        b = random.randrange(len(cuts) - 1)
        cuts[b], cuts[b + 1] = rows, random.randrange(rows)
        return "cu_seqlens must not decrease"
    ends = given.get("ends", given.get("lengths"))
    if given.get("starts") is not None and ends is not None and len(ends) > 0:
        b = random.randrange(len(ends))
        ends[b] = random.randrange(rows)
        given["starts"][b] = random.randint(int(ends[b]) + 1, rows)
        return f"starts must not be greater than {'lengths' if 'lengths' in given else 'ends'}"
    return None


def index_dtype(given: Given, random: Random) -> str | None:
    name = _present(given, (*BOUNDS, "truncate_dims"), random)
    if name is None:
        return None
    given[name] = given[name].to(random.choice((torch.int16, torch.uint8, torch.float32, torch.bool)))
    return f"{name} must be int32 or int64"


def index_shape(given: Given, random: Random) -> str | None:
    name = _present(given, BOUNDS, random)
    if name is None:
        return None
    given[name] = given[name][None, None] if random.random() < 0.5 else torch.tensor(0)  # two may be spans
    return f"{name} must have one dimension"


def index_length(given: Given, random: Random) -> str | None:
    name = _present(given, ("starts", "ends", "lengths"), random)
    if name is None or (given["hidden"].dim() == 2 and name == "starts"):
        return None
    given[name] = torch.nn.functional.pad(given[name], (0, 1))
    return f"{name} must have"


def no_cuts(given: Given, random: Random) -> str | None:
    if given.get("cu_seqlens") is None:
        return None
    given["cu_seqlens"] = given["cu_seqlens"][:0]
    return "cu_seqlens must have B + 1 values"


def leading_shape(given: Given, random: Random) -> str | None:
    name = _present(given, ("mask", "weights", "scores", "truncate_dims"), random)
    if name is None:
        return None
    tensor = given[name]
    short = tensor.dim() > 0 and tensor.shape[-1] > 0 and random.random() < 0.5
    given[name] = tensor[..., :-1] if short else tensor[..., None]
    return f"{name} must have"


def mask_dtype(given: Given, random: Random) -> str | None:
    if given.get("mask") is None:
        return None
    given["mask"] = given["mask"].to(torch.int8).to(random.choice((torch.float32, torch.float16, torch.complex64)))
    return "mask must be bool"


def float_dtype(given: Given, random: Random) -> str | None:
    name = _present(given, ("hidden", "x", "weights", "scores", "query"), random)
    assert name is not None
    given[name] = torch.zeros(given[name].shape, dtype=random.choice((torch.int64, torch.bool, torch.complex64)))
    return f"{_said(given, name)} must be float16"


def query_shape(given: Given, random: Random) -> str | None:
    """Of another width, or of a rank that queries do not have, or for other texts."""
    query = given.get("query")
    if query is None:
        return None
    if query.dim() == 3 and random.random() < 0.3:
        given["query"] = torch.cat([query, query[:1]]) if len(query) > 0 else query.new_ones(1, *query.shape[1:])
        return "must have one row of queries for each"
    wider = torch.nn.functional.pad(query, (0, 1))
    given["query"] = random.choice((wider, query.new_ones(()), query.new_ones(1, 1, 1, query.shape[-1])))
    return "query must have shape"


def left_out(given: Given, random: Random) -> str | None:
    """What a mode cannot do without."""
    name = _present(given, ("scores", "query"), random)
    if name is None:
        return None
    given[name] = None
    return f"{name} must be given"


def out_dtype(given: Given, random: Random) -> str | None:
    if "gradient" in given:
        return None
    given["out_dtype"] = random.choice((torch.int32, torch.bool, torch.complex64))
    return "out_dtype must be float16"


def rank(given: Given, random: Random) -> str | None:
    if "x" in given:
        given["x"] = torch.zeros(1).view([1] * random.choice((0, 65)))
        return "x must have at"
    if "offsets" in given or given.get("lengths") is not None:  # which go with one rank alone
        return None
    given["hidden"] = given["hidden"].flatten() if random.random() < 0.5 else given["hidden"][None, None]
    return "hidden must be padded"


def columns(given: Given, random: Random) -> str | None:
    if "gradient" in given:
        return None
    width = given[states(given)].shape[-1]
    given["truncate_dim"] = random.choice((0, -1, width + 1, 2**40, -(2**63)))
    return "truncate_dim must lie between"


def sizes_value(given: Given, random: Random) -> str | None:
    sizes = given.get("truncate_dims")
    if sizes is None or sizes.numel() == 0:
        return None
    most = given["gradient"].shape[-1] if "gradient" in given else given.get("truncate_dim", given["x"].shape[-1])
    value = random.choice((most + 1, -1, random.choice(HUGE)))
    sizes.view(-1)[random.randrange(sizes.numel())] = value if sizes.dtype == torch.int64 else most + 1
    return "truncate_dims must lie between"


def negative_eps(given: Given, random: Random) -> str | None:
    if "x" not in given:
        return None
    given["eps"] = random.choice((-1.0, -1e-300, float("nan"), float("-inf")))
    return "eps must be at least 0"


def layout(given: Given, random: Random) -> str | None:
    """Bounds that do not go with hidden, or with each other, or are missing."""
    if "x" in given or given.get("lengths") is not None or "offsets" in given:
        return None
    if given["hidden"].dim() == 3:
        given["cu_seqlens"] = torch.tensor([0, 0])
        return "cu_seqlens goes with packed"
    if given.get("cu_seqlens") is not None and random.random() < 0.5:
        given["starts"] = torch.zeros(batch_of(given), dtype=torch.int64)
        return "cu_seqlens already says"
    given[random.choice([name for name in BOUNDS if given.get(name) is not None])] = None
    return "hidden needs cu_seqlens, or starts and ends"


def gradient_shape(given: Given, random: Random) -> str | None:
    name = _present(given, ("gradient", "result"), random)
    if name is None:
        return None
    tensor = given[name]
    given[name] = tensor.repeat(2, *[1] * (tensor.dim() - 1)) if tensor.dim() > 1 and len(tensor) > 0 else tensor[None]
    return f"{name} must have shape"


def gradient_dtype(given: Given, random: Random) -> str | None:
    name = _present(given, ("gradient", "result"), random)
    if name is None:
        return None
    given[name] = given[name].to(torch.float16)
    return f"{name} must be"


def gradient_strides(given: Given, random: Random) -> str | None:
    name = _present(given, ("gradient", "result"), random)
    if name is None or given[name].dim() == 0 or given[name].shape[-1] < 2 or given[name].numel() == 0:
        return None
    given[name] = given[name].repeat_interleave(2, -1)[..., ::2]
    return f"{name} must be contiguous"


def elsewhere(given: Given, random: Random) -> str | None:
    """On another device than hidden."""
    name = _present(
        given, ("mask", "weights", "scores", "query", *BOUNDS, "truncate_dims", "gradient", "result"), random
    )
    if name is None:
        return None
    given[name] = given[name].to("meta")
    return f"{_said(given, name)} must be on"


MISTAKES: tuple[Callable[[Given, Random], str | None], ...] = (
    mask_value, bound_value, bounds_cross, index_dtype, index_shape, index_length, no_cuts, leading_shape, mask_dtype,
    float_dtype, query_shape, left_out, out_dtype, rank, columns, sizes_value, negative_eps, layout, gradient_shape,
    gradient_dtype, gradient_strides, elsewhere,
)  # fmt: skip


def spoil(call: Call, random: Random) -> str:
    """Makes one mistake, and returns what the refusal must say."""
    while (words := random.choice(MISTAKES)(call.given, random)) is None:
        pass
    return words


def reach(tensor: Tensor) -> int:
    """How many elements a storage must have for a tensor, those before it too."""
    if tensor.numel() == 0:
        return 0
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.storage_offset() + last + 1


def free(call: Call, given: Given, random: Random) -> str | None:
    """Takes all memory, or the last of it, away from under one of a call's tensors. Returns what the refusal must
    say; nothing, where no element of it is to be read."""
    name = random.choice([name for name, value in given.items() if isinstance(value, Tensor) and name != "offsets"])
    tensor = given[name]
    read = given[states(given)].shape[-1] > 0 and all(bool(real.any()) for real in call.real.values())
    if call.op == "_pool_backward" and name == "hidden" and given["result"] is None:  # whose shape alone is read
        read = False
    if tensor.numel() > 0 and not read:
        return None
    memory = torch.empty(reach(tensor), dtype=tensor.dtype)
    given[name] = memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    left = random.choice((0, random.randrange(len(memory)))) if len(memory) else 0
    memory.untyped_storage().resize_(left * memory.element_size())
    return f"{_said(given, name)} must have memory" if tensor.numel() > 0 else None
