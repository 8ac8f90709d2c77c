"""SupervisedAgent: base class of SFT and DPO: batches of given texts, updates, metrics, saving.

`transformers.Trainer` makes the updates: schedule, gradient clipping, accumulation, mixed precision, checkpoints. The
file of an algorithm has its items (`__len__`, `collate`, `weight`) and its `loss`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from textgym.data.completions import Example, Reading
from textgym.data.files import atomic_folder
from textgym.data.manifests import checked_manifest
from textgym.models.actor_critic import ActorCritic, PolicyLike, as_policy
from textgym.models.architectures.positions import position_limit
from textgym.models.fitting import check_tokenizer, tokenizer_of
from textgym.models.loading import load_tokenizer
from textgym.models.machine.devices import Device, on_device
from textgym.models.machine.seeding import seeded
from textgym.models.sequences import Sequences
from textgym.models.token_model import Observation
from textgym.rewards.models.last_token import pad_right
from textgym.settings import check_arguments, from_plain

from ..callbacks import CallbackLike, watched
from ..configs.supervised import SupervisedConfig
from ..machine.circumstances import machine, warn_of_differences
from ..machine.distributed import broadcast_weights, by_first, explain_lost_processes, join
from ..machine.out_of_memory import memory_explained
from ..machine.saved_files import SavedSupervisedAgent, read_config, read_json
from .saving import AGENT, check_class, load_policy, place_of, save_policy, start_of
from .supervised_trainer import SupervisedTrainer

Batch = dict[str, Tensor]


class SupervisedAgent(ABC):
    """Base class of agents that train the language model of a policy on a fixed set of texts, without its critic.

    Args:
        policy: The policy; with LoRA only its adapter is trained. A language model or its name becomes an
            `ActorCritic`.
        data: Training data, see the algorithm.
        tokenizer: The policy's tokenizer: a name, a path or a tokenizer. `None` for the one that is saved with the
            policy's weights.
        config: Config of the algorithm.

    Raises:
        ValueError: If no tokenizer is saved with the policy's weights, the given one is not the policy's, or the data
            are wrong.
    """

    config_class: ClassVar[type[SupervisedConfig]]
    texts: list[Example]

    def __init__(self, policy: PolicyLike, data: Any, tokenizer: Any = None, config: Any = None) -> None:
        join()
        self.start = str(policy) if isinstance(policy, str | os.PathLike) else None  # see `start_of`
        policy = as_policy(policy)
        broadcast_weights(policy)
        self.policy, self.tokenizer = policy, _tokenizer_for(policy, tokenizer)
        self.config = config if config is not None else self.config_class()
        if self.config.gradient_checkpointing:
            policy.checkpoint_layers()
        self.source = str(data) if isinstance(data, str | os.PathLike) else None  # of data that has a name
        self.read(data)
        self.updates = 0
        self.trainer: SupervisedTrainer | None = None
        self._saved_progress: Path | None = None

    @abstractmethod
    def read(self, data: Any) -> None:
        """Read the data: set `texts`, and other attributes that the items need."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of training items."""

    @abstractmethod
    def collate(self, items: Sequence[int]) -> Batch:
        """Return a batch of items, which includes the columns of `batch_of` for their texts."""

    @abstractmethod
    def weight(self, batch: Batch) -> Tensor:
        """Return the weight of a batch in the mean of several: its number of tokens or of pairs."""

    @abstractmethod
    def loss(self, log_probs: Tensor, entropies: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and metrics; both are means over the batch.

        Args:
            log_probs: `(N, T)`, log-probs of the completion tokens with gradients, zero in the padding.
            entropies: `(N, T)`, entropies of the distributions of these tokens.
            batch: A batch from `collate`.
        """

    @property
    def max_length(self) -> int:
        """Maximum number of tokens of a text."""
        limit = position_limit(self.policy.lm.config)
        return self.config.max_length if limit is None else min(self.config.max_length, limit)

    @property
    def reading(self) -> Reading:
        """How the agent reads texts."""
        config = self.config
        return Reading(self.tokenizer, self.max_length, config.append_eos, config.add_special_tokens)

    @property
    def total_updates(self) -> int:
        """Total number of updates."""
        if self.config.max_steps is not None:
            return self.config.max_steps
        return math.ceil(self.config.epochs * math.ceil(len(self) / self.config.batch_size))

    @check_arguments
    def learn(
        self,
        callback: CallbackLike = None,
        *,
        progress: bool = False,
        folder: str | Path | None = None,
        log_with: str | Sequence[str] = (),
    ) -> Self:
        """Train to the end of `epochs` or `max_steps`, and return the agent.

        After an early end, or after `load`, training continues where it stopped.

        Args:
            callback: A `textgym.agents.callbacks.Callback`, a function of the agent and the metrics of an update, or a
                list of these. One that returns `False` after an update ends the training early.
            progress: Whether to show what the run does and its progress, as `textgym train` does.
            folder: Run folder with settings, metrics and checkpoints, as `textgym train` writes it. An agent that was
                loaded from one of its checkpoints continues the run there.
            log_with: Names of trackers that are to get metrics and settings too, such as `"wandb"`; see
                `textgym.agents.watching.trackers`.

        Raises:
            MemoryError: If a GPU is out of memory; the message says what used it, and which settings to lower.
        """
        if self.updates >= self.total_updates:
            return self
        with (
            tempfile.TemporaryDirectory() as temporary,
            seeded(self.config.seed),
            explain_lost_processes(),
            memory_explained(self),
            on_device(self.policy.device),
            watched(self, callback, progress, folder, log_with) as callbacks,
        ):
            if self.updates:
                self._write_progress(Path(temporary))
            self.trainer = SupervisedTrainer(self, temporary, callbacks)
            callbacks.on_training_start(self)
            try:
                self.trainer.train(resume_from_checkpoint=temporary if self.updates else None)
            finally:
                self.policy.lm.eval()
            callbacks.on_training_end(self)
        return self

    def predict(self, observation: Observation, deterministic: bool = True) -> Tensor:
        """Return the policy's action, `(B,)` or `()`."""
        return self.policy.predict(observation, deterministic)

    def batch_of(self, texts: Sequence[int]) -> Batch:
        """Return `input_ids` `(N, W)`, `prompt_lengths` and `response_lengths` `(N,)` of texts with these indices."""
        chosen = [self.texts[index] for index in texts]
        return {
            "input_ids": pad_right([[*text.prompt, *text.completion] for text in chosen])[0],
            "prompt_lengths": torch.tensor([len(text.prompt) for text in chosen]),
            "response_lengths": torch.tensor([len(text.completion) for text in chosen]),
        }

    def sequences(self, texts: Sequence[int]) -> Sequences:
        """Return the texts with these indices, on the policy's device."""
        batch = self.batch_of(texts)
        sequences = Sequences(
            batch["input_ids"],
            batch["prompt_lengths"],
            batch["response_lengths"],
            decoder_start=self.policy.decoder_start_ids,
        )
        return sequences.to(self.policy.device)

    # --- Saving: weights in safetensors; the trainer's state in transformers' format, loaded with weights_only ---

    def save(self, folder: str | Path, overwrite: bool = False) -> None:
        """Write everything that `load` needs to continue: `policy/`, a transformers folder, and the training state.

        All processes of a run must call it; the first one writes the files.

        Args:
            folder: Folder to write; it must be empty or not exist.
            overwrite: Whether to replace an agent that was saved in this folder.

        Raises:
            FileExistsError: If the folder has files.
            OSError: If the disk is full or the folder is not writable.
            ValueError: If DeepSpeed has sharded the state of the optimiser.
        """
        if self.trainer is not None and self.trainer.is_deepspeed_enabled:
            raise ValueError(
                "DeepSpeed shards the optimiser's state, and save does not gather it: save the policy alone "
                "(agent.policy.save_pretrained), or train with examples/accelerate/ddp.yaml"
            )
        by_first(lambda: self._write(folder, overwrite))

    def _write(self, folder: str | Path, overwrite: bool) -> None:
        meta = {
            "config": dataclasses.asdict(self.config),
            "updates": self.updates,
            "data": self.fingerprint(),
            "machine": machine(self.policy),
            "start": start_of(self),
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
    def load(cls, folder: str | Path, data: Any, device: Device = None, *, trust_remote_code: bool = False) -> Self:
        """Load a saved agent, to continue with `learn`, which reads the folder again: do not delete it before that.

        Args:
            folder: Folder that `save` wrote.
            data: The training data that the agent was made with.
            device: Device, such as `"cuda"` or `"auto"`. `None` for the device that the agent was saved on, if this
                machine has it.
            trust_remote_code: Whether to run code that comes with the model, as in transformers.

        Raises:
            DamagedFolderError: If a file is missing or was changed, or another class was saved.
            ValueError: If the data are not those that the agent was made with, or the device is not on this machine.
        """
        folder = Path(folder)
        check_class(checked_manifest(folder, AGENT), cls, folder)
        where = folder / "agent.json"
        saved = from_plain(SavedSupervisedAgent, read_json(where), str(where))
        config = read_config(cls.config_class, saved.config, f"{where}: config")
        place = place_of(folder, saved.policy, device)
        policy = load_policy(folder, saved.policy, place, trust_remote_code)
        state: dict[str, Any] = load_file(folder / "state.safetensors")
        agent = cls(policy, data, folder / "policy", config, **state)
        if agent.fingerprint() != saved.data:
            raise ValueError(f"{folder} was trained on other data: pass what it was made with, load(folder, data)")
        agent.updates, agent._saved_progress = saved.updates, folder / "trainer"
        agent.start = saved.start
        warn_of_differences(folder, saved.machine, policy)
        return agent

    def fingerprint(self) -> str:
        """Return a hash of the data, because a run can only continue with the same data."""
        return hashlib.sha256(json.dumps(self.texts).encode()).hexdigest()

    def training_state(self) -> dict[str, Tensor]:
        """Return further arguments of the constructor that `load` needs; empty for most agents."""
        return {}

    def _write_progress(self, folder: Path) -> None:
        if self.trainer is not None:
            self.trainer.write_progress(folder)
        else:
            assert self._saved_progress is not None  # there are updates, so the agent was loaded
            shutil.copytree(self._saved_progress, folder, dirs_exist_ok=True)


def _tokenizer_for(policy: ActorCritic, given: Any) -> Tokenizer:
    """Return the given tokenizer, or the policy's own. It is never guessed: with wrong ids a policy learns noise."""
    tokenizer = tokenizer_of(policy.lm) if given is None else load_tokenizer(given)
    if tokenizer is None:
        source = policy.lm.name_or_path or "a model made in memory"
        raise ValueError(
            f"no tokenizer is saved with the policy's weights ({source}): pass the one that it was trained with, "
            "tokenizer=..."
        )
    check_tokenizer(tokenizer, policy.lm, policy.vocab_size)
    return tokenizer
