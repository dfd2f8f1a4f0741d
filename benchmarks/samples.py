"""What a measurement on a CPU leaves behind (samples_gpu.py: on a GPU)."""

import math
import statistics
from dataclasses import dataclass

from cases import Case
from providers import FASTPOOL_PACKED, FASTPOOL_PADDED, Provider

# Relative errors beyond this are mistakes, not rounding.
WRONG_BEYOND = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 2e-3}


@dataclass(frozen=True)
class Samples:
    """Seconds, in the order they were taken."""

    seconds: tuple[float, ...]

    def percentile(self, percent: int) -> float:
        if len(self.seconds) == 1:
            return self.seconds[0]
        return statistics.quantiles(self.seconds, n=100, method="inclusive")[percent - 1]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """The interquartile range, as a share of the median."""
        return (self.percentile(75) - self.percentile(25)) / self.median

    def summary(self) -> dict[str, float]:
        times = {"median": self.median, "q1": self.percentile(25), "q3": self.percentile(75), "min": min(self.seconds)}
        return {"rounds": len(self.seconds), **{f"{name}_ms": round(1e3 * time, 5) for name, time in times.items()}}


@dataclass(frozen=True)
class Outcome:
    """One provider on one case: its samples and its relative error to float64, or why there are none."""

    samples: Samples | None = None
    error: float = math.nan
    failure: str = ""


@dataclass(frozen=True)
class Result:
    """One case: the floor, by the reader that was fastest on it, and every provider by name."""

    case: Case
    real_bytes: int
    reader: str
    floor: Samples
    outcomes: dict[str, Outcome]

    @property
    def gigabytes_per_second(self) -> float:
        return self.real_bytes / self.floor.median / 1e9

    def over_floor(self, provider: Provider) -> float | None:
        outcome = self.outcomes.get(provider.name)
        return outcome.samples.median / self.floor.median if outcome and outcome.samples else None

    def times_faster(self, than: Provider) -> float | None:
        """How many times faster fastpool is, given the same input as this provider."""
        ours = self.over_floor(FASTPOOL_PADDED if than.layout == "padded" else FASTPOOL_PACKED)
        theirs = self.over_floor(than)
        return theirs / ours if ours and theirs else None

    def is_wrong(self, outcome: Outcome) -> bool:
        return not outcome.error <= WRONG_BEYOND[self.case.dtype]  # NaN is wrong too

    def summary(self) -> dict[str, object]:
        """For JSON."""
        providers: dict[str, dict[str, object]] = {}
        for name, outcome in self.outcomes.items():
            if outcome.samples is None:
                providers[name] = {"failure": outcome.failure}
                continue
            over_floor = round(outcome.samples.median / self.floor.median, 4)
            error = outcome.error if math.isfinite(outcome.error) else str(outcome.error)
            providers[name] = {"over_floor": over_floor, "relative_error": error, **outcome.samples.summary()}
        floor = {"reader": self.reader, "gb_per_s": round(self.gigabytes_per_second, 3), **self.floor.summary()}
        case = {"shape": self.case.shape, "dtype": self.case.dtype, "native": self.case.native}
        return {**case, "real_bytes": self.real_bytes, "floor": floor, "providers": providers}
