"""Which backend a call takes, who requested it, and why not another."""

import os
import subprocess
import sys
import threading
import warnings
from dataclasses import replace

import pytest
import torch

import fastpool
from fastpool import dispatch
from fastpool.backends import native, reference, triton
from fastpool.calls import NormalizeCall, PoolBackwardCall, PoolCall
from fastpool.testing import same_bits
from fastpool.triton_kernels import config

HIDDEN = torch.randn(2, 5, 8)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modes that the reference was called for."""
    calls: list[str] = []

    def spy(call: PoolCall) -> torch.Tensor:
        calls.append(call.mode)
        return torch.zeros(call.batch, 8)

    monkeypatch.setattr(reference, "pool", spy)
    return calls


def test_auto_takes_native(served: list[str]) -> None:
    fastpool.mean(HIDDEN)
    assert served == []
    explanation = fastpool.explain(HIDDEN)
    assert explanation.backend == "native"
    assert explanation.reasons["reference"] == "native comes first"
    assert "fastpool.mean takes native" in str(explanation)


def test_a_requested_backend_reaches_functions_and_raw_ops(served: list[str]) -> None:
    with fastpool.backend("reference"):
        fastpool.mean(HIDDEN)
        torch.ops.fastpool.max(HIDDEN)
        assert fastpool.explain(HIDDEN).backend == "reference"
        with fastpool.backend("native"):
            fastpool.sum(HIDDEN)
            with fastpool.backend("auto"):
                fastpool.cls(HIDDEN)
        fastpool.last(HIDDEN)
    fastpool.sum(HIDDEN)
    assert served == ["mean", "max", "last"]


def test_a_requested_backend_ends_with_an_exception(served: list[str]) -> None:
    with pytest.raises(KeyError), fastpool.backend("reference"):
        raise KeyError
    fastpool.mean(HIDDEN)
    assert served == []


def test_a_call_interrupted_on_its_way_to_native_leaves_nothing(
    served: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal's handler may raise as soon as the library has been told that a call comes from here."""

    class Interrupted:
        def __getattr__(self, name: str) -> object:
            return getattr(info, name)

        def set_direct(self, on: bool) -> None:
            info.set_direct(on)
            if on:
                raise KeyboardInterrupt

    info = native.info
    assert info is not None
    fastpool.validate()
    monkeypatch.setattr(native, "info", Interrupted())
    with pytest.raises((KeyboardInterrupt, RuntimeError)):
        fastpool.mean(HIDDEN)
    monkeypatch.setattr(native, "info", info)
    fastpool.validate(False)
    with fastpool.backend("reference"):
        fastpool.max(HIDDEN)
    assert served == ["max"]


def test_a_requested_backend_is_its_threads_own(served: list[str]) -> None:
    with fastpool.backend("reference"):
        thread = threading.Thread(target=lambda: fastpool.mean(HIDDEN))
        thread.start()
        thread.join()
    assert served == []


def test_what_cannot_be_served_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "INTERPRETED", False)
    words = "fastpool.mean: backend 'triton' was asked for and cannot serve this call: "
    with fastpool.backend("triton"):
        for call in (fastpool.mean, torch.ops.fastpool.mean):
            with pytest.raises(RuntimeError, match=words):
                call(HIDDEN)
        explanation = fastpool.explain(HIDDEN)
        assert explanation.backend is None
        assert "triton was asked for" in str(explanation)
    with pytest.raises(ValueError, match="must be one of auto, triton, native, reference, got 'cuda'"):
        fastpool.backend("cuda")


def test_without_the_library_auto_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_why_not", "it was not built")
    monkeypatch.setattr(dispatch, "_warned", set())
    call = PoolCall("mean", HIDDEN)
    with pytest.warns(RuntimeWarning, match="slow reference on cpu tensors .*native: it was not built"):
        assert dispatch.choose(call) is reference
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch.choose(call)
    with fastpool.backend("native"), pytest.raises(RuntimeError, match="it was not built"):
        dispatch.choose(call)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0", **environment},
    )


def test_environment_variables() -> None:
    given = "import torch, fastpool\n"
    asks = given + "print(fastpool.explain(torch.ones(1, 2, 3)).backend, fastpool.dispatch._validate)"
    assert run(asks, FASTPOOL_BACKEND="reference", FASTPOOL_VALIDATE="1").stdout.split() == ["reference", "True"]
    assert run(asks, FASTPOOL_BACKEND="native").stdout.split() == ["native", "False"]
    inner = "with fastpool.backend('native'): print(fastpool.mean(torch.ones(1, 2, 3)).tolist())\n"
    refused = run(given + inner + "torch.ops.fastpool.mean(torch.ones(1, 2, 3))", FASTPOOL_BACKEND="triton")
    assert refused.stdout.strip() == "[[1.0, 1.0, 1.0]]"
    assert refused.returncode != 0
    assert "backend 'triton' was asked for" in refused.stderr
    unknown = run(given + "fastpool.mean(torch.ones(1, 2, 3))", FASTPOOL_BACKEND="fast")
    assert "FASTPOOL_BACKEND must be one of auto, triton, native, reference, got 'fast'" in unknown.stderr


def test_other_platforms_get_the_reference_and_hear_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_why_not", None)
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    native.load()
    assert native.supports(PoolCall("mean", HIDDEN)) == "native kernels need Linux on x86-64, this is Linux on aarch64"
    monkeypatch.setattr(dispatch, "_warned", set())
    with pytest.warns(RuntimeWarning, match="native kernels need Linux on x86-64"):
        assert dispatch.choose(PoolCall("mean", HIDDEN)) is reference


def gpu_tensor(elements: int, of: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Stands for one: nothing but its device, dtype and size is looked at."""

    class Tensor:
        device, dtype = torch.device("cuda", 0), of

        def numel(self) -> int:
            return elements

        def element_size(self) -> int:
            return 2

    return Tensor()  # type: ignore[return-value]  # a stand-in


def test_auto_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA C++ first, up to a size that is written down or was measured; the library is told it once a device."""
    monkeypatch.setattr(triton, "INTERPRETED", False)
    monkeypatch.setattr(native, "_why_not_cuda", None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test 1")
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(native, "set_python_from", lambda index, bytes: told.append((index, bytes)))
    for below in (config.native_below_bytes("nvidia-test-1"), 1000):
        monkeypatch.setattr(dispatch, "native_below_bytes", lambda name, below=below: below)
        dispatch._native_below_bytes.cache_clear()
        assert dispatch._fastest_first(gpu_tensor(below // 2 - 1)) == ("native", "triton", "reference")
        assert dispatch._fastest_first(gpu_tensor(below // 2)) == ("triton", "native", "reference")
        assert dispatch._fastest_first(gpu_tensor(below, torch.float64)) == ("native", "triton", "reference")
        assert dispatch._fastest_first(gpu_tensor(below), favours_cpp=True) == ("native", "triton", "reference")
        assert told.pop() == (0, below)
        assert told == []
    monkeypatch.setattr(native, "_why_not_cuda", "the CUDA library was not built")
    assert dispatch._fastest_first(gpu_tensor(1)) == ("triton", "native", "reference")
    monkeypatch.setattr(native, "_why_not_cuda", None)
    monkeypatch.setattr(triton, "_FOUND", False)
    dispatch._native_below_bytes.cache_clear()
    assert dispatch._fastest_first(gpu_tensor(2**40))[0] == "native"
    assert told == [(0, native.NEVER)]
    dispatch._native_below_bytes.cache_clear()


@pytest.mark.skipif(not triton.INTERPRETED, reason="Triton serves no CPU tensors here")
def test_what_a_backend_cannot_take_is_declined() -> None:
    """By `auto`, explain and whoever asks for it alike, gradients too: Triton's kernels count rows in 32 bits."""
    row = torch.arange(1.0, 4.0)[None]
    call = PoolCall("max", row.expand(2**31, 3), cu_seqlens=torch.tensor([0, 2, 5]))
    reason = f"Triton kernels take at most {2**31 - 1} rows of a sequence, got {2**31}"
    for one in (call, PoolBackwardCall(call, torch.ones(2, 3), torch.ones(2, 3))):
        assert triton.supports(one) == reason
        assert triton.supports(replace(call, hidden=row.expand(2**31 - 1, 3))) is None
        assert reference.supports(one) is native.supports(one) is None
    arguments = {"hidden": call.hidden, "cu_seqlens": call.cu_seqlens}
    with fastpool.backend("triton"):
        assert fastpool.explain(**arguments, mode="max").reasons["triton"] == reason
        with pytest.raises(RuntimeError, match=f"'triton' was asked for and cannot serve this call: {reason}"):
            fastpool.max(**arguments)
    assert torch.equal(fastpool.max(**arguments), row.expand(2, 3))


def test_half_a_library_is_none() -> None:
    """Without the module that tells the library which backend is requested, the library must not serve calls."""
    code = """
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name == "fastpool._native":
            raise ImportError("built for another Python")
import sys
sys.meta_path.insert(0, Blocker())
import torch, fastpool
print(fastpool.explain(torch.ones(1, 2, 3)))
with fastpool.backend("triton"):
    try:
        fastpool.mean(torch.ones(1, 2, 3))
    except RuntimeError as error:
        print(error)
"""
    done = run(code)
    assert "fastpool.mean takes reference" in done.stdout, done.stderr
    assert "not native: the native library does not load: built for another Python" in done.stdout
    assert "backend 'triton' was asked for" in done.stdout


def test_values_are_checked_where_asked() -> None:
    """On a device that is no CPU, values are checked only when asked: there the check synchronises."""
    for words, call in (
        ("starts must lie between", lambda x, index: PoolCall("mean", x, starts=index)),
        ("truncate_dims must lie between", lambda x, index: NormalizeCall(x[:, 0], truncate_dims=index)),
    ):
        index = torch.tensor([0, 9])
        with pytest.raises(ValueError, match=words):
            dispatch.check(call(HIDDEN, index))
        elsewhere = call(HIDDEN.to("meta"), index.to("meta"))
        dispatch.check(elsewhere)
        fastpool.validate()
        # A meta tensor has no values to check, which shows that they were asked for.
        with pytest.raises((NotImplementedError, RuntimeError)):
            dispatch.check(elsewhere)
        fastpool.validate(False)


def test_python_hands_native_every_argument() -> None:
    """As on a GPU, where calls come past Python's dispatch before they are native's."""
    ops, x, truncate_dims = torch.ops.fastpool, torch.randn(3, 8), torch.tensor([5, 0, 2])
    more = {"truncate_dim": 6, "truncate_dims": truncate_dims, "eps": 2.0, "out_dtype": torch.float64}
    with fastpool.backend("native"):
        assert same_bits(ops._python_l2_normalize(x, **more), ops.l2_normalize(x, **more))
        given = (torch.randn(3, 6), x, 2.0, truncate_dims)
        assert same_bits(ops._python__l2_normalize_backward(*given), ops._l2_normalize_backward(*given))
