"""SupervisedAgent: what SFT and DPO share: batches of given texts, updates, reports, saving.

`transformers.Trainer` makes the updates: schedule, gradient clipping, accumulation, mixed precision, checkpoints. An
algorithm is on a page of its own in agents/: its items (`__len__`, `collate`, `weight`) and its `loss`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from textgym.data.completions import Example
from textgym.data.files import atomic_folder
from textgym.data.manifests import checked_manifest
from textgym.errors import ConfigError
from textgym.models.actor_critic import ActorCritic, PolicyLike, as_policy
from textgym.models.architectures.positions import position_limit
from textgym.models.fitting import check_tokenizer, tokenizer_of
from textgym.models.loading import load_tokenizer
from textgym.models.machine.devices import Device, on_device
from textgym.models.machine.seeding import seeded
from textgym.models.sequences import Sequences
from textgym.models.token_model import Observation
from textgym.rewards.models.last_token import pad_right
from textgym.settings import Count, NotNegative, Positive, Share, check_settings, from_plain

from ..machine.circumstances import machine, warn_of_differences
from ..machine.distributed import explained
from ..machine.out_of_memory import memory_explained
from ..machine.saved_files import SavedSupervisedAgent, read_json
from .rollout_agent import Metrics
from .saving import AGENT, check_class, load_policy, place_of, save_policy
from .supervised_trainer import SupervisedTrainer

Callback = Callable[["SupervisedAgent", Metrics], bool | None]
"""Called after every update with its metrics; returns `False` to stop."""
Batch = dict[str, Tensor]


@dataclass
class SupervisedConfig:
    """Hyperparameters of all agents that learn from given texts."""

    learning_rate: NotNegative = 1e-4
    """Peak learning rate of AdamW, which has torch's epsilon of 1e-8: warmup keeps the first updates small."""
    epochs: Positive = 1.0
    """Passes over the data."""
    max_steps: Count | None = None
    """Updates to make, in place of `epochs`."""
    batch_size: Count = 32
    """Examples, or pairs, in one update, over all processes."""
    micro_batch_size: Count | None = None
    """Of them in one forward pass; gradients add up to exactly those of the batch. None: the whole batch."""
    warmup: Share = 0.1
    """Share of the updates over which the learning rate rises."""
    anneal_learning_rate: bool = True
    """Whether the learning rate then falls linearly to zero."""
    adam_8bit: bool = False
    """Keep Adam's two moments in 8 bits each instead of 32; needs bitsandbytes."""
    max_grad_norm: Positive = 1.0
    """The gradient of an update is scaled down to this norm."""
    max_length: Count = 512
    """Tokens of a text at most, or fewer if the model has fewer places: a prompt that is too long loses its beginning,
    and a completion its end."""
    append_eos: bool = True
    """End completions with EOS where it is missing; not wanted of texts that a length limit cut off."""
    bf16: bool = False
    """Run the forward passes in bfloat16 (autocast); log-softmax and losses stay in float32."""
    gradient_checkpointing: bool = False
    """Keep what goes into each layer alone and run it again in the backward pass: less memory, more time."""
    seed: int = 0
    """Of the order of the data."""

    def __post_init__(self) -> None:
        check_settings(self)
        if self.batch_size % (self.micro_batch_size or self.batch_size):
            raise ConfigError(
                f"batch_size={self.batch_size} must be a multiple of micro_batch_size={self.micro_batch_size}"
            )


class SupervisedAgent(ABC):
    """Trains the language model of a policy on a fixed set of texts; a critic is left as it is.

    Args:
        policy: who learns; with LoRA its adapter alone does. A language model or its name becomes an `ActorCritic`.
        data: what it learns from, see the algorithm.
        tokenizer: the policy's: a name, a path or a tokenizer. `None` is the one saved beside the policy's weights.
        config: see the algorithm's config.

    Raises:
        ValueError: no tokenizer was saved beside the policy's weights, or the one given is not the policy's; or see the
            algorithm's data.
    """

    config_class: ClassVar[type[SupervisedConfig]]
    texts: list[Example]

    def __init__(self, policy: PolicyLike, data: Any, tokenizer: Any = None, config: Any = None) -> None:
        policy = as_policy(policy)
        self.policy, self.tokenizer = policy, _tokenizer_for(policy, tokenizer)
        self.config = config if config is not None else self.config_class()
        if self.config.gradient_checkpointing:
            policy.checkpoint_layers()
        self.read(data)
        self.updates = 0
        self.trainer: SupervisedTrainer | None = None
        self._saved_progress: Path | None = None

    @abstractmethod
    def read(self, data: Any) -> None:
        """Sets `texts`, and whatever else the items are made of."""

    @abstractmethod
    def __len__(self) -> int:
        """How many items there are to learn from."""

    @abstractmethod
    def collate(self, items: Sequence[int]) -> Batch:
        """A batch of items, with what `batch_of` gives of their texts."""

    @abstractmethod
    def weight(self, batch: Batch) -> Tensor:
        """How much a batch counts in the mean of several, since losses are means over tokens, or over pairs."""

    @abstractmethod
    def loss(self, log_probs: Tensor, entropies: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to minimise, and metrics to report: means over the batch.

        Args:
            log_probs: `(N, T)` of the completion tokens, with gradients, zero in the padding.
            entropies: `(N, T)`, of the distributions they were scored under.
            batch: from `collate`.
        """

    @property
    def max_length(self) -> int:
        """Tokens that a text may have."""
        limit = position_limit(self.policy.lm.config)
        return self.config.max_length if limit is None else min(self.config.max_length, limit)

    @property
    def total_updates(self) -> int:
        """Updates of the whole training."""
        if self.config.max_steps is not None:
            return self.config.max_steps
        return math.ceil(self.config.epochs * math.ceil(len(self) / self.config.batch_size))

    def learn(self, callbacks: Sequence[Callback] = ()) -> Self:
        """Trains to the end of `epochs` or `max_steps`; returns the agent.

        After an early end, or after `load`, it goes on where it stopped. A callback that returns `False` ends it early.

        Raises:
            MemoryError: a GPU was out of memory; it says what took it, and what to lower.
        """
        if self.updates >= self.total_updates:
            return self
        with (
            tempfile.TemporaryDirectory() as folder,
            seeded(self.config.seed),
            explained(),
            memory_explained(self),
            on_device(self.policy.device),
        ):
            if self.updates:
                self._write_progress(Path(folder))
            self.trainer = SupervisedTrainer(self, folder, callbacks)
            try:
                self.trainer.train(resume_from_checkpoint=folder if self.updates else None)
            finally:
                self.policy.lm.eval()
        return self

    def predict(self, observation: Observation, deterministic: bool = True) -> Tensor:
        """The policy's action, `(B,)` or `()`."""
        return self.policy.predict(observation, deterministic)

    def batch_of(self, texts: Sequence[int]) -> Batch:
        """`input_ids` `(N, W)`, `prompt_lengths` and `response_lengths` `(N,)` of texts by their numbers."""
        chosen = [self.texts[index] for index in texts]
        return {
            "input_ids": pad_right([[*text.prompt, *text.completion] for text in chosen])[0],
            "prompt_lengths": torch.tensor([len(text.prompt) for text in chosen]),
            "response_lengths": torch.tensor([len(text.completion) for text in chosen]),
        }

    def sequences(self, texts: Sequence[int]) -> Sequences:
        """Texts by their numbers, on the policy's device."""
        batch = self.batch_of(texts)
        sequences = Sequences(
            batch["input_ids"],
            batch["prompt_lengths"],
            batch["response_lengths"],
            decoder_start=self.policy.decoder_start_ids,
        )
        return sequences.to(self.policy.device)

    # --- saving: weights in safetensors, the trainer's state as it writes checkpoints, read with weights_only ---

    def save(self, folder: str | Path, overwrite: bool = False) -> None:
        """Writes all that `load` needs to go on: `policy/`, a transformers folder, and the training state.

        Args:
            folder: where to write; it is empty or not there.
            overwrite: whether to replace an agent that was saved there before.

        Raises:
            FileExistsError: the folder has files.
            OSError: the disk is full or the folder not writable.
        """
        meta = {
            "config": dataclasses.asdict(self.config),
            "updates": self.updates,
            "data": self.fingerprint(),
            "machine": machine(self.policy),
        }
        config = dataclasses.asdict(self.config)
        with atomic_folder(folder, AGENT, type(self).__name__, config, overwrite=overwrite) as temporary:
            meta["policy"] = save_policy(self.policy, temporary, self.tokenizer)
            save_file(self.training_state(), temporary / "state.safetensors")
            if self.updates:
                (temporary / "trainer").mkdir()
                self._write_progress(temporary / "trainer")
            (temporary / "agent.json").write_text(json.dumps(meta, indent=1))

    @classmethod
    def load(cls, folder: str | Path, data: Any, device: Device = None) -> Self:
        """Load an agent as it was saved, ready to `learn` on, which reads the folder again: it has to stay until then.

        Args:
            folder: what `save` wrote.
            data: what the agent was made with.
            device: where to go on, such as `"cuda"` or `"auto"`. `None` is where the agent was saved, if this machine
                has such a device.

        Raises:
            DamagedFolderError: a file is missing or not as it was written, or another class was saved.
            ValueError: other data than the agent was made with, or `device` is not on this machine.
        """
        folder = Path(folder)
        check_class(checked_manifest(folder, AGENT), cls, folder)
        where = folder / "agent.json"
        saved = from_plain(SavedSupervisedAgent, read_json(where), str(where))
        config = from_plain(cls.config_class, saved.config, f"{where}: config")
        place = place_of(folder, saved.policy, device)
        policy = load_policy(folder, saved.policy, place)
        state: dict[str, Any] = load_file(folder / "state.safetensors")
        agent = cls(policy, data, folder / "policy", config, **state)
        if agent.fingerprint() != saved.data:
            raise ValueError(f"{folder} was trained on other data: pass what it was made with, load(folder, data)")
        agent.updates, agent._saved_progress = saved.updates, folder / "trainer"
        warn_of_differences(folder, saved.machine, policy)
        return agent

    def fingerprint(self) -> str:
        """Of the data, since a run can go on with the same only."""
        return hashlib.sha256(json.dumps(self.texts).encode()).hexdigest()

    def training_state(self) -> dict[str, Tensor]:
        """Arguments that the constructor needs to make the agent again, besides; most need none."""
        return {}

    def _write_progress(self, folder: Path) -> None:
        if self.trainer is not None:
            self.trainer.write_progress(folder)
        else:
            assert self._saved_progress is not None  # somebody made the updates
            shutil.copytree(self._saved_progress, folder, dirs_exist_ok=True)


def _tokenizer_for(policy: ActorCritic, given: Any) -> Tokenizer:
    """The tokenizer given, or the policy's own; never a guess, since other ids train a policy on noise."""
    tokenizer = tokenizer_of(policy.lm) if given is None else load_tokenizer(given)
    if tokenizer is None:
        source = policy.lm.name_or_path or "a model made in memory"
        raise ValueError(
            f"no tokenizer is saved beside the policy's weights ({source}): pass the one that it was trained with, "
            "tokenizer=..."
        )
    check_tokenizer(tokenizer, policy.lm, policy.vocab_size)
    return tokenizer
