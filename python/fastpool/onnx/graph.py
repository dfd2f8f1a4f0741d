"""What builds the graph: onnxscript's operators, and the few words that all translations share."""

from typing import Any, TypeAlias

from onnxscript import ir, opset18

Value: TypeAlias = Any  # a tensor of the graph that is being built
Dtype: TypeAlias = Any  # an ir.DataType

op: Any = opset18  # the oldest that torch.onnx.export(dynamo=True) writes; newer graphs are converted from it
BOOL, INT32, INT64 = ir.DataType.BOOL, ir.DataType.INT32, ir.DataType.INT64
FLOAT, DOUBLE = ir.DataType.FLOAT, ir.DataType.DOUBLE


def accumulator(x: Value) -> Dtype:
    """The dtype that sums, divisions and norms of x happen in."""
    return DOUBLE if x.dtype == DOUBLE else FLOAT


def constant(value: float, dtype: Dtype) -> Value:
    return op.Constant(value=ir.tensor(value, dtype=dtype))


def size(x: Value, axis: int) -> Value:
    """Of one axis, counted from the front, [1]."""
    return op.Shape(x, start=axis, end=axis + 1)


def integer(value: int) -> Value:
    """[1], int64. Operators of any number of inputs do not take a Python number for one of them."""
    return op.Constant(value_ints=[value])


def joined(*parts: Any) -> Value:
    """Integers and [n] tensors of them behind one another."""
    return op.Concat(*(integer(part) if isinstance(part, int) else part for part in parts), axis=0)


def counted(length: Value) -> Value:
    """0, 1, 2, ..., [length]; length [1]."""
    return op.Range(0, op.Squeeze(length), 1)


def first_columns(x: Value, truncate_dim: int | None) -> Value:
    """x[..., :truncate_dim]; x where that is None."""
    return x if truncate_dim is None else op.Slice(x, [0], [truncate_dim], [-1])
