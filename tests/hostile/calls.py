"""Random calls of every op, from the tables of modes and arguments: what is given, which tokens are real, and the same
call said plainly."""

from dataclasses import dataclass, field
from itertools import pairwise
from random import Random
from typing import Any

import torch
from torch import Tensor

from fastpool.arguments import GRADIENTS_OF, POOL_BACKWARD, codes
from fastpool.calls import accumulator
from fastpool.checks import FLOATS, MASK_DTYPES
from fastpool.modes import MODES

INDICES = (torch.int32, torch.int64)
SPECIAL = torch.tensor(
    [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-40, -1e-45, 3e38, -3e38, 6e4], dtype=torch.float64
)


@dataclass
class Call:
    """A call, in ordinary memory."""

    op: str
    given: dict[str, Any]  # arguments of the op; of a function where there are `offsets` or `lengths`
    real: dict[str, Tensor] = field(default_factory=dict)  # of arguments of which some rows or elements do not matter

    @property
    def by_name_alone(self) -> bool:
        """Whether there is no raw op that takes it."""
        return "lengths" in self.given or "offsets" in self.given

    def plain(self) -> dict[str, Any]:
        """The arguments of a call that must give the same bits: masks of bool, 64-bit bounds, zeros for what is not
        real."""
        plain = {name: value.clone() if isinstance(value, Tensor) else value for name, value in self.given.items()}
        for name, value in plain.items():
            if name in self.real:
                value[~self.real[name]] = 0
            elif name == "mask" and value is not None:
                plain[name] = value == 1 if value.dtype != torch.bool else value.view(torch.uint8) != 0
            elif isinstance(value, Tensor) and value.dtype == torch.int32:
                plain[name] = value.long()
        return plain


def _generator(random: Random) -> torch.Generator:
    return torch.Generator().manual_seed(random.getrandbits(32))


def numbers(shape: tuple[int, ...], dtype: torch.dtype, random: Random) -> Tensor:
    """Around one, none or several scales, sometimes among NaN, infinities, zeros of both signs, subnormal and huge
    values."""
    generator = _generator(random)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64) + 0.25
    kind = random.random()
    if kind < 0.1:
        drawn *= 10.0 ** torch.randint(-45, 39, shape, generator=generator)
    elif kind < 0.3:
        special = SPECIAL[torch.randint(len(SPECIAL), shape, generator=generator)]
        drawn = torch.where(torch.rand(shape, generator=generator) < random.choice((0.01, 0.5, 1.0)), special, drawn)
    elif kind < 0.4:
        drawn = drawn.round()  # ties
    return drawn.to(dtype)


def _size(random: Random, *usual: int) -> int:
    return random.choice((*usual, random.randrange(80)))


def _kept(shape: tuple[int, ...], random: Random) -> Tensor:
    """Which tokens a mask leaves, anywhere or, of padded input, on one side of each row."""
    kept = torch.rand(shape, generator=_generator(random)) < random.choice((0.0, 0.1, 0.5, 0.9, 1.0))
    if len(shape) == 2 and random.random() < 0.5:
        kept = kept.sort(dim=1, descending=random.random() < 0.5).values
    return _alike_along(kept, random)


def _mask(real: Tensor, random: Random) -> Tensor:
    """In any dtype; whatever byte stands for true."""
    dtype = random.choice(MASK_DTYPES)
    if dtype == torch.bool:
        return (real.to(torch.uint8) * random.choice((1, 2, 255))).view(torch.bool)
    return real.to(dtype)


def _index(values: list[int], random: Random) -> Tensor:
    return torch.tensor(values, dtype=random.choice(INDICES))


def _alike_along(values: Tensor, random: Random) -> Tensor:
    """Sometimes the same values along one dimension, which a view of stride 0 may hold then."""
    if random.random() < 0.1 and values.numel() > 0 and values.dim() > 0:
        d = random.randrange(values.dim())
        return values.narrow(d, 0, 1).expand_as(values).clone()
    return values


def _poisoned(values: Tensor, real: Tensor, random: Random) -> Tensor:
    """With NaN for what is not real; or the same values along one dimension."""
    alike = _alike_along(values, random)
    if alike is values:
        values[~real] = torch.nan
    return alike


def _options(width: int, random: Random) -> dict[str, Any]:
    """Those of an epilogue, given or not."""
    given: dict[str, Any] = {}
    if width > 0 and random.random() < 0.4:
        given["truncate_dim"] = random.randint(1, width)
    if random.random() < 0.3:
        given["out_dtype"] = random.choice(FLOATS)
    return given


def _spans(batch: int, rows: int, random: Random) -> list[tuple[int, int]]:
    """Of anything, empty ones too, in any order."""
    return [tuple(sorted((random.randint(0, rows), random.randint(0, rows)))) for _ in range(batch)]


def pooling(random: Random) -> Call:
    mode = random.choice(list(MODES))
    padded = random.random() < 0.5
    batch, width = random.choice((0, 1, 1, 2, 3, 5)), _size(random, 0, 1, 3, 8, 16, 17, 33, 64, 133)
    rows, large = _size(random, 0, 1, 2, 31, 32, 33, 64, 65), random.random()
    if large < 0.05:
        rows, width = random.choice((400, 1500, 3000)), _size(random, 8, 64)  # several units, several threads
    elif large < 0.1:
        width = random.choice((1000, 1100, 3000))  # rows of pages
    given: dict[str, Any] = {}
    if padded:
        shape, inside = (batch, rows), _bounds_of_padded(given, batch, rows, random)
    else:
        shape, inside = (rows,), _bounds_of_packed(given, batch, rows, random)
    real = inside
    if random.random() < 0.6:
        kept = _kept(shape, random)
        given["mask"], real = _mask(kept, random), inside & kept
    dtype = random.choice(FLOATS)
    hidden = _poisoned(numbers((*shape, width), dtype, random), real, random)
    given = {"hidden": hidden, **given, **_options(width, random)}
    marked = {"hidden": real}
    if random.random() < 0.3:
        given["normalize"] = True
    if MODES[mode].takes_weights and random.random() < 0.6:
        weights = numbers(shape, random.choice(FLOATS), random)
        if dtype != torch.float64:  # they are float32 beside narrower states
            fits, size = torch.finfo(torch.float32), weights.double().abs()
            weights[(size > 0) & (size < fits.smallest_normal) | size.isfinite() & (size > fits.max)] = 1.0
        given["weights"], marked["weights"] = _poisoned(weights, real, random), real
    if MODES[mode].takes_scores:
        scores = numbers(shape, random.choice(FLOATS), random)
        if dtype != torch.float64:
            scores[scores.isfinite() & (scores > torch.finfo(torch.float32).max)] = 1.0
        given["scores"], marked["scores"] = _poisoned(scores, real, random), real
    if MODES[mode].takes_query:
        leading = random.choice(((), (random.choice((0, 1, 2, 3)),), (batch, random.choice((0, 1, 2)))))
        given["query"] = _alike_along(numbers((*leading, width), random.choice(FLOATS), random), random)
        if random.random() < 0.5:
            given["scale"] = random.choice((0.125, -1.0, 0.0, 1e30, float("inf"), 1e-300))
    return Call(mode, given, marked)


def _bounds_of_padded(given: dict[str, Any], batch: int, rows: int, random: Random) -> Tensor:
    """Gives some of them, and says which tokens are inside. [batch, rows]"""
    spans = _spans(batch, rows, random)
    starts, ends = [0] * batch, [rows] * batch
    if random.random() < 0.3:
        starts = [start for start, _ in spans]
        given["starts"] = _index(starts, random)
    if random.random() < 0.4:
        ends = [end for _, end in spans]
        given[random.choice(("ends", "lengths"))] = _index(ends, random)
    at = torch.arange(rows)
    return (at >= torch.tensor(starts, dtype=torch.int64)[:, None]) & (
        at < torch.tensor(ends, dtype=torch.int64)[:, None]
    )


def _bounds_of_packed(given: dict[str, Any], batch: int, rows: int, random: Random) -> Tensor:
    """Gives them, and says which rows are inside of any segment. [rows]"""
    inside = torch.zeros(rows, dtype=torch.bool)
    if random.random() < 0.4:
        spans = _spans(batch, rows, random)
        given["starts"] = _index([start for start, _ in spans], random)
        given["ends"] = _index([end for _, end in spans], random)
    else:
        cuts = sorted(random.randint(0, rows) for _ in range(batch + 1))
        if random.random() < 0.3 and batch > 0:
            cuts[0], cuts[-1] = 0, rows
            given["offsets"] = torch.tensor(cuts)  # of a jagged nested tensor
        else:
            given["cu_seqlens"] = _index(cuts, random)
        spans = list(pairwise(cuts))
    for start, end in spans:
        inside[start:end] = True
    return inside


def pooling_gradient(random: Random) -> Call:
    """_pool_backward of a random call, as autograd would make it."""
    while (call := pooling(random)).by_name_alone or MODES[call.op].of_logits:
        pass
    mode, given = MODES[call.op], dict(call.given)
    of = random.choice([name for name in GRADIENTS_OF if name in given])
    dtype, width = accumulator(given["hidden"].dtype), given.pop("truncate_dim", given["hidden"].shape[-1])
    given.pop("normalize", None)
    given.pop("out_dtype", None)
    number_of_mode, number_of = codes(call.op, of)
    queries = given["query"].shape[-2:-1] if "query" in given else ()
    gradient = numbers((batch_of(given), *queries, width), dtype, random)
    given |= {"gradient": gradient, "mode": number_of_mode, "of": number_of}
    if mode.gradient_reads_hidden(of):
        columns = width if width > 0 else None
        result = getattr(torch.ops.fastpool, call.op)
        given["result"] = result(**{**call.plain(), "truncate_dim": columns, "normalize": False, "out_dtype": dtype})
    everything = dict.fromkeys(argument.name for argument in POOL_BACKWARD)
    return Call("_pool_backward", {**everything, "scale": 1.0, **given}, call.real)


def batch_of(given: dict[str, Any]) -> int:
    if given.get("cu_seqlens") is not None:
        return len(given["cu_seqlens"]) - 1
    return given["hidden"].shape[0] if given["hidden"].dim() == 3 else len(given["starts"])


def normalizing(random: Random) -> Call:
    many = random.random() < 0.05
    leading = (
        [1] * random.choice((40, 63)) if many else [random.choice((0, 1, 2, 3, 7)) for _ in range(random.randrange(5))]
    )
    width = _size(random, 0, 1, 3, 8, 16, 17, 64, 133)
    if random.random() < 0.05:
        leading, width = [random.choice((300, 900))], _size(random, 133)  # several threads
    given = {"x": numbers((*leading, width), random.choice(FLOATS), random), **_options(width, random)}
    if random.random() < 0.3:
        given["eps"] = random.choice((0.0, 1e-12, 1e-300, 20.0, 1e300, float("inf")))
    if random.random() < 0.4:
        columns = given.get("truncate_dim", width)
        generator = _generator(random)
        sizes = torch.randint(columns + 1, leading, generator=generator, dtype=random.choice(INDICES))
        given["truncate_dims"] = _alike_along(sizes, random)
        real = torch.arange(width) < given["truncate_dims"][..., None]
    else:
        real = torch.ones(given["x"].shape, dtype=torch.bool)
    given["x"] = _poisoned(given["x"], real, random)
    return Call("l2_normalize", given, {"x": real})


def normalizing_gradient(random: Random) -> Call:
    """_l2_normalize_backward of a random call, as autograd would make it."""
    call = normalizing(random)
    x = call.given["x"]
    shape = (*x.shape[:-1], call.given.get("truncate_dim", x.shape[-1]))
    real = call.real["x"][..., : shape[-1]]
    given = {
        "gradient": _poisoned(numbers(shape, accumulator(x.dtype), random), real, random),
        "x": x,
        "eps": call.given.get("eps", 1e-12),
        "truncate_dims": call.given.get("truncate_dims"),
    }
    return Call("_l2_normalize_backward", given, {**call.real, "gradient": real})


def draw(random: Random) -> Call:
    kinds = (pooling, pooling_gradient, normalizing, normalizing_gradient)
    return random.choices(kinds, (6, 2, 2, 1))[0](random)
