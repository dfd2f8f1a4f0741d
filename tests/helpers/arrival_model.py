"""The arrival tree as two backends go up in it, and the counters that launches use in turn, for weak_memory.py.

A state is a number of real tokens, one for each unit that has any, and sums for each thread: the tuple of units that
were merged into them, so that a wrong read shows in the result. Nodes have two children here, blocks few threads: the
order of memory does not depend on how many.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from helpers.weak_memory import Add, Barrier, Clear, Instruction, Launch, Load, Program, Store

FAN = 2
WRONG = ("unwritten",)


@dataclass(frozen=True)
class Tree:
    """csrc/cuda/arrival_tree.cuh, triton_kernels/arrival_tree.py, or what is left of them without a part: one whose
    field is False.

    `empty`: units without real tokens, whose totals say it all: their sums are neither written nor read.
    """

    empty: frozenset[int] = frozenset()
    release: bool = True
    acquire: bool = True
    before_count: bool = True  # the barriers, by what follows or precedes them
    after_count: bool = True
    after_merge: bool = True
    only_real: bool = True

    # Which thread's columns a thread reads, counted from its own.
    reads_of: ClassVar[int] = 0

    def merge_last_block(
        self,
        unit: int,
        units: int,
        thread: int,
        threads: int,
        launch: object = 0,
        counters: object = 0,
        totals_of: object = None,
    ) -> Generator[Instruction, Any, Any]:
        """The units in the root's state for the last to arrive, None for others. States are a launch's own, and so are
        their totals, unless they are said to be another's."""
        owner = launch if totals_of is None else totals_of
        x: tuple[Any, ...] = () if unit in self.empty else (unit,)
        total = len(x)
        width, depth = 1, 1  # units under a child, and the depth of its parent
        while width < units:
            first = unit // (width * FAN) * (width * FAN)
            slots = range(first, min(first + width * FAN, units), width)
            if len(slots) > 1:  # an only child passes for its parent
                slot = unit // width * width
                if total > 0:
                    yield Store(("sums", launch, slot, thread), x)
                if thread == 0:
                    yield Store(("total", owner, slot), total)
                if self.before_count:
                    yield Barrier()
                if thread == 0:
                    arrived = yield Add(("counter", counters, first + depth), self.release, self.acquire)
                    yield Store(("last", launch, unit), arrived == len(slots) - 1)
                if self.after_count:
                    yield Barrier()
                if not (yield Load(("last", launch, unit), unwritten=False)):
                    return None
                yield from self.before_merge()
                totals = []
                for slot in slots:
                    totals.append((yield Load(("total", owner, slot), unwritten=99)))
                x, total = (), sum(totals)
                for slot, count in zip(slots, totals, strict=True):
                    if count > 0 or not self.only_real:
                        x += yield Load(("sums", launch, slot, (thread + self.reads_of) % threads), unwritten=WRONG)
                if self.after_merge:
                    yield Barrier()
            width, depth = width * FAN, depth + 1
        return x if total == len(x) else WRONG

    def before_merge(self) -> Iterator[Instruction]:
        return iter(())


@dataclass(frozen=True)
class CudaTree(Tree):
    """A thread reads the columns that it would write."""


@dataclass(frozen=True)
class TritonTree(Tree):
    """Loads and stores of a state may be laid out differently. The barrier after the count is Triton's own: one thread
    executes an atomic operation and tells the others through shared memory. arrival_tree.py asks for one more."""

    one_more: bool = True
    reads_of: ClassVar[int] = 1

    def before_merge(self) -> Iterator[Instruction]:
        return iter([Barrier()] if self.one_more else [])


def split_launch(tree: Tree, units: int, threads: int = 2) -> Launch:
    """A segment of so many units, a block each."""
    return Launch(
        [[partial(tree.merge_last_block, unit, units, i, threads) for i in range(threads)] for unit in range(units)]
    )


def launch_in_strips(tree: Tree, units: int, share_totals: bool = False) -> Launch:
    """A segment whose rows are cut into two strips, each with a tree of its own: units times strips blocks of a thread,
    the first strip's before the second's. `share_totals`: strips leave their totals in one place, since those of a unit
    are equal."""
    totals_of = "all" if share_totals else None
    return Launch(
        [
            [partial(tree.merge_last_block, unit, units, 0, 1, strip, strip, totals_of)]
            for strip in range(2)
            for unit in range(units)
        ]
    )


@dataclass(frozen=True)
class Counters:
    """What a launch is given: the buffer that it counts in, and the one in which it clears so many counters."""

    counts: str
    clears: str
    number: int


@dataclass
class Turn:
    """The counters of a stream: two buffers, used in turn by launches that succeed. Each clears in the other what the
    launch before it used."""

    name: str = "stream"
    turn: int = 0
    used: int = 0

    def counters(self) -> Counters:
        now, then = (f"{self.name} {(self.turn + i) % 2}" for i in range(2))
        return Counters(now, then, self.used)

    def launched(self, units: int) -> None:
        self.turn += 1
        self.used = units


def counting_launch(
    number: int, units: int, counters: Counters, after: int | None, absent: Sequence[int] = ()
) -> Launch:
    """The launch of that number: a segment of so many units in blocks of one thread, which clear the other buffer in
    passing, a part each. `absent` units never arrive."""
    there = [unit for unit in range(units) if unit not in absent]

    def program(unit: int) -> Generator[Instruction, Any, Any]:
        for place in range(there.index(unit), counters.number, len(there)):
            yield Clear(("counter", counters.clears, place))
        return (yield from CudaTree().merge_last_block(unit, units, 0, 1, launch=number, counters=counters.counts))

    blocks: list[list[Program]] = [[partial(program, unit)] for unit in there]
    return Launch(blocks, after)
