"""The statistics of `fastpool doctor` against known values, and what it concludes from them."""

import dataclasses
import math

import pytest
import torch
from helpers.doctor_cases import CONFIG, needs_packages

from fastpool.doctor import pairs, report
from fastpool.doctor.measure import CONFIDENCE, Interval, _resampled, auc, cohens_d, measure, ranks, spearman
from fastpool.models import Decision, PoolingConfig


def _tensor(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


# Statistics.


def test_ranks_share_ties():
    assert ranks(_tensor(3, 1, 3, 2, 3)).tolist() == [4, 1, 4, 2, 4]
    assert ranks(torch.tensor([[5, 6], [7, 7]])).tolist() == [[1, 2], [1.5, 1.5]]


def test_auc():
    assert auc(_tensor(0.35, 0.8), _tensor(0.1, 0.4)) == 0.75
    assert auc(_tensor(1, 2), _tensor(1, 0)) == 0.875  # a tie counts half
    assert auc(_tensor(1, 1), _tensor(1, 1, 1)) == 0.5
    assert auc(_tensor(2, 3), _tensor(0, 1)) == 1
    assert auc(_tensor(0, 1), _tensor(2, 3)) == 0


def test_auc_is_the_share_of_pairs_in_order():
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randint(6, (4, n), generator=generator).double() for n in (30, 17))
    above = (x[:, :, None] > y[:, None]).double() + (x[:, :, None] == y[:, None]).double() / 2
    torch.testing.assert_close(auc(x, y), above.mean((1, 2)))


def test_spearman():
    # By hand: ranks 1..5 and 1, 2, 3.5, 5, 3.5; covariance 8 / sqrt(10 * 9.5).
    assert spearman(_tensor(1, 2, 3, 4, 5), _tensor(5, 6, 7, 8, 7)).item() == pytest.approx(8 / math.sqrt(95))
    assert spearman(_tensor(1, 2, 3), _tensor(1, 10, 1000)).item() == pytest.approx(1)
    assert spearman(_tensor(1, 2, 3), -_tensor(1, 10, 1000)).item() == pytest.approx(-1)
    assert spearman(_tensor(1, 2, 3), _tensor(7, 7, 7)).item() == 0


def test_cohens_d():
    assert cohens_d(_tensor(2, 4, 6), _tensor(0, 2, 4)) == pytest.approx(1)
    # Pooled variance (1 * 2 + 3 * 0) / 4.
    assert cohens_d(_tensor(0, 2), _tensor(0, 0, 0, 0)) == pytest.approx(1 / math.sqrt(0.5))
    assert cohens_d(_tensor(1, 1), _tensor(1, 1)) == 0
    assert cohens_d(_tensor(2, 2), _tensor(1, 1)) == math.inf


def test_interval_is_as_wide_as_theory_says():
    generator = torch.Generator().manual_seed(2)
    x = torch.cat([torch.randn(300, generator=generator) + 1, torch.randn(200, generator=generator)]).double()
    related, unrelated = torch.arange(300), torch.arange(300, 500)
    samples = _resampled(lambda drawn: auc(x[drawn[:, :300]], x[drawn[:, 300:]]), related, unrelated)
    assert torch.equal(samples, _resampled(lambda drawn: auc(x[drawn[:, :300]], x[drawn[:, 300:]]), related, unrelated))
    # DeLong's variance: of each one's share of the others that are in order.
    order = (x[:300, None] > x[None, 300:]).double()
    error = (order.mean(1).var() / 300 + order.mean(0).var() / 200).sqrt().item()
    interval = Interval.of(samples)
    assert CONFIDENCE == 0.99
    assert Interval.of(torch.arange(1001).double()) == Interval(pytest.approx(5), pytest.approx(995))
    assert interval.high - interval.low == pytest.approx(2 * 2.576 * error, rel=0.15)
    assert (interval.high + interval.low) / 2 == pytest.approx(order.mean().item(), abs=error / 2)


# Conclusions.


def _measured(config: PoolingConfig = CONFIG, scores: list[float] | None = None, **noise: float):
    """Pairs whose two vectors are one and the same but for noise, and unrelated ones; the noise by mode."""
    count = 60
    related = [True] * count + [False] * count
    scores = scores or [float(one) for one in related]
    found = pairs.Pairs(
        "made", "labels" if len(set(scores)) == 2 else "scores", [f"a{i}" for i in range(2 * count)],
        [f"b{i}" for i in range(2 * count)], scores,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(4)
    a, b, off = (torch.randn(2 * count, 16, generator=generator) for _ in range(3))
    share = torch.tensor(scores).div(max(scores)).unsqueeze(1)
    b = share * a + (1 - share) * b
    at = {text: i for i, text in enumerate([*found.a, *found.b])}
    vectors = {(mode,): torch.cat([a, b + amount * off]) for mode, amount in noise.items()}
    return measure(found, vectors, at, config)


def test_the_best_is_said_to_be():
    measured = _measured(mean=0.2, cls=3.0, last=0.2)
    own = measured.configured
    assert (own.modes, own.normalize, own.auc) == (("mean",), True, 1.0)
    assert own.difference == Interval(0, 0)
    # Figures are those of plain formulas.
    row = next(row for row in measured.rows if (row.modes, row.normalize) == (("cls",), True))
    related, unrelated = row.similarities[:60], row.similarities[60:]
    assert row.auc == auc(related, unrelated).item()
    assert (row.related, row.unrelated) == (related.mean().item(), unrelated.mean().item())
    assert row.cohens_d == cohens_d(related, unrelated)
    assert row.spearman is None
    assert row.difference.high < 0
    assert not measured.better
    assert row in measured.worse
    assert next(row for row in measured.tied if row.modes == ("last",))
    lines = report.verdict(measured, CONFIG)
    assert lines[0].startswith("The configured pooling is the best measured here. mean, normalised: AUC 1.000 (99%")
    assert any(line.startswith("These pairs do not tell it apart from: ") and "last" in line for line in lines)
    (cost,) = [line for line in lines if line.startswith("cls instead of mean: ")]
    assert cost.startswith(f"cls instead of mean: AUC {row.auc:.3f}, ")
    assert cost.endswith(" less.")


def test_a_better_one_is_found():
    config = dataclasses.replace(CONFIG, modes=("cls",))
    measured = _measured(config, mean=0.2, cls=3.0)
    assert measured.better[0].modes == ("mean",)
    lines = report.verdict(measured, config)
    assert lines[0].startswith("The configured pooling is NOT the best here. cls, normalised: AUC 0.")
    assert "mean, normalised: AUC 1.000" in lines[0]
    assert "The configured one comes from 1_Pooling/config.json: pooling_mode (stated)." in lines


@pytest.mark.parametrize(
    ("similarity", "source"),
    [
        (None, "no similarity_fn_name, for which sentence-transformers takes cosine (implied)"),
        ("cosine", "config_sentence_transformers.json: similarity_fn_name (stated)"),
    ],
)
def test_what_a_better_dot_product_contradicts_is_named(similarity, source):
    said = Decision("similarity", similarity, "config_sentence_transformers.json: similarity_fn_name", "stated")
    config = dataclasses.replace(CONFIG, normalize=False, similarity=similarity, decisions=(*CONFIG.decisions, said))
    measured = _measured(config, mean=1.0)
    cosine, dot = measured.rows
    better = dataclasses.replace(dot, difference=Interval(0.1, 0.2))
    measured = dataclasses.replace(measured, rows=[cosine, better])
    assert f"The configured one comes from {source}." in report.verdict(measured, config)


def test_a_lead_within_sampling_error_is_a_tie():
    measured = _measured(mean=2.0, cls=1.98)
    assert measured.best.modes == ("cls",)
    assert len(measured.tied) == 3
    assert not measured.better
    line = report.verdict(measured, CONFIG)[0]
    assert line.startswith("The configured pooling is as good as the best measured here. mean, normalised: AUC 0.")
    assert line.endswith("which is within sampling error.")


def test_a_pooling_that_tells_nothing_is_named():
    nothing = "It does not measurably tell related texts from unrelated ones at all."
    assert nothing in report.verdict(_measured(mean=100.0), CONFIG)
    assert nothing not in report.verdict(_measured(mean=2.0), CONFIG)


def test_scores_are_decided_by_spearman():
    scores = [i / 24 for i in range(120)]
    measured = _measured(scores=scores, mean=0.1, cls=4.0)
    row = measured.configured
    assert row.decides == row.spearman == spearman(row.similarities, torch.tensor(scores).double()).item()
    assert row.interval.low < row.spearman < row.interval.high
    assert row.interval.high - row.interval.low < 0.2
    assert row.related == row.similarities[[score > scores[-1] / 2 for score in scores]].mean().item()
    assert "Spearman" in report.verdict(measured, CONFIG)[0]
    assert any(line.startswith("cls instead of mean: Spearman ") for line in report.verdict(measured, CONFIG))


@pytest.mark.parametrize(
    ("normalize", "similarity", "row"),
    [(True, None, True), (True, "dot", True), (False, None, True), (False, "cosine", True), (False, "dot", False)],
)
def test_what_the_model_compares_by_is_the_configured_row(normalize, similarity, row):
    measured = _measured(dataclasses.replace(CONFIG, normalize=normalize, similarity=similarity), mean=1.0)
    assert measured.configured.normalize is row
    cosine, dot = measured.rows
    assert (cosine.normalize, dot.normalize) == (True, False)
    assert cosine.similarities.abs().max() <= 1 + 1e-6
    assert dot.similarities.abs().max() > 2


@needs_packages
def test_scores_on_one_side_are_decided_by_spearman_alone(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    measured = _measured(scores=[0.0, *(4 + i / 119 for i in range(119))], mean=0.1, cls=50.0)
    row = measured.configured
    assert (row.related, row.unrelated, row.cohens_d, row.auc) == (None, None, None, None)
    assert row.decides == row.spearman
    assert row.interval.low < row.spearman < row.interval.high
    (plain,) = [one for one in report.document("m", measured, CONFIG)["poolings"] if one["configured"]]
    assert (plain["auc"], plain["spearman"]) == (None, row.spearman)
    report.render("m", measured, CONFIG)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("* mean")]
    assert line.split()[2:] == ["cosine", "-", "-", "-", "-", f"{row.spearman:.3f}"]
    report.plot(tmp_path / "p.svg", "m", measured)


@needs_packages
@pytest.mark.parametrize(("similarity", "why"), [("cosine", "asks for cosine"), (None, "names no similarity")])
def test_the_report_says_why_the_normalised_row_is_its_own(similarity, why, capsys):
    config = dataclasses.replace(CONFIG, normalize=False, similarity=similarity)
    report.render("m", _measured(config, mean=1.0), config)
    assert f"The model does not normalise, but {why}" in capsys.readouterr().out.replace("\n", " ")


@needs_packages
def test_a_picture_of_a_folder_with_dollars(tmp_path):
    report.plot(tmp_path / "p.svg", r"a$\x$b", _measured(mean=1.0))
    assert (tmp_path / "p.svg").stat().st_size > 0


def test_vectors_that_are_all_the_same_order_nothing():
    found = _measured(mean=0.1).pairs
    at = {text: i for i, text in enumerate([*found.a, *found.b])}
    own = measure(found, {("mean",): torch.ones(240, 4)}, at, CONFIG).configured
    assert (own.auc, own.cohens_d, own.interval) == (0.5, 0, Interval(0.5, 0.5))
    with pytest.raises(ValueError, match="mean: similarities must be finite"):
        measure(found, {("mean",): torch.full((240, 4), math.nan)}, at, CONFIG)
