"""`fastpool doctor` on a model whose states are not finite: which text, token and column."""

import math

import pytest
import torch
from helpers.doctor_cases import CONFIG, REAL, Model, Step
from torch import Tensor, nn

from fastpool.doctor import embed
from fastpool.doctor.finite import not_finite

INF, NAN = math.inf, math.nan


def features(states: Tensor, *mask: list[int]) -> dict[str, Tensor]:
    ids = torch.arange(states[..., 0].numel()).view(states.shape[:2])
    return {"token_embeddings": states, "attention_mask": torch.tensor(mask), "input_ids": ids}


class Tokens:
    """A model whose tokenizer spells ids out."""

    class tokenizer:
        @staticmethod
        def convert_ids_to_tokens(id: int) -> str:
            return f"t{id}"


@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_text_token_and_column_are_named(value, dtype):
    states = torch.zeros(2, 5, 3, dtype=dtype)
    states[1, 3, 2] = states[1, 4, 0] = value
    batch = features(states, [1, 1, 0, 0, 0], [0, 0, 1, 1, 1])
    got = f"states must be finite, got {value} in {str(dtype).removeprefix('torch.')}"
    words = f"{got}: text 'second', token 1 't8' (the first is 0), column 2"
    assert not_finite(Tokens(), ["first", "second"], batch) == words
    assert not_finite(object(), ["first", "second"], batch) == words.replace(" 't8'", "")


def test_holes_are_places_but_no_tokens():
    states = torch.zeros(1, 4, 1)
    states[0, 1] = NAN  # a hole
    assert not_finite(Tokens(), ["a"], features(states, [1, 0, 1, 1])) is None
    states[0, 2] = INF
    assert "got inf in float32: text 'a', token 2 't2'" in (
        not_finite(Tokens(), ["a"], features(states, [1, 0, 1, 1])) or ""
    )


def test_texts_are_shortened_and_made_visible():
    states = torch.full((1, 1, 1), NAN)
    said = not_finite(Tokens(), ["tab\t\x1b\u200b" + "x" * 99], features(states, [1]))
    assert r"text 'tab\t\x1b\u200b" + "x" * 54 + "'..., token 0" in (said or "")


def test_states_that_are_not_finite_end_the_run():
    bad = Step(lambda x: x.index_fill(1, torch.tensor([1]), NAN))
    with pytest.raises(ValueError, match=r"text 'bb', token 1 .*column 0"):
        embed.vectors(Model(bad), CONFIG, ["bb", "a"], lambda count: None)


def test_padding_may_hold_anything():
    padding = Step(lambda x: x.masked_fill(~REAL[..., None], NAN))
    clean = embed.vectors(Model(nn.Identity()), CONFIG, ["bb", "a"], lambda count: None)
    found = embed.vectors(Model(padding), CONFIG, ["bb", "a"], lambda count: None)
    assert all(torch.equal(found[modes], clean[modes]) for modes in clean)


def test_a_mask_of_another_shape_is_for_pooling_to_refuse():
    shorter = Step(lambda x: x[:, :-1])
    with pytest.raises(ValueError, match=r"mask must .*\[2, 5\]"):
        embed.vectors(Model(shorter), CONFIG, ["bb", "a"], lambda count: None)
