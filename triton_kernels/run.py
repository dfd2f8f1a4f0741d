"""Runs calls: plans them, or remembers the plan, and launches."""

from torch import Tensor

from ..calls import NormalizeBackwardCall, NormalizeCall, PoolBackwardCall, PoolCall, QuantizeCall
from .plan import (
    Part,
    PoolPlan,
    device_of,
    launch_normalize,
    make_normalize_backward_plan,
    make_normalize_plan,
    make_pool_plan,
    plan_normalize,
)
from .plan_backward import launch_parts, make_pool_backward_plan
from .plan_quantize import launch_quantize, make_quantize_plan
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
    if plan is None and 0 not in call.shape:
        plan = call.known["plan"] = make_pool_plan(call, device_of(call.hidden.device))
    return plan


def pool_backward(call: PoolBackwardCall) -> Tensor:
    """Runs a PoolBackwardCall."""
    if call.gradient.numel() == 0 or call.pool.hidden.numel() == 0:
        return call.output().zero_()
    parts: list[Part | PoolPlan] | None = call.known.get("plan")
    if parts is None:
        parts = call.known["plan"] = make_pool_backward_plan(call, device_of(call.gradient.device))
    launches = launch_parts(parts, call)
    for launch in launches:
        launch.run()
    out: Tensor = launches[-1].brought["out"]
    return out


def l2_normalize(call: NormalizeCall) -> Tensor:
    """Runs a NormalizeCall."""
    x, out = call.x, call.output()
    if out.numel() > 0:
        part: Part | None = call.known.get("plan")
        if part is None:
            part = call.known["plan"] = make_normalize_plan(x, call.eps, out.shape[-1], device_of(x.device))
        launch_normalize(part, x, out, call.truncate_dims).run()
    return out


def l2_normalize_backward(call: NormalizeBackwardCall) -> Tensor:
    """Runs a NormalizeBackwardCall."""
    x, out = call.tensor, call.output()
    if out.numel() > 0:
        part: Part | None = call.known.get("plan")
        if part is None:
            part = call.known["plan"] = make_normalize_backward_plan(call, device_of(x.device))
        launch_normalize(part, x, out, call.normalize.truncate_dims, gradient=call.gradient).run()
    return out


def quantize(call: QuantizeCall) -> Tensor:
    """Runs a QuantizeCall."""
    out = call.output()
    if out.numel() > 0:
        part: Part | None = call.known.get("plan")
        if part is None:
            part = call.known["plan"] = make_quantize_plan(call, device_of(out.device))
        launch_quantize(part, call, out).run()
    return out
