"""The docstrings of the pooling functions, which follow from the table of modes."""

from .modes import Mode

_POOLING = """{formula}, over the real tokens x_1..x_n of each segment: one vector per segment.

    Input is padded or packed. Padded: hidden [B, S, H], real tokens told by any of mask [B, S], starts [B] and ends
    [B] (positions in the row; lengths [B] is another name for ends); without them every token is real. Packed: hidden
    [T, H] with cu_seqlens [B + 1], or with starts [B] and ends [B] (row numbers; segments may overlap, leave gaps,
    stand in any order), and optionally mask [T]. A jagged nested tensor [B, *, H] is packed input too. Spans of padded
    input: starts and ends [B, n] are n segments of each row, and the result has [B, n] in place of B. No layout copies
    tokens, and what stands outside a segment or behind a zero of the mask never reaches the result.

    Args:
        hidden: token states; float16, bfloat16, float32 or float64; any strides. Where the last dimension is not
            contiguous, hidden is copied first; so it is for spans whose texts do not follow each other by a whole
            number of rows, as in [S, B, H] transposed. There is no other copy.{query}
        mask: bool, or integers of 0 and 1; set where a token is real; holes and either padding side allowed. One that
            numbers the texts of a row is for fastpool.segments, which gives their starts and ends.
        cu_seqlens: int32 or int64; segment b is the rows [cu_seqlens[b], cu_seqlens[b + 1]).{weights}
        lengths: the same as ends, for padded input.
        starts: int32 or int64; the first row of each segment.
        ends: int32 or int64; one behind its last row.{scale}
        truncate_dim: use the first `truncate_dim` columns only (Matryoshka); truncation comes before normalisation.
        normalize: divide each vector by max(its L2 norm, 1e-12).
        out_dtype: of the result; hidden's dtype if not given.

    Returns:
        {shape}. Sums, divisions and norms are float32 (float64 for float64 input), in one canonical
        order (fastpool.reference), so a sequence's result has the same bits in every batch and layout; it is rounded
        once. A segment without real tokens gives zeros. Gradients flow to hidden{weights_too}; what is no real token
        gets 0.

    Raises:
        TypeError: a wrong dtype, or something that is not a tensor; a floating-point mask above all; an option of
            another type; an argument that there is not, such as dim, which in torch is an axis.
        ValueError: a wrong shape, device or value; a tensor whose memory was freed or shrunk; of values in index
            tensors, integer masks, weights and scores on a GPU, and of results that are not finite, where asked
            (fastpool.validate).
        RuntimeError: the backend asked for cannot serve the call.
        torch.OutOfMemoryError: the result does not fit in memory.
    """

_PER_TOKEN = {
    "weights": """
        weights: float16, bfloat16, float32 or float64, shaped like the mask; used where tokens are real. They are
            float32 unless hidden is float64, so of float64 weights the largest of each text must be 0 or within
            float32's normal numbers, 1.2e-38 to 3.4e38 in size; smaller ones beside it may become 0.""",
    "scores": """
        scores: float16, bfloat16, float32 or float64, shaped like the mask, and read where tokens are real; must be
            given. They are float32 unless hidden is float64, so of float64 scores none must be greater than float32's
            largest number, 3.4e38. A token with -inf weighs nothing (but a NaN of its state shows), and where all
            have it the result is 0; inf and NaN make it NaN. Scores beyond 10,000 in size had better be centred.""",
}
_QUERY = """
        query: float16, bfloat16, float32 or float64; [H] or [K, H] for all segments, or [B, K, H], which of
            spans is [B, n, K, H]. Its products are of all columns, also where truncate_dim cuts the result. A bias
            would change nothing: it cancels."""
_SCALE = """
        scale: what the products are multiplied by."""
_SHAPE = """[B, truncate_dim or H] with one query [H], else [B, K, truncate_dim or H]; each of K queries has
        the bits that it has alone"""


def of_pooling(mode: Mode) -> str:
    """The docstring of a mode's function."""
    formula = mode.formula[0].upper() + mode.formula[1:] if mode.formula.startswith("the ") else mode.formula
    return _POOLING.format(
        formula=formula,
        query=_QUERY if mode.takes_query else "",
        weights="".join(_PER_TOKEN.get(argument.name, "") for argument in mode.arguments),
        scale=_SCALE if mode.takes_query else "",
        shape=_SHAPE if mode.takes_query else "[B, truncate_dim or H]",
        weights_too="".join(f" and {argument.name}" for argument in mode.arguments if argument.differentiable),
    )
