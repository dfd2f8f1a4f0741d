"""Plain PyTorch on any device: see fastpool.reference."""

from torch import Tensor

from ..reference import l2_normalize, pool

__all__ = ["l2_normalize", "pool", "refuses", "unavailable"]


def unavailable() -> str | None:
    """Why this backend serves nothing here, or None."""
    return None


def refuses(tensor: Tensor) -> str | None:
    return unavailable()
