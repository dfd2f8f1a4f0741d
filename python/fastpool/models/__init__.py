"""What a model's folder says about its pooling, and what engines make of it."""

from .config import PoolingConfig
from .dense import Dense
from .read import Decision

__all__ = ["Decision", "Dense", "PoolingConfig"]
