"""Tasks that are small enough to enumerate all texts and compute the exact optimum.

For a reward r and a penalty beta on the KL to a reference, the optimal policy has a closed form
(e.g. Korbak et al., 2022):

    pi*(y) = pi_ref(y) exp(r(y) / beta) / Z,    J* = E_pi*[r] - beta KL(pi*, pi_ref) = beta log Z.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from textgym.models.distributions.log_probs import StopRule
from textgym.models.letter_tokenizer import letter_tokenizer
from textgym.models.sequences import Sequences
from textgym.models.token_model import TokenModel
from textgym.testing.mocks import mock_lm
from textgym.testing.table import TableConfig, TableLM

RewardShape = Literal["dense", "sparse", "deceptive"]
CHUNK = 4096
"""Number of texts that are scored at once."""


@dataclass(frozen=True)
class ExactOptimum:
    """The KL-regularised optimum over K texts.

    Attributes:
        log_reference: `(K,)` log-probs under the reference; their probabilities sum to 1.
        rewards: `(K,)` rewards.
        beta: Coefficient of the KL penalty.

    >>> optimum = ExactOptimum(np.log([0.5, 0.5]), np.array([1.0, 0.0]), beta=1.0)
    >>> optimum.probabilities.round(3).tolist(), round(optimum.value, 4)
    ([0.731, 0.269], 0.6201)
    """

    log_reference: np.ndarray
    rewards: np.ndarray
    beta: float

    @property
    def log_probs(self) -> np.ndarray:
        """Log-probs of the optimal policy, log pi*, `(K,)`."""
        logits = self.log_reference + self.rewards / self.beta
        return np.asarray(logits - _logsumexp(logits))

    @property
    def probabilities(self) -> np.ndarray:
        """Probabilities of the optimal policy, pi*, `(K,)`."""
        return np.exp(self.log_probs)

    @property
    def value(self) -> float:
        """The optimum of the objective, J* = beta log Z."""
        return self.beta * _logsumexp(self.log_reference + self.rewards / self.beta)

    def objective(self, log_probs: np.ndarray) -> float:
        """Return the objective of a policy with log-probs `(K,)`, J = E[r] - beta KL(pi, pi_ref)."""
        return float(np.sum(np.exp(log_probs) * (self.rewards - self.beta * (log_probs - self.log_reference))))

    def gap_closed(self, log_probs: np.ndarray) -> float:
        """Return the share of the gap that a policy closes, (J(pi) - J(pi_ref)) / (J* - J(pi_ref))."""
        start = self.objective(self.log_reference)
        return (self.objective(log_probs) - start) / (self.value - start)

    def kl_from(self, log_probs: np.ndarray) -> float:
        """Return KL(pi, pi*) in nats, which is (J* - J(pi)) / beta."""
        return float(np.sum(np.exp(log_probs) * (log_probs - self.log_probs)))


class ExactTask:
    """A text task with one prompt of one token and at most `horizon` response tokens, so all texts can be enumerated.

    The reference is random: a `TableLM` with normal logits, or a tiny transformer. Rewards:

    * `"dense"`: a standard normal number for each text;
    * `"sparse"`: 1 for one text with a probability of about 0.003 under the reference, 0 for all others;
    * `"deceptive"`: up to 0.5, in proportion to the common beginning with the most likely text of the reference; and 1
      for one text with another beginning.

    Args:
        vocab_size: V, from 4 to 28, EOS and padding included.
        horizon: Maximum number of response tokens.
        reward: Kind of reward.
        model: Kind of the reference and of the policy that starts from it.
        seed: Seed of reference and reward.

    >>> task = ExactTask(vocab_size=4, horizon=2)
    >>> len(task.texts)  # 3 first tokens that are not EOS x 4 second ones, and EOS alone
    13
    """

    def __init__(
        self,
        vocab_size: int = 8,
        horizon: int = 3,
        reward: RewardShape = "dense",
        model: Literal["table", "transformer"] = "table",
        seed: int = 0,
    ) -> None:
        self.vocab_size, self.horizon = vocab_size, horizon
        self.tokenizer = letter_tokenizer(vocab_size)
        self.stop = StopRule((int(self.tokenizer.eos_token_id),))
        self.texts = _all_texts(vocab_size, horizon, self.stop.ids)
        self.start = self._table(seed) if model == "table" else mock_lm(vocab_size, seed=seed)
        self.log_reference = self.log_probs(TokenModel(self.start))
        self.rewards = self._make_rewards(reward, np.random.default_rng(seed))
        self.index = {text: index for index, text in enumerate(self.texts)}

    def score(self, completion_ids: Sequence[Sequence[int]]) -> list[float]:
        """Return the reward of each completion; the reward function of the task."""
        return [float(self.rewards[self.index[tuple(ids)]]) for ids in completion_ids]

    def env_kwargs(self, beta: float) -> dict[str, Any]:
        """Return the arguments of `textgym/Text-v0` for this task."""
        return {
            "prompts": ["a"],
            "tokenizer": self.tokenizer,
            "reward": self.score,
            "reference": self.language_model(),
            "kl_coef": beta,
            "max_prompt_tokens": 1,
            "max_new_tokens": self.horizon,
        }

    def language_model(self) -> PreTrainedModel:
        """Return a copy of the reference, to freeze or to train."""
        return copy.deepcopy(self.start)

    def optimum(self, beta: float) -> ExactOptimum:
        """Return the optimum for a coefficient `beta` of the KL penalty."""
        return ExactOptimum(self.log_reference, self.rewards, beta)

    @torch.no_grad()
    def log_probs(self, policy: TokenModel) -> np.ndarray:
        """Return the log-probs `(K,)` of all texts under a policy."""
        return torch.cat([self.differentiable_log_probs(policy, rows) for rows in self._chunks()]).double().numpy()

    def differentiable_log_probs(
        self, policy: TokenModel, texts: Sequence[tuple[int, ...]] | None = None
    ) -> torch.Tensor:
        """Return the log-probs of texts (by default of all texts), with gradients."""
        sequences = self.sequences(self.texts if texts is None else texts)
        states = sequences.states()
        log_probs = policy.logits(states).log_softmax(-1)
        chosen = log_probs.gather(1, sequences.actions[:, None])[:, 0]
        return sequences.pad(chosen).sum(1)

    def greedy_reward(self, policy: TokenModel) -> float:
        """Return the reward of the text that a policy generates greedily."""
        text: list[int] = []
        while tuple(text) not in self.index:
            states = self.sequences([(*text, 0)]).states()
            with torch.no_grad():
                text.append(int(policy.logits(states)[-1].argmax()))
        return float(self.rewards[self.index[tuple(text)]])

    def sequences(self, texts: Sequence[tuple[int, ...]]) -> Sequences:
        """Return texts as `Sequences`, in which each follows the prompt."""
        ids = torch.tensor([[0, *text, *[0] * (self.horizon - len(text))] for text in texts])
        lengths = torch.tensor([len(text) for text in texts])
        return Sequences(ids, torch.ones_like(lengths), lengths, self.stop)

    def _table(self, seed: int) -> PreTrainedModel:
        lm = TableLM(TableConfig(self.vocab_size, 1 + self.horizon, eos_token_id=self.stop.ids[0]))
        with torch.no_grad():
            lm.model.logits.weight.normal_(generator=torch.Generator().manual_seed(seed))
        return lm

    def _chunks(self) -> list[list[tuple[int, ...]]]:
        return [self.texts[start : start + CHUNK] for start in range(0, len(self.texts), CHUNK)]

    def _make_rewards(self, shape: RewardShape, rng: np.random.Generator) -> np.ndarray:
        if shape == "dense":
            return rng.normal(size=len(self.texts))
        rewards = np.zeros(len(self.texts))
        if shape == "sparse":
            rewards[np.abs(self.log_reference - np.log(0.003)).argmin()] = 1.0
            return rewards
        if shape != "deceptive":
            raise ValueError(f"unknown reward {shape!r}: use 'dense', 'sparse' or 'deceptive'")
        lure = self.texts[int(self.log_reference.argmax())]
        for index, text in enumerate(self.texts):
            shared = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text, lure, strict=False))))
            rewards[index] = 0.5 * shared / len(lure)
        away = [i for i, text in enumerate(self.texts) if text[0] != lure[0] and len(text) == self.horizon]
        rewards[min(away, key=lambda i: abs(self.log_reference[i] - np.log(0.003)))] = 1.0
        return rewards


def _all_texts(vocab_size: int, horizon: int, stop_ids: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return all texts that end with their first stop token or, without one, at `horizon` tokens."""
    others = [token for token in range(vocab_size) if token not in stop_ids]
    texts: list[tuple[int, ...]] = []
    for length in range(1, horizon + 1):
        last = range(vocab_size) if length == horizon else stop_ids
        texts += [(*begin, end) for begin in itertools.product(others, repeat=length - 1) for end in last]
    return texts


def _logsumexp(values: np.ndarray) -> float:
    top = float(values.max())
    return top + float(np.log(np.exp(values - top).sum()))
