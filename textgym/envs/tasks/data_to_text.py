"""textgym/DataToText-v0: put facts in a sentence."""

from __future__ import annotations

from typing import ClassVar

from textgym.data.corpora import hub
from textgym.data.corpora.articles import fact_prompts
from textgym.envs.tasks.base import Settings, StandInEnv, TaskVectorEnv


class DataToTextEnv(StandInEnv):
    """Facts to be put in a sentence: a stand-in for ToTTo (RL4LMs' `totto`, a task of GRUE).

    ## Description
    Title, description and topic of an encyclopedia article; the reference is its first sentence. The text is fetched
    once, see `textgym.data.corpora.articles`. Figures are not those of ToTTo.

    ## Action Space
    `Discrete(2048)`, the embedded tokenizer's vocabulary.

    ## Observation Space
    As `TextEnv`, `W = 96 + 32`.

    ## Rewards
    On the last token half whether the title is named (`contains_all`) and a half of chrF, from 0 to 1; on
    every token 0.005 times the log-prob under the embedded reference (`kl_mode="reference"`).

    Metrics: `contains_all`, `Bleu`, `Chrf`, `Rouge`.

    ## Starting State
    One of the prompts of a split: 7,883, 974 and 1,004 for training, validation and test.

    ## Episode End
    The end-of-text token, or 32 tokens.

    ## Arguments
    Args:
        split: `"train"`, `"validation"` or `"test"`.
        original: take ToTTo from the hub instead (`TOTTO`); a model that reads longer prompts
            is then in order, and so are larger `max_prompt_tokens` and `max_new_tokens`.
        kwargs: arguments of `TextEnv`; the defaults are described above.

    Raises:
        ValueError: an unknown split.
        FetchError: no network, or a wrong checksum.
        ImportError: an extra is missing; the message is the pip line.
    """

    metrics = (
        "textgym.rewards.functions:contains_all",
        "textgym.rewards.functions:Bleu",
        "textgym.rewards.functions:Chrf",
        "textgym.rewards.functions:Rouge",
    )

    load = staticmethod(fact_prompts)
    stands_for = hub.TOTTO
    own: ClassVar[Settings] = {
        "reward": ["textgym.rewards.functions:contains_all", "textgym.rewards.functions:Chrf"],
        "reward_weights": [0.5, 0.005],
        "max_prompt_tokens": 96,
        "max_new_tokens": 32,
    }


class DataToTextVectorEnv(TaskVectorEnv):
    """Many rows of `DataToTextEnv`, see there."""

    single = DataToTextEnv
