"""SGLang's pooling by fastpool, on SGLang's own modules where it is installed (scripts/check_sglang.sh), else on
stand-ins for them; the names of the tests say which.
"""

import importlib.util
import logging
import re
import sys
from collections.abc import Iterator
from enum import IntEnum
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastpool
from fastpool.integrations import sglang as plugin
from fastpool.testing import same_bits

REAL = importlib.util.find_spec("sglang") is not None
MODES = {"MEAN": "mean", "CLS": "cls", "LAST": "last"}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LENGTHS = [7, 1, 130, 64, 33]
WIDTH = 48
TARGET = "sglang.srt.layers.pooler.pool_hidden_states"
modes = pytest.mark.parametrize("kind", MODES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(params=["sglang" if REAL else "stand-in"])
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """SGLang's modules as they are before `register`; put back afterwards."""
    if not REAL:
        path = Path(__file__).parent / "stand_ins" / "sglang.py"
        spec = importlib.util.spec_from_file_location("sglang_stand_in", path)
        assert spec is not None
        assert spec.loader is not None
        stand_in = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(stand_in)
        for name, module in stand_in.modules().items():
            monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv("FASTPOOL_SGLANG", raising=False)
    pooler, hooks = import_module("sglang.srt.layers.pooler"), import_module("sglang.srt.plugins.hook_registry")
    names = SimpleNamespace(sglang=import_module("sglang"), pooler=pooler, hooks=hooks.HookRegistry)
    monkeypatch.setattr(pooler, "pool_hidden_states", pooler.pool_hidden_states)
    monkeypatch.setattr(hooks.HookRegistry, "_hooks", type(hooks.HookRegistry._hooks)(list))
    monkeypatch.setattr(hooks.HookRegistry, "_patched", set())
    plugin.register.cache_clear()
    yield names
    plugin.register.cache_clear()


def attach(engine: SimpleNamespace) -> SimpleNamespace:
    """As SGLang does it: plugins first, then all hooks."""
    plugin.register()
    engine.hooks.apply_hooks()
    return engine


@pytest.fixture
def attached(engine: SimpleNamespace) -> SimpleNamespace:
    return attach(engine)


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[logging.LogRecord]]:
    """What the plugin logs, and what SGLang's registry says of it."""
    handler, records = logging.Handler(), list[logging.LogRecord]()
    monkeypatch.setattr(handler, "emit", records.append)
    log, registry = logging.getLogger("sglang.fastpool"), logging.getLogger("sglang.srt.plugins.hook_registry")
    for one in (log, registry):
        monkeypatch.setattr(one, "handlers", [handler])
    log.setLevel(logging.INFO)
    yield records
    log.setLevel(logging.NOTSET)


def tokens(dtype: torch.dtype, lengths: list[int] = LENGTHS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(sum(lengths), WIDTH, generator=generator) + 0.25).to(dtype)


def batch(lengths: list[int] = LENGTHS, dimensions: list[int] | None = None, dtype: Any = torch.int32) -> Any:
    return SimpleNamespace(
        extend_seq_lens=torch.tensor(lengths, dtype=dtype), extend_seq_lens_cpu=lengths, dimensions=dimensions
    )


def pool(engine: SimpleNamespace, kind: str, hidden: torch.Tensor, forward_batch: Any) -> torch.Tensor:
    result: torch.Tensor = engine.pooler.pool_hidden_states(engine.pooler.PoolingType[kind], hidden, forward_batch)
    return result


def directly(kind: str, hidden: torch.Tensor, lengths: list[int] = LENGTHS, **options: Any) -> torch.Tensor:
    ends = torch.tensor(np.cumsum(lengths))
    return getattr(fastpool, MODES[kind])(hidden, starts=ends - torch.tensor(lengths), ends=ends, **options)


@dtypes
@modes
def test_pooling(attached: SimpleNamespace, kind: str, dtype: torch.dtype) -> None:
    hidden = tokens(dtype)
    result = pool(attached, kind, hidden, batch())
    assert same_bits(result, directly(kind, hidden))
    assert same_bits(pool(attached, kind, hidden, batch(dtype=torch.int64)), result)
    texts = hidden.double().split(LENGTHS)
    expected = torch.stack([{"MEAN": text.mean(0), "CLS": text[0], "LAST": text[-1]}[kind] for text in texts])
    unit = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(result.double(), expected, rtol=unit, atol=1e-6)


@modes
def test_pooling_gives_what_sglang_gave(engine: SimpleNamespace, kind: str) -> None:
    """In float32, where the running sum is a good one."""
    hidden = tokens(torch.float32)
    before = pool(engine, kind, hidden, batch())
    after = pool(attach(engine), kind, hidden, batch())
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_a_mean_no_longer_depends_on_the_batch(engine: SimpleNamespace) -> None:
    lengths = [64] * 32
    hidden = tokens(torch.bfloat16, lengths)
    text, alone = hidden[-64:], batch([64])
    exact = text.double().mean(0)

    def error(vector: torch.Tensor) -> float:
        return float((vector.double() - exact).abs().max())

    theirs, theirs_alone = pool(engine, "MEAN", hidden, batch(lengths))[-1], pool(engine, "MEAN", text, alone)[0]
    attach(engine)
    ours, ours_alone = pool(engine, "MEAN", hidden, batch(lengths))[-1], pool(engine, "MEAN", text, alone)[0]
    assert not same_bits(theirs, theirs_alone)
    assert same_bits(ours, ours_alone)
    assert error(ours) <= 2**-8 * float(exact.abs().max()) < error(theirs)


@modes
def test_empty(attached: SimpleNamespace, kind: str) -> None:
    hidden = tokens(torch.bfloat16, [4])
    assert pool(attached, kind, hidden, batch([])).shape == (0, WIDTH)
    result = pool(attached, kind, hidden, batch([0, 3, 0, 1]))
    assert same_bits(result, directly(kind, hidden, [0, 3, 0, 1]))
    assert not result[[0, 2]].any()


def test_rows_of_nobody_are_not_read(attached: SimpleNamespace) -> None:
    """A batch padded for a CUDA graph."""
    hidden = tokens(torch.bfloat16)
    padded = torch.cat([hidden, torch.full((9, WIDTH), float("nan"), dtype=torch.bfloat16)])
    assert same_bits(pool(attached, "MEAN", padded, batch()), pool(attached, "MEAN", hidden, batch()))


def test_nothing_is_read_back(attached: SimpleNamespace) -> None:
    class Ops(TorchDispatchMode):
        names: ClassVar[list[str]] = []

        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(op.overloadpacket._qualified_op_name)
            return op(*args, **(kwargs or {}))

    with Ops() as ops:
        pool(attached, "MEAN", tokens(torch.bfloat16), forward_batch := batch())
    assert forward_batch.extend_seq_lens.tolist() == LENGTHS
    at = ops.names.index("aten::cumsum")
    assert ops.names[at - 2 :] == ["aten::zeros", "aten::slice", "aten::cumsum", "fastpool::mean"]


def test_unknown_pooling_type(attached: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="Unsupported pooling type: 7"):
        attached.pooler.pool_hidden_states(7, tokens(torch.bfloat16), batch())


@pytest.mark.parametrize("dimensions", [None, [16] * 5, [16, 48, 16, 8, 1]], ids=["all", "same", "mixed"])
@pytest.mark.parametrize("normalize", [True, False])
@modes
def test_pooler(attached: SimpleNamespace, kind: str, normalize: bool, dimensions: list[int] | None) -> None:
    """Truncation and normalisation stay SGLang's."""
    hidden = tokens(torch.bfloat16)
    pooler = attached.pooler.Pooler(attached.pooler.PoolingType[kind], normalize=normalize)
    with torch.inference_mode():
        result = pooler(hidden, batch(dimensions=dimensions)).embeddings
    pooled = directly(kind, hidden)
    for row, vector in enumerate(result):
        expected = pooled[row, : dimensions[row] if dimensions else None]
        if normalize:
            expected = torch.nn.functional.normalize(expected, dim=-1)
        torch.testing.assert_close(vector, expected, rtol=2**-7, atol=0.0)
        assert normalize or same_bits(vector, expected)


def test_modules_that_imported_the_function(engine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's reward models hold it by name."""
    model = ModuleType("sglang_model")
    model.pool_hidden_states = engine.pooler.pool_hidden_states  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sglang_model", model)
    attach(engine)
    assert model.pool_hidden_states is engine.pooler.pool_hidden_states
    assert same_bits(
        model.pool_hidden_states(engine.pooler.PoolingType.LAST, tokens(torch.bfloat16), forward_batch=batch()),
        directly("LAST", tokens(torch.bfloat16)),
    )


# ---- register


def hooks_of(engine: SimpleNamespace) -> list[Any]:
    return list(engine.hooks._hooks.get(TARGET, []))


def test_register_twice(engine: SimpleNamespace, lines: list[logging.LogRecord]) -> None:
    plugin.register()
    plugin.register()
    assert len(hooks_of(engine)) == 1
    (line,) = lines
    assert line.levelno == logging.INFO
    assert engine.sglang.__version__ in line.getMessage()


def test_switched_off(engine: SimpleNamespace, lines: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTPOOL_SGLANG", "0")
    before = engine.pooler.pool_hidden_states
    attach(engine)
    assert engine.pooler.pool_hidden_states is before
    assert not lines


class OneMore(IntEnum):
    LAST = 0
    CLS = 1
    MEAN = 2
    MAX = 3


def _more_parameters(pooling_type: Any, hidden_states: Any, forward_batch: Any, more: Any = None) -> None: ...


def _patched_by_another(pooling_type: Any, hidden_states: Any, forward_batch: Any) -> None: ...


UNEXPECTED: dict[str, tuple[str, str, Any, str]] = {
    "older": ("sglang", "__version__", "0.5.2", "knows SGLang .*0.5.23, this is 0.5.2"),
    "newer": ("sglang", "__version__", "0.5.24", "this is 0.5.24"),
    "signature": ("pooler", "pool_hidden_states", _more_parameters, "takes .*more.*expected"),
    "another_plugin": ("pooler", "pool_hidden_states", _patched_by_another, "replaced already, by"),
    "mode": ("pooler", "PoolingType", OneMore, "PoolingType has LAST, CLS, MEAN, MAX"),
    "no_enum": ("pooler", "PoolingType", object(), "TypeError: 'object' object is not iterable"),
    "no_registry": ("hook_registry", "HookRegistry", None, "HookRegistry"),
}


@pytest.mark.parametrize("case", UNEXPECTED)
def test_not_as_expected(
    engine: SimpleNamespace, lines: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    where, name, value, message = UNEXPECTED[case]
    module = getattr(engine, where, None) or import_module("sglang.srt.plugins.hook_registry")
    if value is None:
        monkeypatch.delattr(module, name)
    else:
        monkeypatch.setattr(module, name, value)
    plugin.register()
    plugin.register()
    assert not hooks_of(engine)
    (line,) = lines
    assert line.levelno == logging.WARNING
    assert line.getMessage().startswith("fastpool leaves SGLang's pooling as it is: ")
    assert re.search(message, line.getMessage())


def test_entry_point() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, function = project["entry-points"]["sglang.srt.plugins"]["fastpool"].partition(":")
    assert getattr(import_module(module), function) is plugin.register
