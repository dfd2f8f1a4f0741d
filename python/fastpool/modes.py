"""The table of pooling modes. Ops, fakes, docstrings and tests follow from its rows; CONTRIBUTING.md says what else a
new one needs, and a test what was forgotten."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mode:
    name: str
    code: int  # as in csrc/pool.h; a test holds the two together
    formula: str  # what the real tokens x_1..x_n of a segment become
    takes_weights: bool = False


_TABLE = (
    Mode("mean", 0, "sum(x) / n"),
    Mode("mean_sqrt_len", 1, "sum(x) / sqrt(n)"),
    Mode("sum", 2, "sum(x)"),
    Mode("max", 3, "the elementwise maximum; NaN propagates, as in torch.amax"),
    Mode("cls", 4, "the first real token"),
    Mode("last", 5, "the last real token"),
    Mode(
        "weighted_mean",
        6,
        "sum(w * x) / sum(w); without weights, w is the position counted 1, 2, 3, ... from the first real token "
        "(holes keep counting); where sum(w) = 0 the result is 0",
        takes_weights=True,
    ),
)

MODES: dict[str, Mode] = {mode.name: mode for mode in _TABLE}
