"""What is pooled: on CPUs (cases_gpu.py has the GPU's), shapes from a small query batch to a long document, each in
float32 and bfloat16, half of every batch padding.

The same tokens stand in both layouts, padded [B, S, H] and packed [T, H], so that each provider gets the input it is
made for.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """A shape in a dtype. `native`: the dtype is the usual one at that size."""

    batch: int
    length: int
    width: int
    dtype: str
    native: bool

    @property
    def shape(self) -> str:
        return f"B{self.batch} S{self.length} H{self.width}"

    @property
    def name(self) -> str:
        return f"{self.shape} {self.dtype}"


_SHAPES = (
    (8, 64, 384, {"fp32"}),
    (32, 128, 384, {"fp32", "bf16"}),
    (32, 512, 768, {"fp32"}),
    (32, 512, 1024, {"bf16"}),
    (64, 512, 1024, {"fp32"}),
    (1, 8192, 4096, {"bf16"}),
    (4, 8192, 1024, {"bf16"}),
    (256, 128, 1024, {"bf16"}),
)
CASES = tuple(
    Case(batch, length, width, dtype, dtype in native)
    for dtype in ("fp32", "bf16")
    for batch, length, width, native in _SHAPES
)


@dataclass(frozen=True)
class Batch:
    """The input of one case, in every spelling a provider may want."""

    hidden: Tensor  # [B, S, H]
    mask: Tensor  # int64 [B, S], 1 where a token is real
    packed: Tensor  # [T, H], the real tokens of hidden
    cu_seqlens: Tensor  # int64 [B + 1]; int32 on GPUs, as engines have it

    @property
    def real_bytes(self) -> int:
        return self.packed.numel() * self.packed.element_size()


def lengths_of(case: Case, generator: torch.Generator) -> Tensor:
    """[B] lengths in 1..S-1 whose mean is S/2 exactly: every drawn length stands beside its complement to S."""
    drawn = torch.randint(1, case.length, (case.batch // 2,), generator=generator)
    middle = torch.full((case.batch % 2,), case.length // 2)
    lengths = torch.cat([drawn, case.length - drawn, middle])
    return lengths[torch.randperm(case.batch, generator=generator)]


def fill(lengths: Tensor, rows: int, width: int, dtype: str, generator: torch.Generator) -> Batch:
    """Right-padded input for lengths [B] on the generator's device. Padding holds ordinary numbers: formulas that
    multiply by the mask would turn a NaN there into a wrong result, and what is timed here is the right one."""
    device, batch = generator.device, len(lengths)
    # A model's features have means of their own; without them the mean of many tokens would be noise about zero.
    feature_means = torch.randn(width, generator=generator, device=device)
    hidden = torch.randn(batch, rows, width, generator=generator, device=device).add_(feature_means)
    hidden = hidden.to(DTYPES[dtype])
    lengths = lengths.to(device)
    mask = (torch.arange(rows, device=device) < lengths[:, None]).to(torch.int64)
    cu_seqlens = torch.zeros(batch + 1, dtype=torch.int64, device=device)
    torch.cumsum(lengths, 0, out=cu_seqlens[1:])
    return Batch(hidden, mask, hidden[mask.bool()], cu_seqlens)


def build(case: Case, seed: int = 0) -> Batch:
    """Seeded input."""
    generator = torch.Generator().manual_seed(seed)
    return fill(lengths_of(case, generator), case.length, case.width, case.dtype, generator)


def exact(batch: Batch) -> Tensor:
    """The normalised mean of every sequence, in float64."""
    rows = zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True)
    means = torch.stack([batch.packed[start:end].double().mean(0) for start, end in rows])
    return torch.nn.functional.normalize(means, dim=-1)


def relative_error(result: Tensor, expected: Tensor) -> float:
    """The relative L2 error of the worst sequence."""
    return float(((result.double() - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
