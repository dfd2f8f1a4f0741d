"""Runs calls: plans them, or remembers the plan, and launches."""

from torch import Tensor

from ..segments import NormalizeBackwardCall, NormalizeCall, PoolBackwardCall, PoolCall
from .plan import (
    PoolPlan,
    device_of,
    make_pool_plan,
    plan_normalize,
    plan_normalize_backward,
    plan_pool_backward,
)
from .pool import NORM_EPS


def pool(call: PoolCall) -> Tensor:
    """Runs a PoolCall."""
    plan = _plan(call)
    if plan is None:
        return call.output()
    launch = plan.launch(call)
    launch.run()
    out: Tensor = launch.brought["out"]
    if call.normalize and plan.grid[1] > 1:
        # No program holds a whole row: it is normalised in a second launch, and rounded there.
        unrounded, out = out, call.output()
        plan_normalize(unrounded, NORM_EPS.value, out, device_of(out.device)).run()
    return out


def _plan(call: PoolCall) -> PoolPlan | None:
    """None where there is nothing to pool. Made once for all calls that look alike."""
    plan: PoolPlan | None = call.known.get("plan")
    if plan is None and call.batch > 0 and call.hidden.shape[-1] > 0:
        _check_rows(call)
        plan = call.known["plan"] = make_pool_plan(call, device_of(call.hidden.device))
    return plan


def _check_rows(call: PoolCall) -> None:
    if call.rows >= 2**31:
        raise RuntimeError(f"{call.op}: Triton kernels take fewer than 2^31 rows of a sequence, got {call.rows}")


def pool_backward(call: PoolBackwardCall) -> Tensor:
    """Runs a PoolBackwardCall."""
    if call.pool.batch == 0 or call.pool.hidden.numel() == 0:
        return call.output().zero_()
    _check_rows(call.pool)
    launches = plan_pool_backward(call, device_of(call.gradient.device))
    for launch in launches:
        launch.run()
    out: Tensor = launches[-1].brought["out"]
    return out


def l2_normalize(call: NormalizeCall) -> Tensor:
    """Runs a NormalizeCall."""
    out: Tensor = call.output()
    if out.numel() > 0:
        plan_normalize(call.x, call.eps, out, device_of(out.device), call.dims).run()
    return out


def l2_normalize_backward(call: NormalizeBackwardCall) -> Tensor:
    """Runs a NormalizeBackwardCall."""
    if call.tensor.numel() == 0:
        return call.output()
    launch = plan_normalize_backward(call, device_of(call.tensor.device))
    launch.run()
    out: Tensor = launch.brought["out"]
    return out
