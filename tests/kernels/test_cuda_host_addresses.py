"""The CUDA kernels, compiled for a CPU (tests/cpp/cuda_host), touch nothing outside of their tensors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.cmake import ROOT
from helpers.cuda_host import build

ADDRESSES = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from helpers import cuda_host
from fastpool.arguments import GRADIENTS_OF
from fastpool.calls import accumulator
from fastpool.modes import MODES
from fastpool.testing import DTYPES, LAYOUTS, sequences, variants
host = cuda_host.Host(cuda_host.Path(sys.argv[2]))
calls = 0
def run(i, mode, arguments):
    # Memory of its own for every argument, so that a byte beyond it is noticed.
    global calls
    arguments = {name: value.clone() for name, value in arguments.items()}
    host.tune(split=(32, 64, 0)[i % 3], strip=128 if i % 2 else 0, tile=(0, 5, 64)[i % 3])
    host(mode, arguments, normalize=True)
    result = host(mode, arguments, out_dtype=accumulator(arguments["hidden"].dtype))
    for of in [name for name in GRADIENTS_OF if name in arguments and not MODES[mode].of_logits]:
        host.backward(mode, arguments, torch.randn_like(result), result, of)
    calls += 1
for i, (arguments, _) in enumerate(cuda_host.hostile_calls(150, seed=1)):
    for mode, given in (("mean", None), ("weighted_mean", None), ("max", None), ("last", None),
                        ("softmax_mean", "scores"), ("attention", "query")):
        run(i, mode, arguments | cuda_host.own(given, arguments["hidden"]))
for dtype in DTYPES:
    for i, width in enumerate((1, 3, 8, 77, 300)):
        batch = sequences([1, 40, 0, 300, 33], width, dtype)
        for name in ("packed", "padded_lengths"):
            for mode, given in variants():
                run(i, mode, LAYOUTS[name].make(batch, given))
            for several in ((2,), (5,), (len(batch), 3)):
                query = torch.randn(*several, width).to(dtype)
                run(i, "attention", LAYOUTS[name].make(batch, "query") | {"query": query})
        x = torch.randn(3, width).to(dtype)
        gradient = torch.ones(3, width // 2 + 1, dtype=accumulator(dtype))
        for cuts in (None, torch.tensor([0, -9, width // 2]), torch.tensor([width, 2**31 - 1, 1]).int()):
            host.ops.l2_normalize(x, truncate_dims=cuts)
            host.ops._l2_normalize_backward(gradient, x, 1e-12, cuts)
print("calls:", calls)
"""


@pytest.mark.wide  # builds the kernels again, for a minute; where what is read outside shows, test_cuda_host sees it
def test_addresses(tmp_path: Path) -> None:
    """Hostile bounds and odd shapes under the address sanitizer, forward and backward."""
    library = build("cuda_host_address", "-DFASTPOOL_SANITIZE=address")
    asan = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    done = subprocess.run(
        [sys.executable, "-c", ADDRESSES, str(ROOT / "tests"), str(library)],
        capture_output=True,
        text=True,
        env={**os.environ, "LD_PRELOAD": asan.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "calls: 1580" in done.stdout
