"""Plain PyTorch on any device: see fastpool.reference."""

from torch import Tensor

from ..reference import l2_normalize, l2_normalize_backward, pool, pool_backward

__all__ = ["l2_normalize", "l2_normalize_backward", "pool", "pool_backward", "refuses", "unavailable"]


def unavailable() -> str | None:
    """Why this backend serves nothing here, or None."""
    return None


def refuses(tensor: Tensor) -> str | None:
    return unavailable()
