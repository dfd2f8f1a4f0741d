"""Late interaction by late-interaction-kernels, which takes the token outputs as they are."""

import inspect

import pytest
import torch
from torch import Tensor

import fastpool

kernels = pytest.importorskip("late_interaction_kernels")
reference = pytest.importorskip("late_interaction_kernels.reference")  # its own definition, in plain PyTorch

PUNCTUATION = [7, 9]


def texts(number: int, rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token states, with NaN in padding, ids, and which tokens are real."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(number, rows, 48, generator=generator)
    ids = torch.randint(1, 20, (number, rows), generator=generator)
    lengths = torch.randint(3, rows + 1, (number,), generator=generator)
    mask = torch.arange(rows) < lengths[:, None]
    ids[:, 0] = 1  # no text is punctuation alone
    return hidden.masked_fill(~mask[..., None], float("nan")), ids, mask


def plain_scores(queries: tuple[Tensor, Tensor], documents: tuple[Tensor, Tensor]) -> Tensor:
    """Of every pair: the sum over the query's tokens of the largest cosine with one of the document's."""

    def vectors(hidden: Tensor, mask: Tensor) -> list[Tensor]:
        return [torch.nn.functional.normalize(x[real][:, :32], dim=-1) for x, real in zip(hidden, mask, strict=True)]

    return torch.tensor(
        [[(q @ d.T).amax(1).sum().item() for d in vectors(*documents)] for q in vectors(*queries)],
    )


@pytest.mark.parametrize("total", [None, 500])
def test_maxsim(total: int | None) -> None:
    (queries, _, of_queries), (documents, ids, of_documents) = texts(3, 9, 0), texts(5, 40, 1)
    kept = fastpool.keep_mask(ids, of_documents, skip=PUNCTUATION)
    assert kept.sum() < of_documents.sum()
    options = {"truncate_dim": 32, "normalize": True}
    q, cu_seqlens_q = fastpool.tokens(queries, of_queries, **options)
    d, cu_seqlens_d = fastpool.tokens(documents, kept, **options, total=total)
    scores = reference.maxsim_reference_varlen(q, d, cu_seqlens_q, cu_seqlens_d)
    torch.testing.assert_close(scores, plain_scores((queries, of_queries), (documents, kept)), rtol=1e-5, atol=1e-5)


def test_gradients_reach_both_sides() -> None:
    (queries, _, of_queries), (documents, _, of_documents) = texts(3, 9, 0), texts(5, 40, 1)
    leaves = queries.requires_grad_(), documents.requires_grad_()
    q, cu_seqlens_q = fastpool.tokens(queries, of_queries, normalize=True)
    d, cu_seqlens_d = fastpool.tokens(documents, of_documents, normalize=True)
    scores = reference.maxsim_reference_varlen(q, d, cu_seqlens_q, cu_seqlens_d)
    gradients = torch.autograd.grad(scores.sum(), leaves)
    for gradient, mask in zip(gradients, (of_queries, of_documents), strict=True):
        assert gradient.isfinite().all()
        assert (gradient[~mask] == 0).all()
        assert (gradient[mask] != 0).any()


def test_the_kernel_takes_what_its_reference_takes() -> None:
    """On a GPU: the same arguments, in the same order."""
    taken = list(inspect.signature(kernels.maxsim_varlen).parameters)
    assert taken[:4] == ["Q_packed", "D_packed", "cu_seqlens_q", "cu_seqlens_d"]
