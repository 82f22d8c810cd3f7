"""NEFTune (arXiv 2310.05914): uniform noise on the embeddings of a training, for --neftune_noise_alpha."""

from typing import Any

import torch
from torch import Tensor, nn


class EmbeddingNoise:
    """Adds noise of at most alpha / sqrt(L x D) to each number of a document's embeddings, L tokens of D numbers each.

    transformers takes the length of the whole row for L, and so adds too little noise to packed documents and to padded
    ones. Evaluation and generation, in which the model does not train, get none.
    """

    def __init__(self, model: nn.Module, alpha: float):
        self.alpha = alpha
        self._documents: Tensor | None = None  # [B, T]: how long the document of each token is, 0 for padding
        model.get_input_embeddings().register_forward_hook(self._add)

    def set_batch(self, inputs: dict[str, Any]) -> None:
        """Take the documents of the batch (see `collator.Batch`) that the model computes next."""
        if "cu_seq_lens_q" in inputs:
            lengths = inputs["cu_seq_lens_q"].diff()
            self._documents = lengths.repeat_interleave(lengths)[None]
        else:
            mask = inputs["attention_mask"]
            self._documents = mask * mask.sum(1, keepdim=True)

    def _add(self, embeddings: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        if not embeddings.training or self._documents is None or self._documents.shape != output.shape[:2]:
            return None
        bound = self.alpha / (self._documents.clamp(min=1) * output.shape[2]).sqrt() * (self._documents > 0)
        noise = torch.empty_like(output).uniform_(-1, 1)
        return output + noise * bound[..., None].to(output.dtype)
