"""What is pooled on a GPU: the batches of real models, from one short query to documents of 32,768 tokens.

Lengths come from named mixes, drawn with a seed of their own: declared, not measured on real text. Python's generator
draws them, the same everywhere; contents are drawn on the device.
"""

import math
import random
from dataclasses import dataclass, replace

import torch

from cases import Batch, fill


@dataclass(frozen=True)
class Mix:
    """Lognormal token counts: their median, the spread of their logarithm, and the cap that truncates them."""

    median: float
    spread: float
    cap: int

    def draw(self, generator: random.Random) -> int:
        return max(1, min(self.cap, round(generator.lognormvariate(math.log(self.median), self.spread))))


MIXES = {
    "queries": Mix(7.5, 0.35, 64),  # 8 tokens on average
    "passages": Mix(69, 0.4, 512),  # 75
    "chunks": Mix(340, 0.6, 512),  # 330
    "documents": Mix(800, 1.05, 8192),  # 1300
}
SKEWED = "skewed"  # one in 20 is a document of 8192 tokens, the others are queries
_DOCUMENT = 8192


@dataclass(frozen=True)
class GpuCase:
    mix: str | int  # a mix's name, or the length of every sequence
    batch: int
    width: int
    dtype: str = "bf16"
    rows: int = 0  # of the padded layout; 0: the longest sequence's
    level: bool = False  # as many tokens as the mix has, spread evenly
    quick: bool = False

    @property
    def name(self) -> str:
        mix = f"{self.mix}{' levelled' if self.level else ''}{f' of {self.rows}' if self.rows else ''}"
        return f"{mix} B{self.batch} H{self.width} {self.dtype}"

    @property
    def native(self) -> bool:
        """Whether the dtype is the usual one."""
        return self.dtype == "bf16"

    @property
    def twin(self) -> "GpuCase | None":
        """The case whose time this one should keep: skewed lengths that of equal ones, half padding that of none."""
        if self.rows:
            return replace(self, rows=0)
        if self.mix in (SKEWED, "documents") and not self.level:
            return replace(self, level=True)
        return None

    def lengths(self) -> list[int]:
        if isinstance(self.mix, int):
            return [self.mix] * self.batch
        generator = random.Random(f"{self.mix} {self.batch}")
        if self.mix == SKEWED:
            drawn = [_DOCUMENT if i % 20 == 0 else MIXES["queries"].draw(generator) for i in range(self.batch)]
            generator.shuffle(drawn)
        else:
            drawn = [MIXES[self.mix].draw(generator) for _ in range(self.batch)]
        if self.level:
            each, left = divmod(sum(drawn), self.batch)
            drawn = [each + (i < left) for i in range(self.batch)]
        return drawn


def _with_twin(case: GpuCase) -> tuple[GpuCase, ...]:
    assert case.twin is not None
    return case, case.twin


# The most telling first: a run that is out of time leaves out the last ones.
CASES = (
    GpuCase(16, 1, 384, quick=True),
    GpuCase("queries", 32, 384, quick=True),
    GpuCase("passages", 32, 1024, quick=True),
    GpuCase(512, 64, 768, quick=True),
    GpuCase("passages", 1024, 768, quick=True),
    GpuCase(32768, 1, 4096, quick=True),
    *_with_twin(GpuCase(SKEWED, 256, 1024, quick=True)),
    *_with_twin(GpuCase(256, 256, 1024, rows=512, quick=True)),
    GpuCase(512, 1, 768),
    GpuCase(512, 1, 4096),
    GpuCase(64, 8, 384),
    GpuCase("passages", 1024, 384),
    GpuCase(8192, 1, 4096),
    GpuCase("chunks", 256, 1024),
    GpuCase("passages", 4096, 1024),
    GpuCase(8192, 8, 1536),
    *_with_twin(GpuCase("documents", 64, 2560)),
    GpuCase("passages", 1024, 768, "fp16"),
    GpuCase("passages", 1024, 768, "fp32"),
    GpuCase("chunks", 64, 1024, "fp32"),
    GpuCase("queries", 32, 384, "fp32"),
    GpuCase(8192, 1, 4096, "fp16"),
    GpuCase(32768, 16, 4096),
)


def build(case: GpuCase, device: str = "cuda") -> Batch:
    """Seeded input. Indices are int32, as serving engines have them."""
    lengths = case.lengths()
    generator = torch.Generator(device).manual_seed(0)
    batch = fill(torch.tensor(lengths), case.rows or max(lengths), case.width, case.dtype, generator)
    return replace(batch, cu_seqlens=batch.cu_seqlens.int())


def copy(batch: Batch) -> Batch:
    """The same at other addresses, for caches to be cold."""
    return Batch(*(getattr(batch, name).clone() for name in ("hidden", "mask", "packed", "cu_seqlens")))


def reorder(batch: Batch, order: list[int]) -> Batch:
    """The sequences of a batch, each bit of them, at other places in another batch."""
    bounds = batch.cu_seqlens.tolist()
    packed = torch.cat([batch.packed[bounds[i] : bounds[i + 1]] for i in order])
    cu_seqlens = torch.tensor([0] + [bounds[i + 1] - bounds[i] for i in order]).cumsum(0).to(batch.cu_seqlens)
    return Batch(batch.hidden[order], batch.mask[order], packed, cu_seqlens)
