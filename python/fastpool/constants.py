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

# ln(1 + f) is 2 s + s^3 L(s^2) with s = f / (2 + f); L's coefficients are those of Chebyshev interpolation of
# 2 (atanh(s) / s - 1) / s^2 over sqrt(1/2) <= 1 + f <= sqrt(2), where the logarithm is good to 2^-28.6 and 2^-57.7.
# A number is 2^k times one of that range if k is what its bits have above SQRT_HALF's, behind the mantissa. ln 2 is in
# two parts, the first of so few bits that its product with an exponent is exact.
SQRT_HALF = (0x3F3504F3, 0x3FE6A09E667F3BCD)
LN_2 = ((_hex("0x1.62e4p-1"), _hex("0x1.7f7d1cp-20")), (_hex("0x1.62e42fefa38p-1"), _hex("0x1.ef35793c7673p-45")))
LOG = (
    tuple(map(_hex, ("0x1.2ee61p-2", "0x1.997c3p-2", "0x1.55555cp-1"))),
    tuple(
        map(
            _hex,
            (
                "0x1.2b584aae78a57p-3",
                "0x1.39fe606542ddep-3",
                "0x1.7462b4ab2ef6bp-3",
                "0x1.c71c62e5800a1p-3",
                "0x1.2492492df148dp-2",
                "0x1.99999999952e2p-2",
                "0x1.5555555555558p-1",
            ),
        )
    ),
)

# tanh(x) is x + x^3 T(x^2) for |x| < TANH_SMALL, where it comes to about a half; beyond it is 1 - 2 / (e^2x + 1). T's
# coefficients are those of Chebyshev interpolation of (tanh(x) / x - 1) / x^2, and good to 2^-27.5 and 2^-56.9.
TANH_SMALL = 0.5625
TANH = (
    tuple(map(_hex, ("-0x1.aba8fp-8", "0x1.5c60f8p-6", "-0x1.b9902cp-5", "0x1.110fb4p-3", "-0x1.555554p-2"))),
    tuple(
        map(
            _hex,
            (
                "-0x1.4ffe31971aeb8p-16",
                "0x1.616f17dcc6fd8p-14",
                "-0x1.eaf47874aab53p-13",
                "0x1.34ad2f7abd75ap-11",
                "-0x1.7d9545835e3e5p-10",
                "0x1.d6d30f918e945p-9",
                "-0x1.226e32212f8e9p-7",
                "0x1.664f48727bbfdp-6",
                "-0x1.ba1ba1b9f19a0p-5",
                "0x1.1111111110fbep-3",
                "-0x1.5555555555555p-2",
            ),
        )
    ),
)
