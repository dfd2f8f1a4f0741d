"""What each way of pooling gives where pooling goes wrong: the same inputs for all, small, without a clock."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor

import fastpool
from benchmarks.cases import DTYPES, Batch
from benchmarks.measure import Device, words
from benchmarks.providers import BARE_LOOP, PROVIDERS, Provider, backend_of
from benchmarks.tables import table_of
from fastpool.testing import same_bits

_WIDTH = 64


@dataclass(frozen=True)
class Finding:
    """What a provider gave; `fine`: what it should have, None where the question does not arise."""

    fine: bool | None
    gave: str


@dataclass(frozen=True)
class Trial:
    name: str
    about: str
    run: Callable[[Provider, torch.device], Finding]


def _batch(texts: list[Tensor], padding: float = 1.0) -> Batch:
    """A right-padded batch of texts, each [n, H]."""
    lengths = torch.tensor([len(one) for one in texts])
    hidden = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=padding)
    mask = (torch.arange(hidden.shape[1]) < lengths[:, None]).long().to(hidden.device)
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int().to(hidden.device)
    return Batch(hidden, mask, torch.cat(texts), cu_seqlens)


def _texts(lengths: list[int], dtype: str, device: torch.device, mean: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(length, _WIDTH, generator=generator) + mean for length in lengths]
    return [one.to(DTYPES[dtype]).to(device) for one in drawn]


def _pool(provider: Provider, batch: Batch) -> Tensor:
    return provider.prepare(batch, False)()


def _state(result: Tensor) -> str:
    """Nothing for finite numbers, or what else there is."""
    return "NaN" if result.isnan().any() else "inf" if result.isinf().any() else ""


def _error(result: Tensor, texts: list[Tensor]) -> float:
    """The error of the worst text, relative to its mean in float64."""
    exact = torch.stack([one.double().mean(0) for one in texts])
    return float(((result.double() - exact).norm(dim=-1) / exact.norm(dim=-1)).max())


def _overflow(provider: Provider, device: torch.device) -> Finding:
    texts = [torch.full((4096, _WIDTH), 20.0, dtype=torch.float16, device=device)]
    result = _pool(provider, _batch(texts))
    fine = _error(result, texts) < 1e-3  # NaN is not
    return Finding(fine, _state(result) or ("right" if fine else f"{_error(result, texts):.0e} off"))


def _padding(provider: Provider, device: torch.device) -> Finding:
    if provider.layout == "packed":
        return Finding(None, "no padding")
    texts = _texts([3, 9, 5], "fp32", device)
    result = _pool(provider, _batch(texts, padding=float("nan")))
    fine = _error(result, texts) < 1e-5  # NaN is not
    return Finding(fine, _state(result) or ("right" if fine else "wrong"))


def _count(provider: Provider, device: torch.device) -> Finding:
    """Tokens that are all the same have that token as their mean; 257 is 256 in bfloat16."""
    texts = [torch.ones(257, _WIDTH, dtype=torch.bfloat16, device=device)]
    result = _pool(provider, _batch(texts)).double()
    fine = bool((result == 1).all())
    return Finding(fine, _state(result) or ("right" if fine else f"{100 * (result.mean().item() - 1):+.2g} %"))


def _long(provider: Provider, device: torch.device) -> Finding:
    """One rounding to bfloat16 costs up to 2^-9, 0.2 %; twice that is allowed."""
    texts = _texts([32768], "bf16", device)
    result = _pool(provider, _batch(texts))
    error = _error(result, texts)
    return Finding(error <= 2**-8, _state(result) or f"{error:.0e} off")


def _neighbours(provider: Provider, device: torch.device) -> Finding:
    """The bits of a text alone, and among others: before and behind it, longer and shorter."""
    differing = []
    for dtype in DTYPES:
        texts = _texts([300, 7, 1000, 64, 129], dtype, device)
        together = _pool(provider, _batch(texts))
        for i, text in enumerate(texts):
            torch.compiler.reset()
            if not same_bits(_pool(provider, _batch([text])), together[i : i + 1]):
                differing.append(dtype)
                break
    return Finding(not differing, "differs in " + ", ".join(differing) if differing else "same bits")


def _empty(provider: Provider, device: torch.device) -> Finding:
    gave: dict[str, None] = {}
    for lengths in ([4, 0, 6], [0, 2, 3]):
        texts, empty = _texts(lengths, "fp32", device), lengths.index(0)
        result = _pool(provider, _batch(texts))
        gave[_state(result[empty]) or ("another text's" if result[empty].any() else "zeros")] = None
        others = [i for i in range(3) if i != empty]
        if not _error(result[others], [texts[i] for i in others]) < 1e-5:
            gave["wrong neighbours"] = None
    return Finding(list(gave) == ["zeros"], ", ".join(gave))


TRIALS = (
    Trial("fp16 sums", "4096 tokens of 20 in float16: their sum is beyond 65,504, their mean is not", _overflow),
    Trial("NaN in padding", "padding that holds NaN, as uninitialised memory may", _padding),
    Trial("counts", "257 equal tokens in bfloat16, which counts 256, 258", _count),
    Trial("long text", "32,768 tokens in bfloat16: relative error to float64", _long),
    Trial("neighbours", "a text alone and in a batch of five: the same bits?", _neighbours),
    Trial("empty text", "a text without tokens, between two others and before them", _empty),
)


@torch.inference_mode()
def measure(console: Console, device: Device) -> dict[str, dict[str, Finding]]:
    """What each provider gave in each trial."""
    found: dict[str, dict[str, Finding]] = {}
    for provider in PROVIDERS:
        if device.device.type in provider.devices and provider is not BARE_LOOP:
            found[provider.name] = {trial.name: _try(trial, provider, device.device) for trial in TRIALS}
    table = table_of("quality of results", "", *(trial.name for trial in TRIALS))
    for name, findings in found.items():
        styles = {True: "green", False: "red", None: "dim"}
        table.add_row(name, *(Text(one.gave, style=styles[one.fine]) for one in findings.values()))
    console.print(table)
    for trial in TRIALS:
        console.print(f"{trial.name}: {trial.about}", style="dim", highlight=False, soft_wrap=True)
    return found


def _try(trial: Trial, provider: Provider, device: torch.device) -> Finding:
    torch.compiler.reset()  # each trial is compiled for itself
    try:
        with fastpool.backend(provider.backend):
            if reason := backend_of(provider, _batch(_texts([1], "fp32", device)))[1]:
                return Finding(None, reason)
            return trial.run(provider, device)
    except ImportError:
        return Finding(None, "not installed")
    except Exception as error:
        return Finding(False, words(error)[:40])
