"""ActionValues: Q(s, a) of every token of the vocabulary, on the trunk of a critic, and V(s) as its expectation.

    Q(s, a) = v(s) + std e_a . W h(s),    V(s) = sum_a pi(a | s) Q(s, a)

h is the critic's hidden state, v its value head with the running standard deviation std, and e_a the policy's output
embedding of token a, which Q does not train. So Q needs no further weights for each token. W is zero at first, so
Q(s, a) = V(s) = v(s).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from textgym.models.actor_critic import ActorCritic
from textgym.models.distributions.log_probs import in_chunks
from textgym.models.sequences import Sequences


class ActionValues(nn.Module):
    """Weights that Q adds to the critic's, and the values of Q.

    Args:
        policy: The policy, whose critic has v and h.
    """

    def __init__(self, policy: ActorCritic) -> None:
        super().__init__()
        embedding, hidden = policy.head.weight.shape[1], policy.value_head.in_features
        self.weight = nn.Parameter(torch.zeros(embedding, hidden, device=policy.device))

    def of_sequences(self, policy: ActorCritic, sequences: Sequences) -> tuple[Tensor, Tensor]:
        """Return Q of each response token, with gradients of the critic, and V of the state before it, `(N, T)` each.

        V is without gradients, and it is the expectation under the policy as it is now.
        """
        states = sequences.states()
        with torch.no_grad():
            hidden = states.hidden(policy.lm)  # (M, d)
        critic_hidden = policy.critic_hidden(states).float()  # (M, d_c)
        value = policy.value_head(critic_hidden)[:, 0]
        projected = policy.value_head.std * (critic_hidden @ self.weight.T)  # (M, d)
        embeddings = policy.head.weight.detach().float()  # (V, d)
        distribution = policy.distribution_of(sequences)

        def score(projected: Tensor, hidden: Tensor, actions: Tensor, banned: Tensor | None) -> tuple[Tensor, Tensor]:
            advantages = projected @ embeddings.T  # (m, V)
            with torch.no_grad():
                chances = replace(distribution, banned=banned).log_probs(policy.head(hidden)).exp()
                expected = (chances * advantages).sum(-1)
            return advantages.gather(1, actions[:, None])[:, 0], expected

        inputs = (projected, hidden, sequences.actions, distribution.banned)
        advantage, expected = in_chunks(score, policy.vocab_size, *inputs)
        return sequences.pad(value + advantage), sequences.pad((value + expected).detach())
