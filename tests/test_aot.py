"""The command that compiles the kernels without a GPU, and what it calls wrong. CI runs it on far more than these."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")  # a reason to skip: there is no Triton for every platform

from fastpool.triton_kernels import aot  # after the skip


def run(*arguments: str, cache: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache), **variables}
    return subprocess.run(
        [sys.executable, "-m", "fastpool", "aot", *arguments], capture_output=True, text=True, env=environment
    )


def test_compiles_for_gpus_that_are_not_there(tmp_path: Path) -> None:
    done = run("cuda:90", "hip:gfx942", "--dtype", "float64", "--dim", "64", "--jobs", "2", cache=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, total = done.stdout.splitlines()
    count = 0
    for target, lanes in (("cuda:90", 32), ("hip:gfx942", 64)):
        expected = {variant.name for variant in aot.variants([aot.torch.float64], [64], lanes)}
        count += len(expected)
        mine = [line.split("  ") for line in lines if line.startswith(target)]
        assert {line[1] for line in mine} == expected
        assert all(line[2].startswith("registers ") and line[3] == "spills 0" for line in mine)
        assert all(line[5] == "load 16" for line in mine)
    assert total == f"{count} variants, 0 wrong"
    assert list(tmp_path.rglob("*.cubin"))
    assert list(tmp_path.rglob("*.hsaco"))


def test_what_is_wrong_is_said() -> None:
    good = aot.Report(registers=100, spills=0, shared=0, load=16)
    assert good.complaint() is None
    assert aot.Report(128, 8, 0, 16).complaint() == "8 bytes spilled"
    assert aot.Report(100, 0, 0, 16, 1).complaint() == "1 multiply-adds are fused"
    assert aot.Report(100, 0, 0, 8).complaint() == "aligned rows are loaded by 8 bytes"


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
