"""torch.ops.fastpool.*: schemas, fakes and the Python kernels, one of each for every row of the mode table.

Python owns the schemas, so the ops exist without a compiler; the native library fills the CPU key. `_python_<op>` is
the same op without that key: the native one turns to it where a thread has asked for another backend.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import dispatch
from .backends import native
from .modes import MODES
from .segments import NormalizeCall, PoolCall

_library = torch.library.Library("fastpool", "DEF")  # ops live as long as this does


def pool_schema(takes_weights: bool) -> str:
    weights = "Tensor? weights=None, " if takes_weights else ""
    return (
        f"(Tensor hidden, Tensor? mask=None, Tensor? cu_seqlens=None, {weights}*, Tensor? starts=None, "
        "Tensor? ends=None, int? dim=None, bool normalize=False, ScalarType? out_dtype=None) -> Tensor"
    )


NORMALIZE_SCHEMA = "(Tensor x, *, int? dim=None, float eps=1e-12, ScalarType? out_dtype=None) -> Tensor"

CallType = Callable[..., PoolCall] | type[NormalizeCall]


def pool_call(mode: str) -> Callable[..., PoolCall]:
    """Arguments as the op has them -> the call they describe."""
    if MODES[mode].takes_weights:
        return lambda hidden, mask=None, cu_seqlens=None, weights=None, **more: PoolCall(
            mode, hidden, mask, cu_seqlens, weights, **more
        )
    return lambda hidden, mask=None, cu_seqlens=None, **more: PoolCall(mode, hidden, mask, cu_seqlens, **more)


def _define(name: str, schema: str, to_call: CallType) -> None:
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
        _library.define(op + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(op, body, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastpool::{op}", fake, lib=_library)


for _mode in MODES.values():
    _define(_mode.name, pool_schema(_mode.takes_weights), pool_call(_mode.name))
_define("l2_normalize", NORMALIZE_SCHEMA, NormalizeCall)


def _refuse_gradient(gradient: Tensor, shape: list[int], op: str) -> Tensor:
    raise NotImplementedError(f"{op}: gradients are not implemented in this version")


_library.define("_refuse_gradient(Tensor gradient, SymInt[] shape, str op) -> Tensor")
_library.impl("_refuse_gradient", _refuse_gradient, "CompositeExplicitAutograd")
torch.library.register_fake(
    "fastpool::_refuse_gradient", lambda gradient, shape, op: gradient.new_empty(shape), lib=_library
)

dispatch.start()
