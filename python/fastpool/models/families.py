"""What kind of transformer a config.json describes, as far as its names tell: a decoder, an encoder, or not known."""

from .files import Document

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
_WIDTHS = ("word_embed_proj_dim", "hidden_size", "d_model", "n_embd", "emb_dim", "dim")


def architecture(transformer: Document) -> str | None:
    """The name of its class, the first of those that are there. Raises ValueError for what is no name."""
    names = transformer.get("architectures", list) or [None]
    if not isinstance(names[0], str | None):
        raise transformer.error("architectures", "a list of strings")
    return names[0]


def is_decoder(transformer: Document) -> bool:
    """Known to be made for generating text, by the name of its architecture or by its family."""
    name = architecture(transformer) or ""
    if name.endswith("ForCausalLM") or transformer.get("model_type", str) in _DECODERS:
        return True
    return name.endswith("LMHeadModel") and not is_encoder(transformer)  # XLM's head, too, has that name


def is_encoder(transformer: Document) -> bool:
    """Known to be one, by its family. What is neither an encoder nor a decoder is not known."""
    name, family = architecture(transformer) or "", transformer.get("model_type", str)
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


def is_causal(transformer: Document) -> bool:
    """A decoder whose tokens see only what stands before them."""
    return not is_bidirectional(transformer) and is_decoder(transformer)


def parts(transformer: Document) -> list[Document]:
    """It and, of a model of several parts, its text's."""
    names = ("text_config", "llm_config")
    return [transformer, *(Document(f"{transformer.name}: {x}", transformer.get(x, dict) or {}) for x in names)]


def number(transformer: Document, key: str) -> tuple[int, str] | None:
    """What it says under that key, or its text's part, and where: "config.json: vocab_size"."""
    for document in parts(transformer):
        said = document.positive(key)
        if said is not None:
            return said, f"{document.name}: {key}"
    return None


def width(transformer: Document) -> tuple[int, str] | None:
    """The columns of the last hidden state, and what says so: "config.json: hidden_size". Of a model of several parts,
    those of its text's; None where nothing does."""
    # EmbeddingGemma 2 projects from hidden_size.
    family = transformer.get("model_type", str) or ""
    keys = ("embedding_dim", *_WIDTHS) if family.startswith("embedding_gemma2") else _WIDTHS
    for document in parts(transformer):
        for key in keys:
            columns = document.positive(key)
            if columns is not None:
                return columns, f"{document.name}: {key}"
    return None
