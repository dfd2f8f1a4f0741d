"""Digests of results and gradients, so that no change of the code changes a bit unnoticed.

python tests/digests.py                            compares every backend that runs here with digests.json
python tests/digests.py --backends triton          one of them: reference, native (each instruction set), triton (its
                                                   interpreter), cuda (the CUDA sources on the CPU)
python tests/digests.py --write                    writes digests.json, by the reference

Every backend has the same bits, so there is one digest for each mode, dtype and layout, of results and gradients with
each of OPTIONS; and for each kind of quantised vectors. tests/kernels/test_digests.py compares the backends that take
seconds.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton's kernels are imported
sys.path.insert(0, str(Path(__file__).parent))

import torch
from helpers import quantize_cases
from torch import Tensor

import fastpool
from fastpool import dispatch
from fastpool.backends import native, triton
from fastpool.kinds import KINDS
from fastpool.modes import MODES
from fastpool.testing import (
    DTYPES,
    LAYOUTS,
    bits,
    function_of,
    gradients,
    required,
    sequences,
    special_values,
    variants,
)

GOLDEN = Path(__file__).parent / "digests.json"
LENGTHS = [3, 0, 40, 1, 300]  # a leaf, several, and more than one unit of any plan
WIDTH = 21
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"truncate_dim": 9, "normalize": True, "out_dtype": torch.float32},
    {"normalize": True},
)
FEW = OPTIONS[:2]  # for Triton's interpreter, which takes its time

Digests = dict[str, str]


class Digest:
    def __init__(self) -> None:
        self._sum = sha256()

    def add(self, *results: Tensor) -> None:
        for result in results:
            self._sum.update(f"{result.dtype} {tuple(result.shape)}".encode())
            self._sum.update(bits(result.detach()).numpy().tobytes())

    def __str__(self) -> str:
        return self._sum.hexdigest()[:16]


def add_call(digest: Digest, function: Callable[..., Tensor], arguments: dict[str, Any], **more: Any) -> None:
    """The result, and the gradients for one that is drawn."""
    result = function(**arguments, **more)
    drawn = torch.randn(result.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    digest.add(result, *gradients(function, arguments, drawn.to(result.dtype), **more))


def pooled(mode: str, given: str | None, dtype: torch.dtype, layout: str, options: dict[str, Any]) -> str:
    batch = sequences(LENGTHS, WIDTH, dtype, holes=LAYOUTS[layout].holes)
    digest = Digest()
    add_call(digest, function_of(mode), LAYOUTS[layout].make(batch, given), **options)
    return str(digest)


def special(mode: str) -> str:
    """NaN, infinities, zeros of both signs, subnormals. (Not their gradients: what those hold is NaN for the most.)"""
    digest, hidden = Digest(), special_values(6, 40, 24)
    for normalize in (False, True):
        digest.add(function_of(mode)(hidden, normalize=normalize, **required(mode, hidden.shape)))
    return str(digest)


def normalized(dtype: torch.dtype) -> str:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(7, 3, 133, generator=generator, dtype=torch.float64).to(dtype)
    truncate_dims = torch.randint(0, 134, (7, 3), generator=generator)
    digest = Digest()
    for arguments in ({"x": x}, {"x": x, "truncate_dim": 40}, {"x": x, "truncate_dims": truncate_dims}):
        add_call(digest, fastpool.l2_normalize, arguments)
    return str(digest)


def quantized(kind: str) -> str:
    digest = Digest()
    for dtype in DTYPES:
        x, ranges = quantize_cases.values(12, 133, dtype), quantize_cases.ranges_of(133)
        for options in quantize_cases.options(kind, ranges):
            digest.add(fastpool.quantize(x, kind, **options).double())
    return str(digest)


def cases(options: Sequence[dict[str, Any]] = OPTIONS) -> Iterator[tuple[str, Callable[[], str]]]:
    """A name, and what computes its digest."""
    for mode, given in variants():
        name = mode + (f" of {given}" if given else "")
        for dtype in DTYPES:
            for layout in LAYOUTS:
                for chosen in options:
                    said = ", ".join(f"{key}={value}".replace("torch.", "") for key, value in chosen.items())
                    what = f"{name}, {str(dtype).removeprefix('torch.')}, {layout}" + (f", {said}" if said else "")
                    yield what, partial(pooled, mode, given, dtype, layout, chosen)
        if given is None or MODES[mode].softmax:
            yield f"{mode}, special values", partial(special, mode)
    for dtype in DTYPES:
        yield f"l2_normalize, {str(dtype).removeprefix('torch.')}", partial(normalized, dtype)
    for kind in KINDS:
        yield f"quantize, {kind}", partial(quantized, kind)


def golden() -> Digests:
    found: Digests = json.loads(GOLDEN.read_text())
    return found


def changed(options: Sequence[dict[str, Any]] = OPTIONS) -> list[str]:
    """Names whose digests are not those of digests.json, by the backend that calls take now. A mode of which it has
    nothing is new, and other tests compare its backends; once it has some, they are to stay."""
    expected = golden()
    return [name for name, digest in cases(options) if name in expected and digest() != expected[name]]


@contextmanager
def on(backend: str) -> Iterator[None]:
    """Calls take this backend: one of fastpool's, native-avx2 for an instruction set, or cuda."""
    name, _, isa = backend.partition("-")
    kept = dispatch.BACKENDS["triton"]
    if name == "cuda":
        from helpers import cuda_host

        stand_in = cuda_host.Backend(cuda_host.shared())
        dispatch.BACKENDS["triton"] = stand_in  # type: ignore[assignment]  # no module
        name = "triton"
    if isa:
        assert native.info is not None
        native.info.use_isa(isa)
    try:
        with fastpool.backend(name):
            yield
    finally:
        dispatch.BACKENDS["triton"] = kept
        if native.info is not None:
            native.info.use_isa()


def here() -> list[str]:
    """The backends that run here."""
    found = ["reference"]
    if native.info is not None:
        found += [f"native-{isa}" for isa in native.info.isas()] + ["cuda"]
    return found + (["triton"] if triton.INTERPRETED else [])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write digests.json, by the reference")
    parser.add_argument("--backends", nargs="+", help="some of them", metavar="NAME")
    asked = parser.parse_args()
    if asked.write:
        with on("reference"):
            found = {name: digest() for name, digest in cases()}
        GOLDEN.write_text(json.dumps(found, indent=0) + "\n")
        print(f"{len(found)} digests in {GOLDEN.name}")
        return 0
    wrong = 0
    for backend in asked.backends or here():
        with on(backend):
            names = changed(FEW if backend == "triton" else OPTIONS)
        wrong += len(names)
        for name in names:
            print(f"{backend}: other bits: {name}")
        print(f"{backend}: {len(names)} digests differ", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
