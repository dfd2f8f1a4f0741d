"""What a run leaves behind: plain values that go to a file and come back."""

import math
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

# Relative errors beyond this are mistakes, not rounding.
WRONG_BEYOND = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 2e-3}
NOISY = 0.15  # an interquartile range above this share of the median is marked


@dataclass(frozen=True)
class Spread:
    """Microseconds of a call: the median of some rounds and what lies about it."""

    median: float
    q1: float
    q3: float
    least: float
    rounds: int

    @staticmethod
    def of(seconds: list[float]) -> "Spread":
        us = [1e6 * one for one in seconds]
        q1, _, q3 = statistics.quantiles(us, n=4, method="inclusive") if len(us) > 1 else us * 3
        median, q1, q3, least = (round(value, 4) for value in (statistics.median(us), q1, q3, min(us)))
        return Spread(median, q1, q3, least, len(us))

    @property
    def share(self) -> float:
        """The interquartile range, as a share of the median."""
        return (self.q3 - self.q1) / self.median


@dataclass
class Outcome:
    """One provider on one case. Columns of `us`: on a CPU `cpu` (its time on cold data); on a GPU eager (one call after
    another from Python), graph (many calls in one CUDA graph), replay (a graph for each call), all on cold caches; warm
    (as graph, on one input); host (what Python and the launches take of the CPU's time in the eager loop)."""

    backend: str = ""  # that served fastpool's calls
    failure: str = ""  # why there are no figures, or not all of them
    error: float = math.nan  # relative, to float64
    same_bits: bool | None = None  # at another place in another batch
    launches: int | None = None  # per call, on a GPU
    temporary_bytes: int | None = None  # at the peak of a call, without its result
    page_faults: int | None = None  # of a call on a CPU: pages that the system had to find and clear first
    must_move: int = 0  # bytes
    us: dict[str, Spread] = field(default_factory=dict)

    @property
    def best(self) -> Spread | None:
        """The device's own time where the call can be captured in a graph, else that of eager calls, else the CPU's."""
        return self.us.get("graph") or self.us.get("eager") or self.us.get("cpu")


@dataclass
class Result:
    """One case: the read-only stream of its real tokens, and every provider by name."""

    case: str
    suite: str
    dtype: str
    batch: int
    width: int
    tokens: int
    longest: int
    real_bytes: int
    padded_bytes: int
    allowance: int  # temporary bytes within the targets
    twin: str = ""
    failure: str = ""
    copies: int = 0  # of the input, used in turn
    reader: str = ""
    read: Spread | None = None
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def over_read(self, provider: str) -> float | None:
        """A provider's time, as a multiple of the stream's."""
        outcome = self.outcomes.get(provider)
        if outcome is None or outcome.best is None or self.read is None:
            return None
        return outcome.best.median / self.read.median

    def share(self, provider: str) -> float | None:
        """A provider's share of the stream's rate: bytes that have to move, in the time that the provider takes."""
        over = self.over_read(provider)
        return None if over is None else self.outcomes[provider].must_move / self.real_bytes / over

    def gigabytes_per_second(self, provider: str) -> float | None:
        """The rate at which a provider gets through the bytes of real tokens."""
        outcome = self.outcomes.get(provider)
        return self.real_bytes / outcome.best.median / 1e3 if outcome and outcome.best else None

    def is_wrong(self, outcome: Outcome) -> bool:
        return not outcome.error <= WRONG_BEYOND[self.dtype]  # NaN is wrong too


def to_json(value: Any) -> Any:
    """Dataclasses as dictionaries; numbers that JSON cannot hold (NaN, infinities) as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {name: to_json(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(one) for one in value]
    return to_json(asdict(value)) if hasattr(value, "__dataclass_fields__") else value


def from_json(record: dict[str, Any]) -> Result:
    """A Result out of a file's "cases"."""
    outcomes = {
        name: Outcome(
            **{
                **fields,
                "error": float(fields["error"]),
                "us": {column: Spread(**spread) for column, spread in fields["us"].items()},
            }
        )
        for name, fields in record["outcomes"].items()
    }
    read = record["read"] and Spread(**record["read"])
    return Result(**{**record, "outcomes": outcomes, "read": read})
