"""sentence-transformers' own modules give the answers: for every mode that it has, padded on either side."""

import pytest
import torch

import fastpool

models = pytest.importorskip("sentence_transformers.sentence_transformer.modules")

# Their name -> ours.
THEIRS = {
    "mean": "mean",
    "max": "max",
    "cls": "cls",
    "lasttoken": "last",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weighted_mean",
}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("theirs", THEIRS)
def test_pooling(theirs: str, dtype: torch.dtype, side: str) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 37, 48, generator=generator).to(dtype)
    lengths = torch.tensor([37, 1, 20, 5, 36, 2])
    position = torch.arange(37)
    mask = (position < lengths[:, None] if side == "right" else position >= 37 - lengths[:, None]).long()
    pooling = models.Pooling(48, pooling_mode=theirs)
    features = {"token_embeddings": hidden, "attention_mask": mask}
    expected = pooling(features)["sentence_embedding"]
    result = getattr(fastpool, THEIRS[theirs])(hidden, mask)
    assert result.dtype == expected.dtype
    # theirs rounds sums and quotients to bfloat16 one after the other: two units in the last place
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-6, "atol": 1e-3}
    torch.testing.assert_close(result, expected, **tolerance)
    normalized = models.Normalize()({"sentence_embedding": expected})["sentence_embedding"]
    torch.testing.assert_close(getattr(fastpool, THEIRS[theirs])(hidden, mask, normalize=True), normalized, **tolerance)


def test_every_mode_of_theirs_is_here() -> None:
    assert set(models.Pooling.POOLING_MODES) == set(THEIRS)
