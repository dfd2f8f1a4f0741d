"""Inputs and answers that tests share: ragged batches in every layout, and the plainest float64 formula of each mode.

A `Sequence` is one text: its token states, which of them are real (holes), and weights. `LAYOUTS` turn a list of them
into the arguments of a pooling function, each in its own way, with NaN wherever no token is. `given` names the argument
of its own that a mode gets beside them: "weights", "scores", "query" or None.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from .arguments import GRADIENTS_OF, POOL_BACKWARD, codes
from .arguments import given as in_order
from .calls import PoolCall
from .dispatch import BACKENDS, backend
from .modes import MODES, Divisor, Reduce

T = TypeVar("T")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def cpu_backends() -> list[str]:
    """The backends that serve CPU tensors in this process."""
    call = PoolCall("mean", torch.empty(1, 1, 1))
    return [name for name, module in BACKENDS.items() if module.supports(call) is None]


@dataclass(frozen=True)
class Target:
    """A backend and the device it is tested on."""

    backend: str
    device: str

    def run(self, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Calls a function with its tensors on the device and the backend asked for; the result on the CPU."""

        def there(value: Any) -> Any:
            return value.to(self.device) if isinstance(value, Tensor) else value

        with backend(self.backend):
            result = function(*map(there, args), **{name: there(value) for name, value in kwargs.items()})
        return result.cpu()


@dataclass
class Sequence:
    states: Tensor  # [n, H]
    real: Tensor  # [n], bool
    weights: Tensor  # [n], float32


def sequences(
    lengths: list[int], width: int, dtype: torch.dtype, holes: bool = False, seed: int = 0, offset: float = 0.25
) -> list[Sequence]:
    """Normally distributed token states around `offset`, so that sums both grow and cancel."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for n in lengths:
        states = (torch.randn(n, width, generator=generator, dtype=torch.float64) + offset).to(dtype)
        real = torch.rand(n, generator=generator) > 0.4 if holes else torch.ones(n, dtype=torch.bool)
        if holes and n > 0:
            real[0] = real[-1] = True  # padding is the layout's affair
        made.append(Sequence(states, real, torch.rand(n, generator=generator) + 0.125))
    return made


def special_values(batch: int, rows: int, width: int) -> Tensor:
    """[batch, rows, width], at least four sequences: NaN, infinities, both zeros, subnormal and huge values in any
    order; negative zeros; zeros of either sign (which one a maximum is depends on the order of the merges: the first
    stays); negative infinities; from a fifth on, sums that are subnormal, and norms whose squares overflow."""
    special = torch.tensor([float("nan"), torch.inf, -torch.inf, 0.0, -0.0, 1e-40, -1e-45, 3e38, 1.0, -2.0])
    generator = torch.Generator().manual_seed(1)
    hidden = special[torch.randint(len(special), (batch, rows, width), generator=generator)]
    hidden[1] = -0.0
    hidden[2] = torch.where(torch.rand(rows, width, generator=generator) > 0.5, 0.0, -0.0)
    hidden[3] = -torch.inf
    for b in range(4, batch):
        hidden[b] = torch.rand(rows, width, generator=generator) * (1e35 if b % 2 else 1e-40)
    return hidden


# Bounds of norms: none, one among the subnormals of either accumulator, below and above where l2_normalize may scale
# up, and so large that they must not be scaled.
EPS = (0.0, 1e-310, 1e-200, 1e-45, 1e-30, 2.0**-50, 1e-12, 1e24, 1e220)


def every_norm(dtype: torch.dtype) -> Tensor:
    """[N, 20]: a row of zeros, one with nothing but the smallest number of dtype's accumulator, and rows whose norms
    run from there to the largest; the closest stand where norms begin to be scaled. Columns from the eighth on are
    smaller and smaller."""
    double = dtype == torch.float64
    smallest, largest, begin, finer = (-1074, 1023, -300, 7) if double else (-149, 127, -50, 1)
    exponents = [*range(smallest, largest, 12 * finer), *range(begin - 4, begin + 1), largest]
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(len(exponents), 20, generator=generator, dtype=torch.float64) + 1
    x = torch.where(torch.rand(x.shape, generator=generator) > 0.5, x, -x)
    rows = [
        [math.ldexp(value, exponent - 12 * finer * max(0, column - 7)) for column, value in enumerate(row)]
        for exponent, row in zip(exponents, x.tolist(), strict=True)
    ]
    one = [0.0, -math.ldexp(1, smallest), *[0.0] * 18]
    return torch.tensor([[0.0] * 20, one, *rows], dtype=torch.float64).to(dtype)


def own_arguments(given: str | None, weights: Tensor, width: int) -> dict[str, Tensor]:
    """What a mode gets by itself: these weights, scores between -8 and 8 that are exact, or a query, so wide."""
    if given == "weights":
        return {"weights": weights}
    if given == "scores":
        return {"scores": (weights - 0.625) * 16}
    if given == "query":
        drawn = torch.randn(width, generator=torch.Generator().manual_seed(width))
        return {"query": drawn * (4 / max(width, 1) ** 0.5)}
    return {}


def required(mode: str, shape: Iterable[int]) -> dict[str, Tensor]:
    """What a mode cannot do without beside hidden of that shape: scores, of a token's place in its row, or a query."""
    *leading, width = shape
    own = next(given for name, given in variants() if name == mode)
    return own_arguments(own, (torch.arange(leading[-1]) % 9 / 8).expand(leading), width)


def _weights(sequence: Sequence, given: str | None) -> Tensor:
    """Of every token, in float64. [n]"""
    own = {
        name: value.double()
        for name, value in own_arguments(given, sequence.weights, sequence.states.shape[-1]).items()
    }
    if "query" in own:
        own["scores"] = sequence.states.double() @ own["query"]
    if "scores" in own:
        scores = own["scores"].masked_fill(~sequence.real, float("-inf"))
        return torch.exp(scores - scores[sequence.real].amax()) if sequence.real.any() else scores
    return own.get("weights", torch.arange(1, len(sequence.states) + 1, dtype=torch.float64))


def exact(
    mode: str, sequence: Sequence, given: str | None, truncate_dim: int | None = None, normalize: bool = False
) -> Tensor:
    """The formula itself, in float64. [truncate_dim or H]"""
    x = sequence.states.double()[sequence.real]
    row = MODES[mode]
    w = _weights(sequence, given)[sequence.real, None]
    x, w = x[row.select.among], w[row.select.among]
    if len(x) == 0:
        result = torch.zeros(sequence.states.shape[-1], dtype=torch.float64)
    else:
        x = x * w if row.weighted else x
        result = x.amax(0) if row.reduce is Reduce.MAX else x.sum(0)
        n = len(x)
        result = result / {
            Divisor.ONE: 1.0, Divisor.COUNT: n, Divisor.SQRT_COUNT: n**0.5, Divisor.WEIGHT: w.sum(),
        }[row.divisor]  # fmt: skip
    result = result[:truncate_dim]
    return result / result.norm().clamp(min=1e-12) if normalize else result


def moved(value: Any, device: str | torch.device) -> Tensor:
    """A tensor on a device, with its strides and the gaps between its elements."""
    if value.is_nested:
        return torch.nested.nested_tensor_from_jagged(moved(value.values(), device), moved(value.offsets(), device))
    memory = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
    return memory.to(device).as_strided(value.shape, value.stride(), value.storage_offset())


# ---- layouts: list of sequences -> arguments


def _arguments(given: str | None, weights: Tensor, hidden: Tensor, **arguments: Any) -> dict[str, Any]:
    return {"hidden": hidden, **arguments, **own_arguments(given, weights, hidden.shape[-1])}


def _pad(batch: list[Sequence], before: Callable[[int], int], rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [B, rows, H], real [B, rows], weights [B, rows]; sequence b starts at row before(its length)."""
    width = batch[0].states.shape[1]
    hidden = torch.full((len(batch), rows, width), float("nan"), dtype=batch[0].states.dtype)
    real = torch.zeros(len(batch), rows, dtype=torch.bool)
    weights = torch.full((len(batch), rows), float("nan"))
    for b, sequence in enumerate(batch):
        n = len(sequence.states)
        at = slice(before(n), before(n) + n)
        hidden[b, at], real[b, at], weights[b, at] = sequence.states, sequence.real, sequence.weights
        hidden[b, at][~sequence.real] = float("nan")
    return hidden, real, weights


def _longest(batch: list[Sequence]) -> int:
    return max(len(sequence.states) for sequence in batch)


def _padded_right_mask(batch: list[Sequence], given: str | None) -> dict[str, Any]:
    hidden, real, weights = _pad(batch, lambda n: 0, _longest(batch) + 3)
    return _arguments(given, weights, hidden=hidden, mask=real)


def _padded_left_mask(batch: list[Sequence], given: str | None) -> dict[str, Any]:
    rows = _longest(batch) + 40
    hidden, real, weights = _pad(batch, lambda n: rows - n, rows)
    return _arguments(given, weights, hidden=hidden, mask=real.long())


def _padded_middle_strided(batch: list[Sequence], given: str | None) -> dict[str, Any]:
    """Views with gaps between rows, columns and mask elements."""
    rows = _longest(batch) + 9
    hidden, real, weights = _pad(batch, lambda n: (rows - n) // 2, rows)
    wide = torch.full((len(batch), rows, 2, hidden.shape[2] + 5), float("nan"), dtype=hidden.dtype)
    wide[:, :, 1, : hidden.shape[2]] = hidden
    mask = torch.zeros(rows, len(batch), 2, dtype=torch.int32)
    mask[:, :, 1] = real.T
    return _arguments(
        given,
        weights.T.contiguous().T,
        hidden=wide[:, :, 1, : hidden.shape[2]],
        mask=mask[:, :, 1].T,
    )


def _padded_starts_ends(batch: list[Sequence], given: str | None) -> dict[str, Any]:
    rows = _longest(batch) + 5
    hidden, real, weights = _pad(batch, lambda n: rows - n - 2, rows)
    ends = torch.full((len(batch),), rows - 2)
    starts = ends - torch.tensor([len(sequence.states) for sequence in batch])
    return _arguments(given, weights.double(), hidden=hidden, mask=real.to(torch.uint8), starts=starts, ends=ends)


def _padded_lengths(batch: list[Sequence], given: str | None) -> dict[str, Any]:
    hidden, _, weights = _pad(batch, lambda n: 0, _longest(batch) + 1)
    lengths = torch.tensor([len(sequence.states) for sequence in batch], dtype=torch.int32)
    return _arguments(given, weights, hidden=hidden, lengths=lengths)


def _pack(batch: list[Sequence]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [T, H], real [T], weights [T], offsets [B + 1]."""
    hidden = torch.cat([sequence.states for sequence in batch]).clone()
    real = torch.cat([sequence.real for sequence in batch])
    weights = torch.cat([sequence.weights for sequence in batch])
    hidden[~real] = float("nan")
    offsets = torch.tensor([0] + [len(sequence.states) for sequence in batch]).cumsum(0)
    return hidden, real, weights, offsets


def _packed(batch: list[Sequence], given: str | None) -> dict[str, Any]:
    """The first segment does not begin with the first row, nor does the last end with the last."""
    hidden, _, weights, offsets = _pack(batch)
    hidden = torch.nn.functional.pad(hidden, (0, 0, 70, 3), value=float("nan"))
    weights = torch.nn.functional.pad(weights, (70, 3), value=float("nan"))
    return _arguments(given, weights, hidden=hidden, cu_seqlens=offsets.int() + 70)


def _packed_mask(batch: list[Sequence], given: str | None) -> dict[str, Any]:
    """Segments that begin and end with padding."""
    width, dtype = batch[0].states.shape[1], batch[0].states.dtype
    padding = Sequence(
        torch.full((3, width), float("nan"), dtype=dtype),
        torch.zeros(3, dtype=torch.bool),
        torch.full((3,), float("nan")),
    )
    both = [
        Sequence(
            torch.cat([padding.states, s.states, padding.states]),
            torch.cat([padding.real, s.real, padding.real]),
            torch.cat([padding.weights, s.weights, padding.weights]),
        )
        for s in batch
    ]
    hidden, real, weights, offsets = _pack(both)
    return _arguments(given, weights, hidden=hidden, mask=real.to(torch.int16), cu_seqlens=offsets)


def _packed_shuffled(batch: list[Sequence], given: str | None) -> dict[str, Any]:
    """starts and ends, the rows in another order than the segments, with gaps of NaN."""
    gap = Sequence(
        torch.full_like(batch[0].states[:1], float("nan"))
        if len(batch[0].states)
        else torch.full((1, batch[0].states.shape[1]), float("nan"), dtype=batch[0].states.dtype),
        torch.zeros(1, dtype=torch.bool),
        torch.full((1,), float("nan")),
    )
    order = list(reversed(range(len(batch))))
    laid = [part for b in order for part in (gap, batch[b])]
    hidden, real, weights, offsets = _pack(laid)
    starts = torch.zeros(len(batch), dtype=torch.int64)
    ends = torch.zeros(len(batch), dtype=torch.int64)
    for place, b in enumerate(order):
        starts[b], ends[b] = offsets[2 * place + 1], offsets[2 * place + 2]
    return _arguments(given, weights, hidden=hidden, mask=real, starts=starts, ends=ends)


def _nested(batch: list[Sequence], given: str | None) -> dict[str, Any]:
    hidden, _, weights, offsets = _pack(batch)
    return _arguments(given, weights, hidden=torch.nested.nested_tensor_from_jagged(hidden, offsets))


@dataclass(frozen=True)
class Layout:
    make: Callable[[list[Sequence], str | None], dict[str, Any]]
    holes: bool  # whether it can say which tokens inside a segment are not real


LAYOUTS: dict[str, Layout] = {
    "padded_right_mask": Layout(_padded_right_mask, True),
    "padded_left_mask": Layout(_padded_left_mask, True),
    "padded_middle_strided": Layout(_padded_middle_strided, True),
    "padded_starts_ends": Layout(_padded_starts_ends, True),
    "padded_lengths": Layout(_padded_lengths, False),
    "packed": Layout(_packed, False),
    "packed_mask": Layout(_packed_mask, True),
    "packed_shuffled": Layout(_packed_shuffled, True),
    "nested": Layout(_nested, False),
}


def variants() -> list[tuple[str, str | None]]:
    """Every (mode, given) there is: with an argument of its own, and without where it can do without."""
    return [
        (name, given)
        for name, mode in MODES.items()
        for given in (
            *((None,) if not mode.softmax else ()),
            *(one.name for one in mode.arguments if one.differentiable),
        )
    ]


def taking_turns(*values: T, layouts: Iterable[str] = LAYOUTS) -> list[tuple[str, str | None, str, T]]:
    """(mode, given, layout, value), each mode in each layout, and with one of the values: each of them comes to
    every mode and, since there are more modes than values, to every layout."""
    return [
        (mode, given, layout, values[(i + j) % len(values)])
        for i, (mode, given) in enumerate(variants())
        for j, layout in enumerate(layouts)
    ]


def gradients(
    function: Callable[..., Tensor], arguments: dict[str, Any], gradient: Tensor, **more: Any
) -> tuple[Tensor, ...]:
    """The gradients of hidden, or of its rows where it is nested, and of weights, scores or a query where they are
    given, for this gradient of the result. Whatever is given may require gradients or not; nothing of it is written."""
    arguments = dict(arguments)
    name = "x" if "x" in arguments else "hidden"  # of l2_normalize
    states = arguments[name]
    leaves = [(states.values() if states.is_nested else states).detach().requires_grad_()]
    nested = torch.nested.nested_tensor_from_jagged
    arguments[name] = nested(leaves[0], states.offsets()) if states.is_nested else leaves[0]
    for own in GRADIENTS_OF:
        if own != "hidden" and own in arguments:
            arguments[own] = arguments[own].detach().requires_grad_()
            leaves.append(arguments[own])
    return torch.autograd.grad(function(**arguments, **more), leaves, gradient)


# ---- comparisons


def bits(x: Tensor) -> Tensor:
    """The bit patterns of x, all NaNs alike: which NaN comes out is not promised."""
    x = torch.where(x.isnan(), torch.full_like(x, float("nan")), x)
    return x.contiguous().view({8: torch.int64, 4: torch.int32, 2: torch.int16}[x.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


# Mantissa bits, and the smallest exponent of a normal number.
_FORMAT = {torch.float16: (10, -14), torch.bfloat16: (7, -126), torch.float32: (23, -126), torch.float64: (52, -1022)}


def error(result: Tensor, expected: Tensor) -> float:
    """How far a result is from float64, in units of what is allowed: 1 is the limit.

    float32: a relative L2 error of 1e-6; float64: of 1e-14. 16 bits: half a unit in the last place, for the one
    rounding, beside the error of the float32 value that is rounded.
    """
    got = result.double()
    norm = expected.norm().item() if expected.numel() else 0.0
    if result.dtype in (torch.float32, torch.float64):
        allowed = 1e-6 if result.dtype == torch.float32 else 1e-14
        return float((got - expected).norm()) / max(allowed * norm, 1e-38)
    mantissa, smallest = _FORMAT[result.dtype]
    exponent = torch.frexp(expected.abs()).exponent - 1
    unit = torch.ldexp(torch.ones_like(expected), exponent.clamp(min=smallest) - mantissa)
    allowed_each = 0.5 * unit + 1e-6 * norm
    return float(((got - expected).abs() / allowed_each).max()) if expected.numel() else 0.0


def backward_arguments(mode: str, of: str, gradient: Any, result: Tensor | None = None, **tensors: Any) -> list[Any]:
    """What _pool_backward takes, in its order; what is not given is None, and a scale 1."""
    values: dict[str, Any] = dict.fromkeys(argument.name for argument in POOL_BACKWARD)
    values["mode"], values["of"] = codes(mode, of)
    values |= {"gradient": gradient, "result": result, "scale": 1.0}
    return in_order("_pool_backward", values | tensors)[0]
