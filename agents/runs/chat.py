"""chat: type a prompt, read what a policy writes, and see its score."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from textgym.models.actor_critic import ActorCritic
from textgym.models.token_model import TokenModel

from .evaluation import generate
from .heldout import figures


def chat(
    policy: ActorCritic,
    envs: Any,
    reference: TokenModel,
    lines: Iterable[str],
    say: Callable[[str], None],
    seed: int = 0,
) -> None:
    """Answer each line with a completion, its score, its KL to the reference and its length.

    Args:
        policy: The policy.
        envs: A `TextVectorEnv` of one row, with `on_reward_error="skip"`; its prompts are replaced. Reward functions
            get `None` in the columns that prompts have.
        reference: Reference of the KL.
        lines: What is typed; empty lines are skipped.
        say: Shows an answer.
        seed: Seed of the first completion; every later one has the next seed.
    """
    columns = dict.fromkeys(envs.unwrapped.prompts[0])
    for turn, prompt in enumerate(line.rstrip("\n") for line in lines if line.strip()):
        envs.unwrapped.replace_prompts([{**columns, "prompt": prompt}])
        samples = generate(policy, envs, [0], seed + turn)
        rows = figures(samples, reference)
        score, kl, length = (float(rows[name][0]) for name in ("score", "kl", "length"))
        say(samples.completions[0])
        scored = "no score" if score != score else f"score {score:+.3f}"  # NaN is not equal to itself
        say(f"  [{scored}, KL {kl:.2f} nats, {length:.0f} tokens]")
