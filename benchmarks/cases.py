"""What is pooled: the batches of real models, from a handful of queries to documents of 32,768 tokens.

Lengths come from named mixes, drawn with a seed of their own: declared, not measured on real text. Python's generator
draws them, the same everywhere; contents are drawn on the device. The same tokens stand in both layouts, padded
[B, S, H] and packed [T, H], so that each provider gets the input it is made for.
"""

import math
import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
class Case:
    """`devices`: where the suite measures it."""

    mix: str | int  # a mix's name, or the length of every text
    batch: int
    width: int
    dtype: str = "bf16"
    rows: int = 0  # of the padded layout; 0: the longest text's
    level: bool = False  # as many tokens as the mix has, spread evenly
    largest: float = 0  # the share of all tokens that the first text has; 0: what the mix gives
    devices: tuple[str, ...] = ("cuda",)
    quick: bool = False
    suite: str = "shapes"

    @property
    def name(self) -> str:
        mix = f"{self.mix}{' levelled' if self.level else ''}{f' of {self.rows}' if self.rows else ''}"
        if self.largest:
            mix += f" {100 * self.largest:.0f} % in one"
        return f"{mix} B{self.batch} H{self.width} {self.dtype}"

    @property
    def twin(self) -> "Case | None":
        """The case whose time this one should keep: skewed lengths that of equal ones, half padding that of none."""
        if self.suite != "shapes":
            return None
        if self.rows:
            return replace(self, rows=0)
        if self.mix in (SKEWED, "documents") and not self.level:
            return replace(self, level=True)
        return None

    def lengths(self) -> list[int]:
        if isinstance(self.mix, int):
            drawn = [self.mix] * self.batch
        else:
            generator = random.Random(f"{self.mix} {self.batch}")
            if self.mix == SKEWED:
                drawn = [_DOCUMENT if i % 20 == 0 else MIXES["queries"].draw(generator) for i in range(self.batch)]
                generator.shuffle(drawn)
            else:
                drawn = [MIXES[self.mix].draw(generator) for _ in range(self.batch)]
        total = sum(drawn)
        if self.level:
            drawn = _evenly(total, self.batch)
        if self.largest:
            first = round(total * self.largest)
            drawn = [first, *_evenly(total - first, self.batch - 1)]
        return drawn


def _evenly(total: int, count: int) -> list[int]:
    each, left = divmod(total, count)
    return [each + (i < left) for i in range(count)]


def _with_twin(case: Case) -> tuple[Case, ...]:
    assert case.twin is not None
    return case, case.twin


_BOTH = ("cpu", "cuda")
_CPU = ("cpu",)
# The most telling first: a run that is out of time leaves out the last ones.
SHAPES = (
    Case(16, 1, 384, quick=True),
    Case("queries", 32, 384, "fp32", devices=_BOTH, quick=True),
    Case("queries", 32, 384, quick=True),
    Case("passages", 32, 1024, devices=_BOTH, quick=True),
    Case(512, 64, 768, quick=True),
    Case("passages", 1024, 768, quick=True),
    Case(32768, 1, 4096, quick=True),
    *_with_twin(Case(SKEWED, 256, 1024, quick=True)),
    *_with_twin(Case(256, 256, 1024, rows=512, quick=True)),
    Case("passages", 256, 384, "fp32", devices=_CPU, quick=True),
    Case("passages", 256, 384, devices=_CPU),
    Case("chunks", 32, 768, "fp32", devices=_CPU, quick=True),
    Case("chunks", 64, 1024, devices=_BOTH, quick=True),
    Case("chunks", 64, 1024, "fp32", devices=_BOTH),
    Case("chunks", 64, 1024, "fp16", devices=_CPU),
    Case(8192, 1, 4096, devices=_BOTH, quick=True),
    Case(8192, 1, 4096, "fp32", devices=_CPU),
    Case("passages", 256, 1024, devices=_CPU),
    *_with_twin(Case(SKEWED, 40, 768, devices=_CPU)),
    *_with_twin(Case("documents", 16, 2560, devices=_CPU)),
    Case(512, 1, 768),
    Case(512, 1, 4096),
    Case(64, 8, 384),
    Case("passages", 1024, 384),
    Case("chunks", 256, 1024),
    Case("passages", 4096, 1024),
    Case(8192, 8, 1536),
    *_with_twin(Case("documents", 64, 2560)),
    Case("passages", 1024, 768, "fp16"),
    Case("passages", 1024, 768, "fp32"),
    Case(8192, 1, 4096, "fp16"),
    Case(32768, 16, 4096),
)
# Texts of one length in rows of 512: from nearly all padding to none.
FILL = tuple(
    Case(length, 64, 768, "fp32", rows=512, devices=_BOTH, suite="fill") for length in (26, 64, 128, 256, 384, 512)
)
# As many tokens in as many texts each time, and more and more of them in one text.
SKEW = tuple(
    Case(512, 32, 768, largest=share, devices=_BOTH, suite="skew") for share in (1 / 32, 1 / 8, 1 / 4, 1 / 2, 3 / 4)
)
# One long text: what rounding does as it grows. Checked, not timed.
LENGTH = tuple(
    Case(length, 1, 384, dtype, devices=_BOTH, suite="length")
    for dtype in DTYPES
    for length in (32, 128, 512, 2048, 8192, 32768, 131072)
)
CASES = (*SHAPES, *FILL, *SKEW, *LENGTH)


@dataclass(frozen=True)
class Batch:
    """The input of one case, in every layout a provider may want."""

    hidden: Tensor  # [B, S, H]
    mask: Tensor  # int64 [B, S], 1 where a token is real
    packed: Tensor  # [T, H], the real tokens of hidden
    cu_seqlens: Tensor  # int32 [B + 1], as serving engines have it

    @property
    def real_bytes(self) -> int:
        return self.packed.numel() * self.packed.element_size()


def build(case: Case, device: str | torch.device, seed: int = 0) -> Batch:
    """Seeded contents, right-padded. Padding holds ordinary numbers: formulas that multiply by the mask would turn a
    NaN there into a wrong result, and what is timed here is the right one."""
    drawn = case.lengths()
    rows, generator = case.rows or max(drawn), torch.Generator(device).manual_seed(seed)
    # A model's features have means of their own; without them the mean of many tokens would be noise about zero.
    feature_means = torch.randn(case.width, generator=generator, device=device)
    hidden = torch.randn(case.batch, rows, case.width, generator=generator, device=device).add_(feature_means)
    hidden = hidden.to(DTYPES[case.dtype])
    lengths = torch.tensor(drawn, device=device)
    mask = (torch.arange(rows, device=device) < lengths[:, None]).to(torch.int64)
    cu_seqlens = torch.zeros(case.batch + 1, dtype=torch.int32, device=device)
    torch.cumsum(lengths, 0, out=cu_seqlens[1:])
    return Batch(hidden, mask, hidden[mask.bool()], cu_seqlens)


def copy(batch: Batch) -> Batch:
    """The same at other addresses, for caches to be cold."""
    return Batch(*(getattr(batch, name).clone() for name in ("hidden", "mask", "packed", "cu_seqlens")))


def reorder(batch: Batch, order: list[int]) -> Batch:
    """The texts of a batch, each bit of them, at other places in another batch."""
    bounds = batch.cu_seqlens.tolist()
    packed = torch.cat([batch.packed[bounds[i] : bounds[i + 1]] for i in order])
    cu_seqlens = torch.tensor([0] + [bounds[i + 1] - bounds[i] for i in order]).cumsum(0).to(batch.cu_seqlens)
    return Batch(batch.hidden[order], batch.mask[order], packed, cu_seqlens)


def exact(batch: Batch) -> Tensor:
    """The normalised mean of every text, in float64."""
    rows = zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True)
    means = torch.stack([batch.packed[start:end].double().mean(0) for start, end in rows])
    return torch.nn.functional.normalize(means, dim=-1)


def relative_error(result: Tensor, expected: Tensor) -> float:
    """The relative L2 error of the worst text."""
    return float(((result.double() - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
