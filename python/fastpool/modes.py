"""The table of pooling modes: what each does with the real tokens of a segment. Ops, kernels, gradients, docstrings and
tests follow from a row's traits, and nothing else asks which mode a call has."""

from dataclasses import dataclass
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
    """What each of them is multiplied by: nothing, or the weight that `weights` hold for it, else its position."""

    ONE = 0
    TOKEN = 1


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


@dataclass(frozen=True)
class Argument:
    """One argument of an op."""

    name: str
    type: str  # in the words of torch's schemas
    default: str | None = None  # likewise; None: it must be given
    keyword: bool = False  # it can only be given by its name
    differentiable: bool = False


WEIGHTS = Argument("weights", "Tensor?", "None", differentiable=True)


@dataclass(frozen=True)
class Mode:
    name: str
    formula: str  # what the real tokens x_1..x_n of a segment become
    select: Select = Select.ALL
    weight: Weight = Weight.ONE
    reduce: Reduce = Reduce.SUM
    divisor: Divisor = Divisor.ONE
    arguments: tuple[Argument, ...] = ()  # what its op takes besides those of every pooling op

    def __post_init__(self) -> None:
        # Kernels that add select nothing, and none takes the maximum of weighted tokens.
        assert self.reduce is Reduce.MAX or not self.one_token
        assert self.reduce is Reduce.SUM or self.weight is Weight.ONE
        assert (self.weight is Weight.TOKEN) == (WEIGHTS in self.arguments)

    @property
    def one_token(self) -> bool:
        return self.select is not Select.ALL

    @property
    def takes_weights(self) -> bool:
        return WEIGHTS in self.arguments

    @property
    def only_adds(self) -> bool:
        """Whether reducing is adding token states and nothing else."""
        return self.reduce is Reduce.SUM and self.weight is Weight.ONE

    @property
    def copies_tokens(self) -> bool:
        """Whether each element of a result is one of a token's, so that rounding it to the token's dtype is exact."""
        return self.reduce is Reduce.MAX

    def gradient_reads_hidden(self, of: str) -> bool:
        """Whether the gradient of `of` depends on token states and on the result: that of weights does, and that of a
        maximum of several tokens, which goes to one of them."""
        return of != "hidden" or (self.reduce is Reduce.MAX and not self.one_token)


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
        arguments=(WEIGHTS,),
    ),
)

MODES: dict[str, Mode] = {mode.name: mode for mode in _TABLE}
