"""How far each way of pooling is off on what a real model makes, not on random numbers.

256 docstrings through all-MiniLM-L6-v2, their token states as one batch in each 16-bit dtype, against means in float64
of the same states.
"""

import torch
from rich.console import Console
from torch import Tensor

import fastpool
from benchmarks.cases import DTYPES, Batch
from benchmarks.measure import Device, words
from benchmarks.providers import BARE_LOOP, PROVIDERS, backend_of
from benchmarks.tables import table_of
from fastpool.demo.corpus import collect, sample
from fastpool.demo.model import Model

_TEXTS = 256


def token_states() -> list[Tensor]:
    """[n, H] of each text, float32."""
    texts = [doc.text for doc in sample(collect(), _TEXTS)]
    found: list[Tensor] = []
    for one in Model().token_states(texts, batch_size=32):
        found += [row[mask.bool()] for row, mask in zip(one.hidden, one.mask, strict=True)]
    return found


def batch_of(states: list[Tensor], dtype: torch.dtype, device: torch.device) -> Batch:
    alone = [one.to(dtype) for one in states]
    lengths = torch.tensor([len(one) for one in alone])
    hidden = torch.nn.utils.rnn.pad_sequence(alone, batch_first=True)
    mask = (torch.arange(hidden.shape[1]) < lengths[:, None]).long()
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    return Batch(*(one.to(device) for one in (hidden, mask, torch.cat(alone), cu_seqlens)))


@torch.inference_mode()
def measure(console: Console, device: Device) -> dict[str, dict[str, dict[str, float]]]:
    """By dtype and provider: the largest error of a column of a mean, and the least cosine to the exact mean."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    states = token_states()
    for name in ("bf16", "fp16"):
        batch = batch_of(states, DTYPES[name], device.device)
        exact = fastpool.mean(batch.packed.double(), cu_seqlens=batch.cu_seqlens)
        table = table_of(f"a real model's states, {name}: {len(batch.packed)} tokens", "", "error", "cosine")
        found[name] = {}
        for provider in PROVIDERS:
            if device.device.type not in provider.devices or provider is BARE_LOOP:
                continue
            try:
                with fastpool.backend(provider.backend):
                    if backend_of(provider, batch)[1]:
                        continue
                    means = provider.prepare(batch, False)().double()
            except Exception as error:
                console.print(f"  {provider.name}: {words(error)}", style="yellow", highlight=False)
                continue
            off, cosine = (means - exact).abs().max().item(), torch.cosine_similarity(means, exact).min().item()
            found[name][provider.name] = {"error": off, "cosine": cosine}
            table.add_row(provider.name, f"{off:.2g}", f"{cosine:.7f}")
        console.print(table)
    return found
