"""The command that compiles the kernels without a GPU: which variants, and its exit status. CI runs it on far more than
these."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")  # a reason to skip: there is no Triton for every platform

from fastpool import cli
from fastpool.arguments import GRADIENTS_OF
from fastpool.backends import triton as triton_backend
from fastpool.calls import PoolBackwardCall, PoolCall, accumulator  # after the skip
from fastpool.modes import MODES
from fastpool.triton_kernels import aot, targets  # after the skip

wide = partial(pytest.param, marks=pytest.mark.wide)  # a minute each


def run(*arguments: str, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    return subprocess.run(
        [sys.executable, "-m", "fastpool", "aot", *arguments], capture_output=True, text=True, env=environment
    )


@pytest.mark.parametrize(
    ("only", "wide"),
    [
        ("l2_normalize", {("load",), ("load", "store")}),
        ("quantize", {("load",)}),
        wide("scatter_gradient weighted_mean(padded, int64 mask, weights)", {("store",)}),
        wide("weighted_mean(padded, int64 mask, weights)", {(), ("load",), ("store",)}),
        wide("first_maximum max(padded", {("load",)}),
    ],
)
def test_compiles_for_gpus_that_are_not_there(
    only: str,
    wide: set[tuple[str, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(triton_backend, "INTERPRETED", False)
    for name, value in (("TRITON_INTERPRET", "0"), ("TRITON_CACHE_DIR", str(tmp_path))):
        monkeypatch.setenv(name, value)  # for the processes that compile
    status = cli.main(
        ["aot", "cuda:90", "hip:gfx942", "--dtype", "float64", "--dim", "1024", "--jobs", "1", "--only", only]
    )
    said = capsys.readouterr()
    assert status == 0, said
    *lines, total = said.out.splitlines()
    count = 0
    for target, warp_size in (("cuda:90", 32), ("hip:gfx942", 64)):
        variants = aot.variants([torch.float64], [1024], warp_size, splits=warp_size == 32)
        expected = [variant for variant in variants if only in variant.name]
        count += len(expected)
        mine = [line.split("  ") for line in lines if line.startswith(target)]
        assert [line[1] for line in mine] == [variant.name for variant in expected]
        assert all(line[2].startswith("registers ") and line[3] == "spills 0" for line in mine)
        for line, variant in zip(mine, expected, strict=True):
            assert all(f"{what} 16" in line[5:7] for what in variant.wide), line
        assert {variant.wide for variant in expected} == wide
    assert total == f"{count} variants, 0 wrong"
    assert list(tmp_path.rglob("*.cubin"))
    assert list(tmp_path.rglob("*.hsaco"))


@pytest.mark.parametrize(
    ("dtype", "dim", "only"),
    [
        wide("bfloat16", "64", "last(padded, int64 mask)"),
        wide("bfloat16", "64", "scatter_gradient attention(padded, int64 mask"),
        wide("bfloat16", "128", "scatter_gradient max(padded, int64 mask)"),
        wide("bfloat16", "2048", "mean(packed, int64 mask, starts, ends) bfloat16 columns=2048 leaves=1 levels=4"),
        wide("bfloat16", "4096", "max(packed, int64 mask, starts, ends) bfloat16 columns=4096 leaves=1 levels=3"),
        wide("float32", "384", "attention(padded, bool mask, query) float32 columns=512 leaves=1 levels=3"),
    ],
)
def test_what_takes_the_most_registers_does_not_spill(dtype: str, dim: str, only: str, tmp_path: Path) -> None:
    """Of what comes in other widths and dtypes than CI compiles otherwise: one warp that searches a mask, a row of
    fewer bytes than a warp can store at once, rows of maxima, large units of segments that may overlap, units of
    several queries that meet."""
    done = run("cuda:90", "--dtype", dtype, "--dim", dim, "--jobs", "1", "--only", only, cache=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def drawn_calls(dtype: torch.dtype, dim: int, count: int) -> Iterator[PoolCall]:
    """In every mode and layout; masks and indices as `variants` has them."""
    drawn = random.Random(dim)
    for _ in range(count):
        batch, rows = int(2 ** drawn.uniform(0, 12)), 2 ** drawn.uniform(-12, 16)
        mode, layout = drawn.choice(list(MODES.values())), drawn.choice(aot.LAYOUTS)
        normalize, own = drawn.random() < 0.5, [one.name for one in mode.arguments if one.differentiable]
        given = own[0] if mode.softmax or (own and drawn.random() < 0.5) else None
        given = drawn.choice(list(aot.QUERIES)) if given == "query" else given
        yield aot.make_call(mode.name, dtype, dim, (batch, rows), layout, normalize, given)


# Widths of one strip and of many, and the least.
WIDTHS = [
    (torch.bfloat16, 384),
    (torch.float16, 4096),
    (torch.float64, 64),
    wide(torch.bfloat16, 8),
    wide(torch.float32, 1024),
]


@pytest.mark.parametrize(("dtype", "dim"), WIDTHS, ids=str)
def test_every_choice_of_the_heuristic_is_compiled(dtype: torch.dtype, dim: int) -> None:
    """Batches drawn at random, and their gradients, come to no program that is not among the variants of
    `fastpool aot --every`."""
    compiled = {variant.key for variant in aot.variants([dtype], [dim], every=True)}
    drawn = random.Random(dim)
    for call in drawn_calls(dtype, dim, 500):
        launch = aot.plan_pool(call, aot.DeviceProperties("test", drawn.choice(aot.SM_COUNTS)))
        assert aot.key_of(launch) in compiled, call
        if MODES[call.mode].of_logits:  # whose gradients go through the others
            continue
        call.normalize = False  # gradients are those of a result that is not
        gradient = torch.empty(call.shape, dtype=accumulator(dtype), device="meta")
        given = [name for name in GRADIENTS_OF if getattr(call, name) is not None]
        backward = PoolBackwardCall(call, gradient, gradient, drawn.choice(given))
        for launch in aot.plan_pool_backward(backward, aot.DeviceProperties("test", drawn.choice(aot.SM_COUNTS))):
            assert aot.key_of(launch) in compiled, call


def test_usual_layouts_come_to_every_configuration() -> None:
    """The others differ in what is given, not in what is compiled in."""

    def configurations(every: bool) -> set[object]:
        found = aot.variants([torch.bfloat16], [384], every=every)
        return {(variant.key[0], *variant.key[2:]) for variant in found if variant.launch.arguments.get("NORMALIZE", 1)}

    assert configurations(every=False) == configurations(every=True)


@pytest.mark.parametrize(("dtype", "dim"), [(torch.bfloat16, 770), (torch.float64, 16384)], ids=str)
def test_every_variant_has_a_name_of_its_own(dtype: torch.dtype, dim: int) -> None:
    names = [variant.name for variant in aot.variants([dtype], [dim])]
    assert len(set(names)) == len(names)


def test_a_wrong_variant_is_an_exit_status_of_1(capsys: pytest.CaptureFixture[str]) -> None:
    """No such GPU: every compile fails, and each says so."""
    assert aot.run([targets.parse_target("cuda:1")], ["float64"], [64], 1) == 1
    *lines, total = capsys.readouterr().out.splitlines()
    assert all("FAILED: " in line for line in lines)
    assert total == f"{len(lines)} variants, {len(lines)} wrong"


@pytest.mark.parametrize("target", ["cuda:0", "cuda:1", "cuda:35", "cuda:91", "cuda:9999", "hip:gfx1", "hip:gfx9999"])
def test_a_gpu_that_no_compiler_knows(
    target: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(triton_backend, "INTERPRETED", False)
    monkeypatch.setattr(aot, "run", None)  # it is not even begun
    assert cli.main(["aot", "cuda:90", target]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"fastpool aot: this Triton cannot compile for {target}: ")


def test_a_process_that_dies_and_one_that_nobody_waits_for() -> None:
    def stops() -> None:
        with aot._processes(1) as pool:
            pool.submit(time.sleep, 3600)
            raise RuntimeError("no more")

    with pytest.raises(ChildProcessError, match="a process that compiles has died"), aot._processes(1) as pool:
        pool.submit(os._exit, 1).result()
    with pytest.raises(RuntimeError, match="no more"):
        stops()


def test_every_layout_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(triton_backend, "INTERPRETED", False)  # nothing is compiled here
    monkeypatch.setattr(aot, "run", lambda *arguments: asked.append(arguments) or 0)
    for more in ([], ["--every"]):
        assert cli.main(["aot", "cuda:90", "--dtype", "float64", "--dim", "64", "--jobs", "3", *more]) == 0
    target = targets.parse_target("cuda:90")
    assert asked == [([target], ["float64"], [64], 3, False, ""), ([target], ["float64"], [64], 3, True, "")]


@pytest.mark.parametrize(
    ("arguments", "interpreted", "words"),
    [
        (("h100",), False, "a target must look like cuda:90 or hip:gfx942, got 'h100'"),
        (("cuda:ninety",), False, "got 'cuda:ninety'"),
        (("cuda:" + "9" * 5000,), False, "a target must look like cuda:90 or hip:gfx942, got 'cuda:999"),
        (("hip:gfx942\n",), False, r"got 'hip:gfx942\n'"),
        (("cuda:90", "--dim", "9" * 5000), False, "must be a whole number above 0, got '999"),
        (("cuda:90", "--jobs", str(2**31)), False, "must be a whole number above 0 and below 2^31, got '2147483648'"),
        (("cuda:90", "--dim", "0"), False, "must be a whole number above 0, got '0'"),
        (("cuda:90", "--dtype", "int8"), False, "invalid choice: 'int8'"),
        (
            ("cuda:90", "--dtype", "float64", "--dim", "64", "--only", "median("),
            False,
            "no variant has 'median(' in its name",
        ),
        ((), False, "the following arguments are required: TARGET"),
        (("cuda:90",), True, "interprets kernels, it does not compile them"),
    ],
)
def test_wrong_arguments(
    arguments: tuple[str, ...],
    interpreted: bool,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(triton_backend, "INTERPRETED", interpreted)
    with pytest.raises(SystemExit) as left:
        sys.exit(cli.main(["aot", *arguments]))
    assert left.value.code == 2
    assert words in capsys.readouterr().err
