"""l2_normalize and its gradient."""

import torch
from torch import Tensor

from ..calls import NormalizeBackwardCall, NormalizeCall, accumulator
from .finish import normalize, normalize_backward, round_once


def l2_normalize(call: NormalizeCall) -> Tensor:
    """x / max(norm(x), eps) over the last dimension; 0 in the columns that truncate_dims leave out."""
    x, eps = _columns_of(call)
    result = round_once(_used(call, normalize(x, eps)), call.out_dtype or call.x.dtype)
    return result.clone(memory_format=torch.contiguous_format)  # a new tensor, as the op's schema says


def l2_normalize_backward(call: NormalizeBackwardCall) -> Tensor:
    """The gradient of x; 0 in the columns that were not used."""
    x, eps = _columns_of(call.normalize)

    def used(columns: Tensor) -> Tensor:
        return _used(call.normalize, columns)

    gradient = torch.zeros_like(call.normalize.x, dtype=x.dtype, memory_format=torch.contiguous_format)
    gradient[..., : x.shape[-1]] = used(normalize_backward(used(call.gradient), x, eps, used))
    return round_once(gradient, call.normalize.x.dtype)


def _columns_of(call: NormalizeCall) -> tuple[Tensor, float]:
    """The columns that are used, 0 where truncate_dims leave them out, and eps, in the accumulator's dtype, as kernels
    have them."""
    x = call.x[..., : call.columns]
    dtype = accumulator(x.dtype)
    return _used(call, x.to(dtype)), float(torch.tensor(call.eps, dtype=dtype))


def _used(call: NormalizeCall, x: Tensor) -> Tensor:
    """x with +0 in the columns that truncate_dims leave out: more of them change no sum of columns."""
    if call.truncate_dims is None:
        return x
    return torch.where(torch.arange(x.shape[-1], device=x.device) < call.truncate_dims[..., None], x, 0.0)
