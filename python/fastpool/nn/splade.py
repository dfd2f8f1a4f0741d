"""SPLADE's pooling as a module, of logits or with the decoder that makes them."""

from copy import copy
from typing import NoReturn

import torch
from torch import Tensor, nn

from .. import sparse
from ..options import optional_count
from .ending import Ending, given


def _check_decoder(name: str, decoder: nn.Module) -> None:
    """Raises TypeError or ValueError for one that is more than its weight and bias, which are all that is used."""
    if type(decoder) is not nn.Linear:
        raise TypeError(f"{name}: decoder must be a torch.nn.Linear and no subclass, got {type(decoder).__name__}")
    if decoder._forward_hooks or decoder._forward_pre_hooks:
        raise ValueError(f"{name}: decoder must have no forward hooks, which would not be called")


class Splade(Ending):
    """One sparse vector over the vocabulary for each segment: fastpool.splade, or with a `decoder`
    fastpool.splade_linear, where logits never exist all at once.

    Args:
        pooling: "max", or "sum".
        activation: "relu": ln(1 + max(x, 0)); "log1p_relu": ln(1 + y) of that once more.
        decoder: the last linear map of a masked language model's head. It is not copied.
        transform: what token states go through before the decoder.
        chunk: columns of the vocabulary at a time, with a decoder.
        truncate_dim: keep the first `truncate_dim` columns only, of logits.
        normalize: divide each vector by max(its L2 norm, 1e-12).
        out_dtype: of the result; the input's dtype if not given.

    Calls take `splade(logits, mask, cu_seqlens, lengths=, starts=, ends=)`, or with a decoder token states instead of
    logits.

    Returns:
        [B, truncate_dim or V]. Gradients flow to the input and to decoder and transform.

    Raises:
        TypeError: an argument of the wrong type; in calls, what the functions raise.
        ValueError: an unknown pooling or activation; truncate_dim beside a decoder, or transform or chunk without one;
            in calls, what the functions raise.

    >>> fastpool.nn.Splade()(logits, mask)
    """

    def __init__(
        self,
        pooling: str = "max",
        activation: str = "relu",
        decoder: nn.Linear | None = None,
        transform: nn.Module | None = None,
        chunk: int | None = None,
        truncate_dim: int | None = None,
        normalize: bool = False,
        out_dtype: torch.dtype | None = None,
        **unknown: NoReturn,
    ) -> None:
        super().__init__(truncate_dim, normalize, out_dtype, unknown)
        sparse.splade_mode(self._name, pooling, activation)
        self.pooling, self.activation = pooling, activation
        self.chunk = optional_count(self._name, "chunk", chunk)
        if decoder is not None:
            _check_decoder(self._name, decoder)
        if transform is not None and not isinstance(transform, nn.Module):
            raise TypeError(f"{self._name}: transform must be a module, got {type(transform).__name__}")
        if decoder is None and (transform is not None or chunk is not None):
            raise ValueError(
                f"{self._name}: {'chunk' if transform is None else 'transform'} goes with a decoder, got none"
            )
        if decoder is not None and truncate_dim is not None:
            raise ValueError(f"{self._name}: truncate_dim is for logits; give a decoder of fewer rows instead")
        self.decoder, self.transform = decoder, transform

    @classmethod
    def from_mlm_head(
        cls,
        head: nn.Module,
        pooling: str = "max",
        activation: str = "relu",
        *,
        chunk: int | None = None,
        normalize: bool = False,
        out_dtype: torch.dtype | None = None,
    ) -> "Splade":
        """The pooling of a masked language model's hidden states, with its head folded in.

        Args:
            head: one whose last step is `decoder`, a torch.nn.Linear: `model.cls.predictions` of transformers' BERT,
                `model.lm_head` of its RoBERTa. Parameters are shared with it. Of other heads give the class the two
                parts: DistilBERT's `vocab_projector`, and `vocab_transform`, `activation` and `vocab_layer_norm` in a
                torch.nn.Sequential; ModernBERT's `decoder` and `head`.
            pooling: as the class has it, and so
            activation, chunk, normalize, out_dtype: likewise.

        Raises:
            TypeError: head has no such decoder, or is a whole model.
            ValueError: somebody has hooks on them, which would not be called.

        >>> from transformers import BertConfig, BertForMaskedLM
        >>> model = BertForMaskedLM(BertConfig(hidden_size=384, num_hidden_layers=1, intermediate_size=8)).eval()
        >>> fastpool.nn.Splade.from_mlm_head(model.cls.predictions)(hidden, mask)
        """
        name, decoder = f"fastpool.nn.{cls.__name__}.from_mlm_head", getattr(head, "decoder", None)
        if not isinstance(head, nn.Module) or decoder is None or hasattr(head, "base_model"):
            what = "a whole model" if hasattr(head, "base_model") else "none"
            raise TypeError(
                f"{name}: head must be a module whose last step is its `decoder`, a torch.nn.Linear, got "
                f"{type(head).__name__} with {what if decoder is None or what != 'none' else type(decoder).__name__}"
            )
        _check_decoder(name, decoder)
        if head._forward_hooks or head._forward_pre_hooks:
            raise ValueError(f"{name}: head must have no forward hooks: they would see other vectors than they do now")
        transform = copy(head)  # all but its last step; its parameters are the head's own
        transform._modules = {**head._modules, "decoder": nn.Identity()}
        return cls(pooling, activation, decoder, transform, chunk, normalize=normalize, out_dtype=out_dtype)

    def extra_repr(self) -> str:
        own = given(pooling=(self.pooling, "max"), activation=(self.activation, "relu"), chunk=(self.chunk, None))
        return ", ".join([*own, *self._options()])

    def forward(
        self,
        logits: Tensor,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        starts: Tensor | None = None,
        ends: Tensor | None = None,
    ) -> Tensor:
        if self.decoder is None:
            return sparse.splade(
                logits, mask, cu_seqlens, pooling=self.pooling, activation=self.activation, lengths=lengths,
                starts=starts, ends=ends, truncate_dim=self.truncate_dim, normalize=self.normalize,
                out_dtype=self.out_dtype,
            )  # fmt: skip
        if self.transform is not None:
            sparse.check_states(self._name, logits)
        hidden = logits if self.transform is None else self.transform(logits)
        return sparse.splade_linear(
            hidden, self.decoder.weight, self.decoder.bias, mask, cu_seqlens, pooling=self.pooling,
            activation=self.activation, chunk=self.chunk, lengths=lengths, starts=starts, ends=ends,
            normalize=self.normalize, out_dtype=self.out_dtype,
        )  # fmt: skip
