"""The command that compiles the kernels without a GPU, and what it calls wrong. CI runs it on far more than these."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")  # a reason to skip: there is no Triton for every platform

from fastpool.triton_kernels import aot  # after the skip

from fastpool.segments import PoolBackwardCall, PoolCall  # after the skip


def run(*arguments: str, cache: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache), **variables}
    return subprocess.run(
        [sys.executable, "-m", "fastpool", "aot", *arguments], capture_output=True, text=True, env=environment
    )


def test_compiles_for_gpus_that_are_not_there(tmp_path: Path) -> None:
    done = run("cuda:90", "hip:gfx942", "--dtype", "float64", "--dim", "1024", "--jobs", "2", cache=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, total = done.stdout.splitlines()
    count = 0
    for target, lanes in (("cuda:90", 32), ("hip:gfx942", 64)):
        expected = aot.variants([torch.float64], [1024], lanes, splits=lanes == 32)
        count += len(expected)
        mine = [line.split("  ") for line in lines if line.startswith(target)]
        assert [line[1] for line in mine] == [variant.name for variant in expected]
        assert all(line[2].startswith("registers ") and line[3] == "spills 0" for line in mine)
        for line, variant in zip(mine, expected, strict=True):
            assert all(f"{what} 16" in line[5:7] for what in variant.wide), line
        assert {variant.wide for variant in expected} == set(aot.WIDE.values())
    assert total == f"{count} variants, 0 wrong"
    assert list(tmp_path.rglob("*.cubin"))
    assert list(tmp_path.rglob("*.hsaco"))


@pytest.mark.parametrize("dim", [64, 384, 1024, 4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_every_choice_of_the_heuristic_is_compiled(dtype: torch.dtype, dim: int) -> None:
    """Batches drawn at random come to no program that is not among the variants."""
    compiled = {variant.key for variant in aot.variants([dtype], [dim])}
    drawn = random.Random(dim)
    for _ in range(300):
        batch, rows = int(2 ** drawn.uniform(0, 12)), int(2 ** drawn.uniform(0, 16))
        hidden = torch.empty(batch, rows, dim, dtype=dtype, device="meta")
        mask = torch.empty(batch, rows, dtype=torch.int64, device="meta")
        call = PoolCall("mean", hidden, mask, normalize=dim <= 512 or dtype != torch.float64)
        key = aot.key_of(aot.plan_pool(call, aot.Device("test", drawn.choice(aot.PROCESSORS))), "mean(int64 mask)")
        assert key in compiled, (batch, rows)


@pytest.mark.parametrize("dim", [64, 384, 1024])
def test_every_choice_for_gradients_is_compiled(dim: int) -> None:
    """Likewise."""
    compiled = {variant.key for variant in aot.variants([torch.bfloat16], [dim])}
    drawn = random.Random(dim)
    for _ in range(100):
        batch, rows = int(2 ** drawn.uniform(0, 12)), int(2 ** drawn.uniform(0, 16))
        hidden = torch.empty(batch * rows, dim, dtype=torch.bfloat16, device="meta")
        cu_seqlens = torch.empty(batch + 1, dtype=torch.int32, device="meta")
        gradient = torch.empty(batch, dim, dtype=torch.float32, device="meta")
        call = PoolBackwardCall(PoolCall("max", hidden, cu_seqlens=cu_seqlens), gradient, gradient)
        for launch in aot.plan_pool_backward(call, aot.Device("test", drawn.choice(aot.PROCESSORS))):
            what = f"gradient of hidden {aot.kernel_name(launch)} max(cu_seqlens)"
            assert aot.key_of(launch, what) in compiled, (batch, rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_every_variant_has_a_name_of_its_own(dtype: torch.dtype) -> None:
    for dim in (64, 770, 1024, 16384):
        names = [variant.name for variant in aot.variants([dtype], [dim])]
        assert len(set(names)) == len(names)


def test_what_is_wrong_is_said() -> None:
    good = aot.Report(registers=100, spills=0, shared=0, load=16, store=4)
    assert good.complaint(wide=("load",)) is None
    assert good.complaint(wide=("load", "store")) == "the widest store of aligned rows is 4 bytes"
    assert aot.Report(128, 8, 0, 16, 16).complaint(wide=()) == "8 bytes spilled"
    assert aot.Report(100, 0, 0, 16, 16, 1).complaint(wide=()) == "1 multiply-adds are fused"
    assert aot.Report(100, 0, 0, 8, 16).complaint(wide=("load",)) == "the widest load of aligned rows is 8 bytes"


def test_a_wrong_variant_is_an_exit_status_of_1(capsys: pytest.CaptureFixture[str]) -> None:
    """No such GPU: every compile fails, and each says so."""
    assert aot.run([aot.parse_target("cuda:1")], ["float64"], [64], 1) == 1
    *lines, total = capsys.readouterr().out.splitlines()
    assert all("FAILED: " in line for line in lines)
    assert total == f"{len(lines)} variants, {len(lines)} wrong"


@pytest.mark.parametrize(
    ("arguments", "variables", "words"),
    [
        (("h100",), {}, "a target must look like cuda:90 or hip:gfx942, got 'h100'"),
        (("cuda:ninety",), {}, "got 'cuda:ninety'"),
        (("cuda:90", "--dim", "0"), {}, "must be a whole number above 0, got '0'"),
        (("cuda:90", "--dtype", "int8"), {}, "invalid choice: 'int8'"),
        ((), {}, "the following arguments are required: TARGET"),
        (("cuda:90",), {"TRITON_INTERPRET": "1"}, "interprets kernels, it does not compile them"),
    ],
)
def test_wrong_arguments(arguments: tuple[str, ...], variables: dict[str, str], words: str, tmp_path: Path) -> None:
    done = run(*arguments, cache=tmp_path, **variables)
    assert done.returncode == 2
    assert words in done.stderr
