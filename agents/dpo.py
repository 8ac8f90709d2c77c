"""Direct preference optimisation (Rafailov et al., 2023).

    textgym train --agent dpo --data pairs.jsonl --output-dir runs/dpo

Before training the reference scores all completions, each distinct text once. `DPO.collate` makes a batch of pairs, and
`DPO.loss` is what an update minimises. The updates, in micro-batches whose gradients add up, are those of
common/supervised_trainer.py.

If pairs are labelled by Bradley and Terry's model of a reward r, the minimum is pi_ref exp(r / beta) / Z: the same
optimum that the other agents approach by sampling.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from textgym.data.completions import Example, encode_completions, shorten, split_pair
from textgym.data.preferences import load_preferences
from textgym.errors import ConfigError
from textgym.models.actor_critic import PolicyLike
from textgym.models.fitting import check_tokenizer
from textgym.models.token_model import TokenModel
from textgym.rewards.models.pairwise import pairwise_loss
from textgym.settings import NotNegative, Positive, Share

from .common.supervised import Batch, SupervisedAgent, SupervisedConfig

DPOLoss = Literal["sigmoid", "hinge", "ipo"]


@dataclass
class DPOConfig(SupervisedConfig):
    """Hyperparameters of DPO."""

    learning_rate: NotNegative = 1e-5
    """Peak learning rate of AdamW; DPO wants a lower one than supervised fine-tuning."""
    beta: Positive = 0.1
    """How dear a nat of divergence from the reference is: rewards are beta times log-ratios. Of "ipo" its tau."""
    loss: DPOLoss = "sigmoid"
    """"sigmoid": DPO's; "hinge": no more than a margin of 1 (Zhao et al., 2023, SLiC); "ipo": a margin of 1 / (2 beta)
    and not more (Azar et al., 2024)."""
    label_smoothing: Share = 0.0
    """Of "sigmoid": the share of pairs that are taken to be the wrong way round (conservative DPO)."""
    use_probability: bool = False
    """Of "sigmoid": train on a pair's `probability`, how likely a rater prefers `chosen`, in place of certainty."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss != "sigmoid" and (self.label_smoothing or self.use_probability):
            raise ConfigError(f"label_smoothing and use_probability belong to loss='sigmoid', not to {self.loss!r}")


class DPO(SupervisedAgent):
    """Direct preference optimisation on pairs of completions.

    Args:
        policy: who learns.
        preferences: as `load_preferences` reads them: `chosen` and `rejected`, strings or conversations, after a
            `prompt`; without one it is what both begin with. EOS is appended to completions that lack it.
        tokenizer: the policy's: a name, a path or a tokenizer. `None` is the one saved beside the policy's weights.
        config: beta, loss, learning rate, batches.
        reference: the policy as it is now, with the adapter that it has, unless a model or its name is given, or
            the `reference_log_probs` of another agent on the same preferences.

    Raises:
        ValueError: no preferences, or a pair that is none; or a tokenizer or reference that does not fit the policy.

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
        """Distinct texts as ids, and `pairs` of their numbers."""
        preferences = load_preferences(data)
        self.probability = _probabilities(preferences, self.config.use_probability)  # (P,)
        encoded = self._encoded(preferences)
        distinct = {json.dumps(text): text for pair in encoded for text in pair}
        numbers = {key: number for number, key in enumerate(distinct)}
        self.texts = list(distinct.values())
        self.pairs = [(numbers[json.dumps(chosen)], numbers[json.dumps(rejected)]) for chosen, rejected in encoded]

    def __len__(self) -> int:
        """The number of pairs."""
        return len(self.pairs)

    def collate(self, items: Sequence[int]) -> Batch:
        """Pairs by their numbers: each distinct text once, and `chosen` and `rejected` `(P,)` as places among them."""
        pairs = [self.pairs[item] for item in items]
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))
        place = {text: index for index, text in enumerate(texts)}
        return {
            **self.batch_of(texts),
            "reference": self.reference_log_probs[texts],  # (N,)
            "chosen": torch.tensor([place[chosen] for chosen, _ in pairs]),
            "rejected": torch.tensor([place[rejected] for _, rejected in pairs]),
            "probability": self.probability[list(items)],  # (P,)
        }

    def weight(self, batch: Batch) -> Tensor:
        """By pairs."""
        return torch.tensor(len(batch["chosen"]), device=batch["chosen"].device)

    def loss(self, log_probs: Tensor, entropies: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the pairs' implicit rewards, a mean over pairs."""
        # 1. The implicit reward of a completion: beta (log pi - log pi_ref), summed over its tokens (section 4).
        sums = log_probs.sum(1)  # (N,)
        log_ratios = sums - batch["reference"]  # (N,)

        # 2. The loss of chosen beside rejected ones; a text of several pairs was scored once.
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
            "rewards/accuracies": (chosen_rewards > rejected_rewards).float().mean(),
            "logps/chosen": sums.detach()[batch["chosen"]].mean(),
            "logps/rejected": sums.detach()[batch["rejected"]].mean(),
        }

    def fingerprint(self) -> str:
        """Of texts and pairs."""
        data = json.dumps([super().fingerprint(), self.pairs, self.probability.tolist()])
        return hashlib.sha256(data.encode()).hexdigest()

    def training_state(self) -> dict[str, Tensor]:
        """The reference's log-probs: the policy that it was is gone."""
        return {"reference": self.reference_log_probs}

    def _encoded(self, preferences: list[dict[str, Any]]) -> list[list[Example]]:
        """Chosen and rejected text of each pair, the prompt as long in one as in the other."""
        parts = [split_pair(pair) for pair in preferences]
        sides = [(prompt, text) for prompt, *texts in parts for text in texts]
        bos = self.tokenizer.bos_token_id
        encoded = encode_completions(
            sides, self.tokenizer, self.config.append_eos, add_special_tokens=self.config.add_special_tokens
        )
        return [
            shorten([chosen.prompt, rejected.prompt], [chosen.completion, rejected.completion], self.max_length, bos)
            for chosen, rejected in zip(encoded[::2], encoded[1::2], strict=True)
        ]

    def _score(self, reference: str | nn.Module | None) -> Tensor:
        """Log-prob of each text under the reference, `(texts,)`, in packed passes; the reference is dropped."""
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
    """The mean loss of pairs, equal to that of TRL 1.16's DPOTrainer.

    With d = beta (chosen - rejected):

    * "sigmoid": -p log sigmoid(d) - (1 - p) log sigmoid(-d), p = 1 for certain labels (Rafailov et al., 2023, eq. 7)
      and 1 - epsilon under label smoothing, which of TRL's losses "aot" alone does in this way;
    * "hinge": max(0, 1 - d);
    * "ipo": (chosen / n_chosen - rejected / n_rejected - 1 / (2 beta))^2 (Azar et al., 2024, eq. 17), the log-ratios
      averaged over the n tokens of each text as TRL does, since in sums the margin would be a matter of length.

    Args:
        chosen: `(P,)`, log pi - log pi_ref of the chosen completions, summed over their tokens.
        rejected: `(P,)`, of the rejected ones.
        token_counts: `(P,)` each, tokens of both.
        probability: `(P,)`, p before smoothing.
        config: loss, beta, label smoothing.
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


def _probabilities(preferences: list[dict[str, Any]], use: bool) -> Tensor:
    """How likely a rater prefers the chosen text, `(P,)`; 1 where labels are taken as certain."""
    if not use:
        return torch.ones(len(preferences))
    missing = sum(pair.get("probability") is None for pair in preferences)
    if missing:
        raise ValueError(
            f"use_probability needs a 'probability' in every preference; {missing} of {len(preferences)} have none"
        )
    return torch.tensor([float(pair["probability"]) for pair in preferences])
