"""ActorCritic: a language model as a policy, with a value head."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from textgym.data.files import atomic_folder
from textgym.models.attention import PackedStates, checkpoint_layers
from textgym.models.decoding import CachedDecoder
from textgym.models.loading import Device, disable_dropout, freeze, load_causal_lm, load_classifier, quiet, resolve
from textgym.models.log_probs import StopRule, token_log_probs
from textgym.models.sequences import Sequences
from textgym.models.token_model import Observation, TokenModel
from textgym.models.writing import Responses, ResponseWriter

CRITIC_FILE, CRITIC_CONFIG = "critic.safetensors", "critic.json"


class Step(NamedTuple):
    """One decision for each row: `action` int64, `log_prob` and `value` float32, `(B,)` each, or `()` for one row."""

    action: Tensor
    log_prob: Tensor
    value: Tensor


class Evaluation(NamedTuple):
    """Whole sequences under the policy: `log_prob`, `value`, `entropy`, `(N, T)` each, zero in the padding.

    Entry t belongs to response token t: its log-prob, the value of the state before it, the entropy it was drawn from.
    Of single states instead of sequences, each is `(M,)`.
    """

    log_prob: Tensor
    value: Tensor
    entropy: Tensor


class ActorCritic(TokenModel):
    """A policy over tokens and a value function over contexts.

    Args:
        lm: a causal language model of transformers.
        critic: `None` to share the policy's trunk, or a trunk of its own.
        temperature: divides the logits, in acting and training alike.
        adapter: the peft model around `lm`, when it is trained by LoRA.
    """

    def __init__(self, lm: Any, critic: Any = None, temperature: float = 1.0, adapter: Any = None) -> None:
        super().__init__(lm, temperature)
        self.__dict__["lora"] = adapter
        self.critic = critic
        trunk = lm if critic is None else critic
        self.value_head = nn.Linear(trunk.config.hidden_size, 1, device=self.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.generator: torch.Generator | None = torch.Generator(self.device)
        self._critic_decoder: CachedDecoder | None = None
        self._writer: ResponseWriter | None = None

    @classmethod
    def from_pretrained(
        cls,
        name_or_module: str | os.PathLike[str] | nn.Module,
        critic: str = "shared",
        temperature: float = 1.0,
        lora: Any = None,
        dtype: torch.dtype | None = None,
        device: Device = None,
        trust_remote_code: bool = False,
    ) -> ActorCritic:
        """A policy from a model name (`"tiny"`, `"smollm2"`, a hub id), a path, or a module, which is trained in place.

        Args:
            critic: `"shared"`: a value head on the policy's trunk; `"separate"`: on a copy of the trunk; otherwise the
                name or path of a model whose trunk the critic starts from, such as a reward model. A folder that
                `save_pretrained` wrote brings its own value head back, if the critic is asked for as it was saved.
            lora: a `peft.LoraConfig`; the adapter alone is trained, and the reference is the same weights without it.

        Raises:
            ValueError: unknown name, or a model that textgym cannot decode exactly.
            ImportError: `lora` without peft.
        """
        lm = load_causal_lm(name_or_module, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        trunk = None
        if critic == "separate":
            trunk = disable_dropout(copy.deepcopy(lm.base_model))
        elif critic != "shared":
            trunk = load_classifier(critic, dtype=dtype, device=device, trust_remote_code=trust_remote_code).base_model
        policy = cls(lm, trunk, temperature, _with_lora(lm, lora) if lora is not None else None)
        if not isinstance(name_or_module, nn.Module):
            policy._load_critic(Path(resolve(name_or_module)), critic)
        return policy

    def seed(self, seed: int) -> None:
        """Seeds the sampling of actions, which has a generator of its own; torch's global one is not used."""
        self.generator = torch.Generator(self.device).manual_seed(seed)

    @torch.no_grad()
    def act(
        self, observation: Observation, deterministic: bool = False, action_masks: Any = None, with_value: bool = True
    ) -> Step:
        """Draws one token for each row, by cached decoding.

        Args:
            observation: `input_ids` and `attention_mask`, `(B, W)` or `(W,)`.
            deterministic: the most likely token instead of a draw.
            action_masks: bool `(B, V)`, the allowed actions; `None` allows all. `log_prob` is that of the masked
                distribution.
            with_value: off, `value` is zero and a separate critic does no work.
        """
        hidden, batched = self._advance(observation)
        logits = self.head_logits(hidden)
        if action_masks is not None:
            allowed = torch.as_tensor(action_masks, device=self.device).reshape(logits.shape)
            logits = logits.masked_fill(~allowed, torch.finfo(logits.dtype).min)
        log_probs = logits.log_softmax(-1)  # (B, V)
        action = log_probs.argmax(-1) if deterministic else self.draw(log_probs.exp())
        log_prob = log_probs.gather(1, action[:, None])[:, 0]
        value = torch.zeros_like(log_prob)
        if with_value:
            value = self.value_head(self._critic_hidden(hidden).float())[:, 0]
        return Step(action, log_prob, value) if batched else Step(action[0], log_prob[0], value[0])

    def write(
        self, prompts: Tensor, lengths: Tensor, max_new_tokens: int, stop: StopRule, deterministic: bool = False
    ) -> Responses:
        """Whole responses to right-padded prompts `(B, W)` of these lengths `(B,)`: what `act` would draw, but faster.

        W has room for the longest prompt with `max_new_tokens` more. A critic of its own is not asked for values.
        """
        shape = (*prompts.shape, max_new_tokens, stop)
        if self._writer is None or self._writer.shape != shape:
            self._writer = ResponseWriter(self, *shape, captures=self.device.type == "cuda")
        responses = self._writer.write(prompts, lengths, deterministic)
        if not self._writer.captures:
            self._writer = None  # captured steps are worth the memory of their cache, a cache alone is not
        return responses

    def predict(self, observation: Observation, deterministic: bool = True) -> Tensor:
        """The action of `act`, nothing else."""
        return self.act(observation, deterministic).action

    @torch.no_grad()
    def value(self, observation: Observation) -> Tensor:
        """Value `(B,)` of each state: by cached decoding where the cache has this shape, otherwise past the cache."""
        input_ids = torch.as_tensor(observation["input_ids"], device=self.device)
        if self._decoder is not None and (self._decoder.num_rows, self._decoder.max_tokens) == tuple(input_ids.shape):
            hidden, _ = self._advance(observation)
            return self.value_head(self._critic_hidden(hidden).float())[:, 0]
        lengths = torch.as_tensor(observation["attention_mask"], device=self.device).sum(-1)
        return self.state_values(PackedStates.whole(input_ids, lengths))

    def evaluate(self, sequences: Sequences, entropy_gradient: bool = False) -> Evaluation:
        """Log-probs, values and entropies of whole sequences in one packed pass, with gradients."""
        if torch.is_grad_enabled():
            self.reset_cache()  # an update follows; some fused optimisers change weights without a trace
        states = sequences.states()
        hidden = states.hidden(self.lm)  # (M, d)
        log_prob, entropy = token_log_probs(hidden, **self._scoring(sequences), entropy_gradient=entropy_gradient)
        value = self.state_values(states, hidden)
        return Evaluation(sequences.pad(log_prob), sequences.pad(value), sequences.pad(entropy))

    def evaluate_states(self, states: PackedStates, actions: Tensor, action_masks: Tensor | None = None) -> Evaluation:
        """Log-probs, values and entropies `(M,)` of one action in each state, with gradients through all three.

        Args:
            states: M states.
            actions: `(M,)` token ids, allowed ones.
            action_masks: bool `(M, V)`; `None` allows all.
        """
        if torch.is_grad_enabled():
            self.reset_cache()
        hidden = states.hidden(self.lm)
        log_prob, entropy = token_log_probs(
            hidden,
            self.head,
            actions,
            self.vocab_size,
            temperature=self.temperature,
            allowed=action_masks,
            entropy_gradient=True,
        )
        return Evaluation(log_prob, self.state_values(states, hidden), entropy)

    @torch.no_grad()
    def sequence_values(self, sequences: Sequences) -> Tensor:
        """Values `(N, T)` of the states before each response token, in one packed pass of the critic."""
        return sequences.pad(self.state_values(sequences.states()))

    def state_values(self, states: PackedStates, hidden: Tensor | None = None) -> Tensor:
        """Values `(M,)` of states, in one packed pass of the critic, with gradients.

        A critic that shares the policy's trunk takes its `hidden` states `(M, d)` where they are given.
        """
        if self.critic is not None:
            hidden = states.hidden(_Trunk(self.critic))
        elif hidden is None:
            hidden = states.hidden(self.lm)
        return self.value_head(hidden.float())[:, 0]

    def reset_cache(self) -> None:
        """Frees the key-value caches of policy and critic."""
        super().reset_cache()
        self._critic_decoder = None

    def checkpoint_layers(self) -> None:
        """From now on an update keeps what goes into each layer alone, for less memory and more time."""
        for trunk in (self.lm.base_model, self.critic):
            if trunk is not None:
                checkpoint_layers(trunk)

    def reference(self) -> TokenModel:
        """What the policy is now, frozen: a copy, or under LoRA the same weights with the adapter off."""
        if self.lora is not None:
            return TokenModel(self.lm, self.temperature, adapter=self.lora).eval()
        return self.frozen_copy()

    def frozen_copy(self) -> TokenModel:
        """The policy as it is now, its adapter merged where it has one, so that it is a plain language model."""
        lm = copy.deepcopy(self.lm) if self.lora is None else copy.deepcopy(self.lora).merge_and_unload()
        return freeze(TokenModel(lm, self.temperature))

    @property
    def lora(self) -> Any:
        """The peft model around the language model, or `None`."""
        return self.__dict__["lora"]

    def save_pretrained(self, folder: str | os.PathLike[str], tokenizer: Any = None) -> None:
        """Writes a plain transformers folder (with LoRA merged in a copy), and the critic beside it in safetensors.

        Everything is written under a temporary name first, so a full disk leaves the old folder as it was.

        Raises:
            OSError: the disk is full or the folder not writable.
        """
        with atomic_folder(folder) as temporary, quiet():
            lm = self.lm if self.lora is None else copy.deepcopy(self.lora).merge_and_unload()
            lm.save_pretrained(temporary)
            critic = {f"value_head.{name}": weight for name, weight in self.value_head.state_dict().items()}
            if self.critic is not None:
                critic |= {f"critic.{name}": weight.contiguous() for name, weight in self.critic.state_dict().items()}
            save_file({name: weight.clone() for name, weight in critic.items()}, temporary / CRITIC_FILE)
            (temporary / CRITIC_CONFIG).write_text(json.dumps({"separate": self.critic is not None}))
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)

    def draw(self, probabilities: Tensor) -> Tensor:
        """One index `(B,)` from each row `(B, V)` by inverting its distribution function: one random number a row."""
        return self.invert(
            probabilities, torch.rand(len(probabilities), 1, device=self.device, generator=self.generator)
        )

    def invert(self, probabilities: Tensor, noise: Tensor) -> Tensor:
        """The index `(B,)` that a uniform number `(B, 1)` stands for in each distribution `(B, V)`."""
        cumulative = probabilities.cumsum(-1)
        height = noise * cumulative[:, -1:]
        # `right=True` passes over tokens of probability zero; rounding may still reach the top of the last one.
        return torch.searchsorted(cumulative, height, right=True).clamp(max=self.vocab_size - 1)[:, 0]

    def _load_critic(self, folder: Path, critic: str) -> None:
        if not (folder / CRITIC_FILE).exists() or critic not in ("shared", "separate"):
            return
        if json.loads((folder / CRITIC_CONFIG).read_text())["separate"] == (critic == "separate"):
            self.load_state_dict(load_file(folder / CRITIC_FILE, device=str(self.device)), strict=False)

    def _critic_hidden(self, hidden: Tensor) -> Tensor:
        if self.critic is None:
            return hidden
        assert self._decoder is not None
        shape = (self._decoder.num_rows, self._decoder.max_tokens)
        if self._critic_decoder is None or (self._critic_decoder.num_rows, self._critic_decoder.max_tokens) != shape:
            self._critic_decoder = CachedDecoder(_Trunk(self.critic), *shape)
        return self._critic_decoder.advance(self._decoder.input_ids, self._decoder.lengths)


class _Trunk:
    """A trunk without a head, in the form that the decoder and the packed pass read a language model in."""

    def __init__(self, trunk: Any) -> None:
        self.base_model, self.config = trunk, trunk.config
        self.parameters = trunk.parameters

    @property
    def device(self) -> torch.device:
        return self.base_model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.base_model.dtype


def _with_lora(lm: Any, config: Any) -> Any:
    try:
        from peft import get_peft_model
    except ImportError as error:
        raise ImportError("lora= needs peft: pip install 'textgym[lora]'") from error
    return get_peft_model(lm, config)
