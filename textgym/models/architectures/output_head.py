"""OutputHead: logits of models that do more to them than multiply by their output embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class OutputHead(nn.Module):
    """cap * tanh(logits / cap) of logits = scale * E (input_scale * h) + bias, with what a model has of these.

    Args:
        embedding: E, the model's output embedding.
        input_scale: T5 with tied embeddings divides by the root of its width.
        scale: Cohere multiplies by `logit_scale`, Granite divides by `logits_scaling`.
        bias: `(1, V)`, BART's `final_logits_bias`.
        cap: Gemma 2's `final_logit_softcapping`.
    """

    bias: Tensor | None

    def __init__(
        self,
        embedding: nn.Module,
        input_scale: float = 1.0,
        scale: float = 1.0,
        bias: Tensor | None = None,
        cap: float | None = None,
    ) -> None:
        super().__init__()
        self.embedding, self.input_scale, self.scale, self.cap = embedding, input_scale, scale, cap
        self.register_buffer("bias", bias, persistent=False)  # the model's own

    @property
    def weight(self) -> Tensor:
        """`(V, d)`, the embedding's."""
        weight: Tensor = self.embedding.weight  # type: ignore[assignment]
        return weight

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits `(..., V)` from hidden states `(..., d)`."""
        logits: Tensor = self.embedding(hidden * self.input_scale) * self.scale
        if self.bias is not None:
            logits = logits + self.bias[0]
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def output_head(lm: Any) -> Any:
    """What makes logits of a language model's last hidden state: its output embedding, if that is all it does."""
    config, embedding = lm.config, lm.get_output_embeddings()
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    umt5 = config.model_type == "umt5" and config.tie_word_embeddings  # which has no flag of its own for it
    input_scale = config.d_model**-0.5 if getattr(config, "scale_decoder_outputs", umt5) else 1.0
    bias = getattr(lm, "final_logits_bias", None)
    cap = getattr(config, "final_logit_softcapping", None)
    if (input_scale, scale, bias, cap) == (1.0, 1.0, None, None):
        return embedding
    return OutputHead(embedding, input_scale, scale, bias, cap)
