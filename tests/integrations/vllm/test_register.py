"""What `register` changes of vLLM, and when it leaves everything as it is."""

import logging
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastpool.integrations import vllm as plugin


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[logging.LogRecord]]:
    """What the plugin logs, whatever vLLM does with it."""
    log, handler, records = logging.getLogger("vllm.fastpool"), logging.Handler(), list[logging.LogRecord]()
    monkeypatch.setattr(handler, "emit", records.append)
    monkeypatch.setattr(log, "handlers", [handler])
    log.setLevel(logging.INFO)
    yield records
    log.setLevel(logging.NOTSET)


def forwards(engine: SimpleNamespace) -> list[Any]:
    """Of CLS, LAST and MEAN."""
    return [t.forward for t in (engine.CLSPool, engine.LastPool, engine.MeanPool, engine.SequencePooler)]


def test_register_twice(engine: SimpleNamespace, lines: list[logging.LogRecord]) -> None:
    before = forwards(engine)
    plugin.register()
    first = forwards(engine)
    plugin.register()
    assert forwards(engine) == first
    assert not set(first) & set(before)
    (line,) = lines
    assert line.levelno == logging.INFO
    assert engine.vllm.__version__ in line.getMessage()


def test_switched_off(engine: SimpleNamespace, lines: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTPOOL_VLLM", "0")
    before = forwards(engine)
    plugin.register()
    assert forwards(engine) == before
    assert not lines


def _other(self: Any, hidden_states: Any, pooling_metadata: Any, more: Any = None) -> None: ...


def _alike(self: Any, hidden_states: Any, pooling_metadata: Any) -> None: ...


# The class whose `forward` is another, of each kind beside them.
POOLER_OF = {"SPLADE": "SPLADESparsePooler", "token": "TokenPooler"}
POOLER = "vllm.model_executor.layers.pooler"
# What is changed, by its name in vLLM; to what (None: gone); what the line in the log says.
UNEXPECTED: dict[str, tuple[str, str, Any, str]] = {
    "older": ("vllm", "__version__", "0.3.20", "knows vLLM 0.32, 0.33, this is 0.3.20"),
    "newer": ("vllm", "__version__", "0.34.0", "this is 0.34.0"),
    "longer": ("vllm", "__version__", "0.330", "this is 0.330"),
    "method": ("MeanPool", "forward", _other, "takes .*more.*expected"),
    "pooler": ("SequencePooler", "forward", _other, "takes .*more.*expected"),
    "head": ("EmbeddingPoolerHead", "forward", _other, "takes .*more.*expected"),
    "head_options": ("EmbeddingPoolerHead", "__init__", _other, "takes .*more.*expected"),
    "another_plugin": ("MeanPool", "forward", _alike, "replaced already, by"),
    "cursor": ("PoolingCursor", "__dataclass_fields__", {}, "PoolingCursor has no first.*last_token_indices_gpu"),
    "no_dataclass": ("PoolingCursor", "__dataclass_fields__", None, "TypeError: must be called with a dataclass"),
    "no_class": (f"{POOLER}.seqwise", "LastPool", None, "LastPool"),
    "no_activation": (f"{POOLER}.activations", "PoolerNormalize", None, "PoolerNormalize"),
    "no_module": ("modules", f"{POOLER}.seqwise", None, "seqwise"),
}


def _change(engine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, where: str, name: str, value: Any) -> None:
    if where == "modules":
        monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]  # an import of it fails
    elif value is None:
        monkeypatch.delattr(getattr(engine, where, None) or import_module(where), name)
    else:
        owner = getattr(engine, where, None) or import_module(where)
        if not hasattr(owner, name):
            pytest.skip(f"vLLM {engine.vllm.__version__} has no {name}")
        monkeypatch.setattr(owner, name, value)


@pytest.mark.parametrize("case", UNEXPECTED)
def test_not_as_expected(
    engine: SimpleNamespace, lines: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    where, name, value, message = UNEXPECTED[case]
    _change(engine, monkeypatch, where, name, value)
    before, others = forwards(engine), [getattr(engine, pooler).forward for pooler in POOLER_OF.values()]
    plugin.register()
    plugin.register()
    assert forwards(engine) == before
    assert [getattr(engine, pooler).forward for pooler in POOLER_OF.values()] == others
    (line,) = lines
    assert line.levelno == logging.WARNING
    assert line.getMessage().startswith("fastpool leaves vLLM's pooling as it is: ")
    assert re.search(message, line.getMessage())


BERT = "vllm.model_executor.models.bert"
# The same of a kind of pooling beside CLS, LAST and MEAN: that kind alone is left as it is.
UNEXPECTED_KINDS: dict[str, tuple[str, str, str, Any, str]] = {
    "splade_pooler": ("SPLADE", "SPLADESparsePooler", "forward", _other, "takes .*more.*expected"),
    "splade_options": ("SPLADE", "SPLADESparsePooler", "__init__", _other, "takes .*more.*expected"),
    "splade_head": ("SPLADE", "BertMLMHead", "forward", _other, "takes .*more.*expected"),
    "splade_head_options": ("SPLADE", "BertMLMHead", "__init__", _other, "takes .*more.*expected"),
    "splade_another_plugin": ("SPLADE", "SPLADESparsePooler", "forward", _alike, "replaced already, by"),
    "splade_metadata": ("SPLADE", "PoolingMetadata", "__dataclass_fields__", {}, "no prompt_lens and no prompt_token_"),
    "splade_no_class": ("SPLADE", BERT, "SPLADESparsePooler", None, "AttributeError: .*SPLADESparsePooler"),
    "splade_no_module": ("SPLADE", "modules", BERT, None, "bert"),
    "token_pooler": ("token", "TokenPooler", "forward", _other, "takes .*more.*expected"),
    "token_pooler_options": ("token", "TokenPooler", "__init__", _other, "takes .*more.*expected"),
    "token_method": ("token", "AllPool", "forward", _other, "takes .*more.*expected"),
    "token_head": ("token", "TokenEmbeddingPoolerHead", "forward", _other, "takes .*more.*expected"),
    "token_head_options": ("token", "TokenEmbeddingPoolerHead", "__init__", _other, "takes .*more.*expected"),
    "token_head_of_one": ("token", "TokenEmbeddingPoolerHead", "forward_chunk", _other, "takes .*more.*expected"),
    "token_method_options": ("token", "AllPool", "__init__", _other, "takes .*more.*expected"),
    "token_chunks": ("token", f"{POOLER}.tokwise.heads", "_mean_pool_chunks", _other, "takes .*more.*expected"),
    "token_another_plugin": ("token", "TokenPooler", "forward", _alike, "replaced already, by"),
    "token_no_class": ("token", f"{POOLER}.tokwise", "AllPool", None, "AttributeError: .*AllPool"),
    "token_no_module": ("token", "modules", f"{POOLER}.tokwise", None, "tokwise"),
}


@pytest.mark.parametrize("case", UNEXPECTED_KINDS)
def test_a_kind_is_not_as_expected(
    engine: SimpleNamespace, lines: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    kind, where, name, value, message = UNEXPECTED_KINDS[case]
    _change(engine, monkeypatch, where, name, value)
    before, theirs = forwards(engine), {kind: getattr(engine, pooler).forward for kind, pooler in POOLER_OF.items()}
    plugin.register()
    assert not set(forwards(engine)) & set(before)
    for other, pooler in POOLER_OF.items():
        assert (getattr(engine, pooler).forward is theirs[other]) == (other == kind)
    warning, line = lines
    assert (warning.levelno, line.levelno) == (logging.WARNING, logging.INFO)
    assert warning.getMessage().startswith(f"fastpool leaves vLLM's {kind} pooling as it is: ")
    assert re.search(message, warning.getMessage())
    others = ["CLS", "LAST", "MEAN", *(other for other in POOLER_OF if other != kind)]
    assert f" the {', '.join(others[:-1])} and {others[-1]} pooling of vLLM " in line.getMessage()


def test_entry_point() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    module, _, function = project["entry-points"]["vllm.general_plugins"]["fastpool"].partition(":")
    assert getattr(import_module(module), function) is plugin.register
