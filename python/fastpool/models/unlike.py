"""Folders that want something else than token states pooled by a formula: what they are, and what to do with them."""

from collections.abc import Sequence

from .families import architecture
from .files import Document, Folder, Module
from .sources import PYLATE_DENSE, Sources

_ENCODE = "take its vectors from sentence-transformers"
_INSTEAD = f"{_ENCODE}, or pool what this module gives"
_SPARSE = "use sentence-transformers' SparseEncoder"
_MULTI_VECTOR = "use sentence-transformers' MultiVectorEncoder"
_LATE = f"made for several vectors of a text (late interaction); {_MULTI_VECTOR}"
_FEWER = (
    f"a reduction of a text's token vectors (late interaction) to fewer ones, which is not done here; {_MULTI_VECTOR}"
)
_ROUTER = (
    "a router between towers, one for queries and one for documents, each of which may pool its own way; "
    f"{_ENCODE}, or write a modules.json of one tower's modules, whose folders router_config.json names"
)
# sentence-transformers' classes, and the best known ones of others. modules.json: type {...} is ...
MODULES = {
    "Asym": _ROUTER,
    "Router": _ROUTER,
    "BoW": f"a bag of words, which makes one vector of a text without token states; {_ENCODE}",
    "CLIPModel": f"a CLIP model, which gives one vector for a text or an image itself; {_ENCODE}",
    "StaticEmbedding": f"a table of word vectors, which gives the mean of a text's itself; {_ENCODE}",
    "CNN": f"a convolution over token states; {_INSTEAD}",
    "LSTM": f"a recurrent network over token states; {_INSTEAD}",
    "HierarchicalTokenPooling": _FEWER,
    "LambdaTokenPooling": _FEWER,
    "LogitScore": "a cross-encoder's: it scores pairs of texts and gives no vectors; use sentence-transformers' "
    "CrossEncoder",
    "SparseAutoEncoder": f"made for sparse vectors; {_SPARSE}",
    "SparseStaticEmbedding": f"made for sparse vectors; {_SPARSE}",
}
# And of models, where modules.json says something else. model_type {...} is ...
_FAMILIES = {
    "CrossEncoder": MODULES["LogitScore"],
    "MultiVectorEncoder": _LATE,
    "SparseEncoder": f"made for sparse vectors, but modules.json names no SpladePooling; {_SPARSE}",
}
# Files beside the model, with what they mean.
_HEAD = "contextual_head.safetensors"
_PROJECTIONS = "projections.safetensors"


def refuse(sources: Sources) -> None:
    """Raises ValueError for a folder of a model that is not pooled by a formula: which, and what to do."""
    transformer, model = sources.transformer, sources.model
    family = sources.model_type
    if family in _FAMILIES and family != sources.family:
        raise ValueError(f"{model.name}: model_type {model.values['model_type']} is {_FAMILIES[family]}")
    maxsim = (model.get("similarity_fn_name", str) or "").lower() in ("maxsim", "meanmaxsim")
    if maxsim and sources.family != "MultiVectorEncoder":
        raise ValueError(f"{model.name}: similarity_fn_name {model.values['similarity_fn_name']} is {_LATE}")
    name = architecture(transformer) or ""
    if name == "HF_ColBERT":
        raise ValueError(f"{transformer.name}: architectures: {name} is {_LATE}")
    if sources.modules is None and name.endswith("ForSequenceClassification"):
        raise ValueError(
            f"{transformer.name}: architectures: {name} is a classifier or a cross-encoder (reranker), which scores "
            "texts or pairs and gives no vectors; use sentence-transformers' CrossEncoder or transformers' pipelines, "
            "or write modules.json with a Pooling module if its token states are to be pooled"
        )
    if sources.folder.has(_HEAD):
        raise ValueError(
            f"{_HEAD}: the model pools the spans of a text and projects each mean by this matrix, which is not "
            "supported: use the model's own code, or fastpool.mean with starts= and ends= of the spans, then the "
            "projection"
        )


def misplaced(i: int, modules: Sequence[Module]) -> str | None:
    """Why the module, which stands in Pooling's place, does not do so here."""
    module = modules[i]
    names = [one.name for one in modules]
    if module.name == "SpladePooling" and (i != 1 or len(modules) > 2):
        found = ", ".join(one.type for one in modules)
        return f"SPLADE's, which must stand alone behind what gives logits, got {found}"
    late = module.name == "MultiVectorMask" or module.type == PYLATE_DENSE
    return f"{_LATE}, or leave it out of modules.json" if late and "Pooling" in names else None


def matryoshka(folder: Folder, model: Document) -> str | None:
    """A warning where shorter vectors come from matrices, and not from the first columns.

    Raises:
        ValueError: the folder truncates all the same.
    """
    if not folder.has(_PROJECTIONS):
        return None
    words = (
        f"shorter vectors of this model come from the matrices of {_PROJECTIONS}, one after another (Matryoshka by "
        "projection); the first columns are no shorter vector"
    )
    if model.positive("truncate_dim") is not None:
        raise model.error("truncate_dim", f"left out, as {words}")
    return f"{words}: leave truncate_dim and engines' dimensions alone, or apply the matrices to the result"
