"""Q-functions on a language model: the expected return of every token of the vocabulary in a state.

Both are initialised by the pretrained model's log-probs. The Q-values of all tokens are computed for one chunk of
states at a time.
"""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from textgym.models.actor_critic import ActorCritic
from textgym.models.adapters import twin
from textgym.models.architectures.attention import States
from textgym.models.distributions.log_probs import in_chunks
from textgym.models.distributions.token_distribution import TokenDistribution
from textgym.models.loading import freeze
from textgym.models.sequences import Sequences

from .means import masked

Noise = tuple[Tensor, Tensor]
"""Noise factors f(out) `(R, V)` and f(in) `(R, d)`; R is the number of rows, or 1 if they share the noise."""


class Best(NamedTuple):
    """The token with the highest Q in each state, `(M,)`, and its Q, `(M,)` or quantiles `(M, K)`."""

    action: Tensor
    value: Tensor


def frozen_actor(actor: ActorCritic) -> ActorCritic:
    """Return a frozen copy of policy and critic, which shares the weights that are never trained."""
    critic = None if actor.critic is None else twin(actor.critic)
    new = ActorCritic(twin(actor.trained_model), critic, actor.temperature)
    new.value_head.load_state_dict(actor.value_head.state_dict())
    return actor.take_along(freeze(new))


class SoftQ:
    """Q(s, a) = V(s) + beta log(pi(a | s) / pi_ref(a | s)), with policy pi and critic V.

    With this Q the soft-optimal policy, proportional to pi_ref exp(Q / beta), is pi itself, and the soft value
    beta log sum_a pi_ref(a | s) exp(Q(s, a) / beta) is V(s). So values need no sum over the vocabulary, and the trained
    model can be sampled from at any time.
    """

    def __init__(self, actor: ActorCritic) -> None:
        self.actor = actor

    def of_actions(self, sequences: Sequences, reference_log_probs: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        """Return V of the state before each response token, and Q - V of the token, `(N, T)` each."""
        new = self.actor.evaluate(sequences)
        return new.value, masked(beta * (new.log_prob - reference_log_probs), sequences.response_mask)


class Heads(nn.Module):
    """Weights that a `GreedyQ` adds to the language model and the critic.

    Args:
        actor: The language model and critic, for the sizes.
        noisy: Whether to add factorised noise f(out) f(in)^T to the output weights, with a learned standard deviation
            for each weight (noisy networks: Fortunato et al., 2018). It is 0 before the first call of `resample`.
        n_quantiles: Number of quantiles K. Above 1 the return is described by K quantiles around its mean (QR-DQN:
            Dabney et al., 2018). Quantile k minus the mean is u_k(s) + e_a . (psi_k * h(s)), with e the output
            embedding, and u and psi of mean zero over k, so that no head with V x K outputs is needed.
    """

    def __init__(self, actor: ActorCritic, noisy: bool, n_quantiles: int) -> None:
        super().__init__()
        size, device = actor.lm.config.hidden_size, actor.device
        self.noisy, self.n_quantiles = noisy, n_quantiles
        self.noise: Noise | None = None
        if noisy:
            self.sigma = nn.Parameter(torch.full((actor.vocab_size, size), 0.5 / math.sqrt(size), device=device))
        if n_quantiles > 1:
            self.offsets = nn.Linear(size, n_quantiles, device=device)
            nn.init.zeros_(self.offsets.weight)
            nn.init.zeros_(self.offsets.bias)
            self.psi = nn.Parameter(torch.zeros(n_quantiles, size, device=device))

    def resample(self, generator: torch.Generator, rows: int = 1) -> None:
        """Sample new noise, for each row or for all rows together; `generator` must be on the CPU."""
        if self.noisy:
            normal = (torch.randn(rows, size, generator=generator).to(self.sigma.device) for size in self.sigma.shape)
            noise_out, noise_in = (x.sign() * x.abs().sqrt() for x in normal)  # f(x) = sgn(x) sqrt(|x|)
            self.noise = (noise_out, noise_in)

    def quieten(self) -> None:
        """Remove the noise: use the mean weights."""
        self.noise = None

    def noisy_logits(self, hidden: Tensor, noise: Noise | None) -> Tensor | float:
        """Return the contribution of the noise to the logits, `(m, V)`."""
        if noise is None:
            return 0.0
        noise_out, noise_in = noise
        return noise_out * ((hidden.float() * noise_in) @ self.sigma.T)

    def spread(self, hidden: Tensor, embeddings: Tensor) -> Tensor:
        """Return the quantiles minus their mean, `(M, K)`, of tokens with these embeddings `(M, d)`."""
        spread = self.offsets(hidden) + (hidden * embeddings) @ self.psi.T
        return spread - spread.mean(1, keepdim=True)


class GreedyQ:
    """Q(s, a) = v(s) + q_scale log p(a | s), with language model p and critic v, which is initially zero.

    So the best token is always the most likely token of the language model. It is a dueling network (Wang et al.,
    2016), but its advantages are log-probabilities, whose exponentials sum to 1, instead of having mean zero.

    Args:
        actor: Language model and critic.
        heads: Noise and quantiles.
        q_scale: Scale of the log-probs, in reward per nat.
        dueling: If False, Q(s, a) is q_scale times the logit of the language model, and there is no v.
    """

    def __init__(self, actor: ActorCritic, heads: Heads, q_scale: float = 1.0, dueling: bool = True) -> None:
        self.actor, self.heads, self.q_scale, self.dueling = actor, heads, q_scale, dueling

    def frozen_copy(self) -> GreedyQ:
        """Return a frozen copy, for a target network."""
        return GreedyQ(frozen_actor(self.actor), freeze(copy.deepcopy(self.heads)), self.q_scale, self.dueling)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits `(m, V)` with the current noise."""
        return self._noisy_logits(hidden, self.heads.noise)

    def advantages(
        self, hidden: Tensor, banned: Tensor | None, stop_ids: tuple[int, ...], noise: Noise | None = None
    ) -> Tensor:
        """Return Q - v, `(m, V)`; the lowest float for banned stop tokens."""
        distribution = TokenDistribution(self.actor.temperature, banned=banned, stop_ids=stop_ids)
        logits = distribution.logits(self._noisy_logits(hidden, noise))
        lowest = torch.finfo(logits.dtype).min
        advantages = self.q_scale * (logits.log_softmax(-1) if self.dueling else logits)
        return torch.where(logits == lowest, lowest, advantages)

    def values(self, states: States, hidden: Tensor) -> Tensor:
        """Return the value v of each state, `(M,)`."""
        if not self.dueling:
            return torch.zeros(len(hidden), device=hidden.device)
        return self.actor.state_values(states, hidden)

    def of_actions(self, sequences: Sequences, actions: Tensor | None = None) -> Tensor:
        """Return Q `(M,)`, or quantiles `(M, K)`, of each response token, or of `actions` `(M,)` in the same states."""
        states = sequences.states()
        hidden = states.hidden(self.actor.lm)  # (M, d)
        actions = sequences.actions if actions is None else actions
        noise = self.heads.noise  # stored here: the backward pass recomputes the scores and needs the same noise

        def score(hidden: Tensor, actions: Tensor, banned: Tensor | None) -> tuple[Tensor]:
            advantages = self.advantages(hidden, banned, sequences.stop.ids, noise)
            return (advantages.gather(1, actions[:, None])[:, 0],)

        chosen = in_chunks(score, self.actor.vocab_size, hidden, actions, sequences.banned)[0]
        return self._with_quantiles(self.values(states, hidden) + chosen, hidden, actions)

    def choose(self, sequences: Sequences) -> Tensor:
        """Return the token with the highest Q in the state before each response token, `(M,)`."""
        return self._highest(sequences, sequences.states().hidden(self.actor.lm))[0]

    def best(self, sequences: Sequences) -> Best:
        """Return the token with the highest Q in the state before each response token, and this Q."""
        states = sequences.states()
        hidden = states.hidden(self.actor.lm)
        actions, advantages = self._highest(sequences, hidden)
        return Best(actions, self._with_quantiles(self.values(states, hidden) + advantages, hidden, actions))

    def _highest(self, sequences: Sequences, hidden: Tensor) -> tuple[Tensor, ...]:
        noise = self.heads.noise

        def score(hidden: Tensor, banned: Tensor | None) -> tuple[Tensor, Tensor]:
            highest = self.advantages(hidden, banned, sequences.stop.ids, noise).max(-1)
            return highest.indices, highest.values

        return in_chunks(score, self.actor.vocab_size, hidden, sequences.banned)

    def _noisy_logits(self, hidden: Tensor, noise: Noise | None) -> Tensor:
        return self.actor.head(hidden) + self.heads.noisy_logits(hidden, noise)

    def _with_quantiles(self, mean: Tensor, hidden: Tensor, actions: Tensor) -> Tensor:
        if self.heads.n_quantiles == 1:
            return mean
        return mean[:, None] + self.heads.spread(hidden.float(), self.actor.head.weight[actions].float())
