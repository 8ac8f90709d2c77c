"""Text renderings of an episode."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from textgym.data.continuations import HALF, LONGEST_CHARACTER, added_text
from textgym.display import printable, rich_text
from textgym.envs.text_task import LastEpisode, TextTask, Tokens
from textgym.models.sequences import Sequences
from textgym.models.token_model import TokenModel
from textgym.viewer.tokens import token_html

RENDER_MODES = ("ansi", "human", "html")
CONTEXT = 8
"""Tokens before a token that its text is decoded after, so that its first space is there."""


def checked_render_mode(render_mode: str | None) -> str | None:
    """The mode, or `None` with a warning for one that text has no use for, such as the `"rgb_array"` SB3 asks for."""
    if render_mode is None or render_mode in RENDER_MODES:
        return render_mode
    warnings.warn(f"render_mode={render_mode!r} is ignored: text renders as one of {RENDER_MODES}", stacklevel=4)
    return None


def render(
    mode: str | None,
    task: TextTask,
    transcripts: Sequence[dict[str, Any]],
    finished: Sequence[LastEpisode | None],
) -> list[str | None]:
    """Return each row's episode as a string (`"ansi"`, `"html"`), or print it (`"human"`).

    Args:
        mode: The mode.
        task: The environment's task.
        transcripts: Prompt and completion of each row.
        finished: The row's last finished episode, if it is the one to render; `None` if it is the current one.
    """
    texts = [(transcript["prompt"], transcript["completion"]) for transcript in transcripts]
    notes = [_note(episode) for episode in finished]
    if mode == "ansi":
        return [_ansi(*parts, note) for parts, note in zip(texts, notes, strict=True)]
    if mode == "html":
        return list(_html(task, [prompt for prompt, _ in texts], finished, notes))
    if mode == "human":
        for parts, note in zip(texts, notes, strict=True):
            _print(*parts, note)
    return [None] * len(transcripts)


def _note(episode: LastEpisode | None) -> str:
    """Return the line below an episode: its score, if it has one."""
    return "" if episode is None or math.isnan(episode.score) else f"score {episode.score:+.3f}"


def _ansi(prompt: str, completion: str, note: str) -> str:
    return f"{printable(prompt)}\x1b[1m{printable(completion)}\x1b[0m" + (f"\n{note}" if note else "")


def _print(prompt: str, completion: str, note: str) -> None:
    from rich import print as rich_print
    from rich.text import Text

    parts = rich_text(prompt), rich_text(completion, "bold"), (f"  [{note}]" if note else "", "dim")
    rich_print(Text.assemble(*parts))


def _html(
    task: TextTask, prompts: Sequence[str], finished: Sequence[LastEpisode | None], notes: Sequence[str]
) -> Iterator[str]:
    playing = iter(task.current_tokens([row for row, episode in enumerate(finished) if episode is None]))
    tokens = [next(playing) if episode is None else episode.tokens for episode in finished]
    for row, numbers in enumerate(numbers_of(task, tokens)):
        own, episode = tokens[row], finished[row]
        if episode is not None:
            numbers["reward"] = episode.rewards.tolist()
        texts = texts_of(task.tokenizer, list(task.decoder_start) or own.prompt, own.response)
        yield token_html(texts, numbers, prompt=prompts[row], mask=own.generated, note=notes[row])


def texts_of(tokenizer: Any, context: Sequence[int], response: Sequence[int]) -> list[str]:
    """Return the text of each token after a context; a character of several tokens is that of its last one."""
    ids, special = [*context, *response], set(tokenizer.all_special_ids)
    texts, first = [], len(context)
    for place, token in enumerate(ids[len(context) :], start=len(context)):
        if token in special or token >= len(tokenizer):
            text = str(tokenizer.convert_ids_to_tokens(token)) if token < len(tokenizer) else f"<{token}>"
        else:
            known = [before for before in ids[max(0, first - CONTEXT) : first] if before < len(tokenizer)]
            text = added_text(tokenizer, known, ids[first : place + 1])
            if text.endswith(HALF) and place + 1 - first < LONGEST_CHARACTER and place + 1 < len(ids):
                texts.append("")
                continue
        texts.append(text)
        first = place + 1
    return texts


@torch.no_grad()
def numbers_of(task: TextTask, tokens: Sequence[Tokens]) -> list[dict[str, list[float | None]]]:
    """Return what the models say of each token of each row: log-probs, and the KL with an attached policy.

    There is nothing with an action mask, which may depend on each state.
    """
    models: dict[str, Any] = {"log_prob": task.policy}
    if task.penalty is not None:
        models["reference_log_prob"] = task.penalty.reference
    models = {name: model for name, model in models.items() if isinstance(model, TokenModel)}
    begun = [row for row in tokens if row.response]
    if not (begun and models) or task.action_mask is not None:
        return [{} for _ in tokens]

    sequences = _sequences(task, begun)
    log_probs = {name: model.sequence_log_probs(sequences.to(model.device)) for name, model in models.items()}  # (N, T)
    rows = zip(*(of_model.tolist() for of_model in log_probs.values()), strict=True)
    return [_numbers(row, dict(zip(log_probs, next(rows), strict=True))) if row.response else {} for row in tokens]


def _numbers(tokens: Tokens, log_probs: dict[str, list[float]]) -> dict[str, list[float | None]]:
    """Return log-probs of a row's response, and their difference; `None` for tokens that the environment inserted."""
    length = len(tokens.response)
    generated = tokens.generated or [True] * length
    found: dict[str, list[float | None]] = {
        name: [value if own else None for value, own in zip(values[:length], generated, strict=True)]
        for name, values in log_probs.items()
    }
    if len(found) < 2:
        return found
    pairs = zip(found["log_prob"], found["reference_log_prob"], strict=True)
    return {"kl": [None if p is None or q is None else p - q for p, q in pairs], **found}


def _sequences(task: TextTask, tokens: Sequence[Tokens]) -> Sequences:
    """Return rows as sequences in the host's memory."""
    generated = None
    if any(row.generated is not None for row in tokens):
        masks = [torch.tensor(row.generated or [True] * len(row.response)) for row in tokens]
        generated = pad_sequence(masks, batch_first=True)  # (N, T)
    return Sequences(
        pad_sequence([torch.tensor([*row.prompt, *row.response]) for row in tokens], batch_first=True),  # (N, W)
        torch.tensor([len(row.prompt) for row in tokens]),
        torch.tensor([len(row.response) for row in tokens]),
        task.stop_rule,
        generated,
        task.decoder_start,
    )
