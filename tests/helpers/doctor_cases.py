"""What the tests of `fastpool doctor` share."""

import importlib.util
from pathlib import Path

import pytest

from fastpool.models import Decision, PoolingConfig

CONFIG = PoolingConfig(
    modes=("mean",),
    normalize=True,
    decisions=(
        Decision("modes", ("mean",), "1_Pooling/config.json: pooling_mode", "stated"),
        Decision("normalize", True, "modules.json [2]: type", "stated"),
    ),
)

# The extra is not installed wherever the tests run: vLLM's environment has none of it.
needs_packages = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("matplotlib", "rich", "sentence_transformers")),
    reason='needs pip install "fastpool[doctor]"',
)


def write(path: Path, *lines: str) -> Path:
    """A file of these lines."""
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path
