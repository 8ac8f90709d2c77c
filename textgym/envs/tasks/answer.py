"""textgym/Answer-v0: answer a question."""

from __future__ import annotations

from typing import ClassVar

from textgym.data.corpora import hub
from textgym.data.corpora.questions import question_prompts
from textgym.envs.tasks.base import Settings, StandInEnv, TaskVectorEnv


class AnswerEnv(StandInEnv):
    """Questions to be answered: a stand-in for NarrativeQA (RL4LMs' `narrative_qa`, a task of GRUE).

    ## Description
    Questions of general knowledge and on computer trouble, without a text that says the answer. They are fetched once,
    see `textgym.data.corpora.questions`. Figures are not those of NarrativeQA.

    ## Action Space
    `Discrete(2048)`, the embedded tokenizer's vocabulary.

    ## Observation Space
    As `TextEnv`, `W = 64 + 16`.

    ## Rewards
    On the last token the F1 of words shared with the answer (`token_f1`), from 0 to 1; on
    every token 0.005 times the log-prob under the embedded reference (`kl_mode="reference"`).

    Metrics: `token_f1`, `exact_match`, `Rouge`.

    ## Starting State
    One of the prompts of a split: 212, 34 and 25 for training, validation and test.

    ## Episode End
    The end-of-text token, or 16 tokens.

    ## Arguments
    Args:
        split: `"train"`, `"validation"` or `"test"`.
        original: take NarrativeQA from the hub instead (`NARRATIVE_QA`); a model that reads longer prompts
            is then in order, and so are larger `max_prompt_tokens` and `max_new_tokens`.
        kwargs: arguments of `TextEnv`; the defaults are described above.

    Raises:
        ValueError: an unknown split.
        FetchError: no network, or a wrong checksum.
        ImportError: an extra is missing; the message is the pip line.
    """

    metrics = (
        "textgym.rewards.functions:token_f1",
        "textgym.rewards.functions:exact_match",
        "textgym.rewards.functions:Rouge",
    )

    load = staticmethod(question_prompts)
    stands_for = hub.NARRATIVE_QA
    own: ClassVar[Settings] = {
        "reward": "textgym.rewards.functions:token_f1",
        "max_prompt_tokens": 64,
        "max_new_tokens": 16,
    }


class AnswerVectorEnv(TaskVectorEnv):
    """Many rows of `AnswerEnv`, see there."""

    single = AnswerEnv
