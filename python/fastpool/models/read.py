"""From a model's folder to answers: each with the file and key that it comes from, and how sure it is."""

from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from ..modes import MODES
from .dense import Dense
from .files import Document, Folder, Module

T = TypeVar("T")
Certainty = Literal["stated", "implied", "guessed"]

# sentence-transformers' name -> ours (6.2.0, sentence_transformer/modules/pooling.py).
POOLING_MODES = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weighted_mean",
    "lasttoken": "last",
}
# The keys before 5.4, in the order in which their vectors are concatenated.
POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weighted_mean",
    "pooling_mode_lasttoken": "last",
}
# Decoders by model_type, for folders whose architecture is the bare model ("MistralModel") and not a causal LM by name.
# What is in neither list is not known, and said to be.
_DECODERS = (
    *("apertus", "bloom", "chatglm", "codegen", "cohere", "cohere2", "dbrx", "deepseek_v2", "deepseek_v3", "exaone4"),
    *("ernie4_5", "ernie4_5_moe", "falcon", "falcon_h1", "gemma", "gemma2", "gemma3", "gemma3_text", "gemma4"),
    *("gemma4_text", "glm", "glm4", "glm4_moe", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_oss", "gptj"),
    *("granite", "granitemoe", "granitemoehybrid", "jamba", "llama", "llama4", "llama4_text", "mamba", "mamba2"),
    *("ministral", "ministral3", "mistral", "mixtral", "modernbert-decoder", "mpt", "nemotron", "nemotron_h", "olmo"),
    *("olmo2", "olmo3", "olmoe", "openai-gpt", "opt", "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_5_vl"),
    *("qwen2_moe", "qwen2_vl", "qwen3", "qwen3_5", "qwen3_5_moe", "qwen3_moe", "qwen3_next", "qwen3_vl"),
    *("qwen3_vl_moe", "seed_oss", "smollm3", "stablelm", "starcoder2", "xglm"),
)
# Encoders by model_type, besides all that have "bert" in it.
_ENCODERS = (
    *("big_bird", "canine", "data2vec-text", "electra", "ernie", "esm", "fnet", "funnel", "gte", "jina_embeddings_v3"),
    *("layoutlm", "longformer", "luke", "mpnet", "mra", "mt5", "new", "nystromformer", "roformer", "t5", "umt5"),
    *("xlm", "xlnet", "xmod", "yoso"),
)
# Where architectures write the width of their last hidden state; OPT projects from hidden_size to the first.
_WIDTHS = ("word_embed_proj_dim", "hidden_size", "d_model", "n_embd", "dim")
# What loses most where early tokens have not seen the text. weighted_mean was made for causal models.
_EARLY = ("cls", "mean", "mean_sqrt_len", "max")
# transformers' model_max_length where a tokenizer has none is 1e30.
_NO_LIMIT = 10**9


@dataclass(frozen=True)
class Decision:
    """One answer: what was decided, from which file and key, and how sure that is."""

    what: str  # the field of PoolingConfig
    value: Any
    source: str  # "1_Pooling/config.json: pooling_mode"
    certainty: Certainty


def _name(transformer: Document) -> str:
    return str((transformer.get("architectures", list) or [""])[0])


def is_decoder(transformer: Document) -> bool:
    """Known to be made for generating text, by the name of its architecture or by its family."""
    name = _name(transformer)
    if name.endswith("ForCausalLM") or transformer.get("model_type", str) in _DECODERS:
        return True
    return name.endswith("LMHeadModel") and not is_encoder(transformer)  # XLM's head, too, has that name


def is_encoder(transformer: Document) -> bool:
    """Known to be one, by its family. What is neither an encoder nor a decoder is not known."""
    name, family = _name(transformer), transformer.get("model_type", str)
    if name.endswith("ForCausalLM") or family in _DECODERS:
        return False
    return name.endswith(("ForMaskedLM", "EncoderModel")) or family in _ENCODERS or "bert" in (family or name).lower()


def is_bidirectional(transformer: Document) -> bool:
    """The two ways in which a decoder whose tokens see the whole text says so."""
    key = "use_bidirectional_attention"
    said = transformer.values.get(key)
    # Gemma 3 has a bool here, Gemma 4 "all", or "vision" for images only.
    if not (said is None or isinstance(said, bool) or said in ("all", "vision")):
        raise transformer.error(key, "true, false, 'all' or 'vision'")
    return transformer.get("is_causal", bool) is False or said in (True, "all")


class Reader:
    """Reads one folder. `answers` are the fields of PoolingConfig by name; `guesses`, those of the warnings that are
    about a guess.

    Raises:
        FileNotFoundError, ValueError: what PoolingConfig.from_pretrained raises.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.decisions: list[Decision] = []
        self.warnings: list[str] = []
        self.guesses: list[str] = []
        modules = folder.modules()
        if modules is None and not folder.has("config.json"):
            raise FileNotFoundError(f"{folder.root} is no model's folder: modules.json and config.json are missing")
        self.has_modules = modules is not None
        self.transformer = folder.optional("config.json")
        self.tokenizer = folder.optional("tokenizer_config.json")
        self.sentence = folder.optional("sentence_bert_config.json")
        self.model = folder.optional("config_sentence_transformers.json")
        self.architecture = self._architecture()
        self.bidirectional = is_bidirectional(self.transformer)
        self.causal = is_decoder(self.transformer) and not self.bidirectional

        self.pooling, dense, self.normalizer = self._after_the_transformer(modules or [])
        modes = self._modes()
        width = self._width()
        layers = self._dense(dense, width and width * len(modes))
        self.answers: dict[str, Any] = {
            "architecture": self.architecture,
            "modes": modes,
            "normalize": self._normalize(),
            "truncate_dim": self._dim(layers[-1].outputs if layers else width and width * len(modes)),
            "width": width,
            "dense": layers,
            "include_prompt": self._include_prompt(),
            "prompts": self._prompts(),
            "default_prompt_name": self._default_prompt_name(),
            "similarity": self._stated("similarity", self.model, "similarity_fn_name", str),
            "padding_side": self._padding_side(),
            "max_length": self._max_length(),
        }
        self._contradictions()
        self.answers |= {"decisions": tuple(self.decisions), "warnings": tuple(self.warnings)}

    def _decide(self, what: str, value: T, source: str, certainty: Certainty) -> T:
        self.decisions.append(Decision(what, value, source, certainty))
        return value

    def _guess(self, what: str, value: T, source: str, consequence: str) -> T:
        self.guesses.append(consequence)
        self.warnings.append(consequence)
        return self._decide(what, value, source, "guessed")

    def _stated(self, what: str, document: Document, key: str, kind: type[T]) -> T | None:
        value = document.get(key, kind)
        return None if value is None else self._decide(what, value, f"{document.name}: {key}", "stated")

    # What the transformer is.

    def _architecture(self) -> str | None:
        names = self.transformer.get("architectures", list) or [None]
        if not isinstance(names[0], str | None):
            raise self.transformer.error("architectures", "a list of strings")
        if "latent_attention_config" in self.transformer.values or (names[0] or "").startswith("NVEmbed"):
            raise ValueError(
                f"config.json: architectures: {names[0]} pools with latent attention (NV-Embed), which is not "
                "supported yet; expected a model that is pooled by a formula"
            )
        return names[0]

    # modules.json.

    def _after_the_transformer(self, modules: list[Module]) -> tuple[Document | None, list[Module], Module | None]:
        """The configuration of the Pooling module, the Dense modules, the Normalize module."""
        pooling: Document | None = None
        dense: list[Module] = []
        normalizer: Module | None = None
        for i, module in enumerate(modules):
            ours = module.type.startswith("sentence_transformers.")
            if i == 0 and module.name.endswith("Transformer"):
                continue  # also one of the model's own code: what makes the token states is not ours to run
            if ours and module.name == "Dropout":
                continue  # does nothing outside training
            if not ours or module.name not in ("Pooling", "Dense", "Normalize"):
                raise module.entry.error(
                    "type", "sentence-transformers' Transformer (first), Pooling, Dense, Normalize or Dropout"
                )
            in_order = {
                "Pooling": pooling is None,
                "Dense": pooling is not None and normalizer is None,
                "Normalize": pooling is not None and normalizer is None,
            }
            if not in_order[module.name]:
                raise module.entry.error("type", "in the order Transformer, Pooling, Dense (any number), Normalize")
            if module.name == "Pooling":
                pooling = self.folder.document(module.config)
            elif module.name == "Dense":
                dense.append(module)
            else:
                normalizer = module
                said = self.folder.optional(module.config)
                for key in ("module_input_name", "module_output_name"):
                    if (said.get(key, str) or "sentence_embedding") != "sentence_embedding":
                        raise said.error(key, "'sentence_embedding' (normalising tokens is not supported)")
        if self.has_modules and pooling is None:
            found = ", ".join(module.type for module in modules) or "nothing"
            raise ValueError(f"modules.json: type must be sentence-transformers' Pooling for one module, got {found}")
        return pooling, dense, normalizer

    # Pooling.

    def _modes(self) -> tuple[str, ...]:
        if self.pooling is not None:
            return self._modes_of(self.pooling, "stated")
        # Left over from a folder of sentence-transformers: it names the pooling of these weights.
        left_over = sorted(path.parent.name for path in self.folder.root.glob("*_Pooling/config.json"))
        if left_over:
            document = self.folder.document(f"{left_over[0]}/config.json")
            self.pooling = document
            if len(left_over) > 1:
                self.warnings.append(
                    f"modules.json is missing, and {', '.join(left_over)} are all there: the first is followed, though "
                    "nothing says which one is the model's"
                )
            self.warnings.append(
                f"modules.json is missing: {document.name} is followed here, but sentence-transformers and vLLM do not "
                "look at it and choose a pooling of their own"
            )
            return self._modes_of(document, "implied")
        named = self.transformer.get("pooling_type", str)
        if named is not None:
            mode = named.lower()
            if mode not in MODES:
                raise self.transformer.error("pooling_type", f"one of {', '.join(MODES)}, in capitals or not")
            return self._decide("modes", (mode,), "config.json: pooling_type", "implied")
        source = f"config.json: architectures ({self.architecture or 'none'})"
        if self.causal:  # no other token has seen the whole text
            return self._decide("modes", ("last",), source, "implied")
        name = self.architecture or "this model"
        if is_encoder(self.transformer) or self.bidirectional:
            why = f"{name} may have been trained for mean or for cls, and nothing in the folder says which"
        else:
            why = (
                f"mean, although {name} is not known here; an encoder may have been trained for mean or for cls, a "
                "causal model wants last, and nothing in the folder says which"
            )
        worse = "the wrong one raises no error, it makes search worse"
        return self._guess("modes", ("mean",), source, f"the pooling is a guess: {why}; {worse}")

    def _modes_of(self, document: Document, certainty: Certainty) -> tuple[str, ...]:
        for key in document.values:
            if key.startswith("pooling_mode_") and key not in POOLING_FLAGS and document.values[key]:
                raise ValueError(f"{document.name}: {key} is no pooling mode; expected {', '.join(POOLING_FLAGS)}")
        flags = tuple(mode for key, mode in POOLING_FLAGS.items() if document.get(key, bool))
        said = document.values.get("pooling_mode")
        if said is None:
            if not flags:
                self.warnings.append(
                    f"{document.name}: it names no pooling mode: mean, as sentence-transformers takes it"
                )
                return self._decide("modes", ("mean",), f"{document.name}: no pooling_mode", "implied")
            keys = ", ".join(key for key, mode in POOLING_FLAGS.items() if mode in flags)
            return self._decide("modes", flags, f"{document.name}: {keys}", certainty)
        names = said if isinstance(said, list) else [said]
        if not names or not all(isinstance(name, str) and name in POOLING_MODES for name in names):
            raise document.error("pooling_mode", f"one of {', '.join(POOLING_MODES)}, or a list of them")
        modes = tuple(POOLING_MODES[name] for name in names)
        if flags and set(flags) != set(modes):
            self.warnings.append(
                f"{document.name}: pooling_mode says {', '.join(modes)}, the older pooling_mode_* keys say "
                f"{', '.join(flags)}; the first holds, but programs that know the older keys only pool differently"
            )
        return self._decide("modes", modes, f"{document.name}: pooling_mode", certainty)

    def _normalize(self) -> bool:
        if self.normalizer is not None:
            return self._decide("normalize", True, f"{self.normalizer.entry.name}: type", "stated")
        if self.has_modules:
            return self._decide("normalize", False, "modules.json: no Normalize", "stated")
        return self._guess(
            "normalize",
            False,
            "modules.json is missing",
            "whether vectors are normalised is a guess: no, as in sentence-transformers without modules.json; other "
            "engines normalise, and dot products (not cosines) then differ",
        )

    def _width(self) -> int | None:
        key = next((key for key in _WIDTHS if key in self.transformer.values), "hidden_size")
        hidden = self.transformer.positive(key)
        if self.pooling is not None:
            name = "embedding_dimension" if "embedding_dimension" in self.pooling.values else "word_embedding_dimension"
            width = self.pooling.positive(name)
            if width is not None:
                if hidden not in (None, width):
                    raise self.pooling.error(name, f"{hidden}, as config.json: {key} says")
                return self._decide("width", width, f"{self.pooling.name}: {name}", "stated")
        return None if hidden is None else self._decide("width", hidden, f"config.json: {key}", "implied")

    def _dense(self, modules: list[Module], width: int | None) -> tuple[Dense, ...]:
        layers = tuple(Dense.read(self.folder, module) for module in modules)
        for layer in layers:
            if width not in (None, layer.inputs):
                raise ValueError(
                    f"{layer.config}: in_features must be {width}, the columns before it, got {layer.inputs}"
                )
            width = layer.outputs
        return self._decide("dense", layers, "modules.json", "stated") if layers else ()

    def _dim(self, columns: int | None) -> int | None:
        dim = self.model.positive("truncate_dim")
        if dim is not None and columns is not None and dim > columns:
            raise self.model.error("truncate_dim", f"at most {columns}, the columns there are")
        return self._stated("truncate_dim", self.model, "truncate_dim", int)

    # What surrounds it.

    def _include_prompt(self) -> bool:
        if self.pooling is None or self.pooling.get("include_prompt", bool) is None:
            source = self.pooling.name if self.pooling is not None else "modules.json is missing"
            return self._decide("include_prompt", True, f"{source}: no include_prompt", "implied")
        said = self.pooling.need("include_prompt", bool)
        return self._decide("include_prompt", said, f"{self.pooling.name}: include_prompt", "stated")

    def _prompts(self) -> dict[str, str]:
        prompts = self.model.get("prompts", dict) or {}
        if not all(isinstance(prompt, str | None) for prompt in prompts.values()):
            raise self.model.error("prompts", "an object of strings")
        prompts = {name: prompt or "" for name, prompt in prompts.items()}
        return self._decide("prompts", prompts, f"{self.model.name}: prompts", "stated") if prompts else prompts

    def _default_prompt_name(self) -> str | None:
        name = self._stated("default_prompt_name", self.model, "default_prompt_name", str)
        known = self.model.get("prompts", dict) or {}
        if name is not None and name not in known:
            raise self.model.error("default_prompt_name", f"one of prompts ({', '.join(known) or 'there are none'})")
        return name

    def _padding_side(self) -> str | None:
        side = self._stated("padding_side", self.tokenizer, "padding_side", str)
        if side not in (None, "left", "right"):
            raise self.tokenizer.error("padding_side", "'left' or 'right'")
        return side

    def _max_length(self) -> int | None:
        for document, key in ((self.sentence, "max_seq_length"), (self.tokenizer, "model_max_length")):
            value = document.values.get(key)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is None or (number and value >= _NO_LIMIT):
                continue
            if number and value >= 1 and value == int(value):  # some write 512.0
                return self._decide("max_length", int(value), f"{document.name}: {key}", "stated")
            # Pooling does not depend on it, so it is a warning, not an error.
            self.warnings.append(f"{document.error(key, 'a whole number above 0')}; it is left out")
        return None

    def _contradictions(self) -> None:
        modes, normalize = self.answers["modes"], self.answers["normalize"]
        early = [mode for mode in modes if mode in _EARLY]
        if self.causal and early:
            self.warnings.append(
                f"{', '.join(early)} pooling of a causal model ({self.architecture}): its tokens see only what stands "
                "before them, so early ones know little of the text; right only if the model was trained that way"
            )
        if self.answers["similarity"] == "cosine" and self.has_modules and not normalize:
            self.warnings.append(
                "similarity is cosine, but modules.json has no Normalize: an index that takes dot products ranks by "
                "length too; normalise vectors or let the index use cosine"
            )
        if normalize and self.answers["truncate_dim"] is not None:
            self.warnings.append(
                "truncate_dim with Normalize: sentence-transformers truncates what was normalised, so its vectors are "
                "shorter than 1; here and in vLLM and text-embeddings-inference truncation comes first"
            )
        if "cls" in modes and self.answers["padding_side"] == "left":
            self.warnings.append(
                "cls with padding on the left: the first real token is not at position 0; a mask tells it here, "
                "but code that takes hidden[:, 0] takes padding"
            )
