"""torch.ops.fastpool.*: schemas, fakes and the Python kernels, for every list of arguments.py.

Python owns the schemas, so the ops exist without a compiler; the native libraries fill the CPU and CUDA keys.
`_python_<op>` is the same op without those keys: the native one turns to it where a thread has asked for another
backend, and where an argument is not what the op takes. autograd.py fills the Autograd key, and calls
`_pool_backward` and `_l2_normalize_backward`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import dispatch, torchscript_onnx
from .arguments import OPS, named, schema
from .backends import native
from .calls import Call, NormalizeBackwardCall, NormalizeCall, PoolBackwardCall, PoolCall
from .modes import MODES

library = torch.library.Library("fastpool", "DEF")  # ops live as long as this does

_CALLS: dict[str, Callable[..., Call]] = {
    **{mode: partial(PoolCall, mode) for mode in MODES},
    "_pool_backward": PoolBackwardCall.of_op,
    "l2_normalize": NormalizeCall,
    "_l2_normalize_backward": NormalizeBackwardCall.of_op,
}


def call_of(op: str, *args: Any, **kwargs: Any) -> Call:
    """The call that an op's arguments describe."""
    return _CALLS[op](**named(op, args, kwargs))


def _define(op: str) -> None:
    def kernel(*args: Any, **kwargs: Any) -> Tensor:
        return dispatch.run(call_of(op, *args, **kwargs))

    def kernel_for_native(*args: Any, **kwargs: Any) -> Tensor:
        try:
            return kernel(*args, **kwargs)
        except BaseException as error:
            native.set_error(str(error) or type(error).__name__)
            raise

    def fake(*args: Any, **kwargs: Any) -> Tensor:
        call = call_of(op, *args, **kwargs)
        call.check()
        return call.output()

    for name, body in ((op, kernel), (f"_python_{op}", kernel_for_native)):
        library.define(name + schema(op), tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, body, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastpool::{name}", fake, lib=library)


for _op in OPS:
    _define(_op)

dispatch.start()
torchscript_onnx.refuse()
