"""The numbers that results depend on, for every backend: Triton's kernels import them, a test holds C++'s to them."""

LEAF = 32  # tokens that are added one after another, before leaves meet in a tree
NORM_EPS = 1e-12  # F.normalize's default: a vector shorter than this is divided by it instead
# x / norm is (x * scale) / (norm * scale), and norm * scale is the norm of x * scale^2, over the scale. The scale is
# this power of two where a squared norm overflows, its inverse where the norm is less than it, else 1: in float32, in
# float64.
NORM_SCALES = (2.0**-50, 2.0**-300)

# e^x = 2^n 2^f with n + f = x / ln 2, in float32 and in float64. 1 / ln 2 is in two parts, the first of so few bits
# that its product with the upper half of a number's bits is exact. 2^f is 1 + f P(f); P's coefficients, from the
# highest on, are those of Chebyshev interpolation over |f| <= 1/2, where they are good to 2^-26.7 and 2^-55.5.
_hex = float.fromhex
LOG2_E = ((_hex("0x1.714p+0"), _hex("0x1.47652cp-12")), (_hex("0x1.715476p+0"), _hex("0x1.4ae0bf85ddf44p-26")))
EXP2 = (
    tuple(
        map(_hex, ("0x1.44138ap-13", "0x1.5f089p-10", "0x1.3b2a54p-7", "0x1.c6af6cp-5", "0x1.ebfbep-3", "0x1.62e43p-1"))
    ),
    tuple(
        map(
            _hex,
            (
                "0x1.c4a29324a1038p-36",
                "0x1.e9ec1fcb69a7fp-32",
                "0x1.e4cf10dec0f59p-28",
                "0x1.b524ebd13a55fp-24",
                "0x1.62c02242b879cp-20",
                "0x1.ffcbfc6da6ed1p-17",
                "0x1.430912f86b7dbp-13",
                "0x1.5d87fe78a3f9cp-10",
                "0x1.3b2ab6fba4e79p-7",
                "0x1.c6b08d704a0c6p-5",
                "0x1.ebfbdff82c58fp-3",
                "0x1.62e42fefa39efp-1",
            ),
        )
    ),
)
