"""ActorCritic: a language model as a policy, with a value head."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, overload

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from textgym.data.manifests import MANIFEST, checked_manifest
from textgym.errors import ConfigError, DamagedFolderError
from textgym.models.adapters import is_twin, load_lm, split, twin, with_lora, without_peft
from textgym.models.architectures.attention import States, checkpoint_layers
from textgym.models.decoding.cached_decoder import CachedDecoder
from textgym.models.decoding.contexts import read_contexts
from textgym.models.decoding.encoder_decoder_cache import CachedEncoderDecoder
from textgym.models.decoding.generation import ResponseGenerators, Responses
from textgym.models.decoding.sampling import sample
from textgym.models.distributions.log_probs import StopRule, full_kl, token_log_probs
from textgym.models.distributions.sampling_rules import NO_RULES, SamplingRules
from textgym.models.loading import disable_dropout, is_trained, load_classifier, resolve
from textgym.models.machine.devices import Device, on_device, seed_of
from textgym.models.merging import merged, save_plain
from textgym.models.sequences import Sequences
from textgym.models.text_generation import continuations, is_one_text
from textgym.models.token_model import POLICY, Observation, TokenModel, fits
from textgym.models.value_head import ValueHead

CRITIC_FILE, CRITIC_CONFIG = "critic.safetensors", "critic.json"
SCALE = {"value_head.mean", "value_head.std", "value_head.fits"}
"""Names of the moments that values are scaled by."""


class Step(NamedTuple):
    """One decision for each row: `action` int64, `log_prob` and `value` float32, `(B,)` each, or `()` for one row."""

    action: Tensor
    log_prob: Tensor
    value: Tensor


class Evaluation(NamedTuple):
    """Whole sequences under the policy: `log_prob`, `value`, `entropy`, `(N, T)` each, zero in the padding.

    Entry t belongs to response token t: its log-prob, the value of the state before it, the entropy it was drawn from.
    Of single states instead of sequences, each is `(M,)`. `kl` is the exact KL of each state to a reference, if one was
    given.
    """

    log_prob: Tensor
    value: Tensor
    entropy: Tensor
    kl: Tensor | None = None


class ActorCritic(TokenModel):
    """A policy over tokens and a value function over contexts.

    Args:
        lm: a causal language model of transformers, or an encoder-decoder one; or a peft model around one, whose
            adapter is trained.
        critic: `None` to share the policy's trunk, or a trunk of its own.
        temperature: divides the logits, in acting and training alike.
        rules: further rules of `act`, for evaluation: see `SamplingRules`. Losses do not have them, so agents refuse a
            policy with rules.

    Attributes:
        generates_what_act_would: whether `write` may stand in for `act`, token by token. A subclass whose `act` chooses
            in another way sets it to False.
    """

    generates_what_act_would: ClassVar[bool] = True

    def __init__(self, lm: Any, critic: Any = None, temperature: float = 1.0, rules: SamplingRules = NO_RULES) -> None:
        lm, adapter = split(lm)
        super().__init__(lm, temperature)
        self.__dict__["lora"] = adapter  # not a submodule: its weights are those of `lm`
        self.critic, self.rules = critic, rules
        trunk = lm if critic is None else critic
        self.value_head = ValueHead(trunk.config.hidden_size, self.device)
        self.generator: torch.Generator | None = torch.Generator(self.device)
        self._critic_decoder: CachedDecoder | CachedEncoderDecoder | None = None
        self._generators = ResponseGenerators()

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
            dtype: of the weights. Log-probs are float32 in any case, but bfloat16 weights move them, in the band that
                `PPOConfig.bf16` states. On most processors decoding and a pass over whole sequences round apart, so
                that ratios before the first step may be as far from 1. `PPOConfig(bf16=True)` keeps float32 weights.
            lora: a `peft.LoraConfig`; the adapter alone is trained, and a separate critic is another one on the same
                frozen weights. A critic that was loaded is trained whole. A `peft.PeftModel`, a model after
                `add_adapter` and the folder of an adapter bring an adapter along, which is trained on.

        Raises:
            ConfigError: `lora` for a model that has an adapter already, or a trained prompt instead of an adapter.
            ValueError: unknown name, or a model that textgym cannot decode exactly.
            DamagedFolderError: a file of a saved policy is missing or not as it was written.
            ImportError: `lora` without peft.
        """
        folder = None if isinstance(name_or_module, nn.Module) else Path(resolve(name_or_module))
        if folder is not None and (folder / MANIFEST).exists():
            checked_manifest(folder, POLICY)
        loaded = load_lm(name_or_module, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        lm, adapter = split(loaded)
        if adapter is not None and lora is not None:
            raise ConfigError(
                "lora= adds an adapter, and the model has one already: leave lora=None to train it on, or pass the "
                "merged model, model.merge_and_unload()"
            )
        if lora is None and not is_trained(lm):
            warnings.warn(
                "all weights of the model are frozen, as peft leaves them after merge_and_unload(), so agents would "
                "train only the critic: call model.requires_grad_(True) first",
                stacklevel=2,
            )
        folder = None if isinstance(name_or_module, nn.Module) else Path(resolve(name_or_module))
        if folder is not None and (folder / MANIFEST).exists():
            checked_manifest(folder, POLICY)
        trunk = None
        if critic not in ("shared", "separate"):
            if (Path(resolve(critic)) / MANIFEST).exists():
                checked_manifest(Path(resolve(critic)))
            classifier = load_classifier(critic, dtype=dtype, device=lm.device, trust_remote_code=trust_remote_code)
            trunk = classifier.base_model
        elif critic == "separate" and folder is not None:
            trunk = _saved_trunk(folder, lm)  # before an adapter changes the names of weights
        if lora is not None:
            adapter = with_lora(lm, lora)
        if critic == "separate" and trunk is None:
            trunk = disable_dropout(twin(lm.base_model))
        policy = cls(lm if adapter is None else adapter, trunk, temperature)
        if folder is not None:
            policy._load_critic(folder, critic)
        return policy

    def seed(self, seed: int) -> None:
        """Seeds the sampling of actions, which has a generator of its own; torch's global one is not used."""
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves all that is the policy's, see `TokenModel`; sampling goes on by a generator of the new device.

        The value head stays float32, as it is made.
        """
        super()._apply(fn, recurse)
        self._generators = ResponseGenerators()
        if self.generator is not None and self.generator.device != self.device:
            seed = seed_of(self.generator.get_state())
            self.generator = torch.Generator(self.device).manual_seed(seed)
        return self

    @torch.no_grad()
    def act(
        self, observation: Observation, deterministic: bool = False, action_masks: Any = None, with_value: bool = True
    ) -> Step:
        """Draws one token for each row, by cached decoding.

        Args:
            observation: as the environment gives it, rows `(B, W)` or one `(W,)`.
            deterministic: the most likely token instead of a draw.
            action_masks: bool `(B, V)`, the allowed actions; `None` allows all. `log_prob` is that of the masked
                distribution.
            with_value: off, `value` is zero and a separate critic does no work.
        """
        with self._own_precision():
            return self._act(observation, deterministic, action_masks, with_value)

    def _act(self, observation: Observation, deterministic: bool, action_masks: Any, with_value: bool) -> Step:
        hidden, batched = self._advance(observation)
        distribution = self.distribution(action_masks)
        if distribution.allowed is not None and not bool(distribution.allowed.any(-1).all()):
            raise ValueError("action_masks allow no token in some row: allow at least one in each")
        if self.rules:
            tokens = read_contexts(observation, self.device)[0].tokens
            log_probs = self.rules.log_probs(self.head(hidden), distribution, *tokens)  # (B, V)
        else:
            log_probs = distribution.log_probs(self.head(hidden))
        action = log_probs.argmax(-1) if deterministic else self.sample(log_probs.exp())
        log_prob = log_probs.gather(1, action[:, None])[:, 0]
        value = torch.zeros_like(log_prob)
        if with_value:
            value = self.value_head(self._critic_hidden(hidden).float())[:, 0]
        return Step(action, log_prob, value) if batched else Step(action[0], log_prob[0], value[0])

    @overload
    def generate(self, prompts: str, max_new_tokens: int = 64, **sampling: Any) -> str: ...

    @overload
    def generate(self, prompts: Sequence[Any], max_new_tokens: int = 64, **sampling: Any) -> Any: ...

    @overload
    def generate(
        self, prompts: Tensor, lengths: Tensor, max_new_tokens: int, stop: StopRule, deterministic: bool = False
    ) -> Responses: ...

    def generate(self, prompts: Any, *arguments: Any, **sampling: Any) -> Any:
        """Return what the policy writes after prompts: texts after texts, whole responses after token ids.

        >>> policy = ActorCritic.from_pretrained("tiny")
        >>> policy.generate("The film is", max_new_tokens=8, seed=0)  # doctest: +SKIP
        ' well can be pretty admira'
        >>> policy.generate(["The film is", "I liked"], top_p=0.9, temperature=0.7)  # doctest: +SKIP

        Args:
            prompts: A string or a conversation, whose continuation is returned, or a list of these, for a list. The
                other arguments are then those of `textgym.models.text_generation.continuations`: `max_new_tokens`,
                `deterministic`, `temperature`, `top_k`, `top_p`, `rules`, `stop`, `seed` and `tokenizer`. Or
                right-padded ids `(B, W)`, where W has room for the longest prompt with `max_new_tokens` more: their
                responses are what `act` would sample, faster, and a critic of its own is not asked for values.
            arguments: `max_new_tokens` of texts; of ids `lengths` `(B,)`, `max_new_tokens`, `stop` and
                `deterministic`.
            sampling: The same by name.

        Raises:
            ConfigError: If the policy has `rules`, which responses to ids do not follow.
        """
        if isinstance(prompts, Tensor):
            return self._respond(prompts, *arguments, **sampling)
        if is_one_text(prompts):
            return continuations(self, [prompts], *arguments, **sampling)[0]
        return continuations(self, prompts, *arguments, **sampling)

    def _respond(
        self, prompts: Tensor, lengths: Tensor, max_new_tokens: int, stop: StopRule, deterministic: bool = False
    ) -> Responses:
        if self.rules:
            raise ConfigError(
                f"generate does not follow rules={self.rules}: use act, or textgym.agents.runs.evaluation.generate"
            )
        prompts, lengths = prompts.to(self.device), lengths.to(self.device)
        num_rows, width = prompts.shape
        with on_device(self.device), self._own_precision():
            generator = self._generators.get(self, num_rows, width, max_new_tokens, stop)
            return generator.generate(prompts, lengths, deterministic)

    def predict(self, observation: Observation, deterministic: bool = True) -> Tensor:
        """The action of `act`, nothing else."""
        return self.act(observation, deterministic).action

    @torch.no_grad()
    def value(self, observation: Observation) -> Tensor:
        """Value `(B,)` of each state: by cached decoding where the cache has this shape, otherwise past the cache."""
        contexts, _ = read_contexts(observation, self.device)
        if self._decoder is not None and self._decoder.shape == contexts.shape:
            hidden, _ = self._advance(observation)
            with self._own_precision():
                return self.value_head(self._critic_hidden(hidden).float())[:, 0]
        return self.state_values(contexts.states())

    def evaluate(
        self, sequences: Sequences, entropy_gradient: bool = False, reference: TokenModel | None = None
    ) -> Evaluation:
        """Log-probs, values and entropies of whole sequences in one packed pass, with gradients.

        Args:
            sequences: whole sequences.
            entropy_gradient: whether gradients flow through the entropies.
            reference: the exact KL to it of the distribution in every state is evaluated too, with gradients of the
                policy alone; a sum over the vocabulary, and one pass of the reference.
        """
        if torch.is_grad_enabled():
            self.reset_cache()  # an update follows; some fused optimisers change weights without a trace
        states = sequences.states()
        hidden = states.hidden(self.lm)  # (M, d)
        log_prob, entropy = token_log_probs(
            hidden,
            self.head,
            sequences.actions,
            self.vocab_size,
            self.distribution_of(sequences),
            entropy_gradient=entropy_gradient,
        )
        value = self.state_values(states, hidden)
        kl = None if reference is None else sequences.pad(self._kl_to(reference, sequences, hidden))
        return Evaluation(sequences.pad(log_prob), sequences.pad(value), sequences.pad(entropy), kl)

    def _kl_to(self, reference: TokenModel, sequences: Sequences, hidden: Tensor) -> Tensor:
        """The exact KL `(M,)` of the distributions in the states before each response token."""
        with torch.no_grad():
            reference_hidden = reference.hidden(sequences.states())
        distribution = self.distribution_of(sequences)
        return full_kl(hidden, self.head, reference_hidden, reference.head, self.vocab_size, distribution)

    def evaluate_states(self, states: States, actions: Tensor, action_masks: Tensor | None = None) -> Evaluation:
        """Log-probs, values and entropies `(M,)` of one action in each state, with gradients through all three.

        Args:
            states: M states.
            actions: `(M,)` token ids.
            action_masks: bool `(M, V)`; `None` allows all.
        """
        if torch.is_grad_enabled():
            self.reset_cache()
        hidden = states.hidden(self.lm)
        distribution = self.distribution(action_masks)
        log_prob, entropy = token_log_probs(
            hidden, self.head, actions, self.vocab_size, distribution, entropy_gradient=True
        )
        return Evaluation(log_prob, self.state_values(states, hidden), entropy)

    @torch.no_grad()
    def sequence_values(self, sequences: Sequences) -> Tensor:
        """Values `(N, T)` of the states before each response token, in one packed pass of the critic."""
        return sequences.pad(self.state_values(sequences.states()))

    def state_values(self, states: States, hidden: Tensor | None = None) -> Tensor:
        """Values `(M,)` of states, in one packed pass of the critic, with gradients; float32, under autocast too.

        A critic that shares the policy's trunk takes its `hidden` states `(M, d)` where they are given.
        """
        if self.critic is not None or hidden is None:
            hidden = self.critic_hidden(states)
        with torch.autocast(hidden.device.type, enabled=False):
            return self.value_head(hidden.float())[:, 0]

    def critic_hidden(self, states: States) -> Tensor:
        """Return the last hidden state `(M, d)` of states in the critic's trunk, by one packed pass, with gradients."""
        return states.hidden(self.lm if self.critic is None else _Trunk(self.critic))

    def reset_cache(self) -> None:
        """Frees the key-value caches of policy and critic; captured steps are worth the memory of theirs."""
        super().reset_cache()
        self._critic_decoder = None
        self._generators.reset()

    def checkpoint_layers(self) -> None:
        """From now on an update keeps what goes into each layer alone, for less memory and more time."""
        for trunk in (self.lm.base_model, self.critic):
            if trunk is not None:
                checkpoint_layers(trunk)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the key-value caches of policy and critic, as they are now."""
        return super().cache_bytes + sum(x.nbytes for x in (self._critic_decoder, self._generators) if x is not None)

    def reference(self) -> TokenModel:
        """Return a frozen copy of the policy as it is now; with an adapter it shares the weights that stay frozen."""
        return self.frozen_copy()

    @property
    def lora(self) -> Any:
        """The peft model around the language model, or `None`."""
        return self.__dict__["lora"]

    @property
    def trained_model(self) -> Any:
        """The peft model around the language model; without an adapter, the language model."""
        return self.lm if self.lora is None else self.lora

    def plain_lm(self) -> Any:
        """Return the language model without adapters: a copy that they are merged into, or the model itself."""
        return self.lm if self.lora is None else merged(self.lora)

    def weights(self) -> dict[str, Tensor]:
        """What an engine loads: the language model's weights by their names in transformers, its adapter merged.

        Tied weights are there by each of their names.
        """
        weights: dict[str, Tensor] = self.plain_lm().state_dict()
        return weights

    def _write(self, folder: Path) -> None:
        """Write the language model in the format of transformers, and the critic beside it in safetensors."""
        lm, trunk = self.plain_lm(), self.critic
        if trunk is not None and is_twin(trunk, self.lm) and self.lora is not None:
            trunk = merged(self.lora, trunk).base_model
        save_plain(lm, folder)
        critic = {f"value_head.{name}": weight for name, weight in self.value_head.state_dict().items()}
        if trunk is not None:
            critic |= {f"critic.{name}": weight.contiguous() for name, weight in trunk.state_dict().items()}
        save_file({name: weight.clone() for name, weight in critic.items()}, folder / CRITIC_FILE)
        own = trunk is not None and _shapes(trunk) != _shapes(lm.base_model)
        form = {"separate": trunk is not None, "config": trunk.config.to_dict() if own else None}
        (folder / CRITIC_CONFIG).write_text(json.dumps(form))

    def sample(self, probabilities: Tensor) -> Tensor:
        """Samples one index `(B,)` from each row `(B, V)`, by one random number a row."""
        noise = torch.rand(len(probabilities), 1, device=self.device, generator=self.generator)
        return sample(probabilities, noise)

    def _load_critic(self, folder: Path, critic: str) -> None:
        if not (folder / CRITIC_CONFIG).exists() or critic not in ("shared", "separate"):
            return
        if json.loads((folder / CRITIC_CONFIG).read_text())["separate"] == (critic == "separate"):
            weights = load_file(folder / CRITIC_FILE, device=str(self.device))
            expected = {name for name in self.state_dict() if name.startswith(("value_head.", "critic."))}
            if not weights.keys() & SCALE:  # textgym 0.1 saved values without a scale
                expected -= SCALE
            if different := sorted(expected ^ set(weights)):
                raise DamagedFolderError(
                    f"{folder / CRITIC_FILE} has not the weights of this critic; they differ in {', '.join(different)}"
                )
            self.load_state_dict(weights, strict=False)

    def _critic_hidden(self, hidden: Tensor) -> Tensor:
        if self.critic is None:
            return hidden
        assert self._decoder is not None
        if not fits(self._critic_decoder, self._decoder.shape, self.device):
            self._critic_decoder = self._decoder.of_model(_Trunk(self.critic))
        return self._critic_decoder.advance(*self._decoder.seen)


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


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in module.state_dict().items()}


PolicyLike = ActorCritic | PreTrainedModel | str | os.PathLike[str]
"""What agents take for a policy."""


def as_policy(given: PolicyLike) -> ActorCritic:
    """Return a policy as it is, or make one of a language model or of its name.

    Raises:
        TypeError: something else.
    """
    if isinstance(given, ActorCritic):
        return given
    if isinstance(without_peft(given), PreTrainedModel | str | os.PathLike):
        return ActorCritic.from_pretrained(given)
    raise TypeError(
        f"a policy is an ActorCritic, a language model or its name, got {type(given).__name__}: pass "
        "ActorCritic.from_pretrained(name_or_model)"
    )


def _saved_trunk(folder: Path, lm: Any) -> Any:
    """A trunk of the form that the critic in a folder had; `None` if it was the policy's, or there was none."""
    path = folder / CRITIC_CONFIG
    saved: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"separate": False}
    if not saved["separate"]:
        return None
    if (config := saved["config"]) is None:
        return copy.deepcopy(lm.base_model)
    with torch.random.fork_rng(devices=[]):  # its weights are read afterwards
        kind = AutoConfig.for_model(config.pop("model_type"), **config)
        return disable_dropout(
            AutoModel.from_config(kind, dtype=lm.dtype, trust_remote_code=False).to(lm.device).eval()
        )
