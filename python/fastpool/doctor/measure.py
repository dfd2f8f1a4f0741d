"""How well each pooling tells related texts from unrelated ones, and whether the differences mean anything."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import functional
from ..models import PoolingConfig
from .embed import Modes, configured
from .pairs import FEWEST, SEED, Pairs

_RESAMPLES = 2000
# Every other pooling is held against the configured one: at 95 % a dozen comparisons would cry wolf every other time.
CONFIDENCE = 0.99
_AT_ONCE = 2**22  # numbers of resamples in memory


def ranks(x: Tensor) -> Tensor:
    """1 for the smallest over the last dimension; equal numbers share the mean of their ranks."""
    ordered = x.sort(dim=-1).values
    x = x.contiguous()
    return (torch.searchsorted(ordered, x) + torch.searchsorted(ordered, x, right=True) + 1) / 2


def auc(related: Tensor, unrelated: Tensor) -> Tensor:
    """The share of (related, unrelated) pairs that are in the right order, a tie counting half: the area under the ROC
    curve. [..., m] and [..., n] give [...]."""
    m, n = related.shape[-1], unrelated.shape[-1]
    above = ranks(torch.cat([related, unrelated], dim=-1))[..., :m].double().sum(-1) - m * (m + 1) / 2
    return above / (m * n)


def spearman(x: Tensor, y: Tensor) -> Tensor:
    """The correlation of the ranks, ties at their mean rank; 0 where all of x or y are equal, as the first tokens of a
    causal model may be: they order nothing. [..., n] give [...]."""
    x, y = (r - r.mean(-1, keepdim=True) for r in (ranks(x).double(), ranks(y).double()))
    scale = (x.square().sum(-1) * y.square().sum(-1)).sqrt()
    return (x * y).sum(-1) / scale.where(scale > 0, 1.0)


def cohens_d(related: Tensor, unrelated: Tensor) -> float:
    """The difference of the means in pooled standard deviations; 0 where there is none."""
    m, n = len(related), len(unrelated)
    pooled = ((m - 1) * related.var() + (n - 1) * unrelated.var()) / (m + n - 2)
    difference = related.mean() - unrelated.mean()
    return (difference / pooled.sqrt()).item() if difference != 0 else 0.0


@dataclass(frozen=True)
class Interval:
    """Where a figure lies with CONFIDENCE, were other pairs of the same sort taken."""

    low: float
    high: float

    @staticmethod
    def of(samples: Tensor) -> "Interval":
        tail = (1 - CONFIDENCE) / 2
        low, high = samples.quantile(samples.new_tensor([tail, 1 - tail])).tolist()
        return Interval(low, high)


@dataclass(frozen=True, eq=False)  # a row is itself
class Row:
    """One pooling: mean similarities, and how well they separate. Scores may fall on one side of the middle of their
    range: what compares related with unrelated pairs is None then."""

    modes: Modes
    normalize: bool
    similarities: Tensor  # [pairs]
    related: float | None
    unrelated: float | None
    cohens_d: float | None
    auc: float | None
    spearman: float | None  # where there are scores
    interval: Interval  # of what decides
    difference: Interval  # of it, this row's minus the configured one's
    non_zeros: float | None  # of a text's vector, the mean; None of dense vectors

    @property
    def decides(self) -> float:
        """Spearman where there are scores, else AUC."""
        figure = self.auc if self.spearman is None else self.spearman
        assert figure is not None  # without scores there are pairs of both kinds
        return figure

    @property
    def label(self) -> str:
        return " + ".join(mode.removeprefix("splade_") for mode in self.modes)

    @property
    def name(self) -> str:
        return f"{self.label}, {'normalised' if self.normalize else 'not normalised'}"


@dataclass(frozen=True)
class Measured:
    """All rows, and what they say about the configured one."""

    pairs: Pairs
    rows: list[Row]
    configured: Row

    @property
    def best(self) -> Row:
        """The configured mode, unless another is ahead of it."""
        return max([self.configured, *self.rows], key=lambda row: row.decides)

    @property
    def better(self) -> list[Row]:
        """The modes that beat the configured one by more than sampling error, best first."""
        return sorted((row for row in self.rows if row.difference.low > 0), key=lambda row: -row.decides)

    @property
    def worse(self) -> list[Row]:
        """The modes that lose against the configured one by more than sampling error, worst first."""
        return sorted((row for row in self.rows if row.difference.high < 0), key=lambda row: row.decides)

    @property
    def tied(self) -> list[Row]:
        """The others, without the configured one."""
        apart = [self.configured, *self.better, *self.worse]
        return [row for row in self.rows if row not in apart]


def _resampled(figure: Callable[[Tensor], Tensor], *kinds: Tensor) -> Tensor:
    """`figure` of pairs drawn with replacement, as many of each kind as there are. The same draws on every call, so
    that the difference of two poolings is taken draw by draw."""
    generator = torch.Generator().manual_seed(SEED)
    at_once = max(1, _AT_ONCE // sum(map(len, kinds)))
    figures = []
    for done in range(0, _RESAMPLES, at_once):
        count = min(at_once, _RESAMPLES - done)
        drawn = [kind[torch.randint(len(kind), (count, len(kind)), generator=generator)] for kind in kinds]
        figures.append(figure(torch.cat(drawn, dim=-1)))
    return torch.cat(figures)


def measure(pairs: Pairs, vectors: Mapping[Modes, Tensor], at: Mapping[str, int], config: PoolingConfig) -> Measured:
    """Every pooling of `vectors`, whose row `at[text]` is a text's: normalised, where the dot product is the cosine,
    and as it is.

    The configured one counts as normalised too where its vectors are compared by cosine.

    Raises:
        ValueError: a similarity is not finite.
    """
    a, b = (torch.tensor([at[text] for text in side]) for side in (pairs.a, pairs.b))
    is_related = torch.tensor(pairs.related)
    related, unrelated = is_related.nonzero().squeeze(1), (~is_related).nonzero().squeeze(1)
    scores = torch.tensor(pairs.scores, dtype=torch.float64)
    kinds = [torch.arange(len(scores))] if pairs.kind == "scores" else [related, unrelated]
    both = min(len(related), len(unrelated)) >= FEWEST

    measures, non_zeros = {}, {}
    for modes, vector in vectors.items():
        non_zeros[modes] = None if config.sparse is None else vector.count_nonzero().item() / len(vector)
        for normalize in (True, False):
            compared = functional.l2_normalize(vector) if normalize else vector
            similarity = torch.linalg.vecdot(compared[a], compared[b]).double()
            if not similarity.isfinite().all():
                raise ValueError(
                    f"{' + '.join(modes)}: similarities must be finite, got inf or NaN from finite token states: by a "
                    "Dense layer, or beyond float32"
                )

            def figure(drawn: Tensor, similarity: Tensor = similarity) -> Tensor:
                if pairs.kind == "scores":
                    return spearman(similarity[drawn], scores[drawn])
                return auc(similarity[drawn[..., : len(related)]], similarity[drawn[..., len(related) :]])

            measures[modes, normalize] = similarity, _resampled(figure, *kinds)

    own = configured(config)
    _, own_samples = measures[own]
    rows = {
        pooling: Row(
            *pooling,
            similarity,
            related=similarity[related].mean().item() if both else None,
            unrelated=similarity[unrelated].mean().item() if both else None,
            cohens_d=cohens_d(similarity[related], similarity[unrelated]) if both else None,
            auc=auc(similarity[related], similarity[unrelated]).item() if both else None,
            spearman=spearman(similarity, scores).item() if pairs.kind == "scores" else None,
            interval=Interval.of(samples),
            difference=Interval.of(samples - own_samples),
            non_zeros=non_zeros[pooling[0]],
        )
        for pooling, (similarity, samples) in measures.items()
    }
    return Measured(pairs, list(rows.values()), rows[own])
