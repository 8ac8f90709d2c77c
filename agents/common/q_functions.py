"""Q-functions on a language model: what it earns to go on with a token, for every token of the vocabulary.

Both start from what the language model knows. The scores of all tokens are made a chunk of states at a time.
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

Noise = tuple[Tensor, Tensor]
"""The factors f(out) `(R, V)` and f(in) `(R, d)`, of R rows or of one for all."""


class Best(NamedTuple):
    """The token of the highest Q in each state, `(M,)`, and that Q, `(M,)` or quantiles `(M, K)`."""

    action: Tensor
    value: Tensor


def frozen_actor(actor: ActorCritic) -> ActorCritic:
    """A frozen copy of policy and critic, which shares what is never trained."""
    critic = None if actor.critic is None else twin(actor.critic)
    new = ActorCritic(twin(actor.trained_model), critic, actor.temperature)
    new.value_head.load_state_dict(actor.value_head.state_dict())
    return freeze(new)


class SoftQ:
    """Q(s, a) = V(s) + beta log(pi(a | s) / pi_ref(a | s)), with pi the policy and V its critic.

    For the policy pi ~ pi_ref exp(Q / beta) the value beta log sum_a pi_ref(a | s) exp(Q(s, a) / beta) is V(s) itself,
    so a value costs no look at the vocabulary, and what is learned is at all times a language model to sample from.
    """

    def __init__(self, actor: ActorCritic) -> None:
        self.actor = actor

    def of_actions(self, sequences: Sequences, reference_log_probs: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        """V of the state before each response token, and what the token adds to it, `(N, T)` each; Q is their sum."""
        new = self.actor.evaluate(sequences)
        return new.value, torch.where(sequences.response_mask, beta * (new.log_prob - reference_log_probs), 0.0)


class Heads(nn.Module):
    """What a `GreedyQ` learns besides language model and critic.

    Args:
        actor: the sizes are its own.
        noisy: noise on the output weights, factored as f(out) f(in)^T, with a learned deviation each (Fortunato et al.,
            2018). There is none until it is drawn.
        n_quantiles: K above 1 describes the return by K quantiles around its mean (Dabney et al., 2018, "QR-DQN").
            Quantile k lies u_k(s) + e_a . (psi_k * h(s)) above it, with e the output embedding and u, psi of mean zero
            over k, so that no head of V x K outputs is needed.
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
        """New noise, for each of the rows that are acted in or one for all; `generator` is a CPU's."""
        if self.noisy:
            drawn = (torch.randn(rows, size, generator=generator).to(self.sigma.device) for size in self.sigma.shape)
            out, within = (x.sign() * x.abs().sqrt() for x in drawn)
            self.noise = (out, within)

    def quieten(self) -> None:
        """The mean weights from now on."""
        self.noise = None

    def noisy_logits(self, hidden: Tensor, noise: Noise | None) -> Tensor | float:
        """What the noise adds to the logits `(m, V)`."""
        if noise is None:
            return 0.0
        out, within = noise
        return out * ((hidden.float() * within) @ self.sigma.T)

    def spread(self, hidden: Tensor, embeddings: Tensor) -> Tensor:
        """What each quantile lies above the mean, `(M, K)`, for tokens with these embeddings `(M, d)`."""
        spread = self.offsets(hidden) + (hidden * embeddings) @ self.psi.T
        return spread - spread.mean(1, keepdim=True)


class GreedyQ:
    """Q(s, a) = v(s) + q_scale log p(a | s), with p the language model and v its critic, zero at first.

    So the best token is at all times the language model's likeliest one. It is a dueling network (Wang et al., 2016)
    whose advantages are normalised to sum to 1 as exponentials, in place of a mean of zero.

    Args:
        actor: language model and critic.
        heads: noise and quantiles.
        q_scale: reward units a nat.
        dueling: off, Q(s, a) is q_scale times the model's logit, whatever its offset, and there is no v.
    """

    def __init__(self, actor: ActorCritic, heads: Heads, q_scale: float = 1.0, dueling: bool = True) -> None:
        self.actor, self.heads, self.q_scale, self.dueling = actor, heads, q_scale, dueling

    def frozen_copy(self) -> GreedyQ:
        """For targets."""
        return GreedyQ(frozen_actor(self.actor), freeze(copy.deepcopy(self.heads)), self.q_scale, self.dueling)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `(m, V)`, with the noise that was drawn."""
        return self._noisy_logits(hidden, self.heads.noise)

    def advantages(
        self, hidden: Tensor, banned: Tensor | None, stop_ids: tuple[int, ...], noise: Noise | None = None
    ) -> Tensor:
        """Q without v, `(m, V)`; the lowest float where a stop token is banned."""
        distribution = TokenDistribution(self.actor.temperature, banned=banned, stop_ids=stop_ids)
        logits = distribution.logits(self._noisy_logits(hidden, noise))
        lowest = torch.finfo(logits.dtype).min
        advantages = self.q_scale * (logits.log_softmax(-1) if self.dueling else logits)
        return torch.where(logits == lowest, lowest, advantages)

    def values(self, states: States, hidden: Tensor) -> Tensor:
        """The value v of each state, `(M,)`."""
        if not self.dueling:
            return torch.zeros(len(hidden), device=hidden.device)
        return self.actor.state_values(states, hidden)

    def of_actions(self, sequences: Sequences, actions: Tensor | None = None) -> Tensor:
        """Q `(M,)` of each response token, or of other `actions` `(M,)` in the same states; quantiles `(M, K)`."""
        states = sequences.states()
        hidden = states.hidden(self.actor.lm)  # (M, d)
        actions = sequences.actions if actions is None else actions
        noise = self.heads.noise  # as it is now, also where the backward pass makes the scores again

        def score(hidden: Tensor, actions: Tensor, banned: Tensor | None) -> tuple[Tensor]:
            advantages = self.advantages(hidden, banned, sequences.stop.ids, noise)
            return (advantages.gather(1, actions[:, None])[:, 0],)

        chosen = in_chunks(score, self.actor.vocab_size, hidden, actions, sequences.banned)[0]
        return self._with_quantiles(self.values(states, hidden) + chosen, hidden, actions)

    def choose(self, sequences: Sequences) -> Tensor:
        """The best token in the state before each response token, `(M,)`."""
        return self._highest(sequences, sequences.states().hidden(self.actor.lm))[0]

    def best(self, sequences: Sequences) -> Best:
        """The best token in the state before each response token, and its Q."""
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
