"""Pairs of options that cannot be used together: the first has no effect or no meaning with some values of the second.

`textgym.settings.check_settings` looks them up for every config, so a pair is refused when the config is made. A pair
is for all configs with fields of both names. An option counts as set if it differs from its default.
"""

from __future__ import annotations

import dataclasses
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


def _one_step(config: Any) -> bool:
    return config.num_epochs == 1 and config.minibatch_size is None


WITHOUT_DECAY = ("Rprop", "SparseAdam")
"""Optimisers of torch.optim that have no weight decay."""

PAIRWISE_ONLY = "it applies to loss='pairwise' only: set that loss, or leave it out"
SIGMOID_ONLY = "it applies to loss='sigmoid' only: set that loss, or leave it out"
CLIP_ONLY = "a penalty limits the update instead of clipping: set variant='clip', or leave it out"
PENALTY_ONLY = "clipping limits the update, and there is no penalty: set variant='penalty', or leave it out"
GREEDY_ONLY = "it applies to backup='greedy' only: set that backup, or leave it out"
NO_CRITIC = "only baseline='learned' trains a critic: set that baseline, or leave it out"
UNTRAINED = "with value_coef=0 the critic is not trained: set value_coef above 0, or leave it out"
NO_TEXTS = "there are no pretraining texts: give a .jsonl file of them as ptx_data, or leave it out"
EVERY_TOKEN = "top_p=1 allows every token: set a lower top_p, or leave it out"
NO_DECAY = "this optimiser has no weight decay: use another optimiser, or leave it out"

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
        lambda c: "Adam" not in c.optimizer,
        "it applies to Adam and its variants only: give the epsilon of another optimiser in optimizer_options",
    ),
    Pair(
        "adam_epsilon",
        "optimizer_options",
        lambda c: "eps" in c.optimizer_options,
        '"eps" replaces it: leave one of them out',
    ),
    Pair(
        "optimizer_options",
        "learning_rate",
        lambda c: "lr" in c.optimizer_options,
        'the option learning_rate replaces "lr": set learning_rate instead',
        idle=False,
    ),
    Pair(
        "optimizer_options",
        "weight_decay",
        lambda c: "weight_decay" in c.optimizer_options,
        'the option weight_decay replaces "weight_decay" there: set the option instead',
        idle=False,
    ),
    Pair("weight_decay", "optimizer", lambda c: c.optimizer in WITHOUT_DECAY, NO_DECAY),
    Pair("critic_weight_decay", "optimizer", lambda c: c.optimizer in WITHOUT_DECAY, NO_DECAY),
    Pair(
        "annealing",
        "anneal_learning_rate",
        lambda c: not c.anneal_learning_rate,
        "the learning rate is constant: set anneal_learning_rate=True, or leave it out",
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
        "only estimator='n_step' counts steps: set that estimator, or leave it out",
    ),
    Pair(
        "lam",
        "estimator",
        lambda c: c.estimator != "gae",
        "only estimator='gae' has a lambda: set that estimator, or leave it out",
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
    Pair("clip_range", "variant", lambda c: c.variant == "penalty", CLIP_ONLY),
    Pair("clip_range_high", "variant", lambda c: c.variant == "penalty", CLIP_ONLY),
    Pair("dual_clip", "variant", lambda c: c.variant == "penalty", CLIP_ONLY),
    Pair("kl_min", "variant", lambda c: c.variant == "clip", PENALTY_ONLY),
    Pair("kl_max", "variant", lambda c: c.variant == "clip", PENALTY_ONLY),
    Pair("penalty_coef", "variant", lambda c: c.variant == "clip", PENALTY_ONLY),
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
        "CISPO clips only ratios that are too high: set clip_range_high instead",
    ),
    Pair(
        "overlong_penalty",
        "overlong_buffer",
        lambda c: c.overlong_buffer is None,
        "it is the penalty of the last overlong_buffer tokens: set overlong_buffer to a number, or leave it out",
    ),
    Pair(
        "overlong_buffer",
        "overlong_penalty",
        lambda c: c.overlong_penalty == 0,
        "these tokens have no penalty: set overlong_penalty above 0, or leave both out",
    ),
    # Preferences: DPO, online DPO and reward models
    *(
        Pair(
            option,
            "loss",
            lambda c: c.loss in ("hinge", "ipo"),
            SIGMOID_ONLY,
        )
        for option in ("label_smoothing", "use_probability")
    ),
    Pair(
        "label_smoothing",
        "use_probability",
        lambda c: c.use_probability,
        "the probabilities already say how many labels are wrong: leave one of them out",
        idle=False,
    ),
    *(
        Pair(option, "loss", lambda c: c.loss in ("ranked_pairs", "plackett_luce", "regression"), PAIRWISE_ONLY)
        for option in ("use_margin", "label_smoothing", "use_probability", "center_coefficient")
    ),
    # Agents with a replay buffer
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
    Pair("q_scale", "backup", lambda c: c.backup == "soft", GREEDY_ONLY),
    Pair("double", "backup", lambda c: c.backup == "soft", GREEDY_ONLY),
    Pair("dueling", "backup", lambda c: c.backup == "soft", GREEDY_ONLY),
    Pair("noisy", "backup", lambda c: c.backup == "soft", GREEDY_ONLY),
    Pair("n_quantiles", "backup", lambda c: c.backup == "soft", GREEDY_ONLY),
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
        "the number of updates replaces the number of epochs: leave one of them out",
    ),
    # Runs
    Pair(
        "kl_target",
        "kl_coef",
        lambda c: c.kl_coef == 0,
        "the controller multiplies the coefficient, and a multiple of 0 is 0: set kl_coef above 0, or leave it out",
        idle=False,
    ),
    # Environments
    Pair(
        "max_reward_failures",
        "on_reward_error",
        lambda c: c.on_reward_error == "raise",
        "the first failure is an error then: set on_reward_error to 'skip' or 'penalise', or leave it out",
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
