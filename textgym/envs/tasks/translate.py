"""textgym/Translate-v0: translate from English to German."""

from __future__ import annotations

from typing import ClassVar

from textgym.data.corpora import hub
from textgym.data.corpora.translations import translation_prompts
from textgym.envs.tasks.base import Settings, StandInEnv, TaskVectorEnv


class TranslateEnv(StandInEnv):
    """English to be put in German: a stand-in for IWSLT 2017 (RL4LMs' `iwslt2017`, a task of GRUE).

    ## Description
    Sentences of user interfaces and their translations. The text is fetched once, see
    `textgym.data.corpora.translations`. Figures are not those of IWSLT, and the embedded model has never seen German.

    ## Action Space
    `Discrete(2048)`, the embedded tokenizer's vocabulary.

    ## Observation Space
    As `TextEnv`, `W = 96 + 32`.

    ## Rewards
    On the last token chrF, from 0 to 1; on
    every token 0.005 times the log-prob under the embedded reference (`kl_mode="reference"`).

    Metrics: `Bleu`, `Chrf`, `Ter`.

    ## Starting State
    One of the prompts of a split: 1,704, 219 and 204 for training, validation and test.

    ## Episode End
    The end-of-text token, or 32 tokens.

    ## Arguments
    Args:
        split: `"train"`, `"validation"` or `"test"`.
        original: take IWSLT 2017 from the hub instead (`IWSLT`); a model that reads longer prompts
            is then in order, and so are larger `max_prompt_tokens` and `max_new_tokens`.
        kwargs: arguments of `TextEnv`; the defaults are described above.

    Raises:
        ValueError: an unknown split.
        FetchError: no network, or a wrong checksum.
        ImportError: an extra is missing; the message is the pip line.
    """

    metrics = ("textgym.rewards.functions:Bleu", "textgym.rewards.functions:Chrf", "textgym.rewards.functions:Ter")

    load = staticmethod(translation_prompts)
    stands_for = hub.IWSLT
    own: ClassVar[Settings] = {
        "reward": "textgym.rewards.functions:Chrf",
        "reward_weights": [0.01],
        "max_prompt_tokens": 96,
        "max_new_tokens": 32,
    }


class TranslateVectorEnv(TaskVectorEnv):
    """Many rows of `TranslateEnv`, see there."""

    single = TranslateEnv
