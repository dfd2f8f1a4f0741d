"""How fastpool starts as a plugin of an engine, and how it steps aside for an engine that it does not know.

Pooling that is almost the engine's raises no error, it only makes search worse. So a plugin replaces nothing unless the
engine is a version whose sources it was written against, and its classes look as they did there.
"""

import inspect
import logging
import os
from collections.abc import Callable
from importlib import import_module
from typing import Any


class UnexpectedEngineError(Exception):
    """The engine is not as the plugin knows it; the message says in what."""


def expect_signature(function: Any, owner: Any, *parameters: str) -> None:
    """Raises UnexpectedEngineError unless a function takes these parameters and comes from where its owner does."""
    name, found = function.__qualname__, list(inspect.signature(function).parameters)
    if found != list(parameters):
        raise UnexpectedEngineError(f"{name} takes ({', '.join(found)}), expected ({', '.join(parameters)})")
    if function.__module__ != owner.__module__:
        raise UnexpectedEngineError(f"{name} has been replaced already, by {function.__module__}")


def start(engine: str, known: tuple[str, ...], attach: Callable[[], None]) -> None:
    """Runs `attach` where the engine is a known version: one line in the log, info if it ran, a warning if not.

    FASTPOOL_<ENGINE>=0 leaves the engine alone, without a line. `attach` checks everything before it replaces anything.
    """
    package = engine.lower()
    variable = f"FASTPOOL_{engine.upper()}"
    if os.environ.get(variable) == "0":
        return
    # A child of the engine's own logger: the line stands where the engine's lines do.
    log = logging.getLogger(f"{package}.fastpool")
    try:
        version: str = import_module(package).__version__
        if not any(version == one or version.startswith(f"{one}.") for one in known):
            raise UnexpectedEngineError(f"fastpool knows {engine} {', '.join(known)}, this is {version}")
        attach()
    except Exception as error:  # an engine that looks different must still start, whatever looking at it raises
        kind = "" if isinstance(error, UnexpectedEngineError) else f"{type(error).__name__}: "
        why = kind + " ".join(str(error).split())
        log.warning("fastpool leaves %s's pooling as it is: %s (%s=0 turns it off)", engine, why, variable)
    else:
        log.info("fastpool does the CLS, LAST and MEAN pooling of %s %s (%s=0 turns it off)", engine, version, variable)
