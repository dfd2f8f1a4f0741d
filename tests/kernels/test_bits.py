"""The promise: one sequence, the same bits, wherever it stands and whoever adds it up."""

import threading
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastpool
from fastpool.backends import native
from fastpool.modes import MODES
from fastpool.testing import (
    DTYPES,
    LAYOUTS,
    Sequence,
    function_of,
    gradients,
    own_arguments,
    same_bits,
    sequences,
    special_values,
    variants,
)

LENGTHS = [1, 40, 0, 700, 33, 64, 5, 2000, 96, 31]


def alone(mode: str, sequence: Sequence, given: str | None, normalize: bool) -> torch.Tensor:
    """The sequence in a batch of its own, nothing padded."""
    arguments = own_arguments(given, sequence.weights[None], sequence.states.shape[-1])
    mask = None if sequence.real.all() else sequence.real[None]
    return function_of(mode)(sequence.states[None], mask=mask, normalize=normalize, **arguments)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("mode", "given"), variants())
def test_layouts_batches_and_threads(mode: str, given: str | None, dtype: torch.dtype) -> None:
    pool = function_of(mode)
    for holes in (False, True):
        batch = sequences(LENGTHS, 200, dtype, holes=holes)
        torch.set_num_threads(1)
        expected = torch.stack([alone(mode, sequence, given, normalize=True) for sequence in batch])
        for name, layout in LAYOUTS.items():
            if holes and not layout.holes:
                continue
            arguments, reordered = layout.make(batch, given), layout.make(batch[::-1], given)
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                assert same_bits(pool(**arguments, normalize=True), expected), (name, threads)
                assert same_bits(pool(**reordered, normalize=True), expected.flip(0)), (name, threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("mode", "given"), variants())
def test_instruction_sets(mode: str, given: str | None, dtype: torch.dtype) -> None:
    assert native.info is not None
    batch = sequences(LENGTHS, 133, dtype, holes=True)
    arguments = LAYOUTS["padded_left_mask"].make(batch, given)
    for out_dtype in DTYPES:
        results = []
        for isa in native.info.isas():
            native.info.use_isa(isa)
            assert native.info.isa() == isa
            results.append(function_of(mode)(**arguments, normalize=True, out_dtype=out_dtype))
        assert all(same_bits(result, results[0]) for result in results), native.info.isas()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 70, 4531), (2, 2150, 2064)], ids=str)
def test_wide_rows_and_much_work(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Rows whose sums do not stay in the first cache go by strips of columns; lines of 16 MiB are fetched ahead."""
    assert native.info is not None
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(shape, generator=generator).to(dtype)
    mask = torch.rand(shape[:2], generator=generator) > 0.1
    mask[1, :64] = False  # whole leaves are holes
    weights = torch.rand(shape[:2], generator=generator)
    for mode, own in variants():
        arguments = own_arguments(own, weights, shape[-1])
        pool = function_of(mode)
        with fastpool.backend("reference"):
            expected = pool(hidden, mask=mask, **arguments)
        for isa in native.info.isas():
            native.info.use_isa(isa)
            assert same_bits(pool(hidden, mask=mask, **arguments), expected), (mode, own, isa)
    for modes in (("mean", "max"), ("weighted_mean", "max", "sum", "last")):
        expected = torch.cat([function_of(mode)(hidden, mask=mask) for mode in modes], 1)
        for isa in native.info.isas():
            native.info.use_isa(isa)
            assert same_bits(fastpool.pool(hidden, mask=mask, modes=modes), expected), (modes, isa)


def test_instruction_sets_convert_alike() -> None:
    """Every 16-bit pattern in, and every rounding out, by each instruction set and by torch."""
    assert native.info is not None
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for isa in native.info.isas():
        native.info.use_isa(isa)
        for dtype in (torch.float16, torch.bfloat16):
            x = patterns.view(dtype)[:, None, None]
            assert same_bits(fastpool.cls(x, out_dtype=torch.float32), x[:, 0].float()), (isa, dtype)
            # Values halfway between neighbours, next to halfway, and far beyond the range.
            wide = x[:, 0].double()
            step = torch.nextafter(x.float(), torch.tensor(torch.inf))[:, 0].double() - wide
            values = torch.cat([wide * f + step * g for f in (1.0, 0.5, 4.0) for g in (0.0, 0.5, 0.49999, 2.0**15)])
            assert same_bits(fastpool.cls(values[:, None].float(), out_dtype=dtype), values.float().to(dtype)), (
                isa,
                dtype,
            )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float64_rounds_once(dtype: torch.dtype) -> None:
    """Just above halfway between two 16-bit numbers: by way of float32 it would round down."""
    mantissa = 10 if dtype == torch.float16 else 7
    halfway = 1 + 2.0 ** -(mantissa + 1)
    hidden = torch.tensor(
        [halfway + 2.0**-40, halfway - 2.0**-40, halfway, -halfway - 2.0**-40, 1e-300, -1e-300, 1e300, -1e300],
        dtype=torch.float64,
    )
    up = 1 + 2.0**-mantissa
    expected = torch.tensor([up, 1.0, 1.0, -up, 0.0, -0.0, torch.inf, -torch.inf], dtype=dtype)
    assert native.info is not None
    for isa in (*native.info.isas(), None):
        if isa is not None:
            native.info.use_isa(isa)
        with fastpool.backend("native" if isa else "reference"):
            assert same_bits(fastpool.cls(hidden[None, None], out_dtype=dtype)[0], expected), isa


@st.composite
def _cases(draw: st.DrawFn) -> tuple[list[Sequence], str, str | None, str, dict[str, object]]:
    mode, given = draw(st.sampled_from(variants()))
    name = draw(st.sampled_from(sorted(LAYOUTS)))
    dtype = draw(st.sampled_from(DTYPES))
    width = draw(st.integers(1, 300))
    lengths = draw(st.lists(st.integers(0, 260), min_size=1, max_size=6))
    holes = LAYOUTS[name].holes and draw(st.booleans())
    batch = sequences(lengths, width, dtype, holes=holes, seed=draw(st.integers(0, 10**6)))
    more = {
        "normalize": draw(st.booleans()),
        "truncate_dim": draw(st.none() | st.integers(1, width)),
        "out_dtype": draw(st.none() | st.sampled_from(DTYPES)),
    }
    return batch, mode, given, name, more


@settings(max_examples=250, deadline=None, derandomize=True)
@given(_cases())
def test_native_is_the_reference_bit_for_bit(
    case: tuple[list[Sequence], str, str | None, str, dict[str, object]],
) -> None:
    batch, mode, given, name, more = case
    arguments = LAYOUTS[name].make(batch, given)
    with fastpool.backend("reference"):
        expected = function_of(mode)(**arguments, **more)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with fastpool.backend("native"):
            assert same_bits(function_of(mode)(**arguments, **more), expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_padding_is_skipped_wherever_it_stands(dtype: torch.dtype) -> None:
    """Spans that begin and end on every side of a leaf, told by masks of every width and stride."""
    bounds = [(a, b) for a in (0, 1, 31, 32, 33, 64, 95, 99, 130) for b in (a, a + 1, 131, 160, 192, 193, 199, 200)]
    starts, ends = (torch.tensor(values) for values in zip(*bounds, strict=True))
    hidden = torch.randn(len(bounds), 200, 8, generator=torch.Generator().manual_seed(0))
    at = torch.arange(200)
    real = (at >= starts[:, None]) & (at < ends[:, None])
    mask = real.to(dtype)
    wide = torch.full((len(bounds), 600), 7, dtype=dtype)
    wide[:, ::3] = mask
    expected = fastpool.mean(hidden, starts=starts, ends=ends)
    for name, view in {"rows": mask, "strided": wide[:, ::3], "transposed": mask.t().contiguous().t()}.items():
        assert same_bits(fastpool.mean(hidden, view), expected), name
    assert same_bits(fastpool.mean(hidden[3:4], mask[3:4].expand(1, -1)), expected[3:4])
    shared = fastpool.mean(hidden, mask[5:6].expand(len(bounds), -1))  # one row of a mask for all
    assert same_bits(
        shared, fastpool.mean(hidden, starts=starts[5:6].expand_as(starts), ends=ends[5:6].expand_as(ends))
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_l2_normalize(dtype: torch.dtype) -> None:
    """By each instruction set and number of threads (the input is large enough for several) as by the reference."""
    assert native.info is not None
    x = (torch.randn(3, 211, 130, dtype=torch.float64) * 3).to(dtype).transpose(0, 1)
    for truncate_dim, eps in ((None, 1e-12), (77, 20.0)):
        with fastpool.backend("reference"):
            expected = fastpool.l2_normalize(x, truncate_dim=truncate_dim, eps=eps)
        for isa in native.info.isas():
            native.info.use_isa(isa)
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                assert same_bits(fastpool.l2_normalize(x, truncate_dim=truncate_dim, eps=eps), expected), (isa, threads)


@pytest.mark.parametrize("out_dtype", [None, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_l2_normalize_dims(dtype: torch.dtype, out_dtype: torch.dtype | None) -> None:
    """A row has the bits of a call of its own for that many columns, and +0 behind them, whatever stands there: zeros
    or NaN, a norm that overflows or is zero; truncate_dims of any stride."""
    assert native.info is not None
    generator = torch.Generator().manual_seed(3)
    x = (torch.randn(4, 60, 133, dtype=torch.float64, generator=generator) * 3).to(dtype)
    x[0, ::2] = 6e4 if dtype == torch.float16 else 3e38
    x[1, ::5], x[2, ::7, 3] = 0.0, torch.nan
    truncate_dims = torch.randint(0, 131, (60, 4), generator=generator).T
    truncate_dims[:, :6] = torch.tensor([0, 1, 64, 127, 128, 130])
    poisoned = torch.where(torch.arange(133) < truncate_dims[..., None], x, torch.nan)
    rows = [
        fastpool.l2_normalize(row[: int(n)], eps=0.0, out_dtype=out_dtype)
        for row, n in zip(x.view(-1, 133), truncate_dims.flatten(), strict=True)
    ]
    expected = torch.stack([torch.nn.functional.pad(row, (0, 130 - len(row))) for row in rows]).view(4, 60, 130)
    for backend, isas, threads in (("reference", [""], [1]), ("native", native.info.isas(), [1, 2, 3])):
        for isa, count, index in product(isas, threads, (torch.int32, torch.int64)):
            native.info.use_isa(isa)
            torch.set_num_threads(count)
            for views in (lambda y: y, lambda y: y.transpose(0, 1)):
                with fastpool.backend(backend):
                    result = fastpool.l2_normalize(
                        views(poisoned),
                        truncate_dim=130,
                        truncate_dims=views(truncate_dims.to(index)),
                        eps=0.0,
                        out_dtype=out_dtype,
                    )
                assert same_bits(result, views(expected)), (backend, isa, count)
    one = fastpool.l2_normalize(
        poisoned[:2, 0], truncate_dims=truncate_dims[0, :1].expand(2), truncate_dim=130, eps=0.0, out_dtype=out_dtype
    )
    assert same_bits(one[0], expected[0, 0])
    one = fastpool.l2_normalize(
        poisoned[3, 9], truncate_dims=truncate_dims[3, 9], truncate_dim=130, eps=0.0, out_dtype=out_dtype
    )
    assert same_bits(one, expected[3, 9])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("mode", "given"), [*variants(), ("l2_normalize", None)])
def test_flushed_subnormals_stay(mode: str, given: str | None, dtype: torch.dtype) -> None:
    """torch.set_flush_denormal tells a thread to take subnormals for zeros, and kernels do not listen. (float16's are
    ordinary numbers in float32, in which they are added up; gradients through an activation are torch's.)"""
    assert native.info is not None
    generator = torch.Generator().manual_seed(3)
    tiny = torch.finfo(dtype).tiny
    hidden = (torch.randn(3, 1500, 40, generator=generator, dtype=torch.float64) * tiny).to(dtype)
    gradient = (torch.randn(3, 40, generator=generator, dtype=torch.float64) * tiny).to(dtype)
    function = function_of(mode)
    arguments = {"hidden": hidden, **own_arguments(given, torch.rand(3, 1500, generator=generator), 40)}
    if mode == "l2_normalize":
        arguments, gradient = {"x": hidden}, gradient[:, None].expand_as(hidden)
    recorded = mode not in MODES or not MODES[mode].of_logits

    def results() -> list[torch.Tensor]:
        return [function(**arguments), *(gradients(function, arguments, gradient) if recorded else ())]

    expected = results()
    try:
        torch.set_flush_denormal(True)
        for isa, threads in product(native.info.isas(), (1, 2)):
            native.info.use_isa(isa)
            torch.set_num_threads(threads)
            assert all(same_bits(a, b) for a, b in zip(results(), expected, strict=True)), (isa, threads)
    finally:
        torch.set_flush_denormal(False)
    assert (hidden.abs() < tiny).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("mode", "given"), variants())
def test_special_values(mode: str, given: str | None, dtype: torch.dtype) -> None:
    """NaN, infinities, both zeros and subnormals in real tokens and in what weighs them: as the reference has them, by
    each instruction set."""
    assert native.info is not None
    hidden = special_values(6, 70, 90).to(dtype)
    own = own_arguments(given, special_values(6, 1, 70)[:, 0], 90)
    for normalize in (False, True):
        with fastpool.backend("reference"):
            expected = function_of(mode)(hidden, normalize=normalize, **own)
        for isa in native.info.isas():
            native.info.use_isa(isa)
            assert same_bits(function_of(mode)(hidden, normalize=normalize, **own), expected), isa
    if mode == "max":
        assert torch.equal(fastpool.max(hidden).isnan(), hidden.amax(1).isnan())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_of_several_modes(dtype: torch.dtype) -> None:
    """They are their own modes' results, from one read."""
    assert native.info is not None
    hidden = special_values(6, 70, 90).to(dtype)
    expected = torch.cat([function_of(mode)(hidden) for mode in ("max", "mean")], dim=-1)
    for isa in native.info.isas():
        native.info.use_isa(isa)
        assert same_bits(fastpool.pool(hidden, modes=("max", "mean")), expected), isa


@pytest.mark.parametrize("mode", ["mean", "last", "max", "weighted_mean", "softmax_mean", "attention"])
def test_concurrent_callers(mode: str) -> None:
    """Threads with batches and requested backends of their own do not disturb each other."""
    batches = [sequences([5, 300, 1500, seed], 96, torch.bfloat16, seed=seed) for seed in range(4)]
    given = next(given for name, given in variants() if name == mode)
    inputs = [LAYOUTS["packed"].make(batch, given) for batch in batches]
    pool = function_of(mode)
    expected = [pool(**arguments) for arguments in inputs]
    wrong: list[str] = []

    def work(i: int, backend: str) -> None:
        for _ in range(3 if backend == "reference" else 40):
            with fastpool.backend(backend):
                if not same_bits(pool(**inputs[i]), expected[i]):
                    wrong.append(backend)

    threads = [
        threading.Thread(target=work, args=(i, name)) for i in range(4) for name in ("auto", "native", "reference")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_other_threads_run_meanwhile() -> None:
    """The interpreter's lock is free while the native library works."""
    hidden = torch.zeros(8, 8192, 1024)
    ticks, stop = 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not stop.is_set():
            ticks += 1

    torch.set_num_threads(1)
    thread = threading.Thread(target=tick)
    thread.start()
    gained = 0
    for _ in range(20):
        before = ticks
        fastpool.mean(hidden)
        gained += ticks - before
    stop.set()
    thread.join()
    # A held lock lets a waiting thread run for moments between two calls only.
    assert gained > 100_000
