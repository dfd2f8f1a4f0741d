"""The doctor from end to end."""

import json
import warnings
from pathlib import Path

from ..env import serves
from ..models import PoolingConfig, tokens
from ..models.files import Folder, folder_of
from . import embed, pairs, report
from .measure import measure
from .trace import Trace

_PICTURES = (".png", ".pdf", ".svg")


def run(
    model: str,
    file: Path | None = None,
    as_json: bool = False,
    picture: Path | None = None,
    traced: bool = False,
) -> int:
    """Measures, prints and draws; 1 if a pooling is better than the configured one by more than sampling error.

    Raises:
        OSError, ValueError: a file of the model or of pairs cannot be read, and which; the picture cannot be written;
            the model gives no vector of a text; token states or logits are not finite, and where.
    """
    # Before the minutes that a large model may take.
    if picture is not None and (picture.suffix not in _PICTURES or not picture.parent.is_dir()):
        raise ValueError(f"--plot: expected one of {', '.join(_PICTURES)} in a folder that is there, got {picture}")
    if picture is not None and picture.is_dir():
        raise ValueError(f"--plot: expected a file, got the folder {picture}")
    folder = folder_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the report prints them
        config = tokens.checked(Folder(folder), PoolingConfig.from_pretrained(folder))
    if config.sparse is None:
        config.check_pooled(model)
    found = pairs.read(file)
    texts = list(dict.fromkeys([*found.a, *found.b]))
    transformer = embed.load(folder, config)
    serves(transformer.device)
    trace = Trace(transformer[0]) if traced else None
    with report.progress(len(texts), shown=not as_json) as advance:
        vectors = embed.vectors(transformer, config, texts, advance, trace)
    measured = measure(found, vectors, {text: i for i, text in enumerate(texts)}, config)
    if as_json:
        print(json.dumps(report.document(model, measured, config, trace), indent=2))
    else:
        report.render(model, measured, config, trace)
    if picture is not None:
        report.plot(picture, model, measured)
    return 1 if measured.better else 0
