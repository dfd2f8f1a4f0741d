"""Spans of padded input, starts and ends [B, n]: the bits of each span alone, in the words of padded input."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastpool
from fastpool import spans
from fastpool.demo.measure import peak_bytes
from fastpool.testing import DTYPES, cpu_backends, function_of, gradients, own_arguments, same_bits, variants

B, S, H = 3, 70, 12
STARTS = torch.tensor([[0, 3, 69, 70], [1, 0, 33, 5], [64, 0, 20, 7]])
ENDS = torch.tensor([[70, 3, 70, 70], [70, 70, 65, 6], [70, 1, 50, 64]])  # overlapping, empty, of one row, in any order

# Of a contiguous [B, S, H]: the same values in other memory.
STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "slice": lambda x: torch.nn.functional.pad(x, (0, 0, 1, 2), value=float("nan"))[:, 1:-2],
    "columns": lambda x: torch.nn.functional.pad(x, (3, 2), value=float("nan"))[..., 3:-2],
    "slice of columns": lambda x: torch.nn.functional.pad(x, (0, 3, 2, 2), value=float("nan"))[:, 2:-2, :-3],
    "tokens first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "columns first": lambda x: x.mT.contiguous().mT,
}
MASKS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "none": lambda real: None,
    "bool": lambda real: real,
    "int64 by columns": lambda real: real.long().T.contiguous().T,
    "uint16 slice": lambda real: torch.nn.functional.pad(real.to(torch.uint16), (1, 1))[:, 1:-1],
}


def real_tokens(batch: int = B, rows: int = S) -> Tensor:
    return torch.rand(batch, rows, generator=torch.Generator().manual_seed(1)) > 0.3


def states(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(B, S, H, generator=torch.Generator().manual_seed(0)).to(dtype)


def own_of(given: str | None) -> dict[str, Tensor]:
    return own_arguments(given, torch.rand(B, S, generator=torch.Generator().manual_seed(2)) + 0.125, H)


def alone(
    pool: Callable[..., Tensor], hidden: Tensor, mask: Tensor | None, own: dict[str, Tensor], **more: Any
) -> Tensor:
    """Each span as a text of its own."""
    vectors = []
    for b in range(B):
        for start, end in zip(STARTS[b].tolist(), ENDS[b].tolist(), strict=True):
            of_span = {name: x[b : b + 1, start:end] if name != "query" else x for name, x in own.items()}
            masked = None if mask is None else mask[b : b + 1, start:end]
            vectors.append(pool(hidden[b : b + 1, start:end], mask=masked, **of_span, **more))
    return torch.cat(vectors).unflatten(0, (B, -1))


@pytest.mark.parametrize("backend", [name for name in cpu_backends() if name != "triton"])
@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize(("mode", "given"), variants())
def test_bits_of_each_span_alone(mode: str, given: str | None, strides: str, backend: str) -> None:
    pool = function_of(mode)
    for i, mask in enumerate(MASKS):
        hidden, masked = states(DTYPES[(i + len(strides)) % 4]), MASKS[mask](real_tokens())
        more = {"truncate_dim": 7, "normalize": True, "out_dtype": torch.float64} if i % 2 else {}
        with fastpool.backend(backend):
            bounds = [bound.int() if i == 2 else bound for bound in (STARTS, ENDS)]
            found = pool(
                STRIDES[strides](hidden), mask=masked, starts=bounds[0], ends=bounds[1], **own_of(given), **more
            )
            assert same_bits(found, alone(pool, hidden, masked, own_of(given), **more)), mask


@pytest.mark.parametrize("shape", [(8, 64, 96), (64, 1, 96)])
def test_memory(shape: tuple[int, int, int]) -> None:
    """Where columns or one token lie apart, and of a short slice of a long buffer, no more is made than hidden is."""
    texts, rows, width = shape
    laid = torch.randn(texts, width, rows).transpose(1, 2), torch.randn(texts, 40 * rows, width)[:, :rows]
    for hidden in (*laid, torch.randn(texts, rows, width)):
        leaf, made = hidden.requires_grad_(), []

        class Made(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                result = function(*args, **(kwargs or {}))
                made.append(result.numel() if isinstance(result, Tensor) else 0)  # noqa: B023  # used at once
                return result

        with Made():
            ends = torch.full((texts, 1), rows)
            fastpool.mean(leaf, starts=torch.zeros_like(ends), ends=ends).sum().backward()
        assert max(made) <= 2 * texts * rows * width


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize(("mode", "given"), variants())
def test_gradients(mode: str, given: str | None, strides: str) -> None:
    """Those of the same segments in packed input; padding, holes and rows of no span get 0."""
    pool, bounds = function_of(mode), {"starts": STARTS[:, 1:], "ends": ENDS[:, 1:]}
    mask, own = real_tokens(), own_of(given)
    hidden = STRIDES[strides](states())
    gradient = torch.randn(B, 3, H, generator=torch.Generator().manual_seed(3))
    found = gradients(pool, {"hidden": hidden, "mask": mask, **own, **bounds}, gradient, normalize=True)
    flat = {name: x if name == "query" else x.flatten() for name, x in own.items()}
    packed = {name: (x + torch.arange(B)[:, None] * S).flatten() for name, x in bounds.items()}
    packed |= {"hidden": states().flatten(0, 1), "mask": mask.flatten(), **flat}
    expected = gradients(pool, packed, gradient.flatten(0, 1), normalize=True)
    assert all(same_bits(a, b.view(a.shape)) for a, b in zip(found, expected, strict=True))


def test_queries() -> None:
    """For all spans, or of each span's own."""
    hidden, bounds = states(), {"starts": STARTS, "ends": ENDS}
    queries = torch.randn(B, 4, 2, H, generator=torch.Generator().manual_seed(4))
    shared = fastpool.attention(hidden, queries[0, 0], **bounds)
    own = fastpool.attention(hidden, queries, scale=0.5, **bounds)
    assert shared.shape == own.shape == (B, 4, 2, H)
    for k in range(2):
        assert same_bits(shared[:, :, k], fastpool.attention(hidden, queries[0, 0, k], **bounds))
    for j in range(4):
        bound = {name: x[:, j] for name, x in bounds.items()}
        assert same_bits(own[:, j], fastpool.attention(hidden, queries[:, j], scale=0.5, **bound))
    (of_query,) = gradients(fastpool.attention, {"hidden": hidden, "query": queries, **bounds}, torch.ones_like(own))[
        1:
    ]
    assert of_query.shape == queries.shape


def test_one_of_starts_and_ends_and_lengths() -> None:
    hidden = states()
    whole = {"starts": torch.zeros_like(STARTS), "ends": torch.full_like(ENDS, S)}
    for given in ({"starts": STARTS}, {"ends": ENDS}):
        assert same_bits(fastpool.mean(hidden, **given), fastpool.mean(hidden, **{**whole, **given}))
    assert same_bits(fastpool.mean(hidden, lengths=ENDS), fastpool.mean(hidden, ends=ENDS))


@pytest.mark.parametrize("shape", [(0, 5, 3, 4), (2, 0, 3, 4), (2, 5, 0, 4), (2, 5, 3, 0), (0, 0, 0, 4)], ids=str)
def test_nothing_to_pool(shape: tuple[int, ...]) -> None:
    texts, rows, n, width = shape
    none = torch.zeros(texts, n, dtype=torch.int64)
    found = fastpool.mean(torch.ones(texts, rows, width), starts=none, ends=none, normalize=True)
    assert same_bits(found, torch.zeros(texts, n, width))


def test_several_modes() -> None:
    hidden, mask, bounds = states(), real_tokens(), {"starts": STARTS, "ends": ENDS}
    for modes in (("mean", "max"), ("weighted_mean", "softmax_mean"), ("cls",)):
        own = {
            **own_of("weights" if "weighted_mean" in modes else None),
            **own_of("scores" if "softmax_mean" in modes else None),
        }
        found = fastpool.pool(hidden, mask, modes=modes, normalize=True, **own, **bounds)
        for j in range(4):
            bound = {name: x[:, j] for name, x in bounds.items()}
            assert same_bits(found[:, j], fastpool.pool(hidden, mask, modes=modes, normalize=True, **own, **bound))
        assert same_bits(fastpool.nn.Pooling(modes, normalize=True)(hidden, mask, **own, **bounds), found)


MODULES: dict[str, Callable[[], torch.nn.Module]] = {
    "linear": lambda: fastpool.nn.AttentionPooling(H, queries=2, normalize=True),
    "tanh": lambda: fastpool.nn.AttentionPooling(H, scorer="tanh", inner=5, truncate_dim=7),
    "multihead": lambda: fastpool.nn.AttentionPooling.from_multihead(
        torch.nn.MultiheadAttention(H, 3, batch_first=True), torch.randn(1, 2, H)
    ),
    "one of multihead": lambda: fastpool.nn.AttentionPooling.from_multihead(
        torch.nn.MultiheadAttention(H, 3, batch_first=True), torch.randn(1, 1, H), normalize=True
    ),
    "latent": lambda: fastpool.nn.LatentAttention(H, latents=4, heads=2),
}


@pytest.mark.parametrize("module", MODULES)
def test_modules(module: str) -> None:
    """Each span is what the module gives for a padded call; NaN outside of spans harms no gradient."""
    torch.manual_seed(0)
    pooling, mask = MODULES[module](), real_tokens()
    starts, ends = STARTS[:, 1:3], ENDS[:, 1:3]
    at = torch.arange(S)
    covered = ((at >= starts[..., None]) & (at < ends[..., None])).any(1)
    hidden = states().masked_fill(~(mask & covered)[..., None], float("nan")).requires_grad_()
    found = pooling(hidden, mask, starts=starts, ends=ends)
    for j in range(2):
        expected = pooling(hidden, mask, starts=starts[:, j], ends=ends[:, j])
        torch.testing.assert_close(found[:, j], expected, rtol=1e-5, atol=1e-6)
    found.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in pooling.parameters())
    with pytest.raises(ValueError, match=r"ends\[:, 0\] must lie between 0 and 70, got ends\[:, 0\]\[2\] = 71"):
        pooling(hidden, mask, starts=starts, ends=torch.tensor([[9, 9], [9, 9], [71, 50]]))


def test_a_slice_is_not_copied() -> None:
    hidden, mask = torch.randn(4, 514, 96)[:, 1:-1], torch.ones(4, 512, dtype=torch.bool)
    bounds = {"starts": torch.tensor([[0, 9]] * 4), "ends": torch.tensor([[512, 400]] * 4)}
    assert peak_bytes(lambda: fastpool.mean(hidden, mask, **bounds)) < hidden.nbytes / 10


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("strides", ["contiguous", "slice"])
def test_whole_graph(strides: str, recorded: bool) -> None:
    torch._dynamo.reset()
    mask = real_tokens()

    def pooled(hidden: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
        return fastpool.mean(hidden, mask, starts=starts, ends=ends, normalize=True)

    compiled = torch.compile(pooled, fullgraph=True, backend="aot_eager", dynamic=True)
    results = []
    for function in (compiled, pooled):
        hidden = STRIDES[strides](states()).requires_grad_(recorded)
        results.append(function(hidden, STARTS, ENDS))
        if recorded:
            results += torch.autograd.grad(results[-1][..., 0].sum(), hidden)
    half = len(results) // 2
    assert all(same_bits(a, b) for a, b in zip(results[:half], results[half:], strict=True))
    with pytest.raises(ValueError, match=r"fastpool\.mean: starts must lie between 0 and"):
        compiled(hidden, STARTS, ENDS + 1)


def test_export() -> None:
    class Pooled(torch.nn.Module):
        def forward(self, hidden: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
            return fastpool.max(hidden, starts=starts, ends=ends)

    program = torch.export.export(Pooled(), (states(), STARTS, ENDS)).module()
    assert same_bits(program(states(), STARTS, ENDS), fastpool.max(states(), starts=STARTS, ends=ENDS))


def test_what_is_out_of_its_text_reads_no_other() -> None:
    """On a GPU, where values are clamped; what runs backwards is empty."""
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"), shape=(2, 5, 3))
    starts, ends = torch.tensor([[-9, 0, 7], [6, 4, -1]]), torch.tensor([[2, 6, 9], [2**62, 3, 5]])
    first, behind = spans._bounds(on_gpu, 7, 12, starts, ends)
    assert first.tolist() == [0, 0, 5, 12, 11, 7]
    assert behind.tolist() == [2, 5, 5, 12, 10, 12]


def test_validation_names_the_token() -> None:
    fastpool.validate()
    hidden = states()
    hidden[2, 30, 4] = float("inf")
    with pytest.raises(ValueError, match=r"result of segment 2 is not finite: hidden\[2, 30, 4\] is inf"):
        fastpool.mean(hidden, starts=STARTS, ends=ENDS)


def test_explain() -> None:
    told = fastpool.explain(states(), starts=STARTS, ends=ENDS, mode="attention", query=torch.randn(H), scale=2.0)
    assert (told.op, told.backend) == ("fastpool.attention", "native")
    with pytest.raises(ValueError, match=r"ends\[:, 0\] must lie between 0 and 70"):
        fastpool.explain(states(), starts=STARTS, ends=ENDS + 1)


def freed() -> Tensor:
    mask = torch.ones(B, S, dtype=torch.int64).T.contiguous().T
    mask.untyped_storage().resize_(0)
    return mask


def put(x: Tensor, *at: int, value: int) -> Tensor:
    x = x.clone()
    x[at] = value
    return x


BETWEEN = r"must lie between 0 and 70, got "
WRONG: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("mean", {"ends": ENDS.to("meta")}, ValueError, "ends must be on hidden's device, cpu, got meta"),
    ("mean", {"ends": put(ENDS, 1, 2, value=71)}, ValueError, rf"^fastpool\.mean: ends\[:, 2\] {BETWEEN}ends\[:, 2\]\[1\] = 71"),
    ("max", {"starts": put(STARTS, 0, 3, value=-1)}, ValueError, rf"starts\[:, 3\] {BETWEEN}starts\[:, 3\]\[0\] = -1"),
    ("mean", {"ends": put(ENDS, 2, 0, value=2**62)}, ValueError, rf"ends\[:, 0\] {BETWEEN}"),
    ("mean", {"starts": put(STARTS, 2, 0, value=-(2**63))}, ValueError, rf"starts\[:, 0\] {BETWEEN}"),
    ("cls", {"starts": put(STARTS, 1, 3, value=9)}, ValueError, r"starts\[:, 3\] must not be greater than ends\[:, 3\], got starts\[:, 3\]\[1\] = 9 and ends\[:, 3\]\[1\] = 6"),
    ("mean", {"starts": None, "ends": None, "lengths": ENDS + 1}, ValueError, rf"lengths\[:, 0\] {BETWEEN}"),
    ("mean", {"starts": STARTS.float()}, TypeError, "starts must be int32 or int64, got float32"),
    ("mean", {"starts": STARTS.tolist()}, TypeError, "starts must be a torch.Tensor, got list"),
    ("mean", {"starts": STARTS[:2]}, ValueError, r"starts must have one dimension, or for spans of padded input be \[3, n\], got shape \[2, 4\]"),
    ("mean", {"ends": ENDS[:, 0]}, ValueError, r"ends must have one dimension, or for spans of padded input be \[3, n\], got shape \[3\]"),
    ("mean", {"ends": ENDS[:, :3]}, ValueError, r"starts and ends must have one shape, got \[3, 4\] and \[3, 3\]"),
    ("mean", {"lengths": ENDS}, ValueError, "lengths is another name for ends, got both"),
    ("mean", {"cu_seqlens": torch.tensor([0, 3])}, ValueError, "cu_seqlens goes with packed"),
    ("mean", {"hidden": torch.zeros(S, H)}, ValueError, r"starts must have one dimension, got shape \[3, 4\]"),
    ("mean", {"hidden": states().long()}, TypeError, "hidden must be float16, bfloat16, float32 or float64, got int64"),
    ("mean", {"hidden": [1.0]}, TypeError, "hidden must be a torch.Tensor, got list"),
    ("mean", {"mask": torch.ones(S, B)}, ValueError, r"mask must have hidden's shape without its last dimension, \[3, 70\], got \[70, 3\]"),
    ("mean", {"mask": torch.ones(B, S)}, TypeError, "mask must be bool or an integer type"),
    ("mean", {"mask": put(torch.ones(B, S).long(), 2, 30, value=2)}, ValueError, r"mask must hold 0 and 1 alone, got mask\[2, 30\] = 2"),
    ("mean", {"mask": freed()}, ValueError, "mask must have memory for its elements"),
    ("mean", {"mask": [[1]]}, TypeError, "mask must be a torch.Tensor, got list"),
    ("weighted_mean", {"weights": torch.ones(B, S - 1)}, ValueError, r"weights must have .*\[3, 70\], got \[3, 69\]"),
    ("weighted_mean", {"weights": torch.full((B, S), 1e300, dtype=torch.float64)}, ValueError, r"got weights\[0, 0\] = 1e\+300"),
    ("softmax_mean", {}, ValueError, "scores must be given, got none"),
    ("softmax_mean", {"scores": torch.ones(B, S).long()}, TypeError, "scores must be float16"),
    ("attention", {"query": torch.ones(B, 2, H)}, ValueError, r"query beside spans must be \[H\], \[K, H\] or \[3, 4, K, H\], got shape \[3, 2, 12\]"),
    ("attention", {"query": torch.ones(B, 3, 2, H)}, ValueError, r"got shape \[3, 3, 2, 12\]"),
    ("attention", {"query": torch.ones(H + 1)}, ValueError, "query must have shape"),
    ("attention", {"query": [1.0]}, TypeError, "query must be a torch.Tensor, got list"),
    ("mean", {"truncate_dim": H + 1}, ValueError, "truncate_dim must lie between 1 and the last dimension, 12, got 13"),
    ("mean", {"dim": 1}, TypeError, "fastpool.mean has no dim"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("mode", "given", "error", "words"), WRONG, ids=lambda one: one if isinstance(one, str) else ""
)
@pytest.mark.parametrize("backend", [name for name in cpu_backends() if name != "triton"])
def test_errors(mode: str, given: dict[str, Any], error: type[Exception], words: str, backend: str) -> None:
    arguments = {"hidden": states(), "starts": STARTS, "ends": ENDS, **given}
    with fastpool.backend(backend), pytest.raises(error, match=words):
        function_of(mode)(**arguments)
