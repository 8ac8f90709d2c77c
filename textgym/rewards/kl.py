"""The KL penalty to a reference model: estimators, coefficient controllers, and what is taken off the rewards."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Annotated, Protocol, get_args

import torch
from torch import Tensor, nn

from textgym.errors import ConfigError
from textgym.models.distributions.log_probs import full_kl
from textgym.models.distributions.masks import ModelMask
from textgym.models.loading import is_trained
from textgym.models.machine.devices import Device, check_one_device
from textgym.models.sequences import Sequences
from textgym.models.token_model import TokenModel
from textgym.settings import Estimator, NotNegative, Positive, above, check_settings, plain

ESTIMATORS = get_args(Estimator)


def estimate_kl(log_probs: Tensor, reference_log_probs: Tensor, estimator: Estimator) -> Tensor:
    """Estimates KL(pi, pi_ref) from the log-probs of a token drawn from pi, elementwise, in nats.

    With d = log pi - log pi_ref (Schulman, "Approximating KL divergence", 2020): `k1` = d, unbiased and of either sign;
    `k2` = d^2 / 2, biased with low variance; `k3` = exp(-d) - 1 + d, unbiased and never negative.

    As a part of the reward, whose own gradient nobody takes, `k1` alone pushes like the KL that it estimates: the
    gradients of the others' means, and of the full sum's, have a second part that is lost there.

    Raises:
        ValueError: `"full"`, which needs the distributions and not only the log-probs of what was drawn.
    """
    difference = log_probs - reference_log_probs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference.square()
    if estimator == "k3":
        return (-difference).exp() - 1 + difference
    raise ValueError(f"cannot estimate {estimator!r} from the log-probs of the drawn tokens; use 'k1', 'k2' or 'k3'")


def kl_to_go(kl: Tensor) -> Tensor:
    """Return the KL of the states after each token, `(N, T)`: the sum of what stands to the right of it.

    Args:
        kl: `(N, T)`, the KL of the state before each token; zero in the padding.
    """
    return kl.flip(1).cumsum(1).flip(1) - kl


def compared_with_others(to_go: Tensor, mask: Tensor) -> Tensor:
    """Return the KL to go minus its mean over the other texts that have the same token, `(..., N, T)`.

    What other texts do does not depend on the token, so this baseline changes no expectation, and the variance is
    lower. A token that no other text has is compared with 0.

    Args:
        to_go: `(..., N, T)`, of N texts, best of one prompt.
        mask: Bool `(..., N, T)`, the tokens.
    """
    to_go = torch.where(mask, to_go, 0.0)
    others = (mask.sum(-2, keepdim=True) - 1).clamp(min=1)
    return torch.where(mask, to_go - (to_go.sum(-2, keepdim=True) - to_go) / others, 0.0)


def sequence_kl(kl: Tensor, log_ratio: Tensor, to_go: Tensor) -> Tensor:
    """Return what a loss adds up over tokens, `(N, T)`, to have the gradient of the KL of whole sequences.

    The KL of sequences is E[sum_t KL_t] over texts of the policy, with KL_t that of the distributions in the state
    before token t. Its gradient has two parts, since the policy also decides which states come:

        E[ sum_t grad KL_t + sum_t grad log pi(a_t | s_t) sum_{u > t} KL_u ]

    A KL of tokens in the loss, such as k3 times the importance ratio, has the first part alone. Here KL_t is a sum over
    the vocabulary, which has no sampling noise, and the second part has the KL of later states alone.

    Args:
        kl: KL_t of the current policy, with gradients.
        log_ratio: log-probs of the tokens minus those at rollout time, with gradients.
        to_go: `kl_to_go` of the KL at rollout time, perhaps `compared_with_others`.
    """
    return kl + log_ratio.exp() * to_go


class KLController(Protocol):
    """A penalty coefficient that may follow the measured KL."""

    coef: float

    def update(self, kl: float, num_episodes: int) -> None:
        """Takes the mean KL of so many episodes, in nats an episode."""


@dataclass
class FixedKL:
    """A coefficient that stays."""

    coef: NotNegative

    def __post_init__(self) -> None:
        check_settings(self)

    def update(self, kl: float, num_episodes: int) -> None:
        """Does nothing."""


@dataclass
class AdaptiveKL:
    """A coefficient that steers the KL to `target` nats an episode.

    With a `horizon` it is the controller of Ziegler et al. (2019, section 2.2): e = clip(KL / target - 1, -0.2, 0.2),
    and after n episodes, of which at most a horizon counts,

        coef <- coef * (1 + e * n / horizon).

    It needs runs of many horizons: within one horizon the coefficient changes by 20% at most. A short horizon does not
    help. A policy needs many updates until its KL has followed the coefficient, so the coefficient falls too far while
    the KL is still rising, and the KL overshoots.

    Without a horizon the controller is in proportion to the run of R episodes, and steers what the KL will be if it
    changes as it does now, a quarter of the run later (a proportional-derivative controller):

        e = clip((KL + slope * R / 4) / target - 1, -1, 1),    coef <- coef * exp(e * min(n / (R / 16), 1)).

    The slope, in nats an episode for each episode of training, is a moving average over R / 16 episodes.

    Attributes:
        target: Nats an episode.
        horizon: Episodes; `None` for the controller in proportion to the run.
        coef: The coefficient, at first and then as it is.
        run: R, 4,096 at first. textgym's agents set it to the `total_episodes` of `learn`; for others assign it.
        last: The KL of the last update.
        slope: The slope of the KL.
    """

    target: Positive
    horizon: Positive | None = None
    coef: NotNegative = 0.1
    run: Positive = field(default=4096, init=False)
    last: float | None = field(default=None, init=False)
    slope: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        check_settings(self)

    def update(self, kl: float, num_episodes: int) -> None:
        """One step of the controller."""
        if self.horizon is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * min(num_episodes / self.horizon, 1.0)
            return
        if self.last is not None:
            weight = 1 - math.exp(-num_episodes / (self.run / 16))
            self.slope += weight * ((kl - self.last) / num_episodes - self.slope)
        self.last = kl
        error = min(max((kl + self.slope * self.run / 4) / self.target - 1, -1.0), 1.0)
        self.coef *= math.exp(error * min(num_episodes / (self.run / 16), 1.0))


@dataclass
class ThresholdKL:
    """A coefficient that keeps the KL between two bounds, in nats an episode (PPO-penalty; Schulman et al., 2017).

    Above `high` it is multiplied by `factor`, below `low` divided by it; in between it stays.
    """

    low: float
    high: float
    factor: Annotated[float, above(1)] = 2.0
    coef: NotNegative = 0.1

    def __post_init__(self) -> None:
        check_settings(self)
        if not 0 < self.low < self.high:
            raise ValueError(f"the bounds must be 0 < low < high, got low={self.low} and high={self.high}")

    def update(self, kl: float, num_episodes: int) -> None:
        """One step of the controller, however many episodes."""
        if kl > self.high:
            self.coef *= self.factor
        elif kl < self.low:
            self.coef /= self.factor


class KLPenalty:
    """The penalty of every token: beta times an estimate of KL(pi, pi_ref) (Ziegler et al., 2019, eq. 2).

    Args:
        reference: a model name, a language model, or a `TokenModel`; it stays where it is. Of one that is trained, such
            as the policy, a frozen copy is taken, so that it stays what it is now.
        coef: beta, or a controller that moves it. Of a controller a copy is taken, so that each penalty starts where
            the caller's does.
        estimator: see `estimate_kl`; `"full"` sums over the whole vocabulary.
        clamp: the KL that a token is charged for is cut to -clamp and clamp nats, so that no single token dominates an
            update; the KL that is measured is not cut.
        device: where a reference that is given by name is.

    Raises:
        ValueError: an unknown estimator, a negative coefficient, or a clamp that is not above 0.
    """

    def __init__(
        self,
        reference: str | Path | nn.Module | TokenModel,
        coef: float | KLController,
        estimator: Estimator = "k1",
        clamp: float | None = None,
        device: Device = None,
    ) -> None:
        if estimator not in ESTIMATORS:
            raise ValueError(f"unknown kl_estimator {estimator!r}; use one of {ESTIMATORS}")
        if clamp is not None and not clamp > 0:
            raise ValueError(f"kl_clamp must be above 0 nats, got {clamp}")
        model = TokenModel.load(reference, device=device)
        self.reference = model.frozen_copy() if is_trained(model) else model  # a policy would take it along
        self.owns_reference = False  # others may share its weights, so nobody may change them
        self.clamp = clamp
        beta = plain(coef)
        if isinstance(beta, Real) and beta < 0:
            raise ConfigError(f"kl_coef must not be negative, got {beta}: it would reward divergence")
        self.controller: KLController = FixedKL(float(beta)) if isinstance(beta, Real) else copy.deepcopy(coef)  # type: ignore[assignment]
        self.estimator: Estimator = estimator

    @property
    def coef(self) -> float:
        """beta, in units of reward a nat."""
        return self.controller.coef

    @torch.no_grad()
    def of_sequences(self, policy: TokenModel, sequences: Sequences, log_probs: Tensor) -> Tensor:
        """The estimate for every response token, `(N, T)` nats, in one packed pass of the reference.

        Args:
            policy: the policy that wrote the sequences; asked for its distributions by `"full"` alone.
            sequences: whole episodes.
            log_probs: `(N, T)` behaviour log-probs.

        Raises:
            ValueError: `"full"`, and the reference is on another device than the policy.
        """
        if self.estimator != "full":
            reference_log_probs = self.reference.sequence_log_probs(sequences.to(self.reference.device))
            return self.of_log_probs(log_probs, reference_log_probs, sequences.response_mask)
        return self.exact(policy, sequences)

    @torch.no_grad()
    def exact(self, policy: TokenModel, sequences: Sequences) -> Tensor:
        """The KL of the distributions in the state before every response token, `(N, T)` nats, without sampling noise.

        Raises:
            ValueError: the reference is on another device than the policy.
        """
        check_one_device(policy=policy.device, reference=self.reference.device)
        states = sequences.states()
        flat = full_kl(
            policy.hidden(states),
            policy.head,
            self.reference.hidden(states),
            self.reference.head,
            policy.vocab_size,
            policy.distribution_of(sequences),
        )
        return sequences.pad(flat)

    def of_log_probs(self, log_probs: Tensor, reference_log_probs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the estimate of every token, of any shape; zero where `mask` is given and not set.

        The reference may be on another device; the result is where `log_probs` is.
        """
        kl = estimate_kl(log_probs, reference_log_probs.to(log_probs.device), self.estimator)
        return kl if mask is None else torch.where(mask, kl, 0.0)

    def charge(self, rewards: Tensor, kl: Tensor) -> Tensor:
        """Return the rewards of tokens minus the penalty, of any shape.

        Args:
            rewards: of each token.
            kl: its estimate in nats; 0 where there is no token. Where agents earn beta log pi_ref instead
                (`kl_mode="reference"`), it is -log pi_ref: that KL without its log pi.
        """
        return rewards - self.cost(kl)

    def cost(self, kl: Tensor) -> Tensor:
        """Return the penalty that `charge` takes off, in units of reward: beta times the clamped estimates."""
        return self.coef * (kl if self.clamp is None else kl.clamp(-self.clamp, self.clamp))


def warn_of_filter(action_mask: object | None, estimator: Estimator) -> None:
    """Says what a KL means where sampling is filtered by top-k or top-p, and k1 estimates it.

    Policy and reference are filtered alike, so k1 is right for the KL between the two *filtered* distributions, which
    does not see tokens that the filter took away.
    """
    if isinstance(action_mask, ModelMask) and estimator == "k1":
        warnings.warn(
            f"sampling is filtered by {type(action_mask).__name__} and the KL estimator is 'k1': the penalty is that "
            "between the filtered policy and the filtered reference, which does not see the tokens that the filter "
            "takes away. Compare it with the KL of unfiltered samples before you trust it",
            stacklevel=3,
        )
