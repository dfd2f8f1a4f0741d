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


def start(
    engine: str, known: tuple[str, ...], attach: Callable[[], None], *more: tuple[str, Callable[[], None]]
) -> None:
    """Runs `attach`, of CLS, LAST and MEAN, where the engine is a known version, and behind it `more`, kinds of pooling
    by their names: one line in the log, info, for what ran. Where `attach` fails nothing else runs, for the engine is
    another than the one known; where another fails that kind alone is left out. Each failure is a warning.

    FASTPOOL_<ENGINE>=0 leaves the engine alone, without a line. Each checks everything before it replaces anything.
    """
    package = engine.lower()
    variable = f"FASTPOOL_{engine.upper()}"
    if os.environ.get(variable) == "0":
        return
    # A child of the engine's own logger: the line stands where the engine's lines do.
    log = logging.getLogger(f"{package}.fastpool")

    def warn(pooling: str, error: Exception) -> None:
        kind = "" if isinstance(error, UnexpectedEngineError) else f"{type(error).__name__}: "
        why = kind + " ".join(str(error).split())
        log.warning("fastpool leaves %s's %s as it is: %s (%s=0 turns it off)", engine, pooling, why, variable)

    # An engine that looks different must still start, whatever looking at it raises.
    try:
        version: str = import_module(package).__version__
        if not any(version == one or version.startswith(f"{one}.") for one in known):
            raise UnexpectedEngineError(f"fastpool knows {engine} {', '.join(known)}, this is {version}")
        attach()
    except Exception as error:
        warn("pooling", error)
        return
    kinds = ["CLS", "LAST", "MEAN"]
    for kind, attach_kind in more:
        try:
            attach_kind()
        except Exception as error:
            warn(f"{kind} pooling", error)
        else:
            kinds.append(kind)
    does = f"{', '.join(kinds[:-1])} and {kinds[-1]}"
    log.info("fastpool does the %s pooling of %s %s (%s=0 turns it off)", does, engine, version, variable)
