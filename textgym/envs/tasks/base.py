"""What all tasks share: a single and a vector environment whose arguments the task fills in."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, ClassVar

from textgym.data.corpora.hub import Original
from textgym.data.rows import Row
from textgym.envs.text import TextEnv
from textgym.envs.vector import TextVectorEnv
from textgym.errors import ConfigError
from textgym.models.loading import load_tokenizer
from textgym.rewards.engine.scoring import RewardSpec

Settings = dict[str, Any]
EMBEDDED: Settings = {"tokenizer": "tiny", "reference": "tiny", "kl_coef": 0.005}
"""Of the tasks with data: their scores go from 0 to 1, and few texts are far from 0, so beta is small."""


class TaskEnv(TextEnv):
    """A `TextEnv` whose arguments are a task's, but for those that are given.

    Attributes:
        metrics: further reward functions that tell how good a policy is at the task; `textgym evaluate` prints them.
    """

    metrics: ClassVar[tuple[RewardSpec, ...]] = ()

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**self.settings(**kwargs))

    @classmethod
    def settings(cls, **kwargs: Any) -> Settings:
        """The arguments of `TextEnv`: of the task's own ones, and of those of `TextEnv` that are given instead."""
        raise NotImplementedError


class StandInEnv(TaskEnv):
    """A task whose text is fetched once, in the place of a data set of the hub.

    Attributes:
        own: arguments of `TextEnv`, besides the prompts. The stand-in's rows with more than its `max_prompt_tokens` are
            left out: the embedded model has no room for them.
        load: the prompts of a split.
        stands_for: the data set of the hub, which `original=True` takes instead.
    """

    own: ClassVar[Settings]
    load: ClassVar[staticmethod[[str], list[Row]]]
    stands_for: ClassVar[Original]

    @classmethod
    def settings(
        cls,
        *,
        split: str = "train",
        original: bool = False,
        revision: str | None = None,
        prompts: Any = None,
        **kwargs: Any,
    ) -> Settings:
        """The arguments of `TextEnv`; `revision` names a commit of the original data set."""
        if revision is not None and not original:
            raise ConfigError(f"revision={revision!r} is of original=True: stand-ins have a pinned SHA-256")
        if prompts is None:
            prompts = cls.stands_for.load(split, revision) if original else cls._rows_with_room(split)
        # Weights belong to the rewards that they are given with.
        own = {name: value for name, value in cls.own.items() if name != "reward_weights" or "reward" not in kwargs}
        return {**EMBEDDED, **own, "prompts": prompts, **kwargs}

    @classmethod
    @lru_cache(maxsize=16)  # the splits of all tasks: environments are often made again
    def _rows_with_room(cls, split: str) -> tuple[Row, ...]:
        tokenizer, most = load_tokenizer("tiny"), cls.own["max_prompt_tokens"]

        def fits(prompt: str) -> bool:
            # A token has a byte or more.
            return len(prompt.encode()) <= most or len(tokenizer(prompt).input_ids) <= most

        return tuple(row for row in cls.load(split) if fits(row["prompt"]))


class TaskVectorEnv(TextVectorEnv):
    """Many rows of a task.

    Attributes:
        single: the environment of one row, whose settings and metrics these are.
    """

    single: ClassVar[type[TaskEnv]]

    def __init__(self, num_envs: int, **kwargs: Any) -> None:
        super().__init__(num_envs, **self.single.settings(**kwargs))

    @property
    def metrics(self) -> tuple[RewardSpec, ...]:
        """Those of the single environment."""
        return self.single.metrics
