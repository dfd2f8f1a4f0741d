"""The attention heads of transformers' vision models, of few columns and random weights, against their folded form."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch

from fastpool.nn import AttentionPooling, MultiheadPooling

transformers = pytest.importorskip("transformers")

WIDTH, HEADS, INNER = 16, 4, 24
Head = Callable[..., torch.Tensor]


def build(model: str, name: str, config: str, **more: Any) -> Any:
    """A head as its model makes it, with weights large enough that scores differ."""
    module = import_module(f"transformers.models.{model}.modeling_{model}")
    said = getattr(transformers, config)(
        hidden_size=WIDTH, num_attention_heads=HEADS, intermediate_size=INNER, attn_implementation="eager", **more
    )
    head = getattr(module, name)(said).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=generator)
    return head


def with_mlp(head: Any) -> Head:
    """What stands behind the attention is done as before."""
    pooling = AttentionPooling.from_multihead(head.attention, head.probe)

    def run(*arguments: Any, **more: Any) -> torch.Tensor:
        y = pooling(*arguments, **more)
        return y + head.mlp(head.layernorm(y))

    return run


def aimv2(head: Any) -> Head:
    return MultiheadPooling.from_projections(head.cls_token, head.k_proj, head.v_proj, head.output_proj, HEADS)


def videoprism(head: Any) -> Head:
    """Its query is scaled by column, and its values are wider than its tokens."""
    query = head.q_proj(head.pooling_attention_query).unflatten(-1, (HEADS, head.head_dim))
    query = (query * head.scaling * torch.nn.functional.softplus(head.per_dim_scale)).flatten(-2)
    return MultiheadPooling.from_projections(query, head.k_proj, head.v_proj, head.o_proj, HEADS, scale=1.0)


def without_masks(head: Any, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Of a head that takes no mask, text by text."""
    return torch.cat([head(row[real][None]) for row, real in zip(hidden, mask, strict=True)])


MODELS: dict[str, tuple[tuple[str, str, str], Callable[[Any], Head], Callable[..., torch.Tensor]]] = {
    "SigLIP": (("siglip", "SiglipMultiheadAttentionPoolingHead", "SiglipVisionConfig"), with_mlp, without_masks),
    "SigLIP2": (
        ("siglip2", "Siglip2MultiheadAttentionPoolingHead", "Siglip2VisionConfig"),
        with_mlp,
        lambda head, hidden, mask: head(hidden, mask.long()),
    ),
    "Idefics2": (
        ("idefics2", "Idefics2MultiheadAttentionPoolingHead", "Idefics2VisionConfig"),
        with_mlp,
        without_masks,
    ),
    "Phi-4": (
        ("phi4_multimodal", "Phi4MultimodalVisionMultiheadAttentionPoolingHead", "Phi4MultimodalVisionConfig"),
        with_mlp,
        lambda head, hidden, mask: head(hidden, mask),
    ),
    "AIMv2": (("aimv2", "Aimv2AttentionPoolingHead", "Aimv2VisionConfig"), aimv2, without_masks),
    "VideoPrism": (
        ("videoprism", "VideoPrismMultiheadAttentionPoolingHead", "VideoPrismVisionConfig"),
        videoprism,
        lambda head, hidden, mask: without_masks(lambda rows: head(rows)[0][:, 0], hidden, mask),
    ),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("model", MODELS)
def test_heads(model: str, bias: bool) -> None:
    (package, name, config), fold, theirs = MODELS[model]
    head = build(package, name, config, qkv_bias=bias)
    torch.manual_seed(0)
    hidden, lengths = torch.randn(3, 40, WIDTH), torch.tensor([40, 1, 17])
    mask = torch.arange(40) < lengths[:, None]
    with torch.no_grad():
        expected = theirs(head, hidden, mask)
        ours = fold(head)
        rows = hidden[mask]
        results = (
            ours(hidden.where(mask[..., None], torch.nan), mask),
            ours(hidden, lengths=lengths),
            ours(rows, cu_seqlens=torch.tensor([0, 40, 41, 58])),
        )
    assert expected.std() > 0.1
    for result in results:
        torch.testing.assert_close(result / expected.std(), expected / expected.std(), rtol=0, atol=1e-5)


def test_the_scorer_of_esmfold2() -> None:
    """A plain linear scorer over the second tokens of each pair, which are the rows; a matrix follows."""
    module = import_module("transformers.models.esmfold2.modeling_esmfold2")
    theirs = module.EsmFold2RowAttentionPooling(transformers.EsmFold2Config(pairwise_hidden_size=WIDTH, hidden_size=8))
    torch.nn.init.normal_(theirs.attn_proj.weight, std=0.5)
    ours = AttentionPooling(WIDTH)
    pairs, mask = torch.randn(2, 9, 9, WIDTH), torch.arange(9) < torch.tensor([[9], [4]])
    with torch.no_grad():
        ours.query.copy_(theirs.attn_proj.weight[0])
        pooled = ours(pairs.flatten(0, 1), mask.repeat_interleave(9, 0))
        torch.testing.assert_close(theirs.out_proj(pooled).view(2, 9, 8), theirs(pairs, mask), rtol=0, atol=1e-5)
