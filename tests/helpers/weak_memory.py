"""Every outcome of a few threads under a weak memory: release and acquire, as in the causality order of PTX.

A place remembers all messages that were ever written to it, oldest first. A thread has a view: for each place, how many
messages it can no longer overlook. A plain load takes any message but those before the newest that the view knows of;
a plain store adds a message that carries nothing. An atomic addition takes the newest message. Where it releases, what
it writes carries its thread's view; where it acquires, the view carried by what it reads joins the thread's own. The
threads of a block join their views at a barrier, and a launch begins with the views of all that it comes after.

Of two plain stores that race for a place only one order is looked at; clearing a counter is tried in every order.
"""

from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

Place = Hashable
View = frozenset[tuple[Place, int]]  # of each place, how many messages are known; places that are not there: none
NOTHING: View = frozenset()


@dataclass(frozen=True)
class Store:
    place: Place
    value: Any


@dataclass(frozen=True)
class Clear:
    """A counter to 0, by a plain store."""

    place: Place


@dataclass(frozen=True)
class Load:
    """Gives a value that stands in the place, `unwritten` where that is what was there before all messages."""

    place: Place
    unwritten: Any


@dataclass(frozen=True)
class Add:
    """Adds 1 to a counter and gives what it was before; it begins at 0."""

    place: Place
    release: bool = True
    acquire: bool = True


@dataclass(frozen=True)
class Barrier:
    """Waits for the threads of the block that have not ended."""


@dataclass(frozen=True)
class End:
    result: Any


Instruction = Store | Clear | Load | Add | Barrier
Program = Callable[[], Generator[Instruction, Any, Any]]  # what one thread does; it returns its result


@dataclass(frozen=True)
class Launch:
    """Blocks of threads that run side by side, and beside every other launch but those in order with it: it begins
    when the launch numbered `after` has ended."""

    blocks: Sequence[Sequence[Program]]
    after: int | None = None


@dataclass(frozen=True)
class Message:
    value: Any
    view: View = NOTHING


@dataclass(frozen=True)
class Thread:
    """Where a thread stands: what its instructions have given so far (its program can be run again from that), or
    its result alone once it has ended."""

    given: tuple[Any, ...] = ()
    view: View = NOTHING
    ended: bool = False


@dataclass(frozen=True)
class State:
    threads: tuple[Thread, ...]
    memory: frozenset[tuple[Place, tuple[Message, ...]]] = frozenset()

    @cached_property
    def messages(self) -> dict[Place, tuple[Message, ...]]:
        return dict(self.memory)

    def written(self, place: Place, message: Message) -> frozenset[tuple[Place, tuple[Message, ...]]]:
        before = self.messages.get(place, ())
        return self.memory - {(place, before)} | {(place, (*before, message))}


@cache
def joined(one: View, other: View) -> View:
    known = dict(one)
    for place, count in other:
        known[place] = max(count, known.get(place, 0))
    return frozenset(known.items())


class Machine:
    """Runs launches in every order."""

    def __init__(self, launches: Sequence[Launch]) -> None:
        self.programs: list[Program] = []
        self.blocks: list[tuple[int, ...]] = []  # for each thread, those it meets at barriers
        self.before: list[tuple[int, ...]] = []  # for each thread, those that end before it begins
        ends: list[tuple[int, ...]] = []
        for launch in launches:
            first = len(self.programs)
            for block in launch.blocks:
                mates = tuple(range(len(self.programs), len(self.programs) + len(block)))
                self.programs += block
                self.blocks += [mates] * len(block)
            ends.append(tuple(range(first, len(self.programs))))
            self.before += [() if launch.after is None else ends[launch.after]] * len(ends[-1])
        self._next: dict[tuple[int, tuple[Any, ...]], Instruction | End] = {}

    def outcomes(self) -> Iterator[tuple[Any, ...]]:
        """The results of all threads, once for every state in which all have ended, as they are found."""
        start = State((Thread(),) * len(self.programs))
        seen, open_states = {start}, [start]
        while open_states:
            state = open_states.pop()
            if all(thread.ended for thread in state.threads):
                yield tuple(thread.given[0] for thread in state.threads)
                continue
            following = self.steps(state)
            assert following, "threads wait for each other"
            for one in following:
                if one not in seen:
                    seen.add(one)
                    open_states.append(one)

    def steps(self, state: State) -> list[State]:
        """The states that one step of one thread leads to. To store, to meet at a barrier and to end are taken at once
        and alone: when they happen makes no difference to others, who may overlook what was stored as long as they
        like."""
        found = []
        for index, thread in enumerate(state.threads):
            if thread.ended or not all(state.threads[i].ended for i in self.before[index]):
                continue
            for i in self.before[index]:
                thread = replace(thread, view=joined(thread.view, state.threads[i].view))
            instruction = self.next(index, thread.given)
            if isinstance(instruction, End):
                return [self.changed(state, {index: Thread((instruction.result,), thread.view, ended=True)})]
            if isinstance(instruction, Barrier):
                if met := self.met(state, index):
                    return [met]
                continue
            after = self.accesses(state, index, thread, instruction)
            if isinstance(instruction, Store):
                return after
            found += after
        return found

    def next(self, index: int, given: tuple[Any, ...]) -> Instruction | End:
        """What a thread does when its instructions have given so much."""
        known = self._next.get((index, given))
        if known is None:
            running = self.programs[index]()
            try:
                known = next(running)
                for value in given:
                    known = running.send(value)
            except StopIteration as ended:
                known = End(ended.value)
            self._next[index, given] = known
        return known

    def met(self, state: State, index: int) -> State | None:
        """A block beyond its barrier, if all its threads have come to it."""
        mates = [i for i in self.blocks[index] if not state.threads[i].ended]
        if not all(isinstance(self.next(i, state.threads[i].given), Barrier) for i in mates):
            return None
        view = NOTHING
        for i in mates:
            view = joined(view, state.threads[i].view)
        return self.changed(state, {i: Thread((*state.threads[i].given, None), view) for i in mates})

    def accesses(self, state: State, index: int, thread: Thread, access: Store | Clear | Load | Add) -> list[State]:
        """A thread's access to memory, with everything it may give."""
        messages = state.messages.get(access.place, ())
        known = dict(thread.view).get(access.place, 0)

        def gone_on(value: Any, view: View, seen: int) -> dict[int, Thread]:
            return {index: Thread((*thread.given, value), joined(view, frozenset({(access.place, seen)})))}

        if isinstance(access, Load):
            return [
                self.changed(state, gone_on(messages[i - 1].value if i else access.unwritten, thread.view, i))
                for i in range(known, len(messages) + 1)
            ]
        count = len(messages) + 1
        if not isinstance(access, Add):
            memory = state.written(access.place, Message(access.value if isinstance(access, Store) else 0))
            return [self.changed(state, gone_on(None, thread.view, count), memory)]
        last = messages[-1] if messages else Message(0)
        view = joined(thread.view, last.view) if access.acquire else thread.view
        after = gone_on(last.value, view, count)
        # What is released to the counter stays released through the additions that follow.
        carried = joined(last.view, after[index].view) if access.release else last.view
        return [self.changed(state, after, state.written(access.place, Message(last.value + 1, carried)))]

    def changed(self, state: State, threads: dict[int, Thread], memory: Any = None) -> State:
        every = tuple(threads.get(i, thread) for i, thread in enumerate(state.threads))
        return State(every, state.memory if memory is None else memory)
