"""textgym/Dialogue-v0: reply in a conversation."""

from __future__ import annotations

from typing import ClassVar

from textgym.data.corpora import hub
from textgym.data.corpora.dialogues import reply_prompts
from textgym.envs.tasks.base import Settings, StandInEnv, TaskVectorEnv


class DialogueEnv(StandInEnv):
    """Continue a conversation: a stand-in for DailyDialog (RL4LMs' `dialog`, a task of GRUE).

    ## Description
    Two turns of a chat between people who do not know each other; the reference is the reply that was given. The text
    is fetched once, see `textgym.data.corpora.dialogues`. It is not filtered for rude words, since the source does not
    mark them. Results cannot be compared with those on DailyDialog.

    ## Action Space
    `Discrete(2048)`, the embedded tokenizer's vocabulary.

    ## Observation Space
    As `TextEnv`, `W = 88 + 24`.

    ## Rewards
    On the last token METEOR to the human reply, from 0 to 1; on every token 0.005 times the log-prob under the embedded
    reference (`kl_mode="reference"`). METEOR looks at words, and a good reply may have others than the human one.
    RL4LMs pays METEOR and whether the reply has the intent of the human one, which these chats are not annotated with.
    The ratings that they have are of whole conversations: they go with length and say next to nothing of a single
    reply, so no reward model is learned from them.

    Metrics: `Meteor`, `Bleu`, `Rouge`, `DistinctN` (distinct bigrams of a reply).

    ## Starting State
    One of the prompts of a split: 4,819, 507 and 532 for training, validation and test.

    ## Episode End
    The end-of-text token, or 24 tokens.

    ## Arguments
    Args:
        split: `"train"`, `"validation"` or `"test"`.
        original: take DailyDialog from the hub instead (`DAILY_DIALOG`); a model that reads longer prompts
            is then in order, and so are larger `max_prompt_tokens` and `max_new_tokens`.
        kwargs: arguments of `TextEnv`; the defaults are described above.

    Raises:
        ValueError: an unknown split.
        FetchError: no network, or a wrong checksum.
        ImportError: an extra is missing; the message is the pip line.
    """

    metrics = (
        "textgym.rewards.functions:Meteor",
        "textgym.rewards.functions:Bleu",
        "textgym.rewards.functions:Rouge",
        "textgym.rewards.functions:DistinctN",
    )

    load = staticmethod(reply_prompts)
    stands_for = hub.DAILY_DIALOG
    own: ClassVar[Settings] = {
        "reward": "textgym.rewards.functions:Meteor",
        "max_prompt_tokens": 88,
        "max_new_tokens": 24,
    }


class DialogueVectorEnv(TaskVectorEnv):
    """Many rows of `DialogueEnv`, see there."""

    single = DialogueEnv
