"""Training of a reward model with `transformers.Trainer`: the loss of preference pairs, batches and the optimiser."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from textgym.models.machine.changes import ChangedWeights
from textgym.models.machine.devices import on_device
from textgym.models.machine.finite import FiniteGradients
from textgym.models.machine.schedules import warmup_and_decay
from textgym.models.machine.shared_batches import SharedBatches, SharedLoader
from textgym.models.machine.training_arguments import OneDeviceArguments
from textgym.rewards.models.config import RewardModelConfig
from textgym.rewards.models.last_token import LastTokenScorer, pad_right
from textgym.rewards.models.muon import Muon
from textgym.rewards.models.ranking_loss import RankingObjective

SILENT: dict[str, Any] = {
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
"""Arguments of a `transformers.Trainer` that prints nothing, saves nothing and pins no memory."""


def pairwise_loss(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None = None,
    center_coefficient: float = 0.0,
    label_smoothing: float = 0.0,
    probability: Tensor | None = None,
) -> Tensor:
    """Return the mean of `-p log sigmoid(d) - (1 - p) log sigmoid(-d)`, with `d = chosen - rejected - margin`.

    With p = 1, the default, this is the loss of TRL's RewardTrainer (Bradley and Terry, 1952).

    Args:
        chosen: `(P,)` scores of the preferred texts.
        rejected: `(P,)` scores of the other texts.
        margin: `(P,)` required differences of scores.
        center_coefficient: Weight of the mean of `(chosen + rejected)^2`, which is added to the loss.
        label_smoothing: Epsilon, the assumed share of pairs whose labels are swapped: p = 1 - epsilon.
        probability: `(P,)` values of p, which is how likely a rater prefers the chosen text. Label smoothing moves them
            towards 1/2.
    """
    difference = chosen - rejected if margin is None else chosen - rejected - margin
    p = torch.ones_like(difference) if probability is None else probability
    p = p * (1 - label_smoothing) + (1 - p) * label_smoothing
    # Both terms need only one logsigmoid, which does not overflow, because log sigmoid(-d) = log sigmoid(d) - d.
    loss = -(F.logsigmoid(difference) - (1 - p) * difference).mean()
    return loss + center_coefficient * (chosen + rejected).square().mean()


class Item(Protocol):
    """What a reward model is trained on, such as a pair."""

    @property
    def cluster(self) -> int:
        """Number that items have in common which follow each other, such as those of a prompt."""


class Objective(Protocol):
    """Batches of items, and their loss."""

    def collate(self, items: Any) -> dict[str, Any]:
        """Return a batch: `texts`, padded ids `(N, T)` and lengths `(N,)`, in which each text is once, and others."""

    def loss(self, scores: Tensor, batch: dict[str, Any]) -> Tensor:
        """Return the mean loss of a batch, with the scores `(N,)` of its texts."""

    def weight(self, batch: dict[str, Any]) -> Tensor:
        """Return the number that the loss of a batch is a mean over."""


def fit(
    scorer: LastTokenScorer,
    items: Sequence[Item],
    config: RewardModelConfig,
    callbacks: Sequence[TrainerCallback],
) -> None:
    """Train all weights of a scorer on pairs or rankings, without output or files.

    Args:
        scorer: The scorer; its weights must require gradients.
        items: A `RatedPair` each for the loss "pairwise", and for the other losses a `RankedTexts`.
        config: Hyperparameters.
        callbacks: Callbacks of transformers, for progress.

    Raises:
        UnchangedWeightsError: If no weight changed.
    """
    assert config.batch_size is not None
    device = scorer.classifier.device
    with tempfile.TemporaryDirectory() as folder, on_device(device):
        arguments = OneDeviceArguments(
            output_dir=folder,
            num_train_epochs=config.epochs,
            per_device_train_batch_size=config.batch_size,
            max_grad_norm=1.0,
            bf16=config.bf16,
            model_device=str(device),
            seed=config.seed,
            logging_steps=10,
            **SILENT,
        )
        trainer = RewardTrainer(
            config,
            model=scorer,
            args=arguments,
            train_dataset=list(items),
            callbacks=[*callbacks, FiniteGradients(config.on_nonfinite), ChangedWeights()],
            optimizers=(MuonAndAdamW(scorer, config), None),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


class RatedPair(NamedTuple):
    """Token ids of a preferred and another text, and how sure and how large the preference is."""

    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    margin: float
    probability: float
    cluster: int


def collate(pairs: Sequence[RatedPair]) -> dict[str, Any]:
    """Return a batch of pairs in which each text is once.

    Returns:
        `texts`, padded ids `(N, T)` and lengths `(N,)`, and `(P,)` of each pair: the indices of its texts, `chosen` and
        `rejected`, its `margin` and its `probability`.
    """
    texts = list(dict.fromkeys(text for pair in pairs for text in (pair.chosen, pair.rejected)))
    place = {text: index for index, text in enumerate(texts)}
    return {
        "texts": pad_right(texts),
        "chosen": torch.tensor([place[pair.chosen] for pair in pairs]),
        "rejected": torch.tensor([place[pair.rejected] for pair in pairs]),
        "margin": torch.tensor([pair.margin for pair in pairs]),
        "probability": torch.tensor([pair.probability for pair in pairs]),
    }


class PairwiseObjective:
    """Objective of `fit` on pairs: the mean of `pairwise_loss`."""

    def __init__(self, config: RewardModelConfig) -> None:
        self.config = config

    def collate(self, items: Sequence[RatedPair]) -> dict[str, Any]:
        """Return a batch, see the function `collate`."""
        return collate(items)

    def loss(self, scores: Tensor, batch: dict[str, Any]) -> Tensor:
        """Return the mean loss of a batch, with the scores `(N,)` of its texts."""
        chosen, rejected = scores[batch["chosen"]], scores[batch["rejected"]]  # (P,)
        config = self.config
        return pairwise_loss(
            chosen,
            rejected,
            batch["margin"] if config.use_margin else None,
            config.center_coefficient,
            config.label_smoothing,
            batch["probability"] if config.use_probability else None,
        )

    def weight(self, batch: dict[str, Any]) -> Tensor:
        """Return the number of pairs."""
        return torch.tensor(len(batch["chosen"]))


class ClusterSampler(Sampler[int]):
    """Order of pairs in which those of a cluster, such as a prompt, follow each other, in a random order of clusters.

    So the texts of a prompt are compared in one batch and encoded once (Ouyang et al., 2022, section 3.5). A cluster
    larger than a batch is spread over several.
    """

    def __init__(self, clusters: Sequence[int], seed: int) -> None:
        self.members: dict[int, list[int]] = {}
        for index, cluster in enumerate(clusters):
            self.members.setdefault(cluster, []).append(index)
        self.size = len(clusters)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration has."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        clusters, generator = list(self.members.values()), torch.Generator().manual_seed(self.seed + self.epoch)
        for cluster in torch.randperm(len(clusters), generator=generator).tolist():
            members = clusters[cluster]
            yield from (members[index] for index in torch.randperm(len(members), generator=generator).tolist())


class RewardTrainer(Trainer):
    """`transformers.Trainer` with the loss of an objective on batches that the processes of a run share."""

    def __init__(self, config: RewardModelConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.config = config
        self.objective: Objective = (
            PairwiseObjective(config) if config.loss == "pairwise" else RankingObjective(config.loss)
        )
        self.model_accepts_loss_kwargs = True  # `compute_loss` divides by the weight of all processes itself

    def get_train_dataloader(self) -> SharedLoader:
        """Return the items of this process; each is trained on once an epoch, by one process."""
        items: list[Item] = self.train_dataset  # type: ignore[assignment]
        order = ClusterSampler([item.cluster for item in items], self.config.seed)
        size, (processes, process) = self.config.batch_size, (self.args.world_size, self.args.process_index)
        assert size is not None
        batches = SharedBatches(order, size, None, processes, process)
        return SharedLoader(batches, lambda chosen: self.objective.collate([items[index] for index in chosen]))

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Return the batch of an update, and its weight over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        total = torch.stack([self._weight(batch) for batch in batches]).sum().to(device)
        return batches, self.accelerator.gather(total).sum()

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make a schedule of linear warm-up and cosine decay."""
        chosen: Any = self.optimizer if optimizer is None else optimizer
        self.lr_scheduler = warmup_and_decay(chosen, num_training_steps, self.config.warmup, "cosine")
        return self.lr_scheduler

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of a batch, in which every text is encoded once."""
        last, mean = (scores[:, 0] for scores in model(*inputs["texts"]))  # (N,) each
        loss = self.objective.loss(last, inputs) + self.config.mean_coefficient * self.objective.loss(mean, inputs)
        assert num_items_in_batch is not None  # from `get_batch_samples`
        share = self._weight(inputs) / num_items_in_batch
        loss = share * loss * self.accelerator.num_processes  # because gradients are averaged over processes
        return (loss, last) if return_outputs else loss

    def _weight(self, batch: dict[str, Any]) -> Tensor:
        """Return the weight of a batch; 0 for one that stands in for an empty one."""
        return self.objective.weight(batch) * batch["counts"]


class MuonAndAdamW(torch.optim.Optimizer):
    """Optimiser that uses Muon for weight matrices and AdamW for embeddings, norms and heads.

    Muon's authors recommend this division. If the learning rate of the matrices is 0, AdamW trains them too.
    """

    def __init__(self, scorer: LastTokenScorer, config: RewardModelConfig) -> None:
        assert config.matrix_learning_rate is not None
        assert config.learning_rate is not None
        embeddings = {id(module.weight) for module in scorer.modules() if isinstance(module, nn.Embedding)}
        matrices = [p for p in scorer.parameters() if p.ndim == 2 and min(p.shape) > 1 and id(p) not in embeddings]
        chosen = {id(parameter) for parameter in matrices}
        others = [parameter for parameter in scorer.parameters() if id(parameter) not in chosen]
        decay = config.weight_decay
        self.parts: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=config.matrix_learning_rate, weight_decay=decay)
            if config.matrix_learning_rate > 0
            else torch.optim.AdamW(matrices, lr=config.learning_rate, weight_decay=decay),
            torch.optim.AdamW(others, lr=config.learning_rate, weight_decay=0.0),
        ]
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step with both optimisers."""
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups = [group]  # schedulers set the learning rate in this object's groups, not in the parts'
            part.step()
