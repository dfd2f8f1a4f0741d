"""fastpool: token states to sentence vectors, exact and with the same bits every time."""

from . import nn, ops  # ops defines torch.ops.fastpool.*  # noqa: F401
from .dispatch import Explanation, backend, validate
from .functional import cls, explain, l2_normalize, last, max, mean, mean_sqrt_len, sum, weighted_mean
from .models import PoolingConfig
from .modes import MODES, Mode
from .version import __version__

__all__ = [
    "MODES",
    "Explanation",
    "Mode",
    "PoolingConfig",
    "__version__",
    "backend",
    "cls",
    "explain",
    "l2_normalize",
    "last",
    "max",
    "mean",
    "mean_sqrt_len",
    "nn",
    "sum",
    "validate",
    "weighted_mean",
]
