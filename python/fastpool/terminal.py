"""What a command prints on, whatever becomes of it: a reader that leaves, a full disk, a stream that is closed or knows
ASCII alone. And what is printed: nothing that a terminal would obey."""

import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import TYPE_CHECKING, Any, TextIO, cast

from .text import told

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_READER_HAS_LEFT = 141  # of a process that SIGPIPE ends, in a shell
_CANNOT = 2
_NARROWEST, _USUAL = 20, 80  # columns in which a table can be read
_LINES = 100  # from the beginning of a text, and from its end
_LINE = 2000  # characters; messages of ours are shorter


class Lost(SystemExit):
    """stdout takes nothing more; `status` is the command's exit status, `why` is None where its reader has left. As it
    is no Exception, nobody in between takes it for a failure of theirs, and a thread ends by it without a word."""

    def __init__(self, error: Exception | str) -> None:
        left = isinstance(error, ConnectionError)  # a broken pipe is one
        self.status = _READER_HAS_LEFT if left else _CANNOT
        super().__init__(self.status)
        self.why = None if left else getattr(error, "strerror", None) or str(error)


class Output:
    """A stream on which its encoding stops nothing: what that lacks is written as escapes. Once it has failed, it is
    left alone, also by Python as it ends; where it is `needed`, that raises Lost, at once and from then on."""

    def __init__(self, stream: TextIO | None, needed: bool) -> None:
        self._lost = Lost("it is closed") if stream is None else None
        self._stream = stream or io.StringIO()
        self._needed = needed

    def write(self, text: str) -> int:
        encoding = self._stream.encoding or "utf-8"
        self._try(self._stream.write, text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, act: Callable[..., object], *arguments: str) -> None:
        if self._lost is None:
            try:
                act(*arguments)
            except (OSError, ValueError) as error:  # ValueError: somebody has closed it
                self._lost = Lost(error)
                with suppress(OSError, ValueError):  # of what is no file
                    _to_nowhere(self._stream.fileno())
        if self._lost is not None and self._needed:
            raise self._lost

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Lines:
    """stderr, for whoever writes to it: errors, Python's warnings, libraries' logs. Each line of a text is made
    visible, and those behind the first are set in, so that no text that is written at once passes for messages of its
    own. Of very many those in the middle are left out."""

    def __init__(self, plain: Output) -> None:
        self.plain = plain  # for what has to reach the terminal as it is

    def write(self, text: str) -> int:
        first, *more = text.split("\n")
        if len(more) > 2 * _LINES:
            more = [*more[:_LINES], "...", *more[-_LINES:]]
        shown = [told(first, _LINE), *(f"  {told(line, _LINE)}" if line else "" for line in more)]
        self.plain.write("\n".join(shown))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def isatty(self) -> bool:
        """It passes no colours on."""
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plain, name)


def _to_nowhere(number: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)


@contextmanager
def attached() -> Iterator[None]:
    """sys.stdout is an Output, and sys.stderr Lines."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # else a file opened later would take its number, and be printed into
            _to_nowhere(number)
    out, errors = Output(sys.stdout, needed=True), Lines(Output(sys.stderr, needed=False))
    with redirect_stdout(cast(TextIO, out)), redirect_stderr(cast(TextIO, errors)):
        yield


def complain(who: str, text: str) -> None:
    """One line on stderr: "fastpool inspect: ..."."""
    print(f"{who}: {told(text)}", file=sys.stderr)


def console(stderr: bool = False) -> "Console":
    """rich's, which takes no text for an emoji's code, and colours no words of its own accord."""
    from rich.console import Console

    file = getattr(sys.stderr, "plain", sys.stderr) if stderr else None
    found = Console(file=file, highlight=False, emoji=False)
    if found.width < _NARROWEST:  # by COLUMNS=0, say, with which nothing at all would be printed
        found.width = _USUAL
    return found


def text(*parts: str | tuple[str, str]) -> "Text":
    """rich's, of strings and (string, style), visible, in which nothing is taken for markup."""
    from rich.text import Text

    return Text.assemble(*(told(part) if isinstance(part, str) else (told(part[0]), part[1]) for part in parts))
