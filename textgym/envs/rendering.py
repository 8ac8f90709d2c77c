"""Text renderings of an episode."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from textgym.data.continuations import HALF, LONGEST_CHARACTER, added_text
from textgym.display import printable, rich_text
from textgym.envs.text_task import TextTask, Tokens
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


def render(mode: str | None, task: TextTask, row: int, transcript: dict[str, Any], ended: bool) -> str | None:
    """Return an episode as a string (`"ansi"`, `"html"`), or print it (`"human"`).

    Args:
        mode: The mode.
        task: The environment's task.
        row: The row.
        transcript: Prompt and completion.
        ended: Whether it is the row's last finished episode, which has a score, and not the current one.
    """
    prompt, completion = transcript["prompt"], transcript["completion"]
    score = task.scores[row]
    note = f"score {score:+.3f}" if ended and score == score else ""  # NaN is not equal to itself
    if mode == "ansi":
        return f"{printable(prompt)}\x1b[1m{printable(completion)}\x1b[0m" + (f"\n{note}" if note else "")
    if mode == "html":
        tokens = task.finished_tokens[row] if ended else None
        tokens = task.tokens(row) if tokens is None else tokens
        numbers = numbers_of(task, tokens)
        if ended and task.token_rewards[row] is not None:
            numbers["reward"] = list(task.token_rewards[row])  # type: ignore[arg-type]
        texts = texts_of(task.tokenizer, list(task.decoder_start) or tokens.prompt, tokens.response)
        return token_html(texts, numbers, prompt=prompt, mask=tokens.generated, note=note)
    if mode == "human":
        from rich import print as rich_print
        from rich.text import Text

        parts = rich_text(prompt), rich_text(completion, "bold"), (f"  [{note}]" if note else "", "dim")
        rich_print(Text.assemble(*parts))
    return None


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
def numbers_of(task: TextTask, tokens: Tokens) -> dict[str, list[float | None]]:
    """Return what the models of an environment say of each token: log-probs, and the KL with an attached policy.

    There is nothing with an action mask, which may depend on each state.
    """
    models: dict[str, Any] = {"log_prob": task.policy}
    if task.penalty is not None:
        models["reference_log_prob"] = task.penalty.reference
    if not tokens.response or task.action_mask is not None:
        return {}
    length, generated = len(tokens.response), tokens.generated
    sequences = Sequences(
        torch.tensor([[*tokens.prompt, *tokens.response]], device=task.device),
        torch.tensor([len(tokens.prompt)], device=task.device),
        torch.tensor([length], device=task.device),
        task.stop_rule,
        None if generated is None else torch.tensor([generated], device=task.device),
        task.decoder_start,
    )
    found: dict[str, list[float | None]] = {}
    for name, model in models.items():
        if isinstance(model, TokenModel):
            values = model.sequence_log_probs(sequences)[0, :length].tolist()
            found[name] = [value if generated is None or generated[t] else None for t, value in enumerate(values)]
    if len(found) == 2:
        pairs = zip(found["log_prob"], found["reference_log_prob"], strict=True)
        found = {"kl": [None if p is None or q is None else p - q for p, q in pairs], **found}
    return found
