"""The precision in which modules compute: the parameters', whatever autocast would choose."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ..checks import FLOATS


def in_dtype_of(x: Tensor, *weights: Tensor) -> Tensor:
    """x in the dtype of the first of a module's weights that is one to compute in: quantised weights hold integers, and
    their layers take numbers."""
    return x.to(next((weight.dtype for weight in weights if weight.dtype in FLOATS), x.dtype))


def own_precision(x: Tensor) -> AbstractContextManager[object]:
    """Within it products are of the dtypes that their arguments have: autocast is off on x's device."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()
