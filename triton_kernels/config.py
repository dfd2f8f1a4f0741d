"""How a call's work is cut up: a written heuristic, and measured exceptions to it. No choice changes a bit of a
result."""

import json
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from ..constants import LEAF

MOST_THREADS = 512  # of a program: each then has 128 registers
LOAD_BYTES = 16  # the widest load of a thread
MAX_LEVELS = 4  # a state per level stays in registers (single_program has so few columns a thread that more fit)
# Bytes of a segment that one processor reads in the time of what splitting it costs: finding its units, and meeting.
SHORT = 256 << 10
SMALL = 8 << 20  # bytes of a batch below which that matters
# Packed segments are as long as their mean says, give or take a few times, unless they may overlap; where one of them
# is as long as all rows, one program reads so much.
LIKELY = 4
LONGEST_WALK = 512 << 10  # bytes
MOST_QUERIES = 4  # of a program
STATE_REGISTERS = 200  # of a thread, for the states of several queries
MEETING_STATES = 7  # at least, of each query, where units meet
MEETING_REGISTERS = 50  # of a thread, for finding the nodes to meet
# Where no measurement says otherwise (benchmarks/tune.py), token states of fewer bytes are left to CUDA C++: its calls
# cost the host less and never wait for a compiler. On an H100 a call from Python took the host 17 to 20 us, Triton's 49
# to 72, and the GPU 60 us for 192 MB: from there on it is busy for as long, and Triton's programs are faster.
NATIVE_BELOW_BYTES = 192 << 20
TUNED = Path(__file__).parent / "tuned"


@dataclass(frozen=True)
class Config:
    """leaves side by side in a program, 2^levels such groups one after another, warps that share them, loads of a
    thread that are in flight together, each of another row of a leaf (a divisor of LEAF); stages of such loads, beyond
    1 by way of shared memory; registers that a thread may use on an NVIDIA GPU, 0 for what `registers` says."""

    leaves: int
    levels: int
    warps: int
    loads: int
    stages: int = 1
    registers: int = 0

    @property
    def split(self) -> int:
        """Tokens of a unit."""
        return LEAF * self.leaves << self.levels


@dataclass(frozen=True)
class Shape:
    """What the choice may depend on. `longest` and `mean`: tokens of a segment, as far as shapes tell."""

    batch: int
    longest: int
    mean: int
    columns: int  # of a program, a power of two
    element_size: int
    weighted: bool
    sm_count: int
    warp_size: int = 32  # threads of a warp; 64 on most AMD GPUs
    may_overlap: bool = False  # segments, each of which may then be as long as all rows
    summed: bool = False  # tokens are added as they are
    softmax: bool = False  # weights are powers of scores
    queries: int = 1  # of a segment

    @property
    def light(self) -> bool:
        """What a program does beside its loads takes few registers, so that there may be many loads."""
        return self.summed and not self.may_overlap and self.element_size <= 4

    @property
    def likely(self) -> int:
        """Tokens that a segment hardly exceeds."""
        return self.longest if self.may_overlap else min(self.longest, LIKELY * self.mean)

    @property
    def together(self) -> int:
        """Queries that a program takes at once, if registers hold as many."""
        return min(MOST_QUERIES, power_of_two(self.queries))

    @property
    def texts(self) -> int:
        """Segments, each as often as it is read."""
        return self.batch * -(-self.queries // self.together)

    def units(self, split: int) -> int:
        """About so many have tokens."""
        return max(self.texts, self.texts * self.mean // split)


def power_of_two(n: int) -> int:
    """The least that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def max_columns(element_size: int) -> int:
    """What the registers of a program hold of one row: wider ones are cut into strips."""
    return 512 if element_size == 8 else 4096


def row_columns(width: int, element_size: int, warp_size: int) -> int:
    """Columns of a program for rows of this width: at least one whole load for every thread of a warp."""
    return min(max(power_of_two(width), warp_size * LOAD_BYTES // element_size), max_columns(element_size))


def warps(leaves: int, columns: int, element_size: int, warp_size: int) -> int:
    """One load of LOAD_BYTES a thread and row, as far as MOST_THREADS go."""
    return max(1, min(MOST_THREADS, leaves * columns * element_size // LOAD_BYTES) // warp_size)


def registers(warps: int, shared: bool = True) -> int:
    """What a thread may use on an NVIDIA GPU. `shared`: a third of a processor's for a small program, half for a larger
    one, so that others fit beside it; else all that there are. Left alone, ptxas takes more to have a few loads'
    addresses at hand, where one more program's loads in flight count for more."""
    return (168 if warps <= 4 else 128) if shared else min(255, 65536 // (32 * warps))


def widest(shape: Shape) -> int:
    """Leaves side by side that make a program of 256 threads, of which two fit a processor, or of 128, of which three
    do. Either has more than the 32 KB or so of loads in flight with which a processor of an H100 draws its share of the
    memory's bandwidth."""
    threads = 256 if shape.light else 128
    return max(1, min(16, threads * LOAD_BYTES // (shape.columns * shape.element_size)))


def is_wide(shape: Shape) -> bool:
    """Whether a thread loads more than once for a row."""
    return shape.columns * shape.element_size > MOST_THREADS * LOAD_BYTES


def loads(shape: Shape) -> int:
    """Half a leaf where registers allow it, which spares short texts a wait; fewer where values are wide, or rows, or
    powers are computed meanwhile."""
    if shape.light and shape.element_size == 2 and shape.columns <= 1024:
        return 16
    return 8 >> (shape.element_size == 8) >> shape.softmax >> 2 * is_wide(shape)


def usual(shape: Shape, leaves: int, levels: int) -> Config:
    """Wide rows with weights have half of the threads, with all the registers there are; with powers all rows that
    would have as many."""
    config = Config(leaves, levels, warps(leaves, shape.columns, shape.element_size, shape.warp_size), loads(shape))
    many = config.warps * shape.warp_size == MOST_THREADS
    return halved(config) if many and (shape.softmax or (shape.weighted and is_wide(shape))) else config


def halved(config: Config) -> Config:
    """Half of the threads, with all the registers there are."""
    num_warps = config.warps // 2
    return replace(config, warps=num_warps, registers=registers(num_warps, shared=False))


def one_row(config: Config, warps: int) -> Config:
    """Units of as many tokens, read a row at a time: its product with a query is then one number, which the compiler
    need not lay out as it does columns; and there is one product, since it takes long to compile."""
    return replace(
        config, leaves=1, levels=config.levels + config.leaves.bit_length() - 1, warps=warps, loads=1, stages=1
    )


def deep(shape: Shape, leaves: int) -> int:
    """Levels of a large unit: eight groups, or four where many threads share the registers and need them."""
    num_warps = warps(leaves, shape.columns, shape.element_size, shape.warp_size)
    return 3 if shape.light or num_warps * shape.warp_size <= MOST_THREADS // 4 else 2


def deepest(shape: Shape, leaves: int) -> int:
    """Levels of the largest unit that meets others. Weights, whose sums take registers too, leave none for more than
    usual."""
    return deep(shape, leaves) if shape.weighted else MAX_LEVELS


def whole(shape: Shape) -> Config:
    """Leaves for a segment that is as long as is likely, and levels for one of any length. Where segments may be longer
    than that, levels for LONGEST_WALK, so that a batch's length is no reason to compile."""
    row_bytes = shape.columns * shape.element_size
    longest = shape.longest if shape.likely == shape.longest else LONGEST_WALK // row_bytes
    leaves = power_of_two(max(-(-shape.likely // LEAF), -(-longest // (LEAF << MAX_LEVELS))))
    leaves = min(leaves, widest(shape) if shape.light else max(1, min(16, MOST_THREADS * LOAD_BYTES // row_bytes)))
    levels = (-(-longest // (LEAF * leaves)) - 1).bit_length() if longest > 0 else 0
    return usual(shape, leaves, levels)


def queries_together(shape: Shape, columns: int, config: Config, whole: bool) -> int:
    """Queries that a program takes at once, reading a row for all of them: as many as registers hold the states of. A
    thread has those of its levels, or of nodes of the arrival tree; and what is added to them, and the queries. Beside
    its columns each has a sum of weights and an exponent."""
    states = config.levels + 3 if whole else max(config.levels + 4, MEETING_STATES)
    held = states * (columns // (config.warps * shape.warp_size) + 2) * (max(4, shape.element_size) // 4)
    queries = shape.together
    while queries > 1 and queries * held > STATE_REGISTERS - (0 if whole else MEETING_REGISTERS):
        queries //= 2
    return queries


def one_token(shape: Shape) -> Config:
    """For modes that read one token."""
    return Config(1, 0, warps(1, shape.columns, shape.element_size, shape.warp_size), 1)


def heuristic(shape: Shape) -> Config:
    """Small batches of texts that a program can take whole need no other program's sums. Otherwise the widest program
    that texts have leaves for, and units as large as still give most processors one: what a program costs beside its
    reading (finding its unit, meeting others) is paid for every unit, and two large ones fill a processor. Few choices,
    since each is a compile."""
    row_bytes = shape.columns * shape.element_size
    if (
        shape.likely * row_bytes <= SHORT
        and shape.longest * row_bytes <= LONGEST_WALK
        and shape.texts * shape.mean * row_bytes < SMALL
    ):
        return whole(shape)
    leaves = widest(shape)
    while leaves > 1 and LEAF * (leaves - 1) >= shape.mean:
        leaves //= 2
    levels = deep(shape, leaves)
    while levels > 0 and 4 * shape.units(LEAF * leaves << levels) < 3 * shape.sm_count:
        levels -= 1
    return usual(shape, leaves, levels)


def single_program(shape: Shape) -> tuple[int, Config]:
    """Columns and a configuration for segments of any length in one piece: leaves for MOST_THREADS on 2 KB of a row,
    so that little of each level falls to a thread, and levels for a million tokens and more; half of the row and
    levels for any number where there may be so many. With weights half the threads, with all the registers there
    are."""
    row_bytes = 2048 if shape.longest <= 1 << 20 else 1024
    columns = min(shape.columns, row_bytes // shape.element_size)
    leaves = max(1, MOST_THREADS * LOAD_BYTES // (columns * shape.element_size))
    levels = 14 if shape.longest <= 1 << 20 else 24
    config = Config(leaves, levels, warps(leaves, columns, shape.element_size, shape.warp_size), 4 >> shape.softmax)
    return columns, halved(config) if shape.weighted else config


TILE_BYTES = 8192  # of a gradient: four loads or stores for each of 128 threads, which leaves room for many programs
TILE_THREADS = 128
# Of a thread that writes rows of one segment: five programs fit a processor, so that their stores hide what each waits
# for. Left alone, ptxas takes up to twice as many to keep addresses. Fewer programs fit where so few registers will not
# always do: for max, which compares rows with those of maxima (128 columns of bfloat16 take up to 168), and with a row
# to a thread.
SCATTER_REGISTERS = 96
STRIP_BYTES = 2048  # of its widest row
SEVERAL_ROWS = 16  # at most, where several segments may hold one: each row's own mask and weight take registers


def tile(width: int, element_size: int) -> tuple[int, int]:
    """Columns and rows that a program of the backward kernels takes at once."""
    columns = min(max(power_of_two(width) * element_size, LOAD_BYTES), STRIP_BYTES) // element_size
    return columns, TILE_BYTES // (columns * element_size)


LEAST_CHUNK = 64  # rows
MOST_CHUNK = 1 << 30  # kernels take it in 32 bits


def chunk(rows: int, strips: int, tile_rows: int, sm_count: int) -> int:
    """Rows of a program of the backward kernels: whole tiles, as many as leave 16 programs for every processor, or
    LEAST_CHUNK, as far as that leaves four. Many, since a program looks its segments up and reads their gradients once
    for all of them."""

    def each(per_processor: int) -> int:
        return -(-rows // max(1, per_processor * sm_count // strips))

    wanted = min(max(each(16), min(LEAST_CHUNK, each(4))), MOST_CHUNK)
    return max(1, -(-wanted // tile_rows)) * tile_rows


def scan(mean: int, weighted: bool) -> tuple[int, int]:
    """Mask elements that `segment_prologue` looks at in one go, eight a thread, and its threads: a program has a
    segment to itself. Half as many where sums of weights take registers."""
    threads = 128 if mean <= 1024 else MOST_THREADS // 2 if weighted else MOST_THREADS
    return 8 * threads, threads


@lru_cache(maxsize=4096)
def choose(shape: Shape, device: str) -> Config:
    """What was measured for this kind of shape on this device, or else the heuristic."""
    return tuned(device).get(key(shape)) or heuristic(shape)


def key(shape: Shape) -> str:
    """Shapes alike enough to share a measured configuration: powers of two of everything."""
    mean, batch = power_of_two(max(shape.mean, 1)), power_of_two(max(shape.texts, 1))
    kind = "s" if shape.softmax else "w" if shape.weighted else "" if shape.light else "h"
    return f"{shape.columns}x{shape.element_size}{kind}-{batch}x{mean}"


@cache
def _measured(device: str) -> dict[str, Any]:
    """What benchmarks/tune.py wrote about a device of this name; nothing if it never ran there."""
    path = TUNED / f"{device}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


@cache
def tuned(device: str) -> dict[str, Config]:
    """Configurations that were measured to be better than the heuristic's, by key."""
    return {name: Config(**one) for name, one in _measured(device).get("configs", {}).items()}


def native_below_bytes(device: str) -> int:
    """Token states of fewer bytes are faster on CUDA C++: as measured, or else as assumed."""
    below: int = _measured(device).get("native_below_bytes", NATIVE_BELOW_BYTES)
    return below


def slug(device_name: str) -> str:
    """A device's name as a file's: nvidia-h200."""
    return "-".join("".join(c if c.isalnum() else " " for c in device_name.lower()).split())


def candidates(shape: Shape) -> list[Config]:
    """What a tuner may try: every cut with more and fewer loads in flight; with loads of the next steps on their way
    through shared memory; and, where a program fills a processor, with half of the registers, so that two do."""
    found = []
    for leaves in (1, 2, 4, 8, 16):
        if leaves <= 4 * widest(shape):
            for levels in range(MAX_LEVELS + 1):
                base = usual(shape, leaves, levels)
                fewer, count = max(1, base.warps // 2), base.loads
                for num_warps in sorted({fewer, base.warps}):
                    found += [
                        replace(base, warps=num_warps, loads=n) for n in sorted({max(1, count // 2), count, 2 * count})
                    ]
                for n in (max(1, count // 2), count):
                    found.append(replace(base, loads=n, stages=3))
                    if base.warps * shape.warp_size == MOST_THREADS:
                        found.append(replace(base, loads=n, registers=64))
    return list(dict.fromkeys(found))
