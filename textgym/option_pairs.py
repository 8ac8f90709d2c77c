"""Pairs of options that do not go together: beside some values of the second the first has no effect, or no meaning.

`textgym.settings.check_settings` looks them up for every config, so a pair is refused when the config is made. A pair
is for all configs with fields of both names. An option counts as set if it differs from its default.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from textgym.errors import ExcludedOptionError


class Pair(NamedTuple):
    """An option that is refused if it is set beside another one.

    Attributes:
        option: Name of the option.
        other: Name of the other option.
        excluded: Whether the values of a config exclude the option.
        advice: Why, and what to do.
        idle: Whether the option merely has no effect, so that a saved config loses nothing without it.
    """

    option: str
    other: str
    excluded: Callable[[Any], bool]
    advice: str
    idle: bool = True


def _takes(argument: str, name: str) -> bool:
    """Return whether a class of torch.optim has an argument."""
    if name in ("AdamW", "Adam", "SGD", "RMSprop"):
        return argument != "eps" or name != "SGD"
    import torch  # here, since most configs need none of it, and torch takes seconds to load

    return argument in inspect.signature(getattr(torch.optim, name)).parameters


def _one_step(config: Any) -> bool:
    return config.num_epochs == 1 and config.minibatch_size is None


def _small_buffer(config: Any) -> bool:
    return bool(config.buffer_size < config.episodes_per_update)


OF_PAIRS = "it is of pairs: set loss='pairwise', or leave it out"
CLIP_ALONE = "a penalty limits the update instead of clipping: set variant='clip', or leave it out"
PENALTY_ALONE = "clipping limits the update, and there is no penalty: set variant='penalty', or leave it out"
GREEDY_ALONE = (
    "the soft backup has no greedy token, explores by its own distribution, and always has a value: set "
    "backup='greedy', or leave it out"
)
NO_CRITIC = "only a learned baseline has a critic: set baseline='learned', or leave it out"
UNTRAINED = "a critic whose loss has no weight is not trained: set value_coef above 0, or leave it out"
NO_TEXTS = "there are no pretraining texts: give a .jsonl file of them as ptx_data, or leave it out"
EVERY_TOKEN = "top_p=1 allows every token: set a lower top_p, or leave it out"
BUFFER = "new episodes would replace each other before they are replayed: set buffer_size to at least this number"

PAIRS = (
    # The optimiser
    Pair(
        "adam_8bit",
        "optimizer",
        lambda c: c.optimizer != "AdamW",
        "only AdamW has moments in 8 bits: leave one of them out",
        idle=False,
    ),
    Pair(
        "adam_epsilon",
        "optimizer",
        lambda c: "Adam" not in c.optimizer or not _takes("eps", c.optimizer),
        "it is the epsilon of Adam and its variants: give that of another optimiser in optimizer_options",
    ),
    Pair(
        "adam_epsilon",
        "optimizer_options",
        lambda c: "eps" in c.optimizer_options,
        'it would be replaced by "eps": give one of them',
    ),
    Pair(
        "optimizer_options",
        "learning_rate",
        lambda c: "lr" in c.optimizer_options,
        'learning_rate replaces "lr": set learning_rate alone',
        idle=False,
    ),
    Pair(
        "optimizer_options",
        "weight_decay",
        lambda c: "weight_decay" in c.optimizer_options,
        "the option weight_decay replaces the one in optimizer_options: set it by itself",
        idle=False,
    ),
    Pair(
        "weight_decay",
        "optimizer",
        lambda c: not _takes("weight_decay", c.optimizer),
        "this optimiser has no weight decay: leave it out, or use another optimiser",
    ),
    Pair(
        "critic_weight_decay",
        "optimizer",
        lambda c: not _takes("weight_decay", c.optimizer),
        "this optimiser has no weight decay: leave it out, or use another optimiser",
    ),
    Pair(
        "annealing",
        "anneal_learning_rate",
        lambda c: not c.anneal_learning_rate,
        "a constant learning rate does not decrease: leave one of them out",
    ),
    # Policy gradients
    Pair(
        "target_kl",
        "num_epochs",
        _one_step,
        "an update of one step cannot end early: leave it out, or make more steps, with num_epochs above 1 or with "
        "minibatch_size, in an agent that has them, such as PPO",
    ),
    Pair(
        "constraint_learning_rate",
        "constraints",
        lambda c: not c.constraints,
        "there is nothing to constrain: name a reward function and its limit in constraints, or leave it out",
    ),
    # Critics
    Pair("critic_lam", "value_coef", lambda c: c.value_coef == 0, UNTRAINED),
    Pair("clip_range_value", "value_coef", lambda c: c.value_coef == 0, UNTRAINED),
    Pair("critic_max_grad_norm", "value_coef", lambda c: c.value_coef == 0, UNTRAINED),
    Pair(
        "critic_learning_rate",
        "value_coef",
        lambda c: c.value_coef == 0 and not (c.weight_decay or c.critic_weight_decay),
        UNTRAINED,
    ),
    Pair("freezing_actor_steps", "value_coef", lambda c: c.value_coef == 0, UNTRAINED, idle=False),
    # A2C
    Pair(
        "n_steps",
        "estimator",
        lambda c: c.estimator != "n_step",
        "only this one counts steps: set estimator='n_step', or leave it out",
    ),
    Pair(
        "lam",
        "estimator",
        lambda c: c.estimator != "gae",
        "only GAE has a lambda: set estimator='gae', or leave it out",
    ),
    # REINFORCE
    Pair(
        "gamma",
        "reward_to_go",
        lambda c: not c.reward_to_go,
        "the return of a whole episode is not discounted: set reward_to_go=True, or leave it out",
    ),
    Pair("value_coef", "baseline", lambda c: c.baseline != "learned", NO_CRITIC),
    Pair("normalise_values", "baseline", lambda c: c.baseline != "learned", NO_CRITIC),
    Pair("critic_learning_rate", "baseline", lambda c: c.baseline != "learned", NO_CRITIC),
    Pair("critic_weight_decay", "baseline", lambda c: c.baseline != "learned", NO_CRITIC),
    Pair("critic_max_grad_norm", "baseline", lambda c: c.baseline != "learned", NO_CRITIC),
    Pair("freezing_actor_steps", "baseline", lambda c: c.baseline != "learned", NO_CRITIC, idle=False),
    # PPO and NLPO
    Pair("clip_range", "variant", lambda c: c.variant == "penalty", CLIP_ALONE),
    Pair("clip_range_high", "variant", lambda c: c.variant == "penalty", CLIP_ALONE),
    Pair("dual_clip", "variant", lambda c: c.variant == "penalty", CLIP_ALONE),
    Pair("kl_min", "variant", lambda c: c.variant == "clip", PENALTY_ALONE),
    Pair("kl_max", "variant", lambda c: c.variant == "clip", PENALTY_ALONE),
    Pair("penalty_coef", "variant", lambda c: c.variant == "clip", PENALTY_ALONE),
    Pair("ptx_coef", "ptx_data", lambda c: c.ptx_data is None, NO_TEXTS),
    Pair("ptx_batch_size", "ptx_data", lambda c: c.ptx_data is None, NO_TEXTS),
    Pair("ptx_max_length", "ptx_data", lambda c: c.ptx_data is None, NO_TEXTS),
    Pair("min_tokens_to_keep", "top_p", lambda c: c.top_p == 1, EVERY_TOKEN),
    Pair("mask_update_interval", "top_p", lambda c: c.top_p == 1, EVERY_TOKEN),
    Pair(
        "kl_in",
        "top_p",
        lambda c: c.kl_in == "loss",
        "NLPO's mask is not in the KL of the loss: leave kl_in='reward', or use PPO",
        idle=False,
    ),
    # PPO and GRPO
    Pair(
        "kl_gradient",
        "kl_in",
        lambda c: c.kl_in == "reward",
        "a KL in the reward has no gradient of its own: set kl_in='loss', or leave it out",
    ),
    # GRPO
    Pair(
        "ratio",
        "surrogate",
        lambda c: c.surrogate == "cispo",
        "CISPO weights each token by its own ratio: leave one of them out",
        idle=False,
    ),
    Pair(
        "clip_range",
        "surrogate",
        lambda c: c.surrogate == "cispo",
        "CISPO clips from above alone: set clip_range_high instead",
    ),
    Pair(
        "overlong_penalty",
        "overlong_buffer",
        lambda c: c.overlong_buffer is None,
        "it is what the last tokens of a long response pay: set overlong_buffer, their number, or leave it out",
    ),
    Pair(
        "overlong_buffer",
        "overlong_penalty",
        lambda c: c.overlong_penalty == 0,
        "its tokens pay nothing: set overlong_penalty above 0, or leave both out",
    ),
    # Preferences: DPO, online DPO and reward models
    *(
        Pair(
            option,
            "loss",
            lambda c: c.loss in ("hinge", "ipo"),
            "it is of loss='sigmoid': use that loss, or leave it out",
        )
        for option in ("label_smoothing", "use_probability")
    ),
    Pair(
        "label_smoothing",
        "use_probability",
        lambda c: c.use_probability,
        "the probabilities of the labels say already how many are wrong: leave one of them out",
        idle=False,
    ),
    *(
        Pair(option, "loss", lambda c: c.loss in ("ranked_pairs", "plackett_luce", "regression"), OF_PAIRS)
        for option in ("use_margin", "label_smoothing", "use_probability", "center_coefficient")
    ),
    # Agents with a replay buffer
    Pair("buffer_size", "episodes_per_update", _small_buffer, BUFFER, idle=False),
    Pair("episodes_per_update", "buffer_size", _small_buffer, BUFFER, idle=False),
    Pair(
        "epsilon_fraction",
        "epsilon_end",
        lambda c: c.epsilon_start == c.epsilon_end,
        "epsilon is constant: set another epsilon_start or epsilon_end, or leave it out",
    ),
    Pair(
        "exploration_temperature",
        "epsilon_end",
        lambda c: c.epsilon_start == c.epsilon_end == 0,
        "no token is sampled from the reference: set epsilon_start or epsilon_end above 0, or leave it out",
    ),
    # Q-learning
    Pair("q_scale", "backup", lambda c: c.backup == "soft", GREEDY_ALONE),
    Pair("double", "backup", lambda c: c.backup == "soft", GREEDY_ALONE),
    Pair("dueling", "backup", lambda c: c.backup == "soft", GREEDY_ALONE),
    Pair("noisy", "backup", lambda c: c.backup == "soft", GREEDY_ALONE),
    Pair("n_quantiles", "backup", lambda c: c.backup == "soft", GREEDY_ALONE),
    Pair(
        "priority_exponent",
        "prioritised",
        lambda c: not c.prioritised,
        "all episodes have the same chance: set prioritised=True, or leave it out",
    ),
    Pair(
        "priority_correction",
        "prioritised",
        lambda c: not c.prioritised,
        "there are no priorities to correct: set prioritised=True, or leave it out",
    ),
    Pair(
        "prioritised",
        "priority_exponent",
        lambda c: c.priority_exponent == 0,
        "the exponent 0 samples uniformly: set it above 0, or leave both out",
    ),
    # SFT and DPO
    Pair(
        "epochs",
        "max_steps",
        lambda c: c.max_steps is not None,
        "the number of updates replaces the number of epochs: give one of them",
    ),
    # Runs
    Pair(
        "kl_target",
        "kl_coef",
        lambda c: c.kl_coef == 0,
        "the coefficient is multiplied to reach the target, so it stays 0: give one above 0 to start with",
        idle=False,
    ),
    # Environments
    Pair(
        "max_reward_failures",
        "on_reward_error",
        lambda c: c.on_reward_error == "raise",
        "the first failure is an error: set on_reward_error to 'skip' or 'penalise', or leave it out",
    ),
)


def defaults_of(config_class: Any) -> dict[str, Any]:
    """Return the default of every field that has one."""
    return {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(config_class)
        if field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
    }


def refuse_pairs(config: Any) -> None:
    """Refuse a config with an option that another one excludes.

    Raises:
        ExcludedOptionError: It names both options, and says what to do.
    """
    defaults = defaults_of(type(config))
    for pair in PAIRS:
        if pair.option not in defaults or pair.other not in defaults:
            continue
        if getattr(config, pair.option) != defaults[pair.option] and pair.excluded(config):
            option, other = (f"{name}={getattr(config, name)!r}" for name in (pair.option, pair.other))
            raise ExcludedOptionError(f"{option} cannot be used with {other}: {pair.advice}", pair.option, pair.idle)
