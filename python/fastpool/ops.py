"""torch.ops.fastpool.*: schemas, fakes and the Python kernels, for every list of arguments.py.

Python owns the schemas, so the ops exist without a compiler; the native libraries fill the CPU and CUDA keys.
`_python_<op>` is the same op without those keys: the native one turns to it where a thread has asked for another
backend, and where an argument is not what the op takes. autograd.py fills the Autograd key, and calls
`_pool_backward`, `_l2_normalize_backward` and `_tokens_backward`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from . import dispatch, errors, several, torchscript_onnx
from .arguments import OPS, named, schema
from .backends import native
from .calls import (
    Call,
    NormalizeBackwardCall,
    NormalizeCall,
    PoolBackwardCall,
    PoolCall,
    QuantizeCall,
    Result,
    TokensBackwardCall,
    TokensCall,
)
from .modes import MODES

library = torch.library.Library("fastpool", "DEF")  # ops live as long as this does

_CALLS: dict[str, Callable[..., Call]] = {
    **{mode: partial(PoolCall, mode) for mode in MODES},
    "_pool_backward": PoolBackwardCall.of_op,
    "l2_normalize": NormalizeCall,
    "_l2_normalize_backward": NormalizeBackwardCall.of_op,
    "quantize": QuantizeCall,
    "tokens": TokensCall,
    "_tokens_backward": TokensBackwardCall.of_op,
}


def call_of(op: str, *args: Any, **kwargs: Any) -> Call:
    """The call that an op's arguments describe."""
    return _CALLS[op](**named(op, args, kwargs))


def _kernel(op: str) -> Callable[..., Result]:
    if op not in _CALLS:
        return several.apart  # calls of other ops

    def kernel(*args: Any, **kwargs: Any) -> Result:
        return dispatch.run(call_of(op, *args, **kwargs))

    return kernel


def _define(op: str) -> None:
    def fake(*args: Any, **kwargs: Any) -> Result:
        if op not in _CALLS:
            return several.apart(*args, **kwargs)
        call = call_of(op, *args, **kwargs)
        call.check()
        if isinstance(call, TokensCall) and call.size is None:
            return call.output(torch.library.get_ctx().new_dynamic_size())  # type: ignore[arg-type]  # a SymInt
        return call.output()

    for name in (op, f"_python_{op}"):
        library.define(name + schema(op), tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"fastpool::{name}", fake, lib=library)


for _op in OPS:
    _define(_op)
dispatch.start()
for _op in OPS:
    library.impl(_op, _kernel(_op), "CompositeExplicitAutograd")
    library.impl(f"_python_{_op}", native.keeping(_kernel(_op)), "CompositeExplicitAutograd")
    errors.leave_as_themselves(_op)
torchscript_onnx.refuse()
