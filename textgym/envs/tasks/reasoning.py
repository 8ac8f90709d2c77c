"""textgym/ReasoningGym-v0: the task families of reasoning_gym, whose answers are verified."""

from __future__ import annotations

import warnings
from typing import Any

from textgym.data.corpora.splits import SPLITS, check_split
from textgym.data.rows import Row
from textgym.envs.tasks.base import EMBEDDED, Settings, TaskEnv, TaskVectorEnv

FEW = 0.1
"""A split that has less than this share of the questions that were asked for comes with a warning."""


class ReasoningGymEnv(TaskEnv):
    """A question of a task family of reasoning_gym, made by rule and scored by its verifier (extra `tasks`).

    ## Description
    Questions are made, not fetched. The embedded model knows no arithmetic and reads at most 128 tokens: short families
    such as `chain_sum` and `spell_backward` fit it, others want a larger model and `max_prompt_tokens`.

    ## Action Space
    `Discrete(2048)`, the embedded tokenizer's vocabulary.

    ## Observation Space
    As `TextEnv`, `W = 96 + 16`.

    ## Rewards
    On the last token the score of the family's own verifier (`reasoning_gym_score`), from 0 to 1; on every token 0.005
    times the log-prob under the embedded reference (`kl_mode="reference"`).

    Metrics: `reasoning_gym_score`, `exact_match`.

    ## Starting State
    One of `size` questions of a split. Splits are made of one stream of questions, one after the other; what an
    earlier split has is left out of a later one.

    ## Episode End
    The end-of-text token, or 16 tokens.

    ## Arguments
    Args:
        task: a family of reasoning_gym.
        split: `"train"`, `"validation"` or `"test"`.
        size: questions of a split.
        seed: of the questions.
        config: settings of the family, such as `{"max_terms": 2, "max_digits": 1}`.
        kwargs: arguments of `TextEnv`; the defaults are described above.

    Raises:
        ImportError: without the reasoning-gym package; the message is the pip line.
        ValueError: an unknown family or split, or no question that an earlier split has not.
    """

    metrics = (
        "textgym.rewards.functions:reasoning_gym_score",
        "textgym.rewards.functions:exact_match",
    )

    @classmethod
    def settings(
        cls,
        *,
        task: str = "chain_sum",
        split: str = "train",
        size: int = 500,
        seed: int = 0,
        config: dict[str, Any] | None = None,
        prompts: Any = None,
        **kwargs: Any,
    ) -> Settings:
        """The arguments of `TextEnv`."""
        return {
            **EMBEDDED,
            "prompts": reasoning_prompts(task, split, size, seed, config) if prompts is None else prompts,
            "reward": "textgym.rewards.functions:reasoning_gym_score",
            "max_prompt_tokens": 96,
            "max_new_tokens": 16,
            **kwargs,
        }


class ReasoningGymVectorEnv(TaskVectorEnv):
    """Many rows of `ReasoningGymEnv`, see there."""

    single = ReasoningGymEnv


def reasoning_prompts(task: str, split: str, size: int, seed: int, config: dict[str, Any] | None) -> list[Row]:
    """Rows with `prompt`, `answer` and `entry`, the whole row that the verifier reads."""
    check_split(split)
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError("textgym/ReasoningGym-v0 needs reasoning-gym: pip install 'textgym[tasks]'") from error
    place = SPLITS.index(split)
    made = reasoning_gym.create_dataset(task, size=(place + 1) * size, seed=seed, **(config or {}))
    earlier = {made[index]["question"] for index in range(place * size)}
    entries = [entry for index in range(place * size, (place + 1) * size) for entry in [made[index]]]
    rows = [
        {"prompt": entry["question"], "answer": entry["answer"], "entry": {**entry, "config": config or {}}}
        for entry in entries
        if entry["question"] not in earlier
    ]
    if not rows:
        raise ValueError(f"all {size} questions of {split!r} are in earlier splits: make size smaller or config wider")
    if len(rows) < FEW * size:
        warnings.warn(
            f"only {len(rows)} of {size} questions of {split!r} are not in earlier splits: make size smaller or config "
            "wider",
            stacklevel=2,
        )
    return rows
