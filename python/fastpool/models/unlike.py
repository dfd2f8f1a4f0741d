"""Folders that want something else than token states pooled by a formula: what they are, and what to do with them."""

from .files import Document, Folder

_ENCODE = "take its vectors from sentence-transformers"
# sentence-transformers' classes, and the best known ones of others. modules.json: type {...} is ...
MODULES = {
    "Asym": f"a router between towers, one for queries and one for documents, each of which may pool its own way; "
    f"{_ENCODE}, or give PoolingConfig.from_pretrained the folder of one tower",
    "Router": f"a router between towers, one for queries and one for documents, each of which may pool its own way; "
    f"{_ENCODE}, or give PoolingConfig.from_pretrained the folder of one tower",
    "BoW": f"a bag of words, which makes one vector of a text without token states; {_ENCODE}",
    "CLIPModel": f"a CLIP model, which gives one vector for a text or an image itself; {_ENCODE}",
    "CNN": f"a convolution over token states; {_ENCODE}, or pool what this module gives",
    "LSTM": f"a recurrent network over token states; {_ENCODE}, or pool what this module gives",
    "FlexibleQuantizer": "a quantiser of the pooled vector, int8 as round(127 * tanh(x)) and not "
    "sentence-transformers' buckets; "
    ' pool with fastpool.PoolingConfig(("mean",)) or what 1_Pooling says, and quantise the result',
    "HierarchicalTokenPooling": "made for several vectors a text (late interaction); use sentence-transformers' "
    "MultiVectorEncoder",
    "LambdaTokenPooling": "made for several vectors a text (late interaction); use sentence-transformers' "
    "MultiVectorEncoder",
    "MultiVectorMask": "made for one vector a token (late interaction), which nothing pools; use "
    "sentence-transformers' MultiVectorEncoder",
    "LogitScore": "a cross-encoder's: it scores pairs of texts and gives no vectors; use sentence-transformers' "
    "CrossEncoder",
    "MLMTransformer": "a SPLADE model's, whose vectors are sparse; use sentence-transformers' SparseEncoder",
    "SparseAutoEncoder": "made for sparse vectors; use sentence-transformers' SparseEncoder",
    "SparseStaticEmbedding": "made for sparse vectors; use sentence-transformers' SparseEncoder",
    "SpladePooling": "SPLADE's, over the logits of a language model's head, to a sparse vector; use "
    "sentence-transformers' SparseEncoder, or for its max over logits: log1p(relu(fastpool.max(logits, mask)))",
    "StaticEmbedding": f"a table of word vectors, which gives the mean of a text's itself; {_ENCODE}",
    "WeightedLayerPooling": f"a weighted mean of the states of all layers; {_ENCODE}, or pool what this module gives",
    "WordWeights": "a weight for each word; use fastpool.weighted_mean with weights=table[input_ids]",
}
_FAMILIES = {
    "CrossEncoder": MODULES["LogitScore"],
    "MultiVectorEncoder": MODULES["MultiVectorMask"],
    "SparseEncoder": MODULES["SpladePooling"],
}
# Files beside the model, with what they mean.
_HEAD = "contextual_head.safetensors"
_PROJECTIONS = "projections.safetensors"


def refuse(folder: Folder, transformer: Document, model: Document, has_modules: bool) -> None:
    """Raises ValueError for a folder of a model that is not pooled by a formula: which, and what to do."""
    family = model.get("model_type", str)
    if family in _FAMILIES:
        raise ValueError(f"{model.name}: model_type {family} is {_FAMILIES[family]}")
    name = str((transformer.get("architectures", list) or [""])[0])
    if "latent_attention_config" in transformer.values or name.startswith("NVEmbed"):
        raise ValueError(
            f"{transformer.name}: architectures: {name} pools with latent attention (NV-Embed), which is not "
            "supported yet; expected a model that is pooled by a formula"
        )
    if not has_modules and name.endswith("ForSequenceClassification"):
        raise ValueError(
            f"{transformer.name}: architectures: {name} is a classifier or a cross-encoder (reranker), which scores "
            "texts or pairs and gives no vectors; use sentence-transformers' CrossEncoder or transformers' pipelines, "
            "or write modules.json with a Pooling module if its token states are to be pooled"
        )
    if folder.has(_HEAD):
        raise ValueError(
            f"{_HEAD}: the model pools the spans of a text and projects each mean by this matrix, which is not "
            "supported: use the model's own code, or fastpool.mean with starts= and ends= of the spans, then the "
            "projection"
        )


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
