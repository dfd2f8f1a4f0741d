"""What torch knows of the ops: schemas, fakes, compile, and what they never touch."""

import subprocess
import sys
import textwrap

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastpool
from fastpool.modes import MODES
from fastpool.testing import SPELLINGS, sequences, variants

OP_SPELLINGS = [
    name for name in SPELLINGS if name not in ("padded_lengths", "nested")
]  # the ops have no such arguments


@pytest.mark.parametrize("spelling", OP_SPELLINGS)
@pytest.mark.parametrize(("mode", "weighted"), variants())
def test_opcheck(mode: str, weighted: bool, spelling: str) -> None:
    arguments = SPELLINGS[spelling].make(sequences([3, 0, 40], 12, torch.bfloat16), weighted)
    op = getattr(torch.ops.fastpool, mode).default
    hidden = arguments.pop("hidden")
    for more in ({}, {"dim": 5, "normalize": True, "out_dtype": torch.float32}):
        torch.library.opcheck(op, (hidden,), {**arguments, **more}, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_opcheck_l2_normalize(backend: str) -> None:
    for x in (torch.randn(5), torch.randn(2, 3, 12), torch.randn(3, 4, 12).transpose(0, 1), torch.randn(3, 0)):
        with fastpool.backend(backend):
            torch.library.opcheck(
                torch.ops.fastpool.l2_normalize.default,
                (x,),
                {"dim": 4} if x.shape[-1] else {},
                test_utils=("test_schema", "test_faketensor"),
            )


@pytest.mark.parametrize("mode", MODES)
def test_fakes_and_meta(mode: str) -> None:
    pool = getattr(fastpool, mode)
    with FakeTensorMode():
        result = pool(torch.empty(3, 7, 16, dtype=torch.float16), lengths=torch.empty(3, dtype=torch.int64), dim=4)
        assert (result.shape, result.dtype, result.stride()) == ((3, 4), torch.float16, (4, 1))
        with pytest.raises(TypeError, match="additive mask"):
            pool(torch.empty(3, 7, 16), torch.empty(3, 7))
    meta = pool(torch.empty(9, 16, device="meta"), None, torch.empty(3, dtype=torch.int64, device="meta"))
    assert (meta.shape, meta.device.type) == ((2, 16), "meta")


@pytest.mark.parametrize("mode", MODES)
def test_compiles_without_graph_breaks(mode: str) -> None:
    pool = getattr(fastpool, mode)
    compiled = torch.compile(
        lambda hidden, mask: pool(hidden * 2, mask, dim=6, normalize=True), fullgraph=True, backend="aot_eager"
    )
    hidden, mask = torch.randn(3, 50, 10), torch.rand(3, 50) > 0.3
    assert torch.equal(compiled(hidden, mask), pool(hidden * 2, mask, dim=6, normalize=True))


def test_compiles_where_gradients_are_recorded() -> None:
    linear = torch.nn.Linear(8, 8)
    compiled = torch.compile(lambda x: fastpool.mean(linear(x)), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 8)
    assert torch.equal(compiled(x), fastpool.mean(linear(x)))
    with pytest.raises(NotImplementedError, match=r"fastpool.mean: gradients are not implemented"):
        compiled(x).sum().backward()


def test_inputs_are_left_alone() -> None:
    batch = sequences([5, 9], 16, torch.float32, holes=True)
    for spelling in SPELLINGS.values():
        if not spelling.holes:
            continue
        arguments = spelling.make(batch, weighted=True)
        before = {name: value.clone() for name, value in arguments.items()}
        fastpool.weighted_mean(**arguments, normalize=True)
        for name, value in arguments.items():
            assert torch.equal(value.nan_to_num(7), before[name].nan_to_num(7)), name


def test_padding_is_not_read() -> None:
    """Padding on pages that nobody may read: touching a byte of them ends the process."""
    code = """
        import ctypes, mmap, torch, fastpool
        page, width = mmap.PAGESIZE, mmap.PAGESIZE // 4
        rows = 80
        memory = mmap.mmap(-1, 3 * rows * page)
        hidden = torch.frombuffer(memory, dtype=torch.float32).view(3, rows, width)
        hidden.fill_(1.0)
        real = torch.zeros(3, rows, dtype=torch.bool)
        real[0, :40] = real[1, 30:] = real[2, ::3] = True
        libc = ctypes.CDLL(None, use_errno=True)
        for b in range(3):
            for s in range(rows):
                if not real[b, s]:
                    assert libc.mprotect(ctypes.c_void_p(hidden[b, s].data_ptr()), page, 0) == 0
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for mode in fastpool.MODES:
                pool = getattr(fastpool, mode)
                pool(hidden, real)
                pool(hidden[:2], starts=torch.tensor([0, 30]), ends=torch.tensor([40, 80]))
                pool(hidden.view(-1, width), starts=torch.tensor([0, 110]), ends=torch.tensor([40, 160]))
        print("not read", flush=True)
        hidden[0, 79].sum()
        print("read")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    # The last line of the program proves that the pages were protected.
    assert done.stdout.strip() == "not read", done.stderr
    assert done.returncode < 0


def test_no_temporaries_of_the_inputs_size() -> None:
    """The library's own memory: 512 MB are pooled while the process may take hardly any more."""
    code = """
        import resource, torch, fastpool
        torch.set_num_threads(2)
        hidden = torch.ones(4, 32768, 1024)
        mask = torch.ones(4, 32768, dtype=torch.bool)
        fastpool.mean(hidden[:, :64], mask[:, :64])
        for mode in fastpool.MODES:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            getattr(fastpool, mode)(hidden, mask, normalize=True)
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            assert grown < 16 * 1024, (mode, grown)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
