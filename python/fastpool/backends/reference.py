"""Plain PyTorch on any device: see fastpool.reference."""

from .. import fork, reference
from ..calls import Call, Result

__all__ = ["l2_normalize", "l2_normalize_backward", "pool", "pool_backward", "quantize", "supports", "tokens"]
__all__ += ["tokens_backward", "unavailable"]


def unavailable() -> str | None:
    """Why this backend serves nothing here, or None."""
    return None


def supports(call: Call) -> str | None:
    """None: it serves every call."""
    return unavailable()


def _run(call: Call) -> Result:
    """Runs a checked call."""
    if call.tensor.device.type == "cpu":
        fork.used_threads()
        call.output()  # first: a result that no memory can hold is an error now, not after minutes of work
    result: Result = getattr(reference, call.kernel)(call)
    return result


pool = pool_backward = l2_normalize = l2_normalize_backward = quantize = tokens = tokens_backward = _run
