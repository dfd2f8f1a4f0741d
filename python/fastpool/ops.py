"""torch.ops.fastpool.*: schemas, fakes and the Python kernels, for every row of the mode table.

Python owns the schemas, so the ops exist without a compiler; the native libraries fill the CPU and CUDA keys.
`_python_<op>` is the same op without those keys: the native one turns to it where a thread has asked for another
backend. autograd.py fills the Autograd key, and calls `_<op>_backward`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import dispatch
from .backends import native
from .modes import MODES
from .segments import Call, NormalizeBackwardCall, NormalizeCall, PoolBackwardCall, PoolCall

library = torch.library.Library("fastpool", "DEF")  # ops live as long as this does


def pool_schema(takes_weights: bool) -> str:
    weights = "Tensor? weights=None, " if takes_weights else ""
    return (
        f"(Tensor hidden, Tensor? mask=None, Tensor? cu_seqlens=None, {weights}*, Tensor? starts=None, "
        "Tensor? ends=None, int? truncate_dim=None, bool normalize=False, ScalarType? out_dtype=None) -> Tensor"
    )


# Of hidden, and of the weights of a mode that takes them; see PoolBackwardCall.
POOL_BACKWARD_SCHEMA = (
    "(Tensor gradient, Tensor hidden, Tensor? mask, Tensor? cu_seqlens, Tensor? weights, Tensor? starts, Tensor? ends, "
    "Tensor? result) -> Tensor"
)
NORMALIZE_SCHEMA = (
    "(Tensor x, *, int? truncate_dim=None, Tensor? truncate_dims=None, float eps=1e-12, ScalarType? out_dtype=None) "
    "-> Tensor"
)
NORMALIZE_BACKWARD_SCHEMA = "(Tensor gradient, Tensor x, float eps, Tensor? truncate_dims=None) -> Tensor"

ToCall = Callable[..., Call]


def pool_call(mode: str) -> Callable[..., PoolCall]:
    """Arguments as the op has them -> the call they describe."""
    if MODES[mode].takes_weights:
        return lambda hidden, mask=None, cu_seqlens=None, weights=None, **more: PoolCall(
            mode, hidden, mask, cu_seqlens, weights, **more
        )
    return lambda hidden, mask=None, cu_seqlens=None, **more: PoolCall(mode, hidden, mask, cu_seqlens, **more)


def _dim(gradient: Tensor) -> int | None:
    return gradient.shape[-1] if gradient.dim() > 0 and gradient.shape[-1] > 0 else None


def pool_backward_call(mode: str, of_weights: bool) -> Callable[..., PoolBackwardCall]:
    """Likewise."""

    def to_call(
        gradient: Tensor,
        hidden: Tensor,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        weights: Tensor | None,
        starts: Tensor | None,
        ends: Tensor | None,
        result: Tensor | None,
    ) -> PoolBackwardCall:
        pool = PoolCall(mode, hidden, mask, cu_seqlens, weights, starts, ends, _dim(gradient))
        return PoolBackwardCall(pool, gradient, result, of_weights)

    return to_call


def normalize_backward_call(
    gradient: Tensor, x: Tensor, eps: float, truncate_dims: Tensor | None = None
) -> NormalizeBackwardCall:
    """Likewise."""
    return NormalizeBackwardCall(NormalizeCall(x, _dim(gradient), truncate_dims, eps), gradient)


def _define(name: str, schema: str, to_call: ToCall) -> None:
    def kernel(*args: Any, **kwargs: Any) -> Tensor:
        return dispatch.run(to_call(*args, **kwargs))

    def kernel_for_native(*args: Any, **kwargs: Any) -> Tensor:
        try:
            return kernel(*args, **kwargs)
        except BaseException as error:
            native.set_error(str(error) or type(error).__name__)
            raise

    def fake(*args: Any, **kwargs: Any) -> Tensor:
        call = to_call(*args, **kwargs)
        call.check()
        return call.output()

    for op, body in ((name, kernel), (f"_python_{name}", kernel_for_native)):
        library.define(op + schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(op, body, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastpool::{op}", fake, lib=library)


for _mode in MODES.values():
    _define(_mode.name, pool_schema(_mode.takes_weights), pool_call(_mode.name))
    _define(f"_{_mode.name}_backward", POOL_BACKWARD_SCHEMA, pool_backward_call(_mode.name, of_weights=False))
    if _mode.takes_weights:
        _define(
            f"_{_mode.name}_backward_weights", POOL_BACKWARD_SCHEMA, pool_backward_call(_mode.name, of_weights=True)
        )
_define("l2_normalize", NORMALIZE_SCHEMA, NormalizeCall)
_define("_l2_normalize_backward", NORMALIZE_BACKWARD_SCHEMA, normalize_backward_call)

dispatch.start()
