"""The table of pooling modes: what each does with the real tokens of a segment. Ops, kernels, gradients, docstrings and
tests follow from a row's traits, and nothing else asks which mode a call has."""

from dataclasses import dataclass, replace
from enum import IntEnum


class Select(IntEnum):
    """Which real tokens of a segment a mode looks at."""

    ALL = 0
    FIRST = 1
    LAST = 2

    @property
    def among(self) -> slice:
        """Of a segment's real tokens in a row."""
        return (slice(None), slice(0, 1), slice(-1, None))[self]


class Weight(IntEnum):
    """What each of them is multiplied by: nothing; the weight that `weights` hold for it, else its position; e to the
    power of its score, which `scores` hold, or which is its product with a query."""

    ONE = 0
    TOKEN = 1
    SCORE = 2
    QUERY = 3

    @property
    def softmax(self) -> bool:
        """Whether it is e to the power of a score."""
        return self in (Weight.SCORE, Weight.QUERY)


class Reduce(IntEnum):
    """How they become one vector."""

    SUM = 0
    MAX = 1


class Divisor(IntEnum):
    """What that vector is divided by: 1, the number n of tokens, sqrt(n), the sum of their weights."""

    ONE = 0
    COUNT = 1
    SQRT_COUNT = 2
    WEIGHT = 3


class Activation(IntEnum):
    """What becomes of the tokens before they are added up, or of their maximum: nothing; ln(1 + max(x, 0)); and once
    more ln(1 + y) of that. NaN stays, and -0 becomes 0. The names are sentence-transformers'."""

    NONE = 0
    RELU = 1
    LOG1P_RELU = 2


@dataclass(frozen=True)
class Argument:
    """One argument of an op."""

    name: str
    type: str  # in the words of torch's schemas
    default: str | None = None  # likewise; None: it must be given
    keyword: bool = False  # it can only be given by its name
    differentiable: bool = False


WEIGHTS = Argument("weights", "Tensor?", "None", differentiable=True)
SCORES = Argument("scores", "Tensor?", "None", differentiable=True)  # whose absence is a ValueError
QUERY = Argument("query", "Tensor", differentiable=True)
SCALE = Argument("scale", "float", "1.0", keyword=True)
_OF_WEIGHT: dict[Weight, tuple[Argument, ...]] = {
    Weight.ONE: (),
    Weight.TOKEN: (WEIGHTS,),
    Weight.SCORE: (SCORES,),
    Weight.QUERY: (QUERY, SCALE),
}


@dataclass(frozen=True)
class Mode:
    name: str
    formula: str  # what the real tokens x_1..x_n of a segment become
    select: Select = Select.ALL
    weight: Weight = Weight.ONE
    reduce: Reduce = Reduce.SUM
    divisor: Divisor = Divisor.ONE
    activation: Activation = Activation.NONE

    def __post_init__(self) -> None:
        # Kernels that add select nothing, and none takes the maximum of weighted tokens. Of a softmax a sum is known
        # but for a power of two, which the sum of weights has too.
        assert self.reduce is Reduce.MAX or not self.one_token
        assert self.reduce is Reduce.SUM or self.weight is Weight.ONE
        assert not self.weight.softmax or self.divisor is Divisor.WEIGHT
        plain = (Select.ALL, Weight.ONE, Divisor.ONE)
        assert not self.activation or (self.select, self.weight, self.divisor) == plain

    @property
    def one_token(self) -> bool:
        return self.select is not Select.ALL

    @property
    def arguments(self) -> tuple[Argument, ...]:
        """What its op takes besides those of every pooling op."""
        return _OF_WEIGHT[self.weight]

    def takes(self, argument: str) -> bool:
        return any(argument == one.name for one in self.arguments)

    @property
    def takes_weights(self) -> bool:
        return self.weight is Weight.TOKEN

    @property
    def takes_scores(self) -> bool:
        return self.weight is Weight.SCORE

    @property
    def takes_query(self) -> bool:
        return self.weight is Weight.QUERY

    @property
    def weighted(self) -> bool:
        return self.weight is not Weight.ONE

    @property
    def softmax(self) -> bool:
        return self.weight.softmax

    @property
    def gradient_finds_maximum(self) -> bool:
        """Whether the gradient of hidden goes to one token of several, the first that is the maximum."""
        return self.reduce is Reduce.MAX and not self.one_token

    @property
    def only_adds(self) -> bool:
        """Whether reducing is adding token states and nothing else."""
        return self.reduce is Reduce.SUM and self.weight is Weight.ONE and not self.activation

    @property
    def copies_tokens(self) -> bool:
        """Whether each element of a result is one of a token's, so that rounding it to the token's dtype is exact."""
        return self.reduce is Reduce.MAX and not self.activation

    @property
    def of_logits(self) -> bool:
        """Whether it is for logits of a vocabulary, by fastpool.splade, and not for token states."""
        return self.activation is not Activation.NONE

    @property
    def activates_tokens(self) -> bool:
        """Whether the activation comes before the reduction. After a maximum it is the same, and there is less to do:
        it never decreases."""
        return self.of_logits and self.reduce is Reduce.SUM

    @property
    def activates_result(self) -> bool:
        """Whether it comes after the reduction."""
        return self.of_logits and self.reduce is Reduce.MAX

    @property
    def without_activation(self) -> str:
        """The name of the mode that reduces alike: gradients go through that one."""
        traits = [(mode.name, replace(mode, name="", formula="")) for mode in MODES.values()]
        own = replace(self, name="", formula="", activation=Activation.NONE)
        return next(name for name, others in traits if others == own)

    def gradient_reads_hidden(self, of: str) -> bool:
        """Whether the gradient of `of` depends on token states and on the result: that of weights, scores and a query
        does, that of hidden where its products with a query weigh it, and that of a maximum of several tokens, which
        goes to one of them."""
        return of != "hidden" or self.takes_query or self.gradient_finds_maximum


_TABLE = (
    Mode("mean", "sum(x) / n", divisor=Divisor.COUNT),
    Mode("mean_sqrt_len", "sum(x) / sqrt(n)", divisor=Divisor.SQRT_COUNT),
    Mode("sum", "sum(x)"),
    Mode("max", "the elementwise maximum; NaN propagates, as in torch.amax", reduce=Reduce.MAX),
    Mode("cls", "the first real token", Select.FIRST, reduce=Reduce.MAX),
    Mode("last", "the last real token", Select.LAST, reduce=Reduce.MAX),
    Mode(
        "weighted_mean",
        "sum(w * x) / sum(w); without weights, w is the position counted 1, 2, 3, ... from the first real token "
        "(holes keep counting); where sum(w) = 0 the result is 0",
        weight=Weight.TOKEN,
        divisor=Divisor.WEIGHT,
    ),
    Mode(
        "softmax_mean",
        "sum(e^s * x) / sum(e^s), s the scores",
        weight=Weight.SCORE,
        divisor=Divisor.WEIGHT,
    ),
    Mode(
        "attention",
        "sum(e^s * x) / sum(e^s), s = scale * (x . query)",
        weight=Weight.QUERY,
        divisor=Divisor.WEIGHT,
    ),
)

_ACTIVATED = {
    Activation.RELU: "ln(1 + max(x, 0))",
    Activation.LOG1P_RELU: "ln(1 + ln(1 + max(x, 0)))",
}


def _splade(reduce: Reduce, activation: Activation) -> Mode:
    """Of logits x of a vocabulary; fastpool.splade says `pooling` and `activation`."""
    pooling, formula = reduce.name.lower(), _ACTIVATED[activation]
    formula = formula.replace("(x, 0)", "(max(x), 0)") if reduce is Reduce.MAX else f"sum({formula})"
    name = f"splade_{pooling}_{activation.name.lower()}"
    return Mode(name, formula, reduce=reduce, activation=activation)


_SPLADE = tuple(_splade(reduce, activation) for reduce in (Reduce.MAX, Reduce.SUM) for activation in _ACTIVATED)

MODES: dict[str, Mode] = {mode.name: mode for mode in (*_TABLE, *_SPLADE)}
