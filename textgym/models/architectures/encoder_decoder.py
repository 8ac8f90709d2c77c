"""Encoder-decoder models: the encoder reads the prompt, and the decoder writes the response after its start tokens.

Everywhere else a row is its prompt followed by its response; here it is laid out as the two halves of such a model see
it. Positions and relative distances are counted by the models from the beginning of a row, so rows are padded on the
right and not packed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from textgym.models.architectures.attention import additive_mask, check_encoder_decoder, recomputing

ROWS = 32
"""Rows of one pass, of similar length, so that little padding is computed."""


class EncoderDecoderRows(NamedTuple):
    """N rows as encoder and decoder read them, right-padded.

    Attributes:
        input_ids: `(N, P)`, prompts.
        lengths: `(N,)`, tokens of each prompt.
        decoder_input_ids: `(N, S + T)`, the S start tokens, then the response.
        decoder_lengths: `(N,)`, start tokens and response tokens of each row.
    """

    input_ids: Tensor
    lengths: Tensor
    decoder_input_ids: Tensor
    decoder_lengths: Tensor

    def observation(self) -> dict[str, Tensor]:
        """The same as environments show it: ids and masks, `(N, P)` and `(N, S + T)`."""
        parts = (("", self.input_ids, self.lengths), ("decoder_", self.decoder_input_ids, self.decoder_lengths))
        observation: dict[str, Tensor] = {}
        for part, ids, lengths in parts:
            slots = torch.arange(ids.shape[1], device=ids.device)
            observation |= {f"{part}input_ids": ids, f"{part}attention_mask": (slots < lengths[:, None]).long()}
        return observation


def split_rows(
    input_ids: Tensor,
    prompt_lengths: Tensor,
    response_lengths: Tensor,
    start: tuple[int, ...],
    max_prompt_tokens: int,
    max_new_tokens: int,
    pad_token_id: int = 0,
) -> EncoderDecoderRows:
    """Rows of prompt and response `(N, W)`, in the two halves; the slots beyond are filled with `pad_token_id`."""
    device = input_ids.device
    steps = torch.arange(max_new_tokens, device=device)
    slots = (prompt_lengths[:, None] + steps).clamp(max=input_ids.shape[1] - 1)
    responses = torch.where(steps < response_lengths[:, None], input_ids.gather(1, slots), pad_token_id)
    real = torch.arange(max_prompt_tokens, device=device) < prompt_lengths[:, None]
    prompts = torch.where(real, input_ids[:, :max_prompt_tokens], pad_token_id)
    begin = torch.tensor(start, dtype=input_ids.dtype, device=device).expand(len(input_ids), -1)
    return EncoderDecoderRows(prompts, prompt_lengths, torch.cat((begin, responses), 1), response_lengths + len(start))


@dataclass(frozen=True)
class EncoderDecoderStates:
    """M states, each a prompt and the first decoder tokens of one of N rows, so that one pass over the rows gives all.

    Attributes:
        rows: what is passed.
        row: `(M,)`, the row of each state.
        slot: `(M,)`, where its last token is in the row's `decoder_input_ids`.
    """

    rows: EncoderDecoderRows
    row: Tensor
    slot: Tensor

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, chosen: slice | Tensor) -> EncoderDecoderStates:
        """Some of the states."""
        return replace(self, row=self.row[chosen], slot=self.slot[chosen])

    @classmethod
    def whole(cls, rows: EncoderDecoderRows) -> EncoderDecoderStates:
        """Every row as far as it has been written: N states."""
        return cls(rows, torch.arange(len(rows.lengths), device=rows.lengths.device), rows.decoder_lengths - 1)

    def hidden(self, lm: Any) -> Tensor:
        """The decoder's last hidden state `(M, d)` of each state, in a pass of encoder and decoder for every 32 rows.

        Raises:
            ValueError: `lm` has no encoder.
        """
        check_encoder_decoder(lm, wanted=True)
        order = (self.rows.lengths + self.rows.decoder_lengths).argsort()
        starts = torch.zeros_like(order)
        parts, offset = [], 0
        for chosen in order.split(ROWS):
            with recomputing(lm.base_model):
                hidden = rows_hidden(lm, EncoderDecoderRows(*(x[chosen] for x in self.rows)))  # (n, D, d)
            starts[chosen] = offset + hidden.shape[1] * torch.arange(len(chosen), device=order.device)
            parts.append(hidden.flatten(0, 1))
            offset += len(parts[-1])
        return torch.cat(parts)[starts[self.row] + self.slot]


def rows_hidden(lm: Any, rows: EncoderDecoderRows) -> Tensor:
    """Last hidden states `(N, D, d)` of the decoder, D the longest row's tokens."""
    encoder_hidden, encoder_mask = encode(lm, rows.input_ids, rows.lengths)
    width = int(rows.decoder_lengths.max())
    causal = torch.ones(width, width, dtype=torch.bool, device=encoder_mask.device).tril()
    output = lm.base_model.get_decoder()(
        input_ids=rows.decoder_input_ids[:, :width],
        attention_mask=additive_mask(causal.expand(len(encoder_mask), 1, -1, -1), lm.dtype),
        encoder_hidden_states=encoder_hidden,
        encoder_attention_mask=encoder_mask,
        use_cache=False,
    )
    hidden: Tensor = output.last_hidden_state
    return hidden


def encode(lm: Any, input_ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The encoder's states `(N, L, d)` of right-padded prompts, L the longest of them, and their mask `(N, L)`."""
    width = int(lengths.max())
    mask = (torch.arange(width, device=lengths.device) < lengths[:, None]).long()
    return lm.base_model.get_encoder()(input_ids=input_ids[:, :width], attention_mask=mask).last_hidden_state, mask


def decoder_start_ids(lm: Any) -> tuple[int, ...]:
    """The token ids that a model's decoder begins with: `()` for a causal language model.

    They are an argument of the environment. Models of many languages, such as mBART, also want the code of the language
    they are to write, which the model's `forced_bos_token_id` says, where it says one.

    Raises:
        ValueError: the model does not name its start token.
    """
    if not lm.config.is_encoder_decoder:
        return ()
    given = [getattr(source, "decoder_start_token_id", None) for source in (lm.config, lm.generation_config)]
    start = next((token for token in given if token is not None), None)
    if start is None:
        raise ValueError(
            f"{type(lm).__name__} does not say which token its decoder begins with: "
            "set lm.config.decoder_start_token_id"
        )
    forced = getattr(lm.generation_config, "forced_bos_token_id", None)
    return (int(start),) if forced is None else (int(start), int(forced))
