"""What a real token is multiplied by: given weights, or else its position."""

import triton
import triton.language as tl

from .state import widen


@triton.jit
def weight_of(weights, row, stride, first, real, ACC: tl.constexpr):
    """The weights of tokens of a segment whose first real token is `first`: those given, or the position, counted from
    1; 0 for tokens that are not real."""
    if weights is not None:
        return widen(tl.load(weights + row * stride, mask=real, other=0.0), ACC)
    else:
        return tl.where(real, (row - first).to(tl.int32) + 1, 0).to(ACC)  # a narrow one takes fewer registers
