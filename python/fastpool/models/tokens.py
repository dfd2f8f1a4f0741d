"""What a model's tokenizer does to the token that is pooled, told by tokenising a word."""

from dataclasses import dataclass, replace
from typing import Any

from ..text import shown
from .config import PoolingConfig
from .decisions import Record
from .files import Document, Folder, inside
from .sources import Sources

_WORD = "word"
_LARGEST = 2**28  # bytes of tokenizer.json
# transformers' classes that put special tokens around a text themselves, whatever tokenizer.json says (5.24).
_FIRST = ("BertTokenizer", "BigBirdTokenizer", "CLIPTokenizer", "DebertaTokenizer", "DebertaV2Tokenizer",
          "DistilBertTokenizer", "ElectraTokenizer", "FunnelTokenizer", "HerbertTokenizer", "MPNetTokenizer",
          "RobertaTokenizer", "XLMRobertaTokenizer")  # fmt: skip
_LAST = ("PegasusTokenizer", "T5Tokenizer", "XLMRobertaTokenizer")
_NONE = ("GPTNeoXTokenizer",)  # takes those away that tokenizer.json puts there


@dataclass(frozen=True)
class _Tokenised:
    first: str
    last: str
    first_is_special: bool  # added by the tokenizer
    last_is_special: bool


def checked(folder: Folder, config: PoolingConfig) -> PoolingConfig:
    """The same with warnings about the pooled token: last pooling without the EOS that the folder asks for, cls pooling
    without a CLS. Asks no network; a folder without tokenizer.json is left as it is.

    Raises:
        FileNotFoundError, ValueError: what PoolingConfig.from_pretrained raises.
    """
    if not {"cls", "last"} & set(config.modes):
        return config
    sources, record = Sources.read(folder), Record()
    name = inside(sources.home, "tokenizer.json")
    found = _tokenise(folder, name, record) if folder.has(name) else None
    if found is not None:
        if "last" in config.modes:
            _last(name, sources, found, record)
        if "cls" in config.modes:
            _cls(name, sources, found, record)
    return replace(
        config,
        warnings=(*config.warnings, *record.warnings),
        contradictions=(*config.contradictions, *record.contradictions),
    )


def _tokenise(folder: Folder, name: str, record: Record) -> _Tokenised | None:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        record.warn(f"{name}: what it does to the pooled token was not tried: pip install tokenizers")
        return None
    path = folder.path(name)
    if path.stat().st_size > _LARGEST:
        raise ValueError(f"{name}: expected at most {_LARGEST} bytes, got {path.stat().st_size}")
    text = folder.text(name, _LARGEST)
    try:
        tokenizer: Any = Tokenizer.from_str(text)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.normalizer = None  # which adds no special tokens, and could make a word as long as memory
        encoding = tokenizer.encode(_WORD)
    except BaseException as error:
        if not is_failure(error):
            raise
        record.warn(
            f"{name}: the tokenizers library cannot use it ({type(error).__name__}), so what it does to the pooled "
            "token is not known"
        )
        return None
    tokens, special = encoding.tokens, encoding.special_tokens_mask
    return _Tokenised(tokens[0], tokens[-1], bool(special[0]), bool(special[-1])) if tokens else None


def is_failure(error: BaseException) -> bool:
    """A panic of the tokenizers library is no Exception, and yet one of these; who interrupts is to be heard."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _named(tokenizer: Document, key: str) -> str | None:
    """A special token's text, which is a string or an object with more about it."""
    said = tokenizer.values.get(key)
    said = said.get("content") if isinstance(said, dict) else said
    return said if isinstance(said, str) else None


def _own(tokenizer: Document, classes: tuple[str, ...], does: str) -> str:
    name = str(tokenizer.values.get("tokenizer_class")).removesuffix("Fast")
    return f"transformers' {name} {does} one itself, " if name in classes else ""


def _last(name: str, sources: Sources, found: _Tokenised, record: Record) -> None:
    key, tokenizer, eos = "add_eos_token", sources.tokenizer, _named(sources.tokenizer, "eos_token")
    appended = found.last == eos if eos is not None else found.last_is_special
    for_it_alone = any(
        isinstance(said, dict) and said.get(key) is True
        for said in (sources.sentence.values.get(each) for each in ("tokenizer_args", "processor_kwargs"))
    )
    if not (tokenizer.values.get(key) is True or for_it_alone):
        return
    if appended:
        return _taken_away(name, sources, found.last, record)
    asks = f"{sources.sentence.name if for_it_alone else tokenizer.name}: {key} is true"
    if for_it_alone:
        heeds = "sentence-transformers appends it, engines do not"
    else:
        heeds = (
            f"{_own(tokenizer, _LAST, 'appends')}transformers 5, vLLM and text-embeddings-inference go by "
            "tokenizer.json and pool another token than llama.cpp and transformers 4, which append it"
        )
    record.contradiction(
        f"{asks}, but {name} does not append {eos or 'an EOS'}: the last token of {_WORD!r} is {shown(found.last)}; "
        f"{heeds}: append it to texts, or in tokenizer.json's post_processor"
    )


def _cls(name: str, sources: Sources, found: _Tokenised, record: Record) -> None:
    tokenizer = sources.tokenizer
    named = [token for token in (_named(tokenizer, key) for key in ("cls_token", "bos_token")) if token is not None]
    if found.first_is_special and (found.first in named or not named):
        return _taken_away(name, sources, found.first, record)
    own = _own(tokenizer, _FIRST, "puts")
    pools = f"{own}but what goes by tokenizer.json" if own else "cls"
    record.contradiction(
        f"cls pooling, but {name} puts no {named[0] if named else 'CLS'} first: the first token of {_WORD!r} is "
        f"{shown(found.first)}; {pools} pools that one, which says little of the text"
    )


def _taken_away(name: str, sources: Sources, token: str, record: Record) -> None:
    own = str(sources.tokenizer.values.get("tokenizer_class")).removesuffix("Fast")
    if own in _NONE and sources.transformer.values.get("model_type") == "gpt_neox":
        record.contradiction(
            f"{name} adds {shown(token)}, but transformers' {own} takes it away: the token that is pooled is another "
            "one in sentence-transformers and vLLM than in what goes by tokenizer.json, as text-embeddings-inference"
        )
