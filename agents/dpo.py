"""Direct preference optimisation (Rafailov et al., 2023).

    textgym train --agent dpo --data pairs.jsonl --output-dir runs/dpo

Before training the reference scores all completions, each distinct text once. `DPO.collate` makes a batch of pairs, and
`DPO.loss` is the loss of an update. The updates, with gradient accumulation, are in common/supervised_trainer.py.

If the labels are from the Bradley-Terry model of a reward r, the minimum is pi_ref exp(r / beta) / Z, the same optimum
as that of the other agents.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from textgym.data.completions import read_pairs
from textgym.data.preferences import numbers_of, placed_preferences
from textgym.models.actor_critic import PolicyLike
from textgym.models.fitting import check_tokenizer
from textgym.models.token_model import TokenModel
from textgym.rewards.models.accuracy import in_order
from textgym.rewards.models.pairwise import pairwise_loss

from .common.supervised import Batch, SupervisedAgent
from .configs.dpo import DPOConfig
from .configs.supervised import SupervisedConfig


class DPO(SupervisedAgent):
    """Direct preference optimisation on pairs of completions.

    Args:
        policy: The policy.
        preferences: Rows of `load_preferences`: `chosen` and `rejected`, strings or conversations, with a `prompt`.
            Without a prompt, it is the common beginning of both. EOS is appended to completions that lack it.
        tokenizer: The policy's tokenizer: a name, a path or a tokenizer. `None` for the one that is saved with the
            policy's weights.
        config: Hyperparameters.
        reference: A model or its name, or the `reference_log_probs` of another agent on the same preferences. `None`
            for a copy of the policy, with its adapter, before training.

    Raises:
        ValueError: If there are no preferences, a row is not a pair, or tokenizer or reference do not fit the policy.
        DataError: If too many pairs have a fault, such as two equal sides.

    >>> from textgym import ActorCritic
    >>> from textgym.agents import DPO
    >>> pairs = [{"prompt": "The film is", "chosen": " a joy.", "rejected": " a bore."}]
    >>> DPO(ActorCritic.from_pretrained("tiny"), pairs).learn().updates
    1
    """

    config_class: ClassVar[type[SupervisedConfig]] = DPOConfig
    config: DPOConfig

    def __init__(
        self,
        policy: PolicyLike,
        preferences: Any,
        tokenizer: Any = None,
        config: Any = None,
        reference: str | nn.Module | Tensor | None = None,
    ) -> None:
        super().__init__(policy, preferences, tokenizer, config)
        self.reference_log_probs = reference if isinstance(reference, Tensor) else self._score(reference)  # (texts,)

    def read(self, data: Any) -> None:
        """Encode the distinct texts, and set `pairs` to their indices."""
        rows = placed_preferences(data)
        graded = self.config.use_probability
        probabilities = numbers_of(rows, "probability", "use_probability") if graded else [1.0] * len(rows)
        self.probability = torch.tensor(probabilities)  # (P,)
        encoded, faults = read_pairs(rows, self.reading)
        faults.check(self.config.allow_faulty_rows)
        distinct = {json.dumps(text): text for pair in encoded for text in pair}
        indices = {key: index for index, key in enumerate(distinct)}
        self.texts = list(distinct.values())
        self.pairs = [(indices[json.dumps(chosen)], indices[json.dumps(rejected)]) for chosen, rejected in encoded]

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.pairs)

    def collate(self, items: Sequence[int]) -> Batch:
        """Return the pairs with these indices: distinct texts, and `chosen` and `rejected` `(P,)`, indices of texts."""
        pairs = [self.pairs[item] for item in items]
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))
        position = {text: index for index, text in enumerate(texts)}
        return {
            **self.batch_of(texts),
            "reference": self.reference_log_probs[texts],  # (N,)
            "chosen": torch.tensor([position[chosen] for chosen, _ in pairs]),
            "rejected": torch.tensor([position[rejected] for _, rejected in pairs]),
            "probability": self.probability[list(items)],  # (P,)
        }

    def weight(self, batch: Batch) -> Tensor:
        """Return the number of pairs."""
        return torch.tensor(len(batch["chosen"]), device=batch["chosen"].device)

    def loss(self, log_probs: Tensor, entropies: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the preference loss of the implicit rewards, a mean over pairs."""
        # 1. The implicit reward of a completion: beta (log pi - log pi_ref), summed over its tokens (section 4).
        sums = log_probs.sum(1)  # (N,)
        log_ratios = sums - batch["reference"]  # (N,)

        # 2. The loss of each pair; a text in several pairs is evaluated once.
        chosen, rejected = (log_ratios[batch[side]] for side in ("chosen", "rejected"))  # (P,)
        lengths = batch["response_lengths"]
        token_counts = (lengths[batch["chosen"]], lengths[batch["rejected"]])
        loss = preference_loss(chosen, rejected, token_counts, batch["probability"], self.config)

        # 3. Metrics.
        chosen_rewards = self.config.beta * chosen.detach()
        rejected_rewards = self.config.beta * rejected.detach()
        return loss, {
            "rewards/chosen": chosen_rewards.mean(),
            "rewards/rejected": rejected_rewards.mean(),
            "rewards/margins": (chosen_rewards - rejected_rewards).mean(),
            "rewards/accuracies": in_order(chosen_rewards - rejected_rewards).mean(),
            "logps/chosen": sums.detach()[batch["chosen"]].mean(),
            "logps/rejected": sums.detach()[batch["rejected"]].mean(),
        }

    def fingerprint(self) -> str:
        """Return a hash of texts and pairs."""
        data = json.dumps([super().fingerprint(), self.pairs, self.probability.tolist()])
        return hashlib.sha256(data.encode()).hexdigest()

    def training_state(self) -> dict[str, Tensor]:
        """Return the reference's log-probs, because the initial policy no longer exists when the agent is loaded."""
        return {"reference": self.reference_log_probs}

    def _score(self, reference: str | nn.Module | None) -> Tensor:
        """Return the log-prob of each text under the reference, `(texts,)`, by packed passes."""
        if reference is None:
            model = self.policy.reference()
        else:
            model = TokenModel.load(reference, temperature=self.policy.temperature, device=self.policy.device)
            check_tokenizer(self.tokenizer, model.lm, model.vocab_size, "the reference")
        size = 2 * (self.config.micro_batch_size or self.config.batch_size)
        parts = [range(len(self.texts))[start : start + size] for start in range(0, len(self.texts), size)]
        with torch.autocast(self.policy.device.type, torch.bfloat16, enabled=self.config.bf16):
            scores = [model.sequence_log_probs(self.sequences(part).to(model.device)).sum(1) for part in parts]
            return torch.cat(scores).cpu()


def preference_loss(
    chosen: Tensor, rejected: Tensor, token_counts: tuple[Tensor, Tensor], probability: Tensor, config: DPOConfig
) -> Tensor:
    """Return the mean loss of pairs, equal to that of TRL 1.16's DPOTrainer.

    With d = beta (chosen - rejected):

    * "sigmoid": -p log sigmoid(d) - (1 - p) log sigmoid(-d), p = 1 for certain labels (Rafailov et al., 2023, eq. 7)
      and 1 - epsilon with label smoothing; of TRL's losses only "aot" has this label smoothing;
    * "hinge": max(0, 1 - d);
    * "ipo": (chosen / n_chosen - rejected / n_rejected - 1 / (2 beta))^2 (Azar et al., 2024, eq. 17), the log-ratios
      averaged over the n tokens of each text, as in TRL, because sums would make the margin depend on the length.

    Args:
        chosen: `(P,)`, log pi - log pi_ref of the chosen completions, summed over their tokens.
        rejected: `(P,)`, the same of the rejected completions.
        token_counts: `(P,)` each, numbers of tokens of both.
        probability: `(P,)`, p before smoothing.
        config: Loss, beta and label smoothing.
    """
    beta = config.beta
    if config.loss == "hinge":
        return torch.relu(1 - beta * (chosen - rejected)).mean()
    if config.loss == "ipo":
        difference = chosen / token_counts[0] - rejected / token_counts[1]
        return (difference - 1 / (2 * beta)).square().mean()
    return pairwise_loss(
        beta * chosen, beta * rejected, label_smoothing=config.label_smoothing, probability=probability
    )
