"""What gpu_modes.py times on a GPU, called on a CPU: the names and the numbers."""

import torch
from torch import Tensor

from benchmarks import gpu_modes
from benchmarks.cases import Batch, Case, build
from benchmarks.gpu_modes import QUERIES, Given

CASE = Case(40, 3, 64, "fp32")


def results() -> tuple[Batch, Given, dict[str, Tensor]]:
    batch = build(CASE, "cpu")
    given = Given(batch)
    calls = gpu_modes.forward(batch, given) | gpu_modes.backward(batch, given) | gpu_modes.of_torch(CASE, batch, given)
    return batch, given, {name: call() for name, call in calls.items()}


def test_torch_and_fastpool_compute_the_same() -> None:
    batch, given, found = results()
    torch.testing.assert_close(found["sum"], 40 * found["mean"])
    assert found["amax"].equal(found["max"])
    for queries in ("", f", {QUERIES} queries"):
        torch.testing.assert_close(found[f"SDPA{queries}"].squeeze(1), found[f"attention{queries}"])
    scores, states = given.scores.view(3, 40), batch.packed.view(3, 40, 64)
    torch.testing.assert_close(found["softmax_mean"], (scores.softmax(1).unsqueeze(1) @ states).squeeze(1))
    torch.testing.assert_close(found["weighted_mean"], found["softmax_mean"])  # weights are powers of the scores
    assert found["mean, max, cls"].equal(torch.cat([found["mean"], found["max"], found["cls"]], 1))


def test_gradients_are_those_of_token_states() -> None:
    batch, given, found = results()
    gradient = found["gradient of mean"].view(3, 40, 64)[:, :1] * 40
    weights = given.weights.view(3, 40, 1)
    expected = gradient * weights / weights.sum(1, keepdim=True)
    for mode in ("weighted_mean", "softmax_mean"):
        torch.testing.assert_close(found[f"gradient of {mode}"].view(3, 40, 64), expected)
    states = batch.packed.view(3, 40, 64).requires_grad_()
    scores = states @ given.queries[0]
    (scores.softmax(1).unsqueeze(1) @ states).squeeze(1).backward(gradient.squeeze(1))
    assert states.grad is not None
    torch.testing.assert_close(found["gradient of attention"].view(3, 40, 64), states.grad)
    of_max = found["gradient of max"].view(3, 40, 64)
    torch.testing.assert_close(of_max.sum(1), gradient.squeeze(1))


def test_texts_of_several_lengths_have_no_ways_of_torch() -> None:
    case = Case("queries", 4, 64)
    batch = build(case, "cpu")
    assert [*gpu_modes.of_torch(case, batch, Given(batch))] == ["write"]
