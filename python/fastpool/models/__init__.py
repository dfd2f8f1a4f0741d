"""What a model's folder says about its pooling, and what engines make of it."""

from .config import PoolingConfig
from .decisions import Decision
from .layers import Dense, LatentAttention, LayerNorm, Normalize
from .multi_vector import MultiVector
from .splade import Splade
from .weighing import LayerWeights, WordWeights

__all__ = [
    "Decision",
    "Dense",
    "LatentAttention",
    "LayerNorm",
    "LayerWeights",
    "MultiVector",
    "Normalize",
    "PoolingConfig",
    "Splade",
    "WordWeights",
]
