"""The arrival trees give right results under every interleaving that weak memory allows, and need what they have for
it; so do the counters that launches on one stream use in turn. What the models are of stands in arrival_model.py."""

from collections.abc import Generator, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
from helpers.arrival_model import (
    Counters,
    CudaTree,
    Tree,
    TritonTree,
    Turn,
    counting_launch,
    launch_in_strips,
    split_launch,
)
from helpers.weak_memory import Add, Instruction, Launch, Load, Machine, Store

Outcome = tuple[Any, ...]
Steps = Generator[Instruction, Any, Any]


# The memory itself, by the classic questions.


def writes(release: bool = True) -> Steps:
    yield Store("x", 1)
    yield Add("counter", release)


def passes_on() -> Steps:
    yield Add("counter", release=False, acquire=False)


def reads(arrivals: int = 0, acquire: bool = True) -> Steps:
    """x, once so many have arrived."""
    seen = yield Add("counter", acquire=acquire)
    return (yield Load("x", unwritten=0)) if seen >= arrivals else "too early"


def seen_by_the_last(launches: Sequence[Launch]) -> set[Any]:
    return {outcome[-1] for outcome in Machine(launches).outcomes()} - {"too early"}


@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("acquire", [False, True])
def test_a_message_passes_where_it_is_released_and_acquired(release: bool, acquire: bool) -> None:
    launch = Launch([[partial(writes, release)], [partial(reads, 1, acquire)]])
    assert seen_by_the_last([launch]) == ({1} if release and acquire else {0, 1})


def test_what_was_released_passes_through_other_additions() -> None:
    assert seen_by_the_last([Launch([[writes], [passes_on], [partial(reads, 2)]])]) == {1}


def test_launches_are_in_order_where_they_say_so() -> None:
    quiet = partial(writes, False), partial(reads, 0, False)
    assert seen_by_the_last([Launch([[quiet[0]]]), Launch([[quiet[1]]], after=0)]) == {1}
    assert seen_by_the_last([Launch([[quiet[0]]]), Launch([[quiet[1]]])]) == {0, 1}


# The trees.


def is_right(results: Outcome, expected: tuple[int, ...], threads: int) -> bool:
    """All threads of one block hold the root's state, and no other block thinks that it does."""
    blocks = [results[at : at + threads] for at in range(0, len(results), threads)]
    left = [block for block in blocks if block != (None,) * threads]
    return left == [(expected,) * threads]


def wrong_outcomes(tree: Tree, units: int) -> Iterator[Outcome]:
    expected = tuple(unit for unit in range(units) if unit not in tree.empty)
    return (o for o in Machine([split_launch(tree, units)]).outcomes() if not is_right(o, expected, threads=2))


def changed(tree: Tree) -> str:
    """A tree's name, and what is not as usual in it."""
    usual = type(tree)()
    return " ".join(
        [type(tree).__name__, *(name for name, value in vars(tree).items() if value != getattr(usual, name))]
    )


EMPTY = frozenset({0})  # whose place its parent takes


@pytest.mark.parametrize("empty", [frozenset(), EMPTY, frozenset({0, 1})], ids=lambda units: f"empty={[*units]}")
@pytest.mark.parametrize("tree", [TritonTree, CudaTree])
def test_right_in_every_interleaving(tree: type[Tree], empty: frozenset[int]) -> None:
    for units in (2, 3):
        assert not list(wrong_outcomes(tree(empty), units))


@pytest.mark.parametrize(
    "tree",
    [
        TritonTree(release=False),
        TritonTree(acquire=False),
        TritonTree(before_count=False),
        TritonTree(after_count=False),
        TritonTree(after_merge=False),
        TritonTree(EMPTY, only_real=False),
        CudaTree(release=False),
        CudaTree(acquire=False),
        CudaTree(before_count=False),
        CudaTree(after_count=False),
        CudaTree(EMPTY, after_merge=False),
        CudaTree(EMPTY, only_real=False),
    ],
    ids=changed,
)
def test_wrong_without(tree: Tree) -> None:
    assert next(wrong_outcomes(tree, units=3), None) is not None


def test_one_barrier_is_redundant_in_triton() -> None:
    """The one that arrival_tree.py asks for before it merges: Triton's own stands there already."""
    assert not list(wrong_outcomes(TritonTree(one_more=False), units=3))


def test_cuda_needs_its_last_barrier_for_empty_units() -> None:
    """Without it a thread may read the total of the next state where a child's was. Where no unit is empty, it takes
    the same sums all the same; `test_wrong_without` has one that is."""
    assert not list(wrong_outcomes(CudaTree(after_merge=False), units=3))


@pytest.mark.parametrize("share_totals", [pytest.param(False, marks=pytest.mark.wide), True])
@pytest.mark.parametrize("tree", [TritonTree, CudaTree])
def test_strips_share_nothing(tree: type[Tree], share_totals: bool) -> None:
    """Not even totals, which are equal: a node of the faster strip takes the place of a child that the other reads."""
    units = 3
    outcomes = Machine([launch_in_strips(tree(), units, share_totals)]).outcomes()
    strips = ((outcome[:units], outcome[units:]) for outcome in outcomes)
    right = all(is_right(strip, tuple(range(units)), threads=1) for both in strips for strip in both)
    assert right is not share_totals


# The counters of launches on streams. A call is its number of units; launch and result are numbered alike.


def on_one_stream(turn: Turn, calls: Sequence[int]) -> list[Launch]:
    launches: list[Launch] = []
    for units in calls:
        after = len(launches) - 1 if launches else None
        launches.append(counting_launch(len(launches), units, turn.counters(), after))
        turn.launched(units)
    return launches


def always_right(launches: Sequence[Launch], expected: Sequence[tuple[int, ...] | None]) -> bool:
    """Whether every outcome has these results of the launches, the expected units of each; None: there is none to
    expect."""
    for outcome in Machine(launches).outcomes():
        at = 0
        for launch, units in zip(launches, expected, strict=True):
            results = outcome[at : at + len(launch.blocks)]
            at += len(launch.blocks)
            if units is not None and not is_right(results, units, threads=1):
                return False
    return True


def all_units(calls: Sequence[int]) -> list[tuple[int, ...]]:
    return [tuple(range(units)) for units in calls]


@pytest.mark.parametrize("calls", [(2, 2, 2, 2), (3, 2, 3), (2, 1, 3)], ids=str)
def test_launches_of_any_size_count_from_zero(calls: tuple[int, ...]) -> None:
    assert always_right(on_one_stream(Turn(), calls), all_units(calls))


@pytest.mark.parametrize("absent", [0, 1, 2])
def test_what_a_launch_leaves_behind_harms_nobody(absent: int) -> None:
    """A unit that never comes leaves a node whose counter says that one more is to come."""
    turn, launches = Turn(), []
    calls = [3, 2, 3]
    for number, units in enumerate(calls):
        after = number - 1 if number else None
        gone = (absent,) if number == 0 else ()
        launches.append(counting_launch(number, units, turn.counters(), after, gone))
        turn.launched(units)
    assert always_right(launches, [None, *all_units(calls[1:])])


def test_streams_with_buffers_of_their_own_do_not_meet() -> None:
    one, other = Turn("one"), Turn("other")
    launches = [*on_one_stream(one, [2, 2]), counting_launch(2, 2, other.counters(), None)]
    assert always_right(launches, all_units([2, 2, 2]))


class OneBuffer(Turn):
    def counters(self) -> Counters:
        return Counters(self.name, self.name, 0)


class Standing(Turn):
    """The turn does not advance."""

    def launched(self, units: int) -> None:
        self.used = units


class Forgetful(Turn):
    """Clears one counter fewer than the launch before used."""

    def launched(self, units: int) -> None:
        super().launched(units - 1)


@pytest.mark.parametrize("host", [OneBuffer, Standing, Forgetful])
def test_wrong_when_counters_are_not_clear(host: type[Turn]) -> None:
    calls = (3, 3, 3)
    assert not always_right(on_one_stream(host(), calls), all_units(calls))


def test_wrong_when_streams_share_a_pair() -> None:
    shared = Turn()
    launches = [counting_launch(0, 2, shared.counters(), None)]
    shared.launched(2)
    launches.append(counting_launch(1, 2, shared.counters(), None))  # another stream: after nobody
    assert not always_right(launches, all_units([2, 2]))


@pytest.mark.parametrize("advances", [False, True])
def test_only_a_launch_that_ran_may_advance_the_turn(advances: bool) -> None:
    turn = Turn()
    launches = on_one_stream(turn, [2])
    turn.counters()  # of a launch that fails
    if advances:
        turn.launched(2)
    launches.append(counting_launch(1, 2, turn.counters(), 0))
    assert always_right(launches, all_units([2, 2])) is not advances


@pytest.mark.parametrize("kept", [False, True])
def test_a_captured_launch_may_not_keep_its_counters(kept: bool) -> None:
    """Replayed beside eager launches, it counts where it was told to when it was captured, though nobody has cleared
    there since. With memory of its own, which it clears itself, all is well."""
    turn = Turn()
    launches = on_one_stream(turn, [2])
    captured = turn.counters()
    if kept:
        turn.launched(2)
    for replay in range(2):
        own = Counters(f"the graph's, cleared before replay {replay}", "nothing", 0)
        launches.append(counting_launch(len(launches), 2, captured if kept else own, len(launches) - 1))
    launches.append(counting_launch(len(launches), 2, turn.counters(), len(launches) - 1))
    assert always_right(launches, all_units([2, 2, 2, 2])) is not kept
