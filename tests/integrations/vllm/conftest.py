"""vLLM's names: its own where it is installed (scripts/check_vllm.sh), else those of a stand-in; the names of the tests
say which."""

import importlib.util
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastpool.integrations import vllm as plugin

REAL = importlib.util.find_spec("vllm") is not None


@pytest.fixture(params=["vllm" if REAL else "stand-in"])
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """vLLM's names as they are before `register`; put back afterwards."""
    if not REAL:
        spec = importlib.util.spec_from_file_location(
            "vllm_stand_in", Path(__file__).parents[1] / "stand_ins" / "vllm.py"
        )
        assert spec is not None
        assert spec.loader is not None
        stand_in = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(stand_in)
        for name, module in stand_in.modules().items():
            monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv("FASTPOOL_VLLM", raising=False)
    pooler = "vllm.model_executor.layers.pooler"
    names = SimpleNamespace(vllm=import_module("vllm"))
    for module in (
        f"{pooler}.seqwise",
        f"{pooler}.activations",
        f"{pooler}.tokwise",
        "vllm.model_executor.models.bert",
        "vllm.v1.pool.metadata",
        "vllm.pooling_params",
    ):
        vars(names).update({n: v for n, v in vars(import_module(module)).items() if not n.startswith("_")})
    names.methods = import_module(f"{pooler}.seqwise.methods")
    for touched in (
        names.CLSPool,
        names.LastPool,
        names.MeanPool,
        names.SequencePooler,
        names.SPLADESparsePooler,
        names.TokenPooler,
    ):
        monkeypatch.setattr(touched, "forward", touched.forward)
    plugin.register.cache_clear()
    yield names
    plugin.register.cache_clear()


@pytest.fixture
def attached(engine: SimpleNamespace) -> SimpleNamespace:
    plugin.register()
    return engine
