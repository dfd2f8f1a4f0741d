"""What follows a reduction: divide, normalise, round once."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..constants import NORM_SCALES
from ..modes import MODES, Divisor
from .segment import TokenIndex
from .tree import add_columns


def _sqrt(x: Tensor) -> Tensor:
    """Correctly rounded, which torch.sqrt is on a GPU but not on a CPU (it is a vector library's there)."""
    return x.sqrt() if x.device.type != "cpu" else x.double().apply_(math.sqrt).to(x.dtype)


_DIVISORS: dict[Divisor, Callable[[Tensor, Tensor], Tensor]] = {
    Divisor.COUNT: lambda count, weight: count,
    Divisor.SQRT_COUNT: lambda count, weight: _sqrt(count),
    Divisor.WEIGHT: lambda count, weight: weight,
}


def divide(tokens: TokenIndex, x: Tensor, weight: Tensor) -> Tensor:
    """x [B, D] over the divisor of the call's mode, which may be the sum of weights, [B, 1]; 0 where that is 0: no real
    token, or weights that add up to nothing."""
    divisor = MODES[tokens.call.mode].divisor
    if divisor is Divisor.ONE:
        return x
    by = _DIVISORS[divisor](tokens.count, weight)
    return torch.where(by == 0, 0, x / by)


def _norm(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x * scale, max(norm, eps) * scale, whether it is the norm, and scale: 1, or a power of two where squares overflow
    or underflow. [..., columns] and three of [..., 1]"""
    squares, small = add_columns(x * x), NORM_SCALES[x.dtype == torch.float64]
    one = torch.ones_like(squares)
    # A norm below eps stays as it is where eps * scale might overflow: nothing is divided by it.
    scale = torch.where((squares < small * small) & (eps * one < small), 1 / small, one)
    scale = torch.where(squares == float("inf"), small, scale)
    y = x * (scale * scale)
    norm = _sqrt(add_columns(y * y)) / scale
    least = eps * scale
    return x * scale, torch.where((norm > least) | norm.isnan(), norm, least), ~(norm < least), scale


def normalize(x: Tensor, eps: float) -> Tensor:
    """x / max(norm, eps)."""
    if x.shape[-1] == 0:
        return x
    scaled, divisor, _, _ = _norm(x, eps)
    return scaled / divisor


def normalize_backward(
    gradient: Tensor, x: Tensor, eps: float, used: Callable[[Tensor], Tensor] = lambda z: z
) -> Tensor:
    """(g - z sum(z g)) / norm, z = x / norm; g / eps where the norm is below eps. `used` puts 0 for what is not summed,
    which a norm of 0 would turn into NaN."""
    if x.shape[-1] == 0:
        return gradient
    scaled, divisor, is_norm, scale = _norm(x, eps)
    z = used(scaled / divisor)
    across = torch.where(is_norm, gradient - z * add_columns(z * gradient), gradient)
    return (across * scale) / divisor


def round_once(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), which for float64 to 16 bits would round twice (torch goes through float32): round to odd first
    (Boldo and Melquiond, "Emulation of FMA and Correctly Rounded Sums", IEEE Trans. Comput. 57, 2008)."""
    if x.dtype != torch.float64 or dtype not in (torch.float16, torch.bfloat16):
        return x.to(dtype)
    nearest = x.float()
    bits = nearest.view(torch.int32)
    inexact = (nearest.double() != x) & ~x.isnan() & (bits % 2 == 0)
    beyond = nearest.double().abs() > x.abs()
    odd = torch.where(beyond, bits - 1, bits + 1)
    smallest = torch.where(x < 0, torch.full_like(bits, -(2**31) + 1), torch.ones_like(bits))
    odd = torch.where(nearest == 0, smallest, odd)
    return torch.where(inexact, odd, bits).view(torch.float32).to(dtype)
