"""The definition of right: every mode in plain PyTorch, on any device, in the canonical order of additions.

The order: tokens are numbered from their segment's first real token. A leaf is LEAF consecutive tokens, added one
after another from +0; holes add nothing. Leaves meet in an aligned binary tree: 0 with 1, 2 with 3, then those pairs,
and so on to the top; a missing right sibling adds nothing. So the order depends on a token's distance from its
segment's first real token alone, any aligned power of two of leaves is a subtree that may be summed anywhere, and the
error of a sum is at most (LEAF + log2(n / LEAF)) 2^-24 sum|x| (2^-53 in float64), however long the sequence. All of
it, weights and divisions included, is IEEE arithmetic in the accumulator's dtype without contraction, and the result
is rounded once at the end. Every backend gives these bits.

The four ideas have the same names in C++ (csrc/) and in Triton (triton_kernels/): segment.py says which tokens,
weight.py what each is multiplied by, state.py how they become one vector, finish.py what follows. The bound on the
error is that of pairwise summation over blocks: Higham, "The Accuracy of Floating Point Summation"
(SIAM J. Sci. Comput. 14, 1993).

Not fast, and it synchronises with a GPU: use it to check and to understand.
"""

from .normalize import l2_normalize, l2_normalize_backward
from .pool import pool, pool_backward
from .quantize import quantize
from .tokens import tokens, tokens_backward

__all__ = ["l2_normalize", "l2_normalize_backward", "pool", "pool_backward", "quantize", "tokens", "tokens_backward"]
