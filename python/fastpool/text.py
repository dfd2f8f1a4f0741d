"""Text from elsewhere (a model's files, a command line, another library's error) as people are shown it: all of it can
be seen, so that it does nothing to a terminal, and however long it is, no more is shown than is read."""

import reprlib

_VALUE = 200  # characters of a value
_TOLD = 1000  # of a message, a table's cell


def visible(text: str) -> str:
    """Letters of every language as they are; as escapes like \\x1b what a terminal obeys or does not show: control
    characters, the ends of lines, what turns the direction of writing, halves of surrogate pairs."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _cut(text: str, most: int) -> str:
    half = (most - 3) // 2
    return text if len(text) <= most else f"{text[:half]}...{text[-half:]}"


def told(text: str, most: int = _TOLD) -> str:
    """A message, visible, its middle left out where it has more characters."""
    return visible(_cut(text, most))


def shown(value: object) -> str:
    """A value in a message: as Python writes it, its middle left out where it is long."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = _VALUE
    short.maxlist = short.maxdict = 6
    short.maxlevel = 2  # each one more would be six times as much
    return _cut(short.repr(value), _VALUE)
