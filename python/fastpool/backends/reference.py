"""Plain PyTorch on any device: see fastpool.reference."""

from ..calls import Call
from ..reference import l2_normalize, l2_normalize_backward, pool, pool_backward

__all__ = ["l2_normalize", "l2_normalize_backward", "pool", "pool_backward", "supports", "unavailable"]


def unavailable() -> str | None:
    """Why this backend serves nothing here, or None."""
    return None


def supports(call: Call) -> str | None:
    """None: it serves every call."""
    return unavailable()
