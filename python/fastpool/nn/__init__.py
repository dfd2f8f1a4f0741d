"""The functions as torch modules: what a model holds, saves and compiles. Their state is what they were made with, and
what they learn."""

from .attention import AttentionPooling
from .latent import LatentAttention
from .multihead import MultiheadPooling
from .pooling import Normalize, Pooling
from .splade import Splade
from .weighted_layers import WeightedLayers

__all__ = [
    "AttentionPooling",
    "LatentAttention",
    "MultiheadPooling",
    "Normalize",
    "Pooling",
    "Splade",
    "WeightedLayers",
]
