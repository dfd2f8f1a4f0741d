"""e^x, ln(1 + x) and tanh(x): how far the reference is from the true value, and that every backend has its bits."""

import re
import subprocess
from functools import cache
from itertools import product

import mpmath
import numpy as np
import pytest
import torch
from helpers import cmake
from helpers.markdown import text
from torch import Tensor

from fastpool.backends import native
from fastpool.reference import elementary
from fastpool.testing import same_bits

FUNCTIONS = ["exp", "log1p", "tanh"]
LIMIT = 2.0  # units in the last place
INF, NAN = float("inf"), float("nan")
FORMATS = {torch.float32: (torch.int32, 23), torch.float64: (torch.int64, 52)}  # integers as wide, bits of the mantissa
every_dtype = pytest.mark.parametrize("dtype", FORMATS, ids=str)
every_function = pytest.mark.parametrize("function", FUNCTIONS)


@cache
def every_16_bit_value() -> Tensor:
    integers = torch.arange(-(2**15), 2**15).to(torch.int16)
    return torch.cat([integers.view(dtype).float() for dtype in (torch.float16, torch.bfloat16)])


@cache
def of_every_exponent(dtype: torch.dtype, count: int) -> Tensor:
    """Both signs, zeros, subnormal numbers, infinities and NaNs; the first mantissa, the last one and random ones."""
    integer, bits = FORMATS[dtype]
    most = 1 << (8 * dtype.itemsize - 1 - bits)
    mantissas = torch.randint(1 << bits, (2 * most, count), generator=torch.Generator().manual_seed(0))
    mantissas[:, 0], mantissas[:, 1] = 0, (1 << bits) - 1
    return ((torch.arange(-most, most)[:, None] << bits) | mantissas).to(integer).view(dtype).flatten()


@cache
def common(dtype: torch.dtype, count: int) -> Tensor:
    """Where the functions are neither x nor constant, and about a half, where one formula takes over from another."""
    normal = torch.randn(5, count, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    scales, offsets = torch.tensor([[0.05, 0.5, 5.0, 50.0, 0.05], [0, 0, 0, 0, 0.5]], dtype=torch.float64)
    return (normal * scales[:, None] + offsets[:, None]).to(dtype).flatten()


def domain(function: str, x: Tensor) -> Tensor:
    """Those of x that the function is defined for, in order."""
    return x[x >= 0 if function == "log1p" else x == x].sort().values


def documented(function: str) -> tuple[float, float]:
    """The largest errors of float32 and of float64, in units in the last place."""
    found = re.search(rf"\| `{function}` \| ([\d.]+) \| ([\d.]+) \|", text("docs/design.md"))
    assert found is not None
    return float(found[1]), float(found[2])


def worst_of_float32(function: str, x: Tensor) -> float:
    """The largest error; float64 is exact enough to tell. What is infinite counts as the number behind the largest."""
    result = getattr(elementary, function)(x).double().clamp(max=2.0**128)
    true = getattr(torch, function)(x.double()).clamp(max=2.0**128)
    exponent = torch.where(true == 0, -125, torch.frexp(true).exponent.clamp(-125, 128))
    error = (result - true).abs() / torch.ldexp(torch.ones_like(true), exponent - 24)
    assert not error.isnan().any()
    return float(error.max())


def worst_of_float64(function: str, x: Tensor) -> float:
    """The largest error, by mpmath. What is infinite counts as the number behind the largest."""
    largest, behind = 0.0, mpmath.mpf(2) ** 1024
    with mpmath.workprec(150):
        for one, got in zip(x.tolist(), getattr(elementary, function)(x).tolist(), strict=True):
            true = min(getattr(mpmath, function)(mpmath.mpf(one)), behind)
            unit = mpmath.ldexp(1, max(mpmath.frexp(true)[1] if true else -1021, -1021) - 53)
            largest = max(largest, float(abs(min(mpmath.mpf(got), behind) - true) / unit))
    return largest


@every_function
def test_results_are_near_the_true_values(function: str) -> None:
    few = torch.cat([of_every_exponent(torch.float64, 4), common(torch.float64, 4000)])
    many = torch.cat([every_16_bit_value(), of_every_exponent(torch.float32, 4096), common(torch.float32, 100_000)])
    errors = worst_of_float32(function, domain(function, many)), worst_of_float64(function, domain(function, few))
    for error, allowed in zip(errors, documented(function), strict=True):
        assert error <= allowed + 0.005 <= LIMIT


@pytest.mark.wide
@every_function
def test_largest_errors_are_documented(function: str) -> None:
    """Of every float32 there is, and of more of float64."""
    single, step = 0.0, 1 << 18  # stays in the cache
    for first in range(-(1 << 31), 1 << 31, step):
        x = domain(function, torch.arange(first, first + step).to(torch.int32).view(torch.float32))
        single = max(single, worst_of_float32(function, x) if len(x) else 0.0)
    double = worst_of_float64(function, domain(function, common(torch.float64, 100_000)))
    print(f"| `{function}` | {single:.2f} | {double:.2f} |")
    assert documented(function) == (round(single, 2), round(double, 2))


@every_dtype
@pytest.mark.parametrize(
    ("function", "x", "expected"),
    [
        ("exp", [0.0, -0.0, -INF, INF, NAN], [1.0, 1.0, 0.0, INF, NAN]),
        ("exp", [1e4, -1e4, 1e38, -1e38], [INF, 0.0, INF, 0.0]),
        ("log1p", [0.0, -0.0, INF, NAN], [0.0, 0.0, INF, NAN]),
        ("log1p", [-0.5, -1.0, -2.0, -INF], [NAN, NAN, NAN, NAN]),
        ("tanh", [0.0, -0.0, INF, -INF, NAN], [0.0, -0.0, 1.0, -1.0, NAN]),
        ("tanh", [30.0, -30.0, 1e38], [1.0, -1.0, 1.0]),
    ],
)
def test_special_values(function: str, x: list[float], expected: list[float], dtype: torch.dtype) -> None:
    result = getattr(elementary, function)(torch.tensor(x, dtype=dtype))
    assert same_bits(result, torch.tensor(expected, dtype=dtype))


@every_dtype
def test_smallest_and_largest_numbers(dtype: torch.dtype) -> None:
    """Subnormal ones are not lost, and no intermediate number overflows."""
    integer, bits = FORMATS[dtype]
    subnormal = torch.tensor([1, 2, 3, 1 << (bits - 1), (1 << bits) - 1, 1 << bits], dtype=integer).view(dtype)
    for x in (subnormal, -subnormal):
        assert same_bits(elementary.exp(x), torch.ones_like(x))
        assert same_bits(elementary.tanh(x), x)
    assert same_bits(elementary.log1p(subnormal), subnormal)
    largest = torch.tensor([torch.finfo(dtype).max], dtype=dtype)
    torch.testing.assert_close(elementary.log1p(largest), largest.log())
    assert elementary.tanh(largest) == 1


@every_function
def test_order_is_kept(function: str) -> None:
    """A larger 16-bit number never has a smaller result."""
    result = getattr(elementary, function)(domain(function, every_16_bit_value()))
    assert (result[1:] >= result[:-1]).all()


@every_dtype
def test_tanh_is_odd(dtype: torch.dtype) -> None:
    x = torch.cat([of_every_exponent(dtype, 16), common(dtype, 5000)])
    assert same_bits(elementary.tanh(-x), -elementary.tanh(x))


# ---- every backend


@cache
def everything(dtype: torch.dtype) -> Tensor:
    return torch.cat([every_16_bit_value().to(dtype), of_every_exponent(dtype, 64), common(dtype, 5000)])


@cache
def expected(function: str, dtype: torch.dtype) -> Tensor:
    """The reference's; of the two numbers that e^x is made of, "factor" and "exponent"."""
    x = everything(dtype)
    if function in FUNCTIONS:
        return getattr(elementary, function)(x)
    return elementary.exponential(x)[function == "exponent"]


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_cpp(isa: str) -> None:
    """tests/cpp/test_elementary.cpp, with the library's options: a number at a time, as a GPU computes, and vectors."""
    assert native.info is not None
    if isa not in native.info.isas():
        pytest.skip(f"this CPU cannot run {isa}")
    target = f"test_elementary_{isa}"
    program = cmake.build("elementary", "-DCMAKE_BUILD_TYPE=Release", target=target) / target
    for dtype, function, kind in product(FORMATS, (*FUNCTIONS, "factor", "exponent"), ("scalars", "lanes")):
        x = everything(dtype).numpy()
        command = [program, function, x.dtype.name, kind]
        done = subprocess.run(command, input=x.tobytes(), capture_output=True, check=True)
        result = torch.from_numpy(np.frombuffer(done.stdout, x.dtype).copy())
        assert same_bits(result, expected(function, dtype)), (dtype, function, kind)


@every_dtype
def test_triton(dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    from helpers import elementary_kernel  # after the skip

    for function in (*FUNCTIONS, "factor", "exponent"):
        with np.errstate(over="ignore", invalid="ignore"):  # numpy's, which is the interpreter's arithmetic
            result = elementary_kernel.evaluate(function, everything(dtype))
        assert same_bits(result, expected(function, dtype)), function
