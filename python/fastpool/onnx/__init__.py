"""ONNX: how `torch.onnx.export(dynamo=True)` writes fastpool's ops.

>>> import fastpool.onnx
>>> table = fastpool.onnx.translation_table()
>>> torch.onnx.export(model, arguments, "model.onnx", custom_translation_table=table, dynamic_shapes=shapes)

An op becomes ONNX's own operators, of opset 18 and later, so that any runtime can run it. The four ideas stand in files
of the same names as the reference's: segment.py, weight.py, state.py, finish.py.
"""

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

import torch

try:
    import onnxscript  # noqa: F401  # brings onnx
except ImportError as error:
    raise ImportError(f'fastpool.onnx needs onnx and onnxscript ({error}): pip install "fastpool[onnx]"') from error

from ..arguments import named
from ..modes import MODES
from .translate import l2_normalize, pool, quantize

__all__ = ["translation_table"]


def translation_table() -> dict[Any, Callable[..., Any]]:
    """The `custom_translation_table` of torch.onnx.export(dynamo=True): from each of fastpool's ops to what builds it.

    Models may call the functions, torch.ops.fastpool.*, or fastpool.nn's modules, with every argument that these take,
    padded or packed, but for softmax_mean, attention, tokens and quantize, which are refused at export; batch, rows and
    columns
    may be dynamic. The results are fastpool's to rounding, not to the bit: a runtime adds in its own order, here 32
    tokens at a time, in float32 (float64 for float64), and rounds once. NaN and infinities in padding reach no result;
    a text without real tokens gives zeros; NaN goes through `max`.

    A `truncate_dim` that is computed stays the number that it was when the model was exported. An ONNX graph cannot
    raise errors: each element of an integer mask that is not 0 counts as 1, and bounds of packed input are clamped to
    the rows there are. Where padded input has no rows (S = 0), or packed input none (T = 0),
    onnxruntime refuses `cls` and `last`.

    Returns:
        A new dict; entries of your own can be added to it.

    Raises:
        ImportError: from `import fastpool.onnx`, where onnx or onnxscript is missing: pip install "fastpool[onnx]".

    >>> program = torch.onnx.export(
    ...     fastpool.nn.Pooling("mean", normalize=True), (hidden, mask),
    ...     custom_translation_table=fastpool.onnx.translation_table(), verbose=False,
    ...     dynamic_shapes={"hidden": {0: "batch", 1: "rows"}, "mask": {0: "batch", 1: "rows"}},
    ... )
    """
    builders: dict[str, Callable[..., Any]] = {
        **{mode.name: partial(pool, mode) for mode in MODES.values()},
        "l2_normalize": l2_normalize,
        "quantize": quantize,
        "tokens": _refused,
    }
    return {getattr(torch.ops.fastpool, op).default: _by_name(op, build) for op, build in builders.items()}


def _refused() -> None:
    """What has no translation."""


def _by_name(op: str, build: Callable[..., Any]) -> Callable[..., Any]:
    """`build` for arguments as a graph's node has them, by place and by name, without those that were not given."""

    parameters = signature(build).parameters.keys()

    def translate(*args: Any, **kwargs: Any) -> Any:
        if build is _refused:
            raise ValueError(f"fastpool.onnx: {op} has no translation; export what comes before it")
        if op in MODES and MODES[op].softmax:
            raise ValueError(
                f"fastpool.onnx: {op} has no translation; fastpool.weighted_mean has one, and takes torch.softmax of "
                "scores as its weights"
            )
        given = named(op, args, kwargs)
        for name in given.keys() - parameters:
            raise ValueError(f"fastpool.onnx: {op}: {name} has no translation; export a call without it")
        return build(**given)

    translate.__name__ = op  # in the exporter's messages
    return translate
