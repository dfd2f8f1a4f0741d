"""What modules of sentence-transformers give through fastpool: their answers in every layout, and where they differ.

Every row of the table in docs/sentence-transformers.md has its test under "Where results differ".
"""

import itertools
from typing import Any

import pytest
import torch
from helpers.sentence_transformers_cases import (
    DTYPES,
    LAYOUTS,
    LONG,
    MODES,
    THREE,
    TOLERANCE,
    WIDTH,
    assert_same,
    both,
    modules,
    packed,
    padded,
    run,
    texts,
)
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import fastpool
from fastpool.integrations.sentence_transformers import patch, unpatch
from fastpool.models.pooling import POOLING_MODES
from fastpool.testing import same_bits

# Their answers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", [*MODES, MODES, ("max", "cls")], ids=str)
def test_pooling(mode: Any, layout: str, dtype: torch.dtype) -> None:
    assert_same(*both(LAYOUTS[layout](texts(dtype)), mode))


@pytest.mark.parametrize(
    "prompt",
    [0, 3, 2.5, torch.tensor([3]), torch.tensor([3] * 3), torch.tensor([[3]] * 3)],
    ids=["0", "3", "2.5", "[1]", "[B]", "[B, 1]"],
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", [*MODES, MODES], ids=str)
def test_a_prompt_is_left_out(mode: Any, layout: str, prompt: Any) -> None:
    batch = texts(lengths=LONG)
    assert_same(*both({**LAYOUTS[layout](batch), "prompt_length": prompt}, mode, include_prompt=False))
    included, alone = both({**LAYOUTS[layout](batch), "prompt_length": prompt}, mode)
    assert_same(included, alone)


@pytest.mark.parametrize("weights", [torch.float32, torch.float64, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", [*MODES, MODES], ids=str)
def test_token_weights_sum(mode: Any, dtype: torch.dtype, weights: torch.dtype) -> None:
    total = torch.tensor([3.5, 17.25, 0.0]).to(weights)
    for side in ("right", "left"):
        features = padded([*texts(dtype, LONG)[:2], torch.zeros(4, WIDTH, dtype=dtype)], side)
        features["token_weights_sum"] = total
        assert_same(*both(features, mode), dtype)
        assert_same(*both({**features, "prompt_length": 1}, mode, include_prompt=False), dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cls_token_embeddings(layout: str) -> None:
    theirs, ours = both({**LAYOUTS[layout](texts()), "cls_token_embeddings": torch.randn(4, WIDTH)}, ("cls", "mean"))
    assert same_bits(theirs[:, :WIDTH], ours[:, :WIDTH])
    assert_same(theirs, ours)


def test_strided_token_embeddings() -> None:
    features = padded(texts())
    features["token_embeddings"] = features["token_embeddings"].mT.contiguous().mT
    assert_same(*both(features, "mean"))


def test_the_bits_are_the_functions_own() -> None:
    features = padded(texts(torch.bfloat16), "left")
    for theirs, ours in POOLING_MODES.items():
        result = run(patch(modules.Pooling(WIDTH, pooling_mode=theirs)), features)
        assert same_bits(result, getattr(fastpool, ours)(features["token_embeddings"], features["attention_mask"]))
    features = padded(texts(), "left")
    fused = fastpool.mean(features["token_embeddings"], features["attention_mask"], normalize=True)
    assert same_bits(run(patch(nn.Sequential(modules.Pooling(WIDTH), modules.Normalize())), features), fused)
    x = torch.randn(3, 5, WIDTH)
    normalize = patch(modules.Normalize("token_embeddings", "normal"))
    assert same_bits(normalize({"token_embeddings": x})["normal"], fastpool.l2_normalize(x))
    assert normalize({"sentence_embedding": x}).keys() == {"sentence_embedding"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normalize(dtype: torch.dtype) -> None:
    x = torch.cat([torch.randn(5, WIDTH), torch.zeros(1, WIDTH)])[:, ::2].to(dtype)  # strided
    normalize = modules.Normalize()
    theirs = normalize({"sentence_embedding": x})["sentence_embedding"].nan_to_num()  # of float16's zero vector
    ours = patch(normalize)({"sentence_embedding": x})["sentence_embedding"]
    torch.testing.assert_close(ours, theirs, rtol=2 * TOLERANCE[dtype]["rtol"], atol=1e-6)


def test_normalize_under_autocast() -> None:
    """On GPUs autocast makes norms float32, on CPUs it does not: fake tensors know."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    normalize = modules.Normalize()
    with FakeTensorMode():
        for device, dtype in itertools.product(("cuda", "cpu"), (torch.bfloat16, torch.float32)):
            x = torch.empty(2, 3, dtype=dtype, device=device)
            was = torch.is_autocast_enabled(device)
            torch.set_autocast_enabled(device, True)
            try:
                theirs = unpatch(normalize)({"sentence_embedding": x})["sentence_embedding"].dtype
                ours = patch(normalize)({"sentence_embedding": x})["sentence_embedding"].dtype
            finally:
                torch.set_autocast_enabled(device, was)
            assert ours == theirs == (torch.float32 if device == "cuda" else dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", [*MODES, MODES], ids=str)
def test_gradients(mode: Any, layout: str) -> None:
    features = {**LAYOUTS[layout](texts(torch.float64, LONG)), "prompt_length": 2}
    gradients = []
    for change in (unpatch, patch):
        model = change(
            nn.Sequential(modules.Pooling(WIDTH, pooling_mode=mode, include_prompt=False), modules.Normalize())
        )
        hidden = features["token_embeddings"].clone().requires_grad_()
        result = model({**features, "token_embeddings": hidden * 1})["sentence_embedding"]
        (result * torch.arange(result.numel()).view_as(result)).sum().backward()
        gradients.append(hidden.grad)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-9)
    assert gradients[0].abs().max() > 0.1


def test_compile() -> None:
    pooling = patch(
        nn.Sequential(modules.Pooling(WIDTH, pooling_mode=MODES, include_prompt=False), modules.Normalize())
    )
    compiled = torch.compile(pooling, fullgraph=True, backend="aot_eager")
    for layout in ("left", "packed"):
        features = {**LAYOUTS[layout](texts(lengths=LONG)), "prompt_length": 2}
        assert same_bits(compiled(dict(features))["sentence_embedding"], pooling(dict(features))["sentence_embedding"])


# Where results differ


@pytest.mark.parametrize("filling", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", MODES)
def test_what_stands_in_padding(mode: str, filling: float) -> None:
    theirs, ours = both(padded(texts(), filling=filling), mode)
    assert theirs.isnan().any() == (mode in ("mean", "mean_sqrt_len_tokens", "weightedmean"))
    assert_same(both(padded(texts()), mode)[0], ours)


@pytest.mark.parametrize(("mode", "wrong"), [("max", float("-inf")), ("cls", 9.0)])
def test_a_row_of_padding(mode: str, wrong: float) -> None:
    theirs, ours = both(padded([THREE, THREE[:0]], filling=9.0), mode)
    assert (theirs[1].item(), ours[1].item()) == (wrong, 0)
    model = nn.Sequential(modules.Pooling(1, pooling_mode="max"), modules.Normalize())
    assert run(model, padded([THREE, THREE[:0]]))[1].isnan()
    assert run(patch(model), padded([THREE, THREE[:0]]))[1].item() == 0


@pytest.mark.parametrize(("mode", "wrong"), [("max", float("-inf")), ("cls", 1.0), ("lasttoken", 4.0)])
def test_an_empty_text_among_packed_ones(mode: str, wrong: float) -> None:
    theirs, ours = both(packed([THREE, THREE[:0], THREE]), mode)
    assert (theirs[1].item(), ours[1].item()) == (wrong, 0)


@pytest.mark.parametrize(
    ("layout", "mode", "wrong"),
    [
        ("right", "cls", 1.0),
        ("packed", "cls", 1.0),
        ("packed", "lasttoken", 4.0),
        ("right", "max", float("-inf")),
        ("packed", "max", float("-inf")),
    ],
)
def test_nothing_but_prompt(layout: str, mode: str, wrong: float) -> None:
    for prompt in (3, 9):
        features = {**LAYOUTS[layout]([THREE]), "prompt_length": prompt}
        theirs, ours = both(features, mode, include_prompt=False)
        assert (theirs.item(), ours.item()) == (wrong, 0)


def test_prompts_of_different_lengths() -> None:
    for layout in (padded, packed):
        features = {**layout([THREE, THREE]), "prompt_length": torch.tensor([1, 2])}
        theirs, ours = both(features, "mean", include_prompt=False)
        assert (theirs.tolist(), ours.tolist()) == ([[3], [3]], [[3], [4]])


@pytest.mark.parametrize("prompt", [-1, torch.tensor([-1])], ids=str)
@pytest.mark.parametrize("layout", ["right", "left", "packed"])
def test_a_negative_prompt(layout: str, prompt: Any) -> None:
    features = {**LAYOUTS[layout]([THREE, THREE]), "prompt_length": prompt}
    theirs, ours = both(features, "mean", include_prompt=False)
    assert (layout == "right") == (theirs.tolist() == [[0], [0]])
    torch.testing.assert_close(ours, torch.full((2, 1), 7 / 3))


def test_long_packed_texts() -> None:
    theirs, ours = both(packed([torch.full((100_000, 1), 0.1)]), "mean")
    assert abs(theirs.item() / 0.1 - 1) > 1e-4
    assert abs(ours.item() / 0.1 - 1) < 1e-6


def test_the_same_text_elsewhere() -> None:
    layouts = [LAYOUTS[name](texts()) for name in ("right", "left", "packed")]
    theirs, ours = zip(*(both(features, "weightedmean") for features in layouts), strict=True)
    assert not same_bits(theirs[0], theirs[1])
    assert not same_bits(theirs[0], theirs[2])
    assert same_bits(ours[0], ours[1])
    assert same_bits(ours[0], ours[2])


@pytest.mark.parametrize(("mode", "wrong"), [("mean", 1.75), ("lasttoken", 6), ("cls", 2)])
def test_mask_values_beyond_one(mode: str, wrong: float) -> None:
    pooling = modules.Pooling(1, pooling_mode=mode)
    mask = torch.tensor([[1, 3, 0 if mode == "mean" else 1]])
    features = {"token_embeddings": THREE[None], "attention_mask": mask}
    assert run(pooling, features).item() == wrong
    with pytest.raises(ValueError, match=r"mask must hold 0 and 1 alone, got mask\[0, 1\] = 3"):
        run(patch(pooling), features)


def test_a_floating_point_mask() -> None:
    pooling = modules.Pooling(1)
    features = {"token_embeddings": THREE[None], "attention_mask": torch.tensor([[0.0, 0.0, -1e9]])}
    assert run(pooling, features).item() < -1e9
    with pytest.raises(TypeError, match=r"fastpool\.mean: mask must be bool or an integer type"):
        run(patch(pooling), features)


def test_token_weights_sum_of_packed_texts() -> None:
    theirs, ours = both({**packed([THREE]), "token_weights_sum": torch.tensor([14.0])}, "mean")
    assert (theirs.item(), ours.item()) == (pytest.approx(7 / 3), 0.5)


def test_gradient_of_equal_maxima() -> None:
    for layout, theirs in ((packed, [1 / 3] * 3), (padded, [1.0, 0.0, 0.0])):
        for change, expected in ((unpatch, theirs), (patch, [1.0, 0.0, 0.0])):
            hidden = torch.ones(3, 1, requires_grad=True)
            pooling = change(modules.Pooling(1, pooling_mode="max"))
            pooling(layout([hidden * 1]) if layout is packed else {"token_embeddings": hidden[None] * 1})[
                "sentence_embedding"
            ].sum().backward()
            assert hidden.grad.flatten().tolist() == pytest.approx(expected)


def test_normalize_in_16_bits() -> None:
    def worst(x: Tensor) -> list[float]:
        exact = F.normalize(x.double(), dim=-1)
        return [
            ((change(modules.Normalize())({"sentence_embedding": x})["sentence_embedding"] - exact).norm(dim=-1)).max()
            for change in (unpatch, patch)
        ]

    theirs, ours = worst(torch.randn(64, 384, generator=torch.Generator().manual_seed(0)).bfloat16())
    assert theirs > 1.5 * ours
    for value, wrong in ((0.0, "nan"), (3000.0, "0.0")):
        x = torch.full((1, 1024), value, dtype=torch.float16)
        theirs, ours = (
            change(modules.Normalize())({"sentence_embedding": x})["sentence_embedding"][0, 0].item()
            for change in (unpatch, patch)
        )
        assert (str(theirs), ours) == (wrong, 1 / 32 if value else 0.0)


def test_normalize_of_huge_vectors() -> None:
    x = torch.full((1, 4), 1e25)
    assert modules.Normalize()({"sentence_embedding": x})["sentence_embedding"][0, 0] == 0
    assert patch(modules.Normalize())({"sentence_embedding": x})["sentence_embedding"][0, 0] == 0.5
