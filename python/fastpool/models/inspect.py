"""`fastpool inspect`: what a model's folder says about its pooling, and what engines make of it."""

import dataclasses
import json
import warnings
from collections.abc import Sequence
from typing import Any

from ..terminal import complain, console, text
from ..text import shown, told
from . import engines, tokens
from .config import PoolingConfig
from .files import Folder, folder_of
from .layers import Layer
from .weighing import LayerWeights, WordWeights

_LONGEST = 100_000  # characters of a value as JSON: no prompts of use are longer


def collect(model: str) -> dict[str, Any]:
    """All of it, as JSON can hold it, and bounded, whatever the folder holds: long words are cut, and a value that is
    longer than any of use is one string, of its beginning and end.

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
        "architecture": config.architecture and told(config.architecture),
        "decisions": [_bounded(_plain(decision)) for decision in config.decisions],
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
        kind = {"layer": type(value).__name__} if isinstance(value, Layer | LayerWeights | WordWeights) else {}
        return kind | {name: _plain(item) for name, item in fields.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _bounded(decision: dict[str, Any]) -> dict[str, Any]:
    value = decision["value"]
    return decision | {"value": shown(value) if len(json.dumps(value)) > _LONGEST else value}


def _words(value: Any) -> str:
    """A decision's value in one cell."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " + ".join(map(_words, value))
    if isinstance(value, dict) and value.get("layer") == "Dense":
        return f"Dense {value['inputs']} to {value['outputs']}, {value['activation']}"
    if isinstance(value, dict) and "layer" in value:
        return str(value["layer"])
    if isinstance(value, dict):
        return ", ".join(f"{name}: {said!r}" for name, said in value.items() if said is not None)
    return str(value)


def render(found: dict[str, Any]) -> None:
    """Prints what `collect` found."""
    from rich.table import Column, Table
    from rich.text import Text

    def table(*headers: str, lines: bool = False) -> Table:
        return Table(*(Column(header, overflow="fold") for header in headers), show_lines=lines)  # nothing is left out

    out = console()
    out.print(text((found["model"], "bold"), "  ", found["architecture"] or ""))
    out.print(text("wants ", (found["pooling"], "bold")), end="\n\n")
    said = table("", "is", "says", "how sure")
    for one in found["decisions"]:
        colour = {"stated": "green", "implied": "yellow", "guessed": "red"}[one["certainty"]]
        row = (one["what"], _words(one["value"]), one["source"], (one["certainty"], colour))
        said.add_row(*map(text, row))
    out.print(said)
    for warning in found["warnings"]:
        out.print(text(("warning:", "yellow"), " ", warning))
    answers = table("engine", "setting for this pooling", "by itself", lines=True)
    for one in found["engines"]:
        itself = text(("differs:", "red"), " ", one["by_itself"]) if one["differs"] else text("the same")
        setting = text(("not possible", "red") if one["setting"] is None else one["setting"])
        by_itself = Text("\n").join([itself, *map(text, one["notes"])])
        answers.add_row(Text("\n").join([text(one["engine"]), text(one["version"])]), setting, by_itself)
    out.print(answers)


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
            complain("fastpool inspect", f"{about}{error}")
            documents.append({"model": model, "error": told(str(error))})
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
    print(told(f"{found['model']}: {found['pooling']}{'' if found['problems'] else ': nothing against it'}"))
    for problem in found["problems"]:
        print(f"  {told(problem)}")
