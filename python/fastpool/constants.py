"""The numbers that results depend on, for every backend: Triton's kernels import them, a test holds C++'s to them."""

LEAF = 32  # tokens that are added one after another, before leaves meet in a tree
NORM_EPS = 1e-12  # F.normalize's default: a vector shorter than this is divided by it instead
# A vector whose squared norm overflows is scaled by this power of two first: in float32, in float64.
OVERFLOW_SCALES = (2.0**-100, 2.0**-600)
