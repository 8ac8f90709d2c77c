"""textgym/Sentiment-v0: continue a movie review so that a reward model learned from human ratings likes it."""

from __future__ import annotations

from typing import Any

from textgym.envs.tasks.base import Settings, TaskEnv, TaskVectorEnv

DEFAULTS: dict[str, Any] = {
    "prompts": "openings",
    "tokenizer": "tiny",
    "reward": "tiny",
    "reference": "tiny",
    "kl_coef": 0.05,
    "max_prompt_tokens": 48,
    "max_new_tokens": 24,
}


class SentimentEnv(TaskEnv):
    """Movie-review continuation, scored by a learned reward model (RL4LMs' `imdb_text_continuation`, a task of GRUE).

    ## Description
    A review has been begun; write the rest. The reward model was trained on pairwise preferences made from human
    ratings of movie-review snippets (Hutto and Gilbert, 2014), so it prefers what people rated as positive. Everything
    is embedded: tokenizer, reference, reward model and 200 openings. The first halves of real snippets, fetched once,
    are taken instead with `prompts="textgym.data.prompts:policy_snippets"`.

    ## Action Space
    `Discrete(2048)`, the embedded tokenizer's byte-level vocabulary.

    ## Observation Space
    As `TextEnv`, `W = 48 + 24`.

    ## Rewards
    On the last token the reward model's score, whose mean is 0 and deviation 1 on the reference's own samples; on every
    token 0.05 times the log-prob under the reference (`kl_mode="reference"`).

    ## Starting State
    One of the prompts.

    ## Episode End
    The model's end-of-text token, or 24 tokens.

    ## Arguments
    Those of `TextEnv`; the defaults are described above.
    """

    @classmethod
    def settings(cls, **kwargs: Any) -> Settings:
        """The arguments of `TextEnv`."""
        return {**DEFAULTS, **kwargs}


class SentimentVectorEnv(TaskVectorEnv):
    """Many rows of `SentimentEnv`, see there."""

    single = SentimentEnv
