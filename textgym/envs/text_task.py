"""TextTask: prompts, episodes, rewards and KL of a batch of rows, which `TextEnv` and `TextVectorEnv` share."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from textgym.data.continuations import decode_continuation, ids_of_text
from textgym.data.encoding import encode
from textgym.data.messages import Text, content
from textgym.data.prompts import load_prompts
from textgym.data.rows import Row
from textgym.envs.config import KLMode, TextConfig
from textgym.envs.episodes import Ends, Episodes
from textgym.envs.kl_modes import check_kl_mode, kl_payer
from textgym.envs.model_checks import check_enough_positions, check_lengths, checked_decoder_start, known_vocabulary
from textgym.envs.prompt_ids import cut_prompts, padded_prompts, prompt_text
from textgym.envs.spaces import KLPayer, TokenSpace
from textgym.envs.step_outcome import StepOutcome
from textgym.envs.stopping import StopStrings, stop_rule
from textgym.errors import ConfigError
from textgym.models.actor_critic import ActorCritic
from textgym.models.architectures.positions import position_limit
from textgym.models.distributions.masks import ModelMask, as_action_mask, narrow
from textgym.models.fitting import check_same_size, check_stop_ids, check_tokenizer, stop_ids
from textgym.models.loading import load_tokenizer
from textgym.models.machine.devices import Device, resolve_device
from textgym.models.machine.profiled_phases import phase
from textgym.models.machine.transfer import to_device, to_host
from textgym.models.token_model import Observation, TokenModel
from textgym.rewards.engine.completions_to_score import Finished
from textgym.rewards.engine.scoring import Scorer, Scores
from textgym.rewards.kl import KLPenalty


class Policy(Protocol):
    """Argument of `attach_policy`: an object with the log-probs of actions."""

    def log_prob(self, observation: Observation, action: Any) -> Tensor:
        """Return the log-probs `(B,)` of actions `(B,)` in the states of an observation."""


class Tokens(NamedTuple):
    """Token ids of an episode, and which of the response the policy generated; `None` if it generated all."""

    prompt: list[int]
    response: list[int]
    generated: list[bool] | None


class LastEpisode(NamedTuple):
    """What stays of a row's last finished episode.

    Attributes:
        transcript: Prompt, completion, columns of the prompt, and what reward functions logged.
        tokens: Its token ids.
        rewards: What reward functions pay for each token of the response.
        score: Its score, as in infos; NaN if no reward function scored it.
    """

    transcript: dict[str, Any]
    tokens: Tokens
    rewards: np.ndarray
    score: float


class TextTask:
    """Prompts, stop rule, reward and KL penalty of B rows, by a config."""

    answers: ClassVar[bool] = False
    """Whether episodes have several turns with replies of the environment between them, see `answer`."""

    def __init__(self, num_rows: int, config: TextConfig) -> None:
        self.device = _device_of(config.device, config.reference)
        self.tokenizer = load_tokenizer(config.tokenizer)
        self.scorer = Scorer(
            config.reward,
            config.reward_weights,
            self.tokenizer,
            on_error=config.on_reward_error,
            timeout=config.reward_timeout,
            max_failures=config.max_reward_failures,
            scaling=config.score_scaling,
            clip=config.score_clip,
            device=self.device,
        )
        self.kl_mode_given = config.kl_mode
        self.kl_mode: KLMode = config.kl_mode or "reference"
        self.kl_coef = config.kl_coef
        self.kl_estimator = config.kl_estimator
        self.kl_clamp = config.kl_clamp
        self.truncates = config.length_limit == "truncate"
        self.missing_eos_penalty = config.missing_eos_penalty
        self.action_mask = as_action_mask(config.action_mask, self.device)
        if isinstance(self.action_mask, ModelMask):
            check_tokenizer(
                self.tokenizer, self.action_mask.model.lm, self.action_mask.model.vocab_size, "the action mask's model"
            )
        self.penalty = self._make_penalty(config.reference)
        if config.kl_mode is not None:
            self.check_kl_mode()
        self.vocab_size, model_stops = known_vocabulary(self.tokenizer, self.penalty)
        self.decoder_start = checked_decoder_start(config.decoder_start_ids, self.vocab_size, self.penalty)
        self.stop_strings = StopStrings(config.stop, self.tokenizer)
        self.stop_rule = stop_rule(config.stop, config.min_new_tokens, self.tokenizer).with_ids(model_stops)
        self.max_prompt_tokens, self.max_new_tokens = config.max_prompt_tokens, config.max_new_tokens
        self.add_special_tokens = config.add_special_tokens
        self.num_rows, self.width = num_rows, 0
        self.take_prompts(load_prompts(config.prompts))
        self.current = np.zeros(num_rows, dtype=np.int64)
        self.last: list[LastEpisode | None] = [None] * num_rows
        self.kl_sum = torch.zeros(num_rows, device=self.device)
        self.kl_paid = torch.zeros(num_rows, device=self.device)
        self.policy: Policy | None = None
        self.action_space = self._make_action_space()
        if self.penalty is not None:
            check_lengths(self.penalty.reference, "the reference", *self._longest())

    def _make_action_space(self) -> TokenSpace:
        return TokenSpace(
            self.vocab_size, self.stop_rule, self.kl_payer(), self.action_mask, self.decoder_start, self.tokenizer
        )

    def fit(self, policy: TokenModel) -> None:
        """Compare the policy with tokenizer, reference and lengths, and use its vocabulary and its stop tokens.

        The vocabulary of a model is often padded beyond the tokenizer's, and its generation config may have more stop
        tokens than the tokenizer. If something changes, the spaces are made again and current episodes end.

        Raises:
            ValueError: If they do not fit.
        """
        check_tokenizer(self.tokenizer, policy.lm, policy.vocab_size)
        if self.penalty is not None:
            check_same_size(policy, self.penalty.reference)
        stop = self.stop_rule.with_ids(stop_ids(policy.lm))
        check_stop_ids(stop.ids, policy.vocab_size, "the policy")
        check_lengths(policy, "the policy", *self._longest())
        if isinstance(policy, ActorCritic) and policy.critic is not None:
            rows = policy.critic.config.get_text_config(decoder=True).vocab_size
            check_tokenizer(self.tokenizer, policy.critic, rows, "the critic")
            check_enough_positions(policy.critic.config, "the critic", *self._longest())
        if (policy.vocab_size, stop) != (self.vocab_size, self.stop_rule):
            self.vocab_size, self.stop_rule = policy.vocab_size, stop
            self._lay_out(self.width)
            self.action_space = self._make_action_space()

    def _longest(self) -> tuple[int, int, int]:
        """Return the most tokens of a prompt, of a response, and before it in a decoder."""
        return int(self.prompt_lengths.max()), self.max_new_tokens, len(self.decoder_start)

    def attach_policy(self, policy: Policy) -> None:
        """Set the policy of `kl_mode="exact"`.

        Raises:
            ConfigError: If the policy has `rules`, since its log-probs would not be those of the sampled tokens.
        """
        if isinstance(policy, ActorCritic) and policy.rules:
            raise ConfigError(f"kl_mode='exact' computes log-probs without rules={policy.rules}: leave one of them out")
        if isinstance(policy, TokenModel):
            check_tokenizer(self.tokenizer, policy.lm, policy.vocab_size)
        self.policy = policy
        if self.penalty is not None:  # otherwise the KL of equal models would not be 0; policies without one have 1
            self.penalty.reference.temperature = getattr(policy, "temperature", 1.0)

    @property
    def restricts_actions(self) -> bool:
        """Whether any action is ever masked out."""
        return self.episodes.restricts_actions() or self.action_mask is not None

    def action_masks(self) -> Tensor:
        """Return bool `(B, V)`: the actions that are currently allowed, by `min_new_tokens` and the action mask."""
        allowed = self.episodes.action_masks()
        if self.action_mask is None:
            return allowed
        mask = self.action_mask(self.episodes.observation()).to(self.device)
        if mask.shape != allowed.shape:
            raise ValueError(
                f"action_mask must return a bool array of shape {tuple(allowed.shape)}, rows and tokens of the "
                f"vocabulary, got {tuple(mask.shape)}"
            )
        if bool((self.episodes.alive & ~mask.any(-1)).any()):
            row = int((self.episodes.alive & ~mask.any(-1)).nonzero()[0])
            raise ValueError(
                f"action_mask allows no token in row {row}, after {self.transcript(row)['completion']!r}: let it allow "
                "at least one in every state"
            )
        return narrow(allowed, mask)

    def take_prompts(self, rows: list[Row]) -> None:
        """Use these rows of `load_prompts` in all episodes that begin after this call.

        Without `max_prompt_tokens`, longer prompts than before make observations wider and end the current episodes.
        """
        self.rows = rows
        self.prompt_texts = [prompt_text(row["prompt"], self.tokenizer) for row in rows]
        encoded = self._encode_prompts([row["prompt"] for row in rows])
        self.prompt_tokens = np.array([len(ids) for ids in encoded])  # before any are cut
        width = self.max_prompt_tokens or min(max(map(len, encoded)), self._longest_prompt())
        if width > self.width:
            self._lay_out(width)
        self.prompt_ids, self.prompt_lengths = padded_prompts(
            cut_prompts(encoded, self.width, self.tokenizer.bos_token_id, self.max_prompt_tokens), rows
        )
        self.queue: list[int] = []

    def _lay_out(self, width: int) -> None:
        """Make episodes for prompts of at most `width` tokens, and the space of their observations."""
        self.width = width
        pad = self.tokenizer.pad_token_id
        self.episodes = Episodes(
            self.num_rows,
            width,
            self.max_new_tokens,
            self.stop_rule,
            self.vocab_size,
            self.tokenizer.eos_token_id if pad is None else pad,
            self.device,
            self.decoder_start,
        )
        spaces: dict[str, gym.spaces.Space[Any]] = {}
        for part, slots in self.episodes.widths.items():
            spaces[f"{part}input_ids"] = gym.spaces.Box(0, self.vocab_size - 1, (slots,), np.int64)
            spaces[f"{part}attention_mask"] = gym.spaces.Box(0, 1, (slots,), np.int64)
        self.observation_space = gym.spaces.Dict(spaces)

    def _longest_prompt(self) -> int:
        """Return the maximum length of prompts for the reference and the tokenizer, if they have one."""
        limit = int(self.tokenizer.model_max_length)
        if self.penalty is not None:
            limit = min(limit, position_limit(self.penalty.reference.lm.config) or limit)
        return max(1, limit - (0 if self.decoder_start else self.max_new_tokens))

    def forget_prompts(self) -> None:
        """Start a new epoch of prompts, after a new seed."""
        self.queue = []

    def next_prompts(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Return the indices `(count,)` of the next prompts, without replacement until all have been used."""
        while len(self.queue) < count:
            self.queue += rng.permutation(len(self.rows)).tolist()
        sampled, self.queue = self.queue[:count], self.queue[count:]
        return np.asarray(sampled)

    def begin(self, rows: np.ndarray, prompts: np.ndarray) -> None:
        """Start new episodes in rows (indices) with prompts (indices)."""
        index = self.episodes.begin(rows, self.prompt_ids[prompts], self.prompt_lengths[prompts])
        self.current[rows] = prompts
        self.kl_sum[index] = self.kl_paid[index] = 0.0

    def play(self, actions: Tensor) -> StepOutcome:
        """Append one token `(B,)` to every row that is alive, and compute its reward.

        Raises:
            ValueError: If an action is outside the vocabulary, or `kl_mode="exact"` has no policy.
        """
        given, actions = actions, actions.clamp(0, self.vocab_size - 1)
        ends = self.episodes.ends(actions)
        outside = (given != actions) & self.episodes.alive
        outside, by_stop, by_length, alive = to_host(outside, *ends, self.episodes.alive)  # the host waits here
        if outside.any():
            raise ValueError(
                f"actions {given.cpu()[outside].tolist()} are outside the vocabulary: use token ids from 0 to "
                f"{self.vocab_size - 1}"
            )
        kl_reward = self._kl_reward(actions)
        self.episodes.append(actions, ends, alive.numpy())
        if self.stop_strings.texts:
            ends = self._end_by_string(actions, ends)
            by_stop, by_length = to_host(*ends)
        if by_stop.any() and (answered := self.answer(ends, by_stop.numpy())) is not ends:
            ends = answered
            by_stop, by_length = to_host(*ends)
        ended = (by_stop | by_length).numpy()
        rewards = torch.zeros_like(self.kl_paid) if kl_reward is None else kl_reward
        infos: dict[str, np.ndarray] = {}
        if ended.any():
            score, infos = self._settle(np.flatnonzero(ended), by_stop.numpy())
            rewards = rewards + score
        return StepOutcome(rewards, ends, ended, infos)

    @property
    def takes_whole_responses(self) -> bool:
        """Whether a response consists only of the policy's tokens, until a stop token or the length limit.

        It is False with stop strings, an `action_mask`, a KL term in each step's reward, or replies of the environment.
        """
        return not (self.stop_strings.texts or self.action_mask or self.kl_mode != "deferred" or self.answers)

    def submit(self, tokens: Tensor, lengths: Tensor) -> StepOutcome:
        """End the episodes of all rows, which have just begun, with whole responses.

        Args:
            tokens: Responses `(B, T)`.
            lengths: Lengths of the responses, `(B,)`.

        Raises:
            ValueError: If the environment does not support this, see `takes_whole_responses`.
        """
        if not self.takes_whole_responses:
            raise ValueError(
                "whole responses can be submitted only with kl_mode='deferred', without stop strings, without "
                "action_mask and without replies of the environment: step through it instead"
            )
        tokens, lengths = tokens.to(self.device), lengths.to(self.device)  # an engine may be on another device
        by_stop, ended_by_stop = self.episodes.extend(tokens, lengths)
        score, infos = self._settle(np.arange(len(lengths)), ended_by_stop)
        return StepOutcome(score, Ends(by_stop, ~by_stop), np.ones(len(lengths), dtype=bool), infos)

    def answer(self, ends: Ends, by_stop: np.ndarray) -> Ends:
        """Append replies of the environment to rows whose turn ended, and return which episodes ended.

        Here there are no replies, and all of these episodes end. A subclass with replies sets `answers`.

        Args:
            ends: Rows whose turn ended.
            by_stop: Rows whose turn ended by a stop token or stop string, bool `(B,)` on the host.
        """
        return ends

    def transcript(self, row: int) -> dict[str, Any]:
        """Return prompt, completion and columns of a row's last finished episode, or of its current one."""
        last = self.last[row]
        if last is not None and not bool(self.episodes.alive[row]):
            return last.transcript
        return self.current_transcripts([row])[0]

    def current_transcripts(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Return prompt, completion and columns of the current episodes of rows."""
        return [
            self._transcript(row, self._completion(row, *ids)) for row, ids in zip(rows, self._ids(rows), strict=True)
        ]

    def current_tokens(self, rows: Sequence[int]) -> list[Tokens]:
        """Return the tokens of the current episodes of rows."""
        return self._tokens(rows, self._ids(rows))

    def _tokens(self, rows: Sequence[int], ids: Sequence[tuple[list[int], list[int]]]) -> list[Tokens]:
        """Return the tokens of rows, of which the ids are known."""
        replied = self.episodes.replied
        if not replied[rows].any():
            return [Tokens(prompt, response, None) for prompt, response in ids]
        [generated] = to_host(self.episodes.generated)
        return [
            Tokens(prompt, response, generated[row, : len(response)].tolist() if replied[row] else None)
            for row, (prompt, response) in zip(rows, ids, strict=True)
        ]

    def _kl_reward(self, actions: Tensor) -> Tensor | None:
        """Return the KL term of the reward of each row's next token, `(B,)`; `None` if the environment has none."""
        if self.kl_mode == "exact" and self.policy is None:
            raise ValueError(
                "kl_mode='exact' needs the policy's log-probs: call env.unwrapped.attach_policy(policy) first, "
                "or use kl_mode='reference'"
            )
        if self.penalty is None or self.kl_mode == "deferred":
            return None
        observation = self.episodes.observation()
        extra = (self.action_masks(),) if self.restricts_actions else ()
        reference = self.penalty.reference.log_prob(observation, actions, *extra).to(self.device)
        alive = self.episodes.alive
        if self.kl_mode == "reference":  # the other part of the KL, log pi, is the entropy bonus in the agent's loss
            kl = torch.where(alive, -reference, 0.0)
        else:
            assert self.policy is not None
            log_prob = torch.as_tensor(self.policy.log_prob(observation, actions, *extra)).to(self.device).float()
            kl = self.penalty.of_log_probs(log_prob, reference, alive)
            self.kl_sum += kl
        kl_reward = self.penalty.charge(torch.zeros_like(kl), kl)
        self.kl_paid += kl_reward
        return kl_reward

    def _end_by_string(self, actions: Tensor, ends: Ends) -> Ends:
        """Return the ends with those by stop strings, which only the text of a response shows."""
        playing, tokens = (x.numpy() for x in to_host(self.episodes.alive | ends.by_length, actions))
        long_enough = self.episodes.host_lengths - self.episodes.host_prompt_lengths > self.episodes.stop.min_new_tokens
        rows = np.flatnonzero(playing & long_enough & self.stop_strings.can_complete(tokens)).tolist()
        if not rows:
            return ends
        turns = zip(rows, self._ids(rows), strict=True)
        hits = [row for row, ids in turns if self.stop_strings.found_in(self._turn(row, *ids), self._early(row, *ids))]
        by_string = torch.zeros_like(ends.by_stop)
        by_string[hits] = True
        self.episodes.alive &= ~by_string
        return Ends(ends.by_stop | by_string, ends.by_length & ~by_string)

    def _settle(self, rows: np.ndarray, by_stop: np.ndarray) -> tuple[Tensor, dict[str, np.ndarray]]:
        """Score all rows that ended in one call, and return the score of every row `(B,)`, and the infos."""
        finished = self.finished(rows)
        with phase("reward"):
            scores = self.scorer(finished)
        penalty = self.missing_eos_penalty * (scores.scored & ~by_stop[rows])  # the reward without a score is 0
        paid = scores.score - penalty
        for rewards, row_penalty in zip(scores.rewards, penalty, strict=True):
            rewards[-1] -= row_penalty
        self._remember(rows.tolist(), finished, scores, penalty)
        [everywhere] = to_device(self.device, torch.from_numpy(_scatter(paid, rows, len(by_stop))).float())
        kl_paid, kl_sum = np.zeros(len(rows)), np.zeros(len(rows))
        if self.kl_mode != "deferred":
            kl_paid, kl_sum = (x.numpy().astype(np.float64)[rows] for x in to_host(self.kl_paid, self.kl_sum))
        values: dict[str, np.ndarray] = {
            "score": scores.raw - penalty,
            "scored": scores.scored,
            "kl_reward": kl_paid,
            "response_tokens": np.array([len(ids) for ids in finished.completion_ids], dtype=np.int64),
            "is_success": scores.raw - penalty > 0,
            "ended_by_stop": by_stop[rows],
            **{f"reward/{name}": values for name, values in scores.components.items()},
            **{f"metric/{name}": np.full(len(rows), value) for name, value in scores.metrics.items()},
        }
        if self.kl_mode == "exact":  # in other modes the environment does not know the policy
            values["kl"] = kl_sum
            if self.penalty is not None:
                self.penalty.controller.update(float(values["kl"].mean()), len(rows))
        if self.scorer.scale.active:
            values["score_paid"] = paid
        if self.scorer.on_error != "raise":
            values["reward_errors"] = scores.errors
        return everywhere, {key: _scatter(value, rows, len(by_stop)) for key, value in values.items()}

    def finished(self, rows: np.ndarray) -> Finished:
        """Return the arguments of reward functions for rows (indices) that have ended."""
        columns = [self.rows[index] for index in self.current[rows]]
        names = [name for name in columns[0] if name != "prompt"]
        ids = self._ids(rows.tolist())
        texts = [self._completion(row, *parts) for row, parts in zip(rows.tolist(), ids, strict=True)]
        text_ids = [self._text_ids(*parts, text) for parts, text in zip(ids, texts, strict=True)]
        return Finished(
            prompts=[column["prompt"] for column in columns],
            completions=[
                text if isinstance(column["prompt"], str) else [{"role": "assistant", "content": text}]
                for text, column in zip(texts, columns, strict=True)
            ],
            prompt_ids=[prompt for prompt, _ in ids],
            completion_ids=[response for _, response in ids],
            columns={name: [column[name] for column in columns] for name in names},
            text_ids=text_ids,
        )

    def _remember(self, rows: list[int], finished: Finished, scores: Scores, penalty: np.ndarray) -> None:
        """Store what stays of the episodes of rows that ended."""
        ids = list(zip(finished.prompt_ids, finished.completion_ids, strict=True))
        for i, (row, tokens) in enumerate(zip(rows, self._tokens(rows, ids), strict=True)):
            logged = {name: values[i] for name, values in scores.columns.items()}
            transcript = {**logged, **self._transcript(row, content(finished.completions[i]))}
            score = float(scores.raw[i] - penalty[i]) if scores.scored[i] else math.nan
            self.last[row] = LastEpisode(transcript, tokens, scores.rewards[i], score)

    def _transcript(self, row: int, completion: str) -> dict[str, Any]:
        index = self.current[row]
        columns = copy.deepcopy(self.rows[index])  # a caller who changes them must not change the prompts
        return {**columns, "prompt": self.prompt_texts[index], "completion": completion}

    def _ids(self, rows: Sequence[int]) -> list[tuple[list[int], list[int]]]:
        """Return the ids of prompt and response of rows."""
        if not rows:
            return []
        [ids] = to_host(self.episodes.input_ids)
        first, last = self.episodes.host_prompt_lengths, self.episodes.host_lengths
        return [(ids[row, : first[row]].tolist(), ids[row, first[row] : last[row]].tolist()) for row in rows]

    def _completion(self, row: int, prompt: list[int], response: list[int]) -> str:
        """Return a row's response as text, without the stop token or stop string that ended it."""
        return self.stop_strings.cut(self._turn(row, prompt, response), self._early(row, prompt, response))

    def _early(self, row: int, prompt: list[int], response: list[int]) -> int:
        """Return the length of the part of `_turn` in which no stop string may end.

        It is the part in the first `min_new_tokens` tokens of the response.
        """
        minimum = self.episodes.stop.min_new_tokens
        if not (minimum and self.stop_strings.texts):
            return 0
        return len(self._turn(row, prompt, response[:minimum]))

    def _turn(self, row: int, prompt: list[int], response: list[int]) -> str:
        """Return the text of the row's current or last turn, without stop tokens; here it is the whole response."""
        return self._decode(self._context(prompt), response)

    def _context(self, prompt: list[int]) -> list[int]:
        """What a response follows: its prompt, or the start tokens of an encoder-decoder model's decoder."""
        return list(self.decoder_start) or prompt

    def _decode(self, context: list[int], ids: list[int]) -> str:
        return decode_continuation(self.tokenizer, context, self._without_stop(ids))

    def _without_stop(self, ids: list[int]) -> list[int]:
        while ids and ids[-1] in self.episodes.stop.ids:
            ids = ids[:-1]
        return ids

    def _text_ids(self, prompt: list[int], response: list[int], text: str) -> list[int]:
        """Return the tokens of a response's text, that is, before the stop token or stop string."""
        ids = self._without_stop(response)
        cut = self.stop_strings.texts and not self.answers
        return ids_of_text(self.tokenizer, self._context(prompt), ids, text) if cut else ids

    def _make_penalty(self, reference: str | Path | nn.Module | None) -> KLPenalty | None:
        if reference is None:  # agents then use their initial policy as the reference
            return None
        return KLPenalty(reference, self.kl_coef, self.kl_estimator, self.kl_clamp, device=self.device)

    def check_kl_mode(self) -> None:
        """Check that the environment can apply the KL penalty in `kl_mode`; not needed if an agent applies it.

        Raises:
            ValueError: If it cannot.
        """
        settings = self.kl_coef, self.kl_estimator, self.kl_clamp
        check_kl_mode(self.kl_mode, self.penalty, *settings, self.action_mask)

    def kl_payer(self) -> KLPayer:
        """Return what applies the KL penalty."""
        return kl_payer(self.kl_mode, self.kl_coef)

    def _encode_prompts(self, prompts: Sequence[Text]) -> list[list[int]]:
        return encode(
            prompts,
            self.tokenizer,
            add_generation_prompt=True,
            add_special_tokens=self.add_special_tokens,
            add_eos=bool(self.decoder_start),  # encoders were trained with EOS after their input
        )


def _device_of(device: Device, reference: str | Path | nn.Module | None) -> torch.device:
    """Return the device of an environment: the given one, or else that of a reference that is a module."""
    if device is None and isinstance(reference, nn.Module):
        return next(reference.parameters()).device
    return resolve_device(device)


def _scatter(values: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
    """Return values of some rows as an array of all rows, zero in the others."""
    array = np.zeros(count, dtype=values.dtype)
    array[rows] = values
    return array
