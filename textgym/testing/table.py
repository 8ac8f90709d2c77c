"""TableLM: a language model with a separate logit for every token after every text, for very small tasks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


class TableConfig(PretrainedConfig):
    """Shape of a `TableLM`."""

    model_type = "textgym_table"

    def __init__(self, vocab_size: int = 8, max_tokens: int = 4, **kwargs: Any) -> None:
        self.vocab_size, self.max_tokens = vocab_size, max_tokens
        self.hidden_size, self.num_hidden_layers, self.num_attention_heads = vocab_size, 1, 1
        self.max_position_embeddings = max_tokens
        super().__init__(**kwargs)


class TableLM(PreTrainedModel):
    """A language model whose logits are rows of a table, with one row per text of at most `max_tokens` tokens.

    Texts share no weights, so the model does not generalise and can represent any distribution over texts. It works as
    a causal language model of transformers: its "attention" sums the tokens before a position, each multiplied by a
    power of V + 1, which gives the number of the text's row.

    >>> lm = TableLM(TableConfig(vocab_size=3, max_tokens=2))
    >>> lm(torch.tensor([[1, 2]])).logits.shape
    torch.Size([1, 2, 3])
    """

    config_class = TableConfig
    base_model_prefix = "model"

    def __init__(self, config: TableConfig) -> None:
        super().__init__(config)
        self.model = _Table(config)
        self.lm_head = _Identity(config.vocab_size)
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: the constructors set the weights."""

    def get_output_embeddings(self) -> nn.Module:
        """Return the identity."""
        return self.lm_head

    def forward(self, input_ids: Tensor, output_hidden_states: bool = False, **kwargs: Any) -> CausalLMOutputWithPast:
        """Return logits `(B, T, V)`."""
        hidden = self.model(input_ids, **kwargs).last_hidden_state
        states = (hidden,) if output_hidden_states else None
        return CausalLMOutputWithPast(logits=self.lm_head(hidden), hidden_states=states)


class _Identity(nn.Module):
    """An identity as the output embedding, because the rows of the table are logits already."""

    weight: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.eye(size))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


class _Table(PreTrainedModel):
    config_class = TableConfig

    def __init__(self, config: TableConfig) -> None:
        super().__init__(config)
        self.base = config.vocab_size + 1  # digit 0 means that there is no token
        if self.base**config.max_tokens > 2**24:  # row numbers are computed in float32, which is exact up to 2^24
            raise ValueError(
                f"a table of {config.vocab_size} tokens and {config.max_tokens} places has too many rows: "
                "use fewer of either"
            )
        self.logits = nn.Embedding(self.base**config.max_tokens, config.vocab_size)
        nn.init.zeros_(self.logits.weight)
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """Weights are set where they are made."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        length = input_ids.shape[1]
        if position_ids is None:
            position_ids = torch.arange(length, device=input_ids.device)[None]
        digits = ((input_ids + 1) * self.base**position_ids).float()[:, None, :, None]  # (B, 1, Q, 1)
        if past_key_values is not None:
            digits, _ = past_key_values.update(digits, digits, 0)
        if attention_mask is None or attention_mask.ndim != 4:
            attention_mask = torch.ones(length, length, device=input_ids.device).tril().log()[None, None]
        seen = attention_mask[..., : digits.shape[2]] > -1.0  # (B, 1, Q, K)
        number = (digits[:, 0, None, :, 0] * seen[:, 0]).sum(-1).long()  # (B, Q)
        return BaseModelOutputWithPast(last_hidden_state=self.logits(number))


AutoConfig.register("textgym_table", TableConfig)
AutoModelForCausalLM.register(TableConfig, TableLM)
