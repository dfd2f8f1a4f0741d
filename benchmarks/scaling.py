"""Cost as work grows: time against tokens, from a few texts to more than memory holds, on data as warm as it gets.

Texts of 100 tokens, MiniLM's width, bfloat16. Up to _ROWS tokens stand in memory by themselves; beyond, texts read the
same rows again and again (spans may overlap), far more than any cache holds, so that memory is read as often.
"""

from collections.abc import Callable

import torch
from rich.console import Console

import fastpool
from benchmarks.cases import Batch
from benchmarks.measure import Device, Run, words
from benchmarks.providers import PROVIDERS, Provider, ours
from benchmarks.tables import table_of

_LENGTH, _WIDTH = 100, 384
_ROWS = 2_000_000  # 1.5 GB
_FASTPOOL = {"cpu": "native", "cuda": "auto"}
_PEERS = ("embedding_bag", "bmm", "model card")
_MOST_BYTES = {"model card": 1 << 30}  # it makes three tensors of twice its input's size


def steps(most: float) -> list[int]:
    """100, 300, 1000, ..., most."""
    found, tokens = [], 100
    while tokens <= most:
        found += [tokens, 3 * tokens]
        tokens *= 10
    return [tokens for tokens in found if tokens <= most]


@torch.inference_mode()
def measure(console: Console, device: Device, most: float) -> list[dict[str, object]]:
    """For each number of tokens, microseconds by provider and the bytes of their states."""
    sizes = steps(most)
    rows = min(_ROWS, max(sizes))
    generator = torch.Generator(device.device).manual_seed(0)
    packed = torch.empty(rows, _WIDTH, dtype=torch.bfloat16, device=device.device)
    for chunk in packed.split(100_000):
        chunk.copy_(torch.randn(chunk.shape, generator=generator, device=device.device))
    backend = _FASTPOOL[device.device.type]
    by_name = {provider.name: provider for provider in PROVIDERS}
    providers = [by_name[ours(backend, "packed")], *(by_name[name] for name in _PEERS)]
    columns = [provider.name for provider in providers]
    table = table_of(
        f"cost as work grows: texts of {_LENGTH} tokens, H{_WIDTH} bf16, warm; us", "tokens", "MB", *columns
    )
    found: list[dict[str, object]] = []
    for tokens in sizes:
        nbytes = tokens * _WIDTH * packed.element_size()
        us: dict[str, float] = {}
        for provider in providers:
            call = _call(provider, packed, tokens, backend)
            if call is None or nbytes > _MOST_BYTES.get(provider.name, nbytes):
                continue
            try:
                with fastpool.backend(provider.backend):
                    us[provider.name] = round(1e6 * device.seconds(call()), 3)
            except Exception as error:
                console.print(f"  {provider.name}: {words(error)}", style="yellow", highlight=False)
        found.append({"tokens": tokens, "bytes": nbytes, "us": us})
        cells = [f"{us[name]:.1f}" if name in us else "-" for name in columns]
        table.add_row(f"{tokens:.0e}".replace("e+0", "e"), f"{nbytes / 1e6:.3g}", *cells)
    console.print(table)
    return found


def _call(provider: Provider, packed: torch.Tensor, tokens: int, backend: str) -> Callable[[], Run] | None:
    """What makes the call, if this provider can do it."""
    batch, width = tokens // _LENGTH, packed.shape[1]
    if tokens <= len(packed):
        part = packed[:tokens]
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=packed.device) * _LENGTH
        mask = torch.ones(batch, _LENGTH, dtype=torch.int64, device=packed.device)
        return lambda: provider.prepare(Batch(part.view(batch, _LENGTH, width), mask, part, cu_seqlens), True)
    if provider.name != ours(backend, "packed"):
        return None
    starts = torch.arange(batch, device=packed.device) * _LENGTH % len(packed)
    return lambda: lambda: fastpool.mean(packed, starts=starts, ends=starts + _LENGTH, normalize=True)
