"""From a model's folder to answers: each with the file and key that it comes from, and how sure it is."""

from collections.abc import Callable
from typing import Any, TypeVar

from ..text import shown
from . import elsewhere, pooling, unlike
from .chain import Chain, follow, unnamed
from .decisions import Record
from .families import architecture, is_causal, number, width
from .files import Document, Folder, inside
from .layers import Dense, LatentAttention, Layer, LayerNorm, Normalize, columns
from .sources import Sources
from .splade import Splade
from .weighing import LayerWeights, WordWeights

T = TypeVar("T")
W = TypeVar("W", LayerWeights, WordWeights)
# What loses most where early tokens have not seen the text. weighted_mean was made for causal models.
_EARLY = ("cls", "mean", "mean_sqrt_len", "max")
# transformers' model_max_length where a tokenizer has none is 1e30.
_NO_LIMIT = 10**9


class Reader:
    """Reads one folder. `answers` are the fields of PoolingConfig by name; `guesses`, those of the warnings that are
    about a guess.

    Raises:
        FileNotFoundError, ValueError: what PoolingConfig.from_pretrained raises.
    """

    def __init__(self, folder: Folder) -> None:
        self.sources = sources = Sources.read(folder)
        self.record = record = Record()
        self.guesses = record.guesses
        self.has_modules = sources.modules is not None
        unlike.refuse(sources)
        self.architecture = architecture(sources.transformer)

        modules = pooling.left_over(folder, record) if sources.modules is None else sources.modules
        chain = follow(sources, modules) if self.has_modules or modules else Chain()
        self.pooling = chain.pooling
        statement = elsewhere.whole(sources)
        self.said = statement.more if statement and not chain.gives_vectors else {}

        sparse, several = chain.sparse, chain.multi_vector
        for what, other in (("sparse", sparse), ("multi_vector", several)):
            if other is not None:
                record.decide(what, other, other.source, "stated")
        modes = () if sparse or several else pooling.modes(sources, self.pooling, record)
        self.latent = elsewhere.latent_attention(sources.transformer)
        first = [] if self.latent is None else [LatentAttention.read(folder, sources.home, self.latent)]
        layers, token_layers = chain.layers, (*first, *chain.tokens)
        width = self._vocabulary(sparse) if sparse else self._width(len(modes), token_layers, layers)
        pooled = columns(token_layers, width)
        given = columns(layers, pooled and pooled * (len(modes) or 1))
        self._check_weighed(modes, chain)
        # Normalisation at the end comes after truncate_dim, of one vector as of several.
        last = ((token_layers if several else layers) or (None,))[-1]
        last = last if isinstance(last, Normalize) else None
        layers, token_layers = (tuple(one for one in each if one is not last) for each in (layers, token_layers))
        self.answers: dict[str, Any] = {
            "architecture": self.architecture,
            "modes": modes,
            "normalize": self._normalize(last),
            "truncate_dim": self._truncate_dim(given),
            "width": width,
            "layers": self._layers("layers", layers),
            "token_layers": self._layers("token_layers", token_layers),
            "layer_weights": self._weighed("layer_weights", chain.layer_weights),
            "word_weights": self._weighed("word_weights", chain.word_weights),
            "quantizer": self._quantizer(chain.quantizer),
            "sparse": sparse,
            "multi_vector": several,
            "include_prompt": self._include_prompt(),
            "prompt_counts": self.said.get("prompt_counts", (True,))[0],
            "prompts": self._prompts(),
            "default_prompt_name": self._default_prompt_name(),
            "similarity": record.stated("similarity", sources.model, "similarity_fn_name", str),
            "padding_side": self._padding_side(),
            "max_length": self._max_length(),
        }
        if statement is not None and not self.answers["include_prompt"] and (self.said or self.latent is not None):
            record.warn(statement.without_prompt)
        self._warn()
        for name in ("decisions", "warnings", "contradictions"):
            self.answers[name] = tuple(getattr(record, name))

    def _stated_as_a_whole(self, what: str, otherwise: Callable[[], T]) -> T:
        """Where LLM2Vec or NV-Embed says how a model pools, it may say this, too."""
        if what not in self.said:
            return otherwise()
        value, source = self.said[what]
        found: T = self.record.decide(what, value, source, "stated")
        return found

    def _normalize(self, last: Normalize | None) -> bool:
        if last is not None:
            source = f"{last.name}: type" if last.name else "PyLate normalises each vector"
            return self.record.decide("normalize", True, source, self.sources.certainty)
        if self.has_modules:
            return self.record.decide("normalize", False, "modules.json: no Normalize at the end", "stated")
        return self._stated_as_a_whole(
            "normalize",
            lambda: self.record.guess(
                "normalize",
                False,
                "modules.json is missing",
                "whether vectors are normalised is a guess: no, as in sentence-transformers without modules.json; "
                "other engines normalise, and dot products (not cosines) then differ",
            ),
        )

    def _quantizer(self, name: str | None) -> str | None:
        if name is None:
            return None
        self.record.warn(
            "vectors are quantised at the end, to round(127 * tanh(x)), and compared by cosine: apply gives what comes "
            f"before, as do engines that do not know the quantiser, and fastpool.quantize(vectors, {name!r}) the rest, "
            "of vectors that nobody has normalised"
        )
        return self.record.decide("quantizer", name, "modules.json", "stated")

    # Columns.

    def _width(self, modes: int, token_layers: tuple[Layer, ...], layers: tuple[Layer, ...]) -> int | None:
        """Of the token states: what the transformer says of itself, and what layers take. The Pooling module's number,
        at which sentence-transformers does not look when it pools, settles it where those two differ or are silent."""
        record, known = self.record, width(self.sources.transformer)
        number, source = self._pooling_columns()
        taken = _taken(token_layers, 1) if token_layers else _taken(layers, modes)
        if known is None:
            known = taken
        elif taken is not None and taken[0] != known[0] and taken[0] == number and not token_layers:
            record.warn(f"{known[1]} says {known[0]}, but {source} and {taken[1]} say {number}, which is followed")
            known = taken
        if known is None:
            return None if number is None or token_layers else record.decide("width", number, source, "stated")
        given, where = known
        if number == given and not token_layers:
            return record.decide("width", number, source, "stated")
        pooled = columns(token_layers, given)
        if number not in (None, pooled):
            through = f", of which layers make {pooled}" if token_layers else ""
            record.warn(
                f"{source} says {number}, but {where} says {given}{through}, which is followed: sentence-transformers "
                "does not look at the first when it pools"
            )
        return record.decide("width", given, where, "implied")

    def _vocabulary(self, splade: Splade) -> int | None:
        """Columns of the logits: the model's words. SpladePooling's own number is not looked at when it pools."""
        record, known, said = self.record, number(self.sources.transformer, "vocab_size"), splade.columns
        if known is None:
            return None if said is None else record.decide("width", said, splade.source, "stated")
        if said not in (None, known[0]):
            record.warn(
                f"{splade.source} says {said} columns, but {known[1]} says {known[0]}, which is followed: "
                "sentence-transformers does not look at the first when it pools"
            )
        return record.decide("width", *known, "implied")

    def _pooling_columns(self) -> tuple[int | None, str]:
        """What the Pooling module says of the columns that it is given, and where."""
        if self.pooling is None:
            return None, ""
        old, new = "word_embedding_dimension", "embedding_dimension"
        name = new if new in self.pooling.values else old
        return self.pooling.positive(name), f"{self.pooling.name}: {name}"

    def _layers(self, what: str, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
        source = "modules.json" if self.has_modules else "modules.json is missing"
        certainty = self.sources.certainty
        if any(isinstance(layer, LatentAttention) for layer in layers):
            source, certainty = next(layer.name for layer in layers), "stated" if len(layers) == 1 else certainty
        return self.record.decide(what, layers, source, certainty) if layers else ()

    def _weighed(self, what: str, weights: W | None) -> W | None:
        if weights is None:
            return None
        return self.record.decide(what, weights, inside(weights.name, "config.json"), self.sources.certainty)

    def _check_weighed(self, modes: tuple[str, ...], chain: Chain) -> None:
        """Raises ValueError for what is no sum of weighted tokens."""
        pooling = chain.pooling
        if pooling is None:
            return
        if chain.layer_weights is not None and self.latent is not None:
            raise ValueError(
                f"{self.latent.name} must not stand beside {chain.layer_weights.name}, which takes the model's layers "
                "as they are before the latent attention; one of the two has no effect"
            )
        if chain.word_weights is not None and modes != ("mean",):
            raise pooling.error(
                "pooling_mode", f"'mean' behind {chain.word_weights.name}, for the others divide by no weights"
            )
        if chain.word_weights is not None and pooling.get("include_prompt", bool) is False:
            raise pooling.error(
                "include_prompt", f"true behind {chain.word_weights.name}, which counts the prompt's weights"
            )
        if chain.layer_weights is not None and "max" in modes:
            raise pooling.error(
                "pooling_mode", f"none but 'max' behind {chain.layer_weights.name}, as layers are added"
            )

    def _truncate_dim(self, columns: int | None) -> int | None:
        model = self.sources.model
        dim = model.positive("truncate_dim")
        if dim is not None and columns is not None and dim > columns:
            raise model.error("truncate_dim", f"at most {columns}, the columns there are")
        warning = unlike.matryoshka(self.sources.folder, model)
        if warning is not None:
            self.record.warn(warning)
        return self.record.stated("truncate_dim", model, "truncate_dim", int)

    # What surrounds it.

    def _include_prompt(self) -> bool:
        if self.pooling is not None and self.pooling.get("include_prompt", bool) is not None:
            said = self.pooling.need("include_prompt", bool)
            return self.record.decide("include_prompt", said, f"{self.pooling.name}: include_prompt", "stated")
        source = f"{self.pooling.name}: no include_prompt" if self.pooling is not None else "no Pooling module"
        return self._stated_as_a_whole(
            "include_prompt", lambda: self.record.decide("include_prompt", True, source, "implied")
        )

    def _prompts(self) -> dict[str, str]:
        model = self.sources.model
        prompts = model.get("prompts", dict) or {}
        if not all(isinstance(prompt, str | None) for prompt in prompts.values()):
            raise model.error("prompts", "an object of strings")
        prompts = {name: prompt or "" for name, prompt in prompts.items()}
        return self.record.decide("prompts", prompts, f"{model.name}: prompts", "stated") if prompts else prompts

    def _default_prompt_name(self) -> str | None:
        model = self.sources.model
        name = self.record.stated("default_prompt_name", model, "default_prompt_name", str)
        known = {"query": "", "document": ""} | (model.get("prompts", dict) or {})  # those two are always there
        if name is not None and name not in known:
            raise model.error("default_prompt_name", f"one of prompts ({', '.join(known)})")
        return name

    def _padding_side(self) -> str | None:
        tokenizer = self.sources.tokenizer
        if tokenizer.get("padding_side", str) not in (None, "left", "right"):
            raise tokenizer.error("padding_side", "'left' or 'right'")
        return self._stated_as_a_whole(
            "padding_side", lambda: self.record.stated("padding_side", tokenizer, "padding_side", str)
        )

    def _max_length(self) -> int | None:
        """As sentence-transformers has it: its own number, or the tokenizer's, but no more than there are positions."""
        if "max_length" in self.said:
            return self._stated_as_a_whole("max_length", lambda: None)
        sources, own = self.sources, "model_max_length"
        given = [
            Document(f"{sources.sentence.name}: {key}", sources.sentence.get(key, dict) or {})
            for key in ("processor_kwargs", "tokenizer_args")
        ]
        for document, key in [*((one, own) for one in given), (sources.sentence, "max_seq_length")]:
            length = self._length(document, key)
            if length is not None:
                return self.record.decide("max_length", length, f"{document.name}: {key}", "stated")
        length, positions = (
            self._length(sources.tokenizer, own),
            self._length(sources.transformer, "max_position_embeddings"),
        )
        if positions is not None and (length is None or positions < length):
            source = f"{sources.transformer.name}: max_position_embeddings"
            return self.record.decide("max_length", positions, source, "implied")
        return (
            None
            if length is None
            else self.record.decide("max_length", length, f"{sources.tokenizer.name}: {own}", "stated")
        )

    def _length(self, document: Document, key: str) -> int | None:
        value = document.values.get(key)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        # XLNet has -1 positions, by which it means no limit.
        if value is None or (number and (value >= _NO_LIMIT or (value == -1 and document is self.sources.transformer))):
            return None
        if number and value >= 1 and value == int(value):  # some write 512.0
            return int(value)
        # Pooling does not depend on it, so it is a warning, not an error.
        self.record.warn(f"{document.error(key, 'a whole number above 0')}; it is left out")
        return None

    def _warn(self) -> None:
        """About what does not fit together, or is not here."""
        record, sources, modes = self.record, self.sources, self.answers["modes"]
        family = sources.model_type
        if self.has_modules and family not in (None, sources.family):
            record.contradiction(
                f"{sources.model.name}: model_type is {shown(family)}, so that sentence-transformers reads neither "
                "modules.json nor prompts, and chooses a pooling of its own; modules.json is followed here"
            )
        for warning in unnamed(sources.modules or []):
            record.warn(warning)
        if sources.base_is_elsewhere:
            base = sources.adapter.get("base_model_name_or_path", str) or "a model that is not named"
            record.warn(
                f"{sources.adapter.name}: the folder is an adapter of {base}, which is not read: its width, and what "
                "its config.json and tokenizer say, are not known here"
            )
        early = [mode for mode in modes if mode in _EARLY]
        if self.latent is not None:
            record.warn(
                f"{self.latent.name}: apply takes the states of the decoder's last layer (embedding_model), and does "
                "the latent attention itself; what the model's own code gives for each token has been through it"
            )
        if self.answers["layer_weights"] is not None and not sources.gives_layers:
            record.contradiction(
                f"{self.answers['layer_weights'].name} weighs the model's layers, but output_hidden_states is not true "
                f"in {sources.transformer.name}: sentence-transformers then leaves it out, and pools the last layer"
            )
        self._warn_of_sizes()
        # LLM2Vec's and NV-Embed's own code makes decoders bidirectional, whatever config.json says.
        if is_causal(sources.transformer) and early and not self.said:
            record.contradiction(
                f"{', '.join(early)} pooling of a causal model ({self.architecture}): its tokens see only what stands "
                "before them, so early ones know little of the text; right only if the model was trained that way"
            )
        unlike_cosine = not (self.answers["normalize"] or self.answers["quantizer"])
        if self.answers["similarity"] == "cosine" and self.has_modules and unlike_cosine:
            record.contradiction(
                "similarity is cosine, but modules.json has no Normalize at its end: an index that takes dot products "
                "ranks by length too; normalise vectors or let the index use cosine"
            )
        if self.answers["normalize"] and self.answers["truncate_dim"] is not None:
            record.warn(
                "truncate_dim with Normalize: sentence-transformers truncates what was normalised, so its vectors are "
                "shorter than 1; here and in vLLM and text-embeddings-inference truncation comes first"
            )
        if "cls" in modes and self.answers["padding_side"] == "left" and not self.said:
            record.contradiction(
                "cls with padding on the left: the first real token is not at position 0; a mask tells it here, "
                "but code that takes hidden[:, 0] takes padding"
            )

    def _warn_of_sizes(self) -> None:
        """Of weights of layers and words that are those of another model."""
        shares, words = self.answers["layer_weights"], self.answers["word_weights"]
        layers = None if shares is None else number(self.sources.transformer, "num_hidden_layers")
        if layers is not None and layers[0] != shares.num_hidden_layers:
            self.record.contradiction(
                f"{inside(shares.name, 'config.json')}: num_hidden_layers says {shares.num_hidden_layers}, but "
                f"{layers[1]} says {layers[0]}: neither apply nor sentence-transformers takes another number of layers "
                "than the first"
            )
        ids = None if words is None else number(self.sources.transformer, "vocab_size")
        if ids is not None and words.vocabulary > ids[0]:
            self.record.contradiction(
                f"{inside(words.name, 'config.json')}: vocab has {words.vocabulary} words, but {ids[1]} says {ids[0]}: "
                "the weights may be those of another tokenizer's words"
            )


def _taken(layers: tuple[Layer, ...], modes: int) -> tuple[int, str] | None:
    """The columns of each mode that layers take, and which key says so; None if they take any."""
    first = next((layer for layer in layers if isinstance(layer, Dense | LayerNorm | LatentAttention)), None)
    return None if first is None or first.inputs % modes else (first.inputs // modes, first.source)
