"""What becomes of logits: before they are added up, or of their maximum."""

import torch
from torch import Tensor

from ..modes import Activation
from .elementary import log1p


def activate(x: Tensor, activation: Activation) -> Tensor:
    """ln(1 + max(x, 0)), and ln(1 + y) of that once more; 0 for -0, NaN for NaN. x is float32 or float64."""
    if activation is Activation.NONE:
        return x
    y = log1p(torch.where(x <= 0, 0, x))
    return log1p(y) if activation is Activation.LOG1P_RELU else y
