"""textgym/ConceptToText-v0: write a sentence that uses some words."""

from __future__ import annotations

from typing import ClassVar

from textgym.data.corpora import hub
from textgym.data.corpora.concepts import concept_prompts
from textgym.envs.tasks.base import Settings, StandInEnv, TaskVectorEnv


class ConceptToTextEnv(StandInEnv):
    """Words to be used in a sentence: a stand-in for CommonGen (RL4LMs' `common_gen`, a task of GRUE).

    ## Description
    `"colony, deportation ="` is to be answered with a sentence that has these words. They are the nouns and verbs of
    example sentences of WordNet 3.0, which are the references; the text is fetched once, see
    `textgym.data.corpora.concepts`. Figures are not those of CommonGen.

    ## Action Space
    `Discrete(2048)`, the embedded tokenizer's vocabulary.

    ## Observation Space
    As `TextEnv`, `W = 32 + 24`.

    ## Rewards
    On the last token half the share of words that were used (`contains_all`) and half ROUGE-L, from 0 to 1; on
    every token 0.005 times the log-prob under the embedded reference (`kl_mode="reference"`).

    Metrics: coverage (`contains_all`), `Bleu`, `Rouge`, `Meteor`.

    ## Starting State
    One of the prompts of a split: 20,156, 2,501 and 2,490 for training, validation and test.

    ## Episode End
    The end-of-text token, or 24 tokens.

    ## Arguments
    Args:
        split: `"train"`, `"validation"` or `"test"`.
        original: take CommonGen from the hub instead (`COMMON_GEN`); a model that reads longer prompts
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
        "textgym.rewards.functions:Rouge",
        "textgym.rewards.functions:Meteor",
    )

    load = staticmethod(concept_prompts)
    stands_for = hub.COMMON_GEN
    own: ClassVar[Settings] = {
        "reward": ["textgym.rewards.functions:contains_all", "textgym.rewards.functions:Rouge"],
        "reward_weights": [0.5, 0.5],
        "max_prompt_tokens": 32,
        "max_new_tokens": 24,
    }


class ConceptToTextVectorEnv(TaskVectorEnv):
    """Many rows of `ConceptToTextEnv`, see there."""

    single = ConceptToTextEnv
