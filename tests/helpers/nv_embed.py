"""NV-Embed's latent attention with random weights, and what it computes, written from its description, unfolded."""

from typing import Any

import torch

SIZES = {"num_latents_value": 6, "num_cross_heads": 2, "cross_dim_head": 5, "latent_dim": 8, "hidden_dim": 8}
CONFIG: dict[str, Any] = {**SIZES, "output_normalize": True, "model_type": "latent_attention"}


def weights(prefix: str = "", dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    """By the names that the model's file has."""
    generator = torch.Generator().manual_seed(seed)
    latents, heads, each, width, _ = SIZES.values()
    inner = heads * each
    shapes = {
        "latents": (latents, width),
        "cross_attend_blocks.0.norm.weight": (width,),
        "cross_attend_blocks.0.norm.bias": (width,),
        "cross_attend_blocks.0.norm_context.weight": (width,),
        "cross_attend_blocks.0.norm_context.bias": (width,),
        "cross_attend_blocks.0.fn.to_q.weight": (inner, width),
        "cross_attend_blocks.0.fn.to_kv.weight": (2 * inner, width),
        "cross_attend_blocks.0.fn.to_out.weight": (width, inner),
        "cross_attend_blocks.1.norm.weight": (width,),
        "cross_attend_blocks.1.norm.bias": (width,),
        "cross_attend_blocks.1.fn.net.0.weight": (8 * width, width),
        "cross_attend_blocks.1.fn.net.0.bias": (8 * width,),
        "cross_attend_blocks.1.fn.net.2.weight": (width, 4 * width),
        "cross_attend_blocks.1.fn.net.2.bias": (width,),
    }
    return {prefix + name: (torch.randn(*shape, generator=generator) * 0.7).to(dtype) for name, shape in shapes.items()}


def token_states(x: torch.Tensor, own: dict[str, torch.Tensor]) -> torch.Tensor:
    """[n, H] to [n, H], in float64: what tokens are before they are averaged."""
    own = {name: value.double() for name, value in own.items()}
    attention, feed = "cross_attend_blocks.0.", "cross_attend_blocks.1."

    def normed(x: torch.Tensor, name: str) -> torch.Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * own[f"{name}.weight"] + own[f"{name}.bias"]

    x = x.double()
    query = normed(x, f"{attention}norm") @ own[f"{attention}fn.to_q.weight"].T
    both = normed(own["latents"], f"{attention}norm_context") @ own[f"{attention}fn.to_kv.weight"].T
    keys, values = both.chunk(2, -1)
    heads = []
    for part in torch.arange(query.shape[-1]).chunk(SIZES["num_cross_heads"]):
        scores = query[:, part] @ keys[:, part].T / len(part) ** 0.5
        heads.append(scores.softmax(-1) @ values[:, part])
    x = x + torch.cat(heads, -1) @ own[f"{attention}fn.to_out.weight"].T
    wide = normed(x, f"{feed}norm") @ own[f"{feed}fn.net.0.weight"].T + own[f"{feed}fn.net.0.bias"]
    first, second = wide.chunk(2, -1)
    gated = first * second * 0.5 * (1 + torch.erf(second / 2**0.5))
    return x + gated @ own[f"{feed}fn.net.2.weight"].T + own[f"{feed}fn.net.2.bias"]
