"""TextConfig and TextVectorConfig: every argument of a text environment, declared once.

A field is the argument's name, type, default and check; the sentence below it is its documentation, also in
`docs/environments.md` (`python scripts/pages/environment_tables.py` copies it there).
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

from gymnasium.vector import AutoresetMode
from torch import nn

from textgym.errors import ConfigError, UnknownArgumentError
from textgym.models.distributions.masks import ActionMask
from textgym.models.machine.devices import Device
from textgym.models.token_model import Observation
from textgym.rewards.engine.scaling import Scaling
from textgym.rewards.engine.scoring import OnRewardError, RewardSpec
from textgym.rewards.kl import KLController
from textgym.settings import Count, Estimator, NotNegative, Positive, Share, WholeNumber, check_settings

KLMode = Literal["reference", "exact", "deferred"]
NO_STEP_LIMIT = "it would end episodes before they are scored, so leave it out: max_new_tokens limits a response"
"""Why text environments take no `max_episode_steps`, which `gym.make_vec` passes on from an id's registration."""
MaskSpec = ActionMask | Callable[[Observation], Any]

P = ParamSpec("P")
Env = TypeVar("Env")
Config = TypeVar("Config")


@dataclass(frozen=True, eq=False)
class TextConfig:
    """The arguments of `TextEnv`; the page on environments has a table of them."""

    # Prompts and what scores them: the three arguments without a default.
    prompts: Any
    """List of strings, or of dicts with a `prompt` (a text or a conversation) and any columns; path of a `.jsonl` or
    `.txt` file; a `datasets` data set; `"module:attribute"`; or `"openings"`, the 200 openings of movie reviews in the
    package."""
    tokenizer: Any
    """Name, path or tokenizer; `"tiny"` is the embedded one."""
    reward: RewardSpec | Sequence[RewardSpec]
    """Reward function, `"module:attribute"`, `RewardModel`, or the name or path of a reward model; or a list of
    these."""

    _: KW_ONLY

    # Reward
    reward_weights: Sequence[float] | None = None
    """One weight for each function; all 1 if not given. A function of weight 0 is only reported."""
    on_reward_error: OnRewardError = "raise"
    """What to do when a reward function fails: `"raise"` an error; `"penalise"`, which counts as -1 (1 if the weight is
    negative); or `"skip"`, which leaves the row without a score: agents do not learn from it."""
    reward_timeout: Positive | None = None
    """Seconds that a reward function may take for a batch; a late one has failed."""
    max_reward_failures: Share = 0.1
    """With `"penalise"` or `"skip"`, the share of recent rows in which a reward function may fail; above it there is an
    error. `None` as a score is no failure."""
    score_scaling: Scaling | None = None
    """`"running"` subtracts the running mean of scores and divides by their running standard deviation; `"running_std"`
    only divides."""
    score_clip: Positive | None = None
    """Clip scores to [-score_clip, score_clip] after scaling."""
    missing_eos_penalty: float = 0.0
    """Subtracted from the score of a row that ended at the length limit."""

    # Generation
    max_prompt_tokens: Count | None = None
    """Longer prompts lose their beginning, except BOS, and a warning says how much. `None` takes the longest prompt, or
    what the reference and the tokenizer can take; in games 256."""
    add_special_tokens: bool = True
    """Whether prompts that are strings get the tokenizer's BOS; `False` if they were rendered already, so that control
    tokens in them count."""
    max_new_tokens: Count = 32
    """Length limit of a response."""
    min_new_tokens: WholeNumber = 0
    """Stop tokens are masked until the response has this many tokens."""
    stop: str | Sequence[str | int] = ()  # a plain string is answered with how to write it
    """Stop strings and stop token ids, in addition to the tokenizer's EOS and those of the model's generation config,
    where the model is known."""
    action_mask: MaskSpec | None = None
    """`TopPMask`, `TopKMask` or a function of the observation that returns the allowed tokens, bool `(B, V)`. It
    restricts `action_masks()` and the reference."""
    length_limit: Literal["terminate", "truncate"] = "terminate"
    """`"truncate"` reports the length limit as truncation, for agents that bootstrap there."""
    decoder_start_ids: Sequence[int] = ()
    """For encoder-decoder models, the tokens that the decoder starts with, as in `policy.decoder_start_ids`."""

    # KL
    reference: str | Path | nn.Module | None = None
    """Reference model of the KL penalty: name, path or model. A model that may be trained is copied; one whose weights
    are frozen is used as it is."""
    kl_coef: NotNegative | KLController = 0.0
    """Beta, the coefficient of the KL penalty; or a controller such as `AdaptiveKL(target=6)`."""
    kl_estimator: Estimator = "k1"
    """`"k1"`, `"k2"`, `"k3"`, or `"full"` (the sum over the vocabulary); in a reward use `"k1"`."""
    kl_mode: KLMode | None = None
    """Who charges the KL penalty, and how: `"reference"`, `"exact"` or `"deferred"`. `None` settles it by itself:
    agents of textgym charge it, and an environment that is stepped by anybody else does, as `"reference"`."""
    kl_clamp: Positive | None = None
    """Clamp the KL of each token to [-kl_clamp, kl_clamp] nats in the penalty."""

    # What is shown, and where it is computed
    render_mode: str | None = None
    """`"ansi"`, `"human"` or `"html"`; others warn."""
    device: Device = None
    """Device of the episodes and of models given by name; `None` uses the device of a reference that is passed as a
    model, otherwise the CPU. Models that are passed stay where they are."""
    info_text: bool = False
    """Add prompt, completion and columns to the last `info` of an episode."""
    info_action_mask: bool = False
    """Add `action_mask` to every `info`, int8 as `action_space.sample(mask)` takes it."""

    def __post_init__(self) -> None:
        check_settings(self)
        if self.min_new_tokens > self.max_new_tokens:
            raise ConfigError(
                f"min_new_tokens must be from 0 to max_new_tokens={self.max_new_tokens}, got {self.min_new_tokens}"
            )


@dataclass(frozen=True, eq=False)
class Rows:
    """What `TextVectorEnv` is told about its rows."""

    num_envs: Count
    """Number of rows."""

    _: KW_ONLY

    autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP
    """`NEXT_STEP`: the step after an end resets the row and ignores its action. `SAME_STEP`: the row is reset at once;
    its end is in `infos["final_obs"]` and `infos["final_info"]`. `DISABLED`: a row that ended waits, whatever its
    action, until `reset(options={"reset_mask": mask})`."""
    array: Literal["numpy", "torch"] = "numpy"
    """`"numpy"`, or `"torch"` for tensors that stay on the device."""


# A dataclass takes the fields of its last base first, and `num_envs` is the first argument.
@dataclass(frozen=True, eq=False)
class TextVectorConfig(TextConfig, Rows):
    """The arguments of `TextVectorEnv`: those of `TextEnv`, and `num_envs`, `autoreset_mode` and `array`."""


def takes(
    config_class: Callable[P, Config],
) -> Callable[[Callable[[Env, Config], None]], Callable[Concatenate[Env, P], None]]:
    """Give an `__init__` that reads a config the arguments of the config's class.

    Type checkers and editors see these arguments, and so does `inspect.signature`.
    """

    def decorate(init: Callable[[Env, Config], None]) -> Callable[Concatenate[Env, P], None]:
        @functools.wraps(init)
        def with_arguments(self: Env, /, *args: P.args, **kwargs: P.kwargs) -> None:
            _check_names(type(self).__name__, kwargs, config_class)
            init(self, config_class(*args, **kwargs))

        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        arguments = inspect.signature(config_class).parameters.values()
        with_arguments.__signature__ = inspect.Signature([own, *arguments])  # type: ignore[attr-defined]
        return with_arguments

    return decorate


def _check_names(environment: str, given: dict[str, Any], config_class: Any) -> None:
    """Refuse arguments that a config does not have, and name the nearest one."""
    names = [field.name for field in dataclasses.fields(config_class)]
    if "max_episode_steps" in given:
        raise UnknownArgumentError(f"{environment} takes no max_episode_steps: {NO_STEP_LIMIT}")
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(names)}"
            raise UnknownArgumentError(f"{environment} got an unexpected keyword argument {name!r}: {hint}")
