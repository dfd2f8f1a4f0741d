"""softmax_mean and attention by the CUDA kernels, compiled for a CPU (tests/cpp/cuda_host): a running maximum that
grows anywhere between a leaf and the arrival tree, and any number of queries."""

from typing import Any

import pytest
import torch
from helpers.cuda_host import NATIVE, Host, backward, native
from torch import Tensor

import fastpool
from fastpool.arguments import GRADIENTS_OF
from fastpool.calls import accumulator
from fastpool.testing import DTYPES, same_bits

ROWS = 400
# Each gives the scores of that many tokens.
SCORES = {
    "growing": torch.arange(ROWS) * 3.0,
    "falling": torch.arange(ROWS) * -3.0,
    "beyond exponents": (torch.arange(ROWS) - 200) * 5e5,
    "beyond integers": torch.randn(ROWS, generator=torch.Generator().manual_seed(1)) * 1e38,
    "a late peak": torch.where(torch.arange(ROWS) == 397, 300.0, 0.0),
    "peaks where leaves end": torch.where(torch.arange(ROWS) % 32 == 31, torch.arange(ROWS) * 1.0, -80.0),
    "far apart": torch.where(torch.arange(ROWS) % 96 < 64, -140.0, 0.0) + torch.arange(ROWS) / 100,
    "none": torch.full((ROWS,), -torch.inf),
    "one": torch.where(torch.arange(ROWS) == 70, 1e6, -torch.inf),
    "the last one": torch.where(torch.arange(ROWS) == ROWS - 1, -1e6, -torch.inf),
    "infinite": torch.where(torch.arange(ROWS) == 70, torch.inf, 0.0),
    "not a number": torch.where(torch.arange(ROWS) == 390, torch.nan, torch.arange(ROWS) * 1.0),
}


def checked(
    host: Host, mode: str, arguments: dict[str, Any], tunings: tuple[dict[str, int], ...] = ({},), **more: Any
) -> Tensor:
    """The result in the accumulator's dtype; however it is cut, it and every gradient are the reference's."""
    dtype = accumulator(arguments["hidden"].dtype)
    with fastpool.backend("reference"):
        result = native(mode, arguments, out_dtype=dtype, **more)
        generator = torch.Generator().manual_seed(3)
        gradient = torch.randn(result.shape, generator=generator, dtype=torch.float64).to(dtype)
        of = [name for name in GRADIENTS_OF if name in arguments]
        expected = {name: backward(NATIVE, mode, arguments, gradient, result, name) for name in of}
    for tuning in tunings:
        host.tune(**tuning)
        assert same_bits(host(mode, arguments, out_dtype=dtype, **more), result), (tuning, arguments)
        for name, wanted in expected.items():
            found = host.backward(mode, arguments, gradient, result, name)
            assert same_bits(found, wanted), (name, tuning, arguments)
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SCORES)
def test_the_largest_score_so_far(host: Host, name: str, dtype: torch.dtype) -> None:
    """Of tokens, leaves, groups of threads, units and nodes of the arrival tree, however they are cut."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(2, ROWS, 8, generator=generator, dtype=torch.float64).to(dtype)
    hidden[1] *= 1e-3  # sums that underflow where they are scaled, of one sign
    hidden[1, :, :4] = -hidden[1, :, :4].abs()
    hidden[1, 1::2, :2] = -0.0  # so that -0 may be left of them
    mask = torch.rand(2, ROWS, generator=generator) > 0.1
    mask[:, [70, 390, 397, 399]] = True
    arguments = {"hidden": hidden, "mask": mask, "scores": SCORES[name].expand(2, ROWS)}
    cuts = ({"split": 32}, {"split": 64, "threads": 32}, {"split": 128, "threads": 64}, {})
    result = checked(host, "softmax_mean", arguments, cuts)
    assert result[0].isnan().any() == (name in ("infinite", "not a number"))
    assert name != "none" or (result == 0).all()


def many_queries(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """That many, their columns not side by side."""
    wide = torch.randn(*shape, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return wide.to(dtype)[..., 1]


def overlapping(width: int, dtype: torch.dtype) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    starts = torch.randint(0, 150, (9,), generator=generator)
    return {
        "hidden": torch.randn(200, width, generator=generator, dtype=torch.float64).to(dtype),
        "mask": torch.rand(200, generator=generator) > 0.2,
        "starts": starts,
        "ends": starts + torch.randint(0, 50, (9,), generator=generator),
    }


@pytest.mark.parametrize(
    ("dtype", "of_query"), [(dtype, DTYPES[i - j]) for i, dtype in enumerate(DTYPES) for j in (0, 1)], ids=str
)
def test_queries_of_overlapping_segments(host: Host, dtype: torch.dtype, of_query: torch.dtype) -> None:
    """Every segment's own, or the same for all; tokens of several segments add up what each of them shares out."""
    for width, truncate_dim in ((24, None), (21, 8)):
        for shape in ((width,), (3, width), (9, 1, width), (9, 3, width)):
            arguments = overlapping(width, dtype) | {"query": many_queries(shape, of_query), "scale": 0.3}
            cuts = ({"split": 32, "tile": 32}, {})
            result = checked(host, "attention", arguments, cuts, truncate_dim=truncate_dim)
            assert result.shape == (9, *shape[-2:-1], truncate_dim or width)


# Fewer than a block takes at once, as many, one more, twice as many, and so on.
QUERIES = (2, 3, 4, 5, 8, 9)


@pytest.mark.parametrize("queries", QUERIES)
def test_each_query_is_alone(host: Host, queries: int) -> None:
    """Whatever others there are, in strips of columns and normalised too; one that is not a number, or a text with such
    a token, spoils nothing else."""
    arguments = overlapping(72, torch.bfloat16)
    arguments["hidden"][arguments["starts"][2]] = torch.nan
    query = many_queries((9, queries, 72), torch.float32).contiguous()
    query[4, queries // 2, 5] = torch.nan
    for more in ({}, {"normalize": True, "truncate_dim": 40}):
        for tuning in ({"split": 32}, {"split": 32, "strip": 128}, {}):
            host.tune(**tuning)
            together = host("attention", arguments | {"query": query}, **more)
            for k in range(queries):
                alone = host("attention", arguments | {"query": query[:, k : k + 1]}, **more)
                assert same_bits(together[:, k], alone[:, 0]), (more, tuning, k)


@pytest.mark.parametrize("queries", QUERIES)
def test_queries_of_long_texts(host: Host, queries: int) -> None:
    """Whose units meet in the arrival tree, or in one block's counter: padded or packed, one of them empty; rows of
    whole 16-byte pieces, or not."""
    generator = torch.Generator().manual_seed(9)
    lengths = [700, 0, 33, 290]
    for width, dtype in ((40, torch.bfloat16), (21, torch.float16), (12, torch.float32), (3, torch.float64)):
        rows = torch.randn(sum(lengths), width, generator=generator).to(dtype)
        padded = rows.new_full((4, 700, width), torch.nan)
        for row, text in zip(padded, rows.split(lengths), strict=True):
            row[: len(text)] = text
        query = many_queries((4, queries, width), dtype)
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
        for tokens in ({"hidden": padded, "ends": torch.tensor(lengths)}, {"hidden": rows, "cu_seqlens": cu_seqlens}):
            for own in (query, query[0]):
                arguments = tokens | {"query": own, "scale": 3.0}
                expected = native("attention", arguments)
                for tuning in ({"split": 32}, {"split": 1024}, {"split": 256, "threads": 64}):
                    host.tune(**tuning)
                    assert same_bits(host("attention", arguments), expected), (width, tuning)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_queries_share_a_read(host: Host, dtype: torch.dtype) -> None:
    """Every four of them: of a token for its products, and of one to add it to their sums."""
    control = host.control
    for width in (64, 77):
        hidden = torch.randn(2, 100, width, generator=torch.Generator().manual_seed(10)).to(dtype)
        for queries in (1, *QUERIES):
            host.tune()
            control.watched, control.watched_end = hidden.data_ptr(), hidden.data_ptr() + hidden.nbytes
            before = control.loaded
            host("attention", {"hidden": hidden, "query": many_queries((queries, width), dtype)})
            reads = 2 * -(-queries // 4)
            assert control.loaded - before == reads * hidden.nbytes, (width, queries)


@pytest.mark.parametrize("queries", [0, 2])
def test_empty(host: Host, queries: int) -> None:
    """No query, segment, token or column."""
    for batch, rows, width in ((2, 5, 8), (0, 5, 8), (2, 0, 8), (2, 5, 0)):
        for shape in ((queries, width), (batch, queries, width)):
            checked(host, "attention", {"hidden": torch.ones(batch, rows, width), "query": torch.ones(shape)})
    packed = {"hidden": torch.ones(9, 8), "cu_seqlens": torch.tensor([4]), "query": torch.ones(queries, 8)}
    checked(host, "attention", packed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wide(host: Host, dtype: torch.dtype) -> None:
    """More columns than a block has threads for or can own, than a warp has in shared memory; few of them kept."""
    for width, truncate_dim in ((1030, None), (9001, 8997), (9000, 4)):
        hidden = torch.randn(1, 70, width, generator=torch.Generator().manual_seed(6), dtype=torch.float64).to(dtype)
        query = many_queries((2, width), dtype) / width**0.5
        checked(host, "attention", {"hidden": hidden, "query": query}, ({"split": 32},), truncate_dim=truncate_dim)


def test_long_segment_in_one_block(host: Host) -> None:
    """A binary counter of many levels, and leaves that are staged in several turns, for every piece of a row."""
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(1, 5000, 600, generator=generator)
    scores = torch.rand(1, 5000, generator=generator) * 100
    with fastpool.backend("reference"):
        expected = native("softmax_mean", {"hidden": hidden, "scores": scores})
    for split, threads in ((1 << 13, 32), (1 << 12, 64)):
        host.tune(split, threads)
        assert same_bits(host("softmax_mean", {"hidden": hidden, "scores": scores}), expected), split


@pytest.mark.parametrize(("mode", "own"), [("softmax_mean", "scores"), ("attention", "query")])
def test_decreasing_cu_seqlens(host: Host, mode: str, own: str) -> None:
    """Nothing is promised, but memory that nobody wrote is not handed out."""
    hidden = torch.randn(300, 24, generator=torch.Generator().manual_seed(8))
    given = {"scores": torch.zeros(300), "query": torch.full((2, 24), 0.1)}[own]
    for cu in ([0, 300, 0, 300, 0], [300, 200, 100, 50, 0], [0, 250, 30, 280, 10]):
        arguments = {"hidden": hidden, "cu_seqlens": torch.tensor(cu), own: given}
        host.tune(split=32)
        result = host(mode, arguments)
        assert not result.isnan().any()
        for of in ("hidden", own):
            assert not host.backward(mode, arguments, torch.ones_like(result), result, of).isnan().any(), (cu, of)
