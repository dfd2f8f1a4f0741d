"""Token states, ordinary and special, and the backends they go to."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..calls import PoolCall
from ..dispatch import BACKENDS, backend

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


def moved(value: Any, device: str | torch.device) -> Tensor:
    """A tensor on a device, with its strides and the gaps between its elements."""
    if value.is_nested:
        return torch.nested.nested_tensor_from_jagged(moved(value.values(), device), moved(value.offsets(), device))
    memory = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
    return memory.to(device).as_strided(value.shape, value.stride(), value.storage_offset())
