"""The numbers that results depend on, for every backend: Triton's kernels import them, a test holds C++'s to them."""

LEAF = 32  # tokens that are added one after another, before leaves meet in a tree
NORM_EPS = 1e-12  # F.normalize's default: a vector shorter than this is divided by it instead
# x / norm is (x * scale) / (norm * scale), and norm * scale is the norm of x * scale^2, over the scale. The scale is
# this power of two where a squared norm overflows, its inverse where the norm is less than it, else 1: in float32, in
# float64.
NORM_SCALES = (2.0**-50, 2.0**-300)
