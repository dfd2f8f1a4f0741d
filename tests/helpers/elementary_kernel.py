"""Triton's elementary functions as a kernel of their own."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpool.triton_kernels import elementary
from fastpool.triton_kernels.launch import options


@triton.jit
def _kernel(x, result, count, function: tl.constexpr, block: tl.constexpr):
    at = tl.program_id(0) * block + tl.arange(0, block)
    numbers = tl.load(x + at, mask=at < count, other=0.0)
    if function == "exp":
        numbers = elementary.exp(numbers)
    elif function == "log1p":
        numbers = elementary.log1p(numbers)
    elif function == "tanh":
        numbers = elementary.tanh(numbers)
    else:
        factor, exponent = elementary.exponential(numbers)
        numbers = factor if function == "factor" else exponent
    tl.store(result + at, numbers, mask=at < count)


def evaluate(function: str, x: Tensor) -> Tensor:
    """On a GPU, or in Triton's interpreter."""
    device, block = ("cuda", 1024) if torch.cuda.is_available() else ("cpu", 1 << 18)
    moved = x.to(device)
    result = torch.empty_like(moved)
    _kernel[(triton.cdiv(len(x), block),)](moved, result, len(x), function, block, **options(4, 128))
    return result.cpu()
