"""textgym/Summarize-v0: say in a few words what a text is about."""

from __future__ import annotations

from typing import ClassVar

from textgym.data.corpora import hub
from textgym.data.corpora.articles import summary_prompts
from textgym.envs.tasks.base import Settings, StandInEnv, TaskVectorEnv
from textgym.rewards.functions.overlap import Rouge


class SummarizeEnv(StandInEnv):
    """A text to be put in a few words: a stand-in for CNN/DailyMail (RL4LMs' `summarization`, a task of GRUE).

    ## Description
    The first 30 words of an encyclopedia article and `"In short:"`; the reference is the article's short description.
    The text is fetched once, see `textgym.data.corpora.articles`. Figures are not those of CNN/DailyMail.

    ## Action Space
    `Discrete(2048)`, the embedded tokenizer's vocabulary.

    ## Observation Space
    As `TextEnv`, `W = 112 + 16`.

    ## Rewards
    On the last token ROUGE-L, from 0 to 1; on
    every token 0.005 times the log-prob under the embedded reference (`kl_mode="reference"`).

    Metrics: `Rouge` (ROUGE-L), ROUGE-1 and ROUGE-2 (`Rouge_2` and `Rouge_3` in the table), `Meteor`.

    ## Starting State
    One of the prompts of a split: 7,856, 971 and 1,001 for training, validation and test.

    ## Episode End
    The end-of-text token, or 16 tokens.

    ## Arguments
    Args:
        split: `"train"`, `"validation"` or `"test"`.
        original: take CNN/DailyMail from the hub instead (`CNN_DAILYMAIL`); a model that reads longer prompts
            is then in order, and so are larger `max_prompt_tokens` and `max_new_tokens`.
        kwargs: arguments of `TextEnv`; the defaults are described above.

    Raises:
        ValueError: an unknown split.
        FetchError: no network, or a wrong checksum.
        ImportError: an extra is missing; the message is the pip line.
    """

    metrics = ("textgym.rewards.functions:Rouge", Rouge("rouge1"), Rouge("rouge2"), "textgym.rewards.functions:Meteor")

    load = staticmethod(summary_prompts)
    stands_for = hub.CNN_DAILYMAIL
    own: ClassVar[Settings] = {
        "reward": "textgym.rewards.functions:Rouge",
        "max_prompt_tokens": 112,
        "max_new_tokens": 16,
    }


class SummarizeVectorEnv(TaskVectorEnv):
    """Many rows of `SummarizeEnv`, see there."""

    single = SummarizeEnv
