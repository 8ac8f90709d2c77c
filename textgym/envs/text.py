"""TextEnv: token generation as a Gymnasium environment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from torch import nn

from textgym.envs.rendering import RENDER_MODES, checked_render_mode, render
from textgym.envs.text_task import KLMode, MaskSpec, Policy, TextTask, prompt_choice
from textgym.models.machine.devices import Device
from textgym.models.machine.transfer import to_host
from textgym.rewards.engine.scaling import Scaling
from textgym.rewards.engine.scoring import OnRewardError, RewardSpec
from textgym.rewards.kl import Estimator, KLController

ObsType = dict[str, np.ndarray]


class TextEnv(gym.Env[ObsType, int]):
    """One row of text, written token by token.

    ## Description
    The state is the context: a prompt and the tokens written so far. An action appends one token. When a stop token is
    written, or the length limit is reached, reward functions score the completion.

    ## Action Space
    `Discrete(V)`: a token id. `action_masks()` says which are allowed; all are, unless `min_new_tokens` or
    `action_mask` is set.

    ## Observation Space
    `Dict(input_ids=Box(0, V-1, (W,), int64), attention_mask=Box(0, 1, (W,), int64))` with
    `W = max_prompt_tokens + max_new_tokens`, right-padded: a token's slot is its position, and each observation is the
    last one with one slot filled.

    For an encoder-decoder model, with `decoder_start_ids`, `input_ids` and `attention_mask` are the prompt alone, with
    `W = max_prompt_tokens`, and `decoder_input_ids` and `decoder_attention_mask` are the start tokens and the response,
    with `W = len(decoder_start_ids) + max_new_tokens`; one slot of these two is filled.

    ## Rewards
    On the last token (EOS included) the score: the weighted sum of the reward functions, less `missing_eos_penalty` if
    the row ended by length. On every token the KL term, by `kl_mode`:

    * `"reference"`: `+ kl_coef * log pi_ref(a | s)`. With beta times the entropy of the policy in the agent's own
      objective this is the KL-regularised return, since -KL = E[log pi_ref] + H(pi).
    * `"exact"`: `- kl_coef * KL estimate`, after `attach_policy(policy)`.
    * `"deferred"`: nothing here; an agent that holds the behaviour log-probs pays it.

    Token-level rewards are known only when the text is complete, so here their sum is part of the score.

    ## Starting State
    A prompt, drawn without replacement until all have been seen; `options={"prompt_index": i}` chooses one.

    ## Episode End
    Terminated by a stop token or stop string, and by the length limit, since the score is paid on the capped text.
    `length_limit="truncate"` reports the length limit as truncation, for agents that bootstrap there.

    ## Information
    At the end: `score`, `kl_reward` (the KL term paid in the episode), `response_tokens`, `is_success` (score above 0),
    `ended_by_stop`, and `reward/<name>` for each function. Where they occur: `kl` (nats in the episode, in
    `kl_mode="exact"`: else the environment does not know the policy), `metric/<name>` (what a function logged),
    `score_paid` (the score as scaled and clipped) and `reward_errors` (functions that failed). What is unknown has no
    key, as a function that gave `None`; there is no NaN. Text is in `env.unwrapped.transcript`, and in `info` with
    `info_text=True`.

    ## Arguments
    Args:
        prompts: list of strings, or of dicts with a `prompt` and any columns; a .jsonl or .txt path; a `datasets`
            object; a `"module:attribute"` string.
        tokenizer: name, path or tokenizer; `"tiny"` is the embedded one.
        reward: a reward function, a `"module:attribute"` string, a `RewardModel` or its name; or a list of them.
        reward_weights: one for each function; a function of weight 0 is only reported.
        on_reward_error: where a function breaks its contract, `"raise"`, or count it, warn once and go on:
            `"penalise"` takes its value for -1, `"skip"` leaves the row out of it.
        reward_timeout: seconds that an async reward function has.
        score_scaling: `"running"` takes the running mean off scores and divides them by their running deviation,
            `"running_std"` only divides.
        score_clip: scores are then cut to -score_clip and score_clip.
        max_prompt_tokens: longer prompts are cut from the left.
        max_new_tokens: length limit of a completion.
        min_new_tokens: before so many tokens the stop tokens are masked out.
        stop: stop strings or token ids, besides the tokenizer's EOS.
        reference: model that the KL is measured to: name, path, or model.
        kl_coef: beta, in reward a nat, or a controller.
        kl_estimator: `"k1"`, `"k2"`, `"k3"` or `"full"`.
        kl_mode: `"reference"`, `"exact"` or `"deferred"`.
        kl_clamp: what a token pays for is cut to -kl_clamp and kl_clamp nats.
        action_mask: `TopPMask`, `TopKMask` or any function of the observation that returns the allowed tokens, bool
            `(B, V)`; it narrows `action_masks()`, and the reference is narrowed alike.
        missing_eos_penalty: taken off the score of a row that ended by length.
        length_limit: `"terminate"` or `"truncate"`.
        decoder_start_ids: for encoder-decoder models, the token ids that the decoder begins with, as
            `policy.decoder_start_ids` says them.
        render_mode: `"ansi"`, `"human"` or `"html"`; others warn.
        device: where the episodes are, and models that are given by name. `None`: where the reference is, if a model
            is given as one, and the CPU otherwise. Models that are given stay where they are.
        info_text: put prompt, completion and columns into `info` at the end.
        info_action_mask: put `action_mask` into every `info`.

    Raises:
        ValueError: bad arguments, an action outside the vocabulary, or `kl_mode="exact"` without a policy.
        gymnasium.error.ResetNeeded: `step` before `reset`, or after the end.

    >>> import gymnasium as gym, textgym
    >>> env = gym.make("textgym/Text-v0", prompts=["Hello"], tokenizer="tiny",
    ...                reward=lambda completions: [1.0], max_new_tokens=2)
    >>> observation, info = env.reset(seed=0)
    >>> observation["input_ids"].shape, int(observation["attention_mask"].sum())
    ((66,), 1)
    >>> env.step(5)[1:4]
    (0.0, False, False)
    >>> env.step(6)[1:4]
    (1.0, True, False)
    """

    metadata: dict[str, Any] = {  # noqa: RUF012  (as Gymnasium declares it)
        "render_modes": list(RENDER_MODES),
        "render_fps": 8,
    }
    task_class: type[TextTask] = TextTask

    def __init__(
        self,
        prompts: Any,
        tokenizer: Any,
        reward: RewardSpec | Sequence[RewardSpec],
        *,
        reward_weights: Sequence[float] | None = None,
        on_reward_error: OnRewardError = "raise",
        reward_timeout: float | None = None,
        score_scaling: Scaling | None = None,
        score_clip: float | None = None,
        max_prompt_tokens: int = 64,
        max_new_tokens: int = 32,
        min_new_tokens: int = 0,
        stop: Sequence[str | int] = (),
        reference: str | nn.Module | None = None,
        kl_coef: float | KLController = 0.0,
        kl_estimator: Estimator = "k1",
        kl_mode: KLMode = "reference",
        kl_clamp: float | None = None,
        action_mask: MaskSpec | None = None,
        missing_eos_penalty: float = 0.0,
        length_limit: Literal["terminate", "truncate"] = "terminate",
        decoder_start_ids: Sequence[int] = (),
        render_mode: str | None = None,
        device: Device = None,
        info_text: bool = False,
        info_action_mask: bool = False,
    ) -> None:
        self.task = self.task_class(
            1,
            prompts=prompts,
            tokenizer=tokenizer,
            reward=reward,
            reward_weights=reward_weights,
            on_reward_error=on_reward_error,
            reward_timeout=reward_timeout,
            score_scaling=score_scaling,
            score_clip=score_clip,
            max_prompt_tokens=max_prompt_tokens,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            stop=stop,
            reference=reference,
            kl_coef=kl_coef,
            kl_estimator=kl_estimator,
            kl_mode=kl_mode,
            kl_clamp=kl_clamp,
            action_mask=action_mask,
            missing_eos_penalty=missing_eos_penalty,
            length_limit=length_limit,
            decoder_start_ids=decoder_start_ids,
            device=device,
        )
        self.observation_space: gym.Space[Any] = self.task.observation_space
        self.action_space: gym.Space[Any] = self.task.action_space
        self.render_mode = checked_render_mode(render_mode)
        self.info_text, self.info_action_mask = info_text, info_action_mask
        self._score: float | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[ObsType, dict[str, Any]]:
        """Starts an episode; `options={"prompt_index": i}` chooses its prompt."""
        super().reset(seed=seed)
        if seed is not None:
            self.task.forget_prompts()
        prompt = prompt_choice(options, 1, len(self.task.rows))
        self.task.begin(np.array([0]), self.task.draw(1, self.np_random) if prompt is None else prompt)
        self._score = None
        return self._observation(), self._with_mask({})

    def step(self, action: int) -> tuple[ObsType, float, bool, bool, dict[str, Any]]:
        """Appends one token."""
        if not bool(self.task.episodes.alive[0]):
            raise gym.error.ResetNeeded("there is no episode under way: call env.reset() before env.step(action)")
        outcome = self.task.play(torch.tensor([int(action)], device=self.task.device))
        observation = self.task.episodes.observation()
        by_length, rewards, *shown = to_host(outcome.ends.by_length, outcome.rewards, *observation.values())
        truncated = bool(by_length[0]) and self.task.truncates
        info: dict[str, Any] = {key: value.item() for key, (value,) in outcome.infos.items() if not np.isnan(value)}
        if info:
            self._score = info["score"]
            if self.info_text:
                info |= self.transcript
        terminated = bool(outcome.ended[0]) and not truncated
        if self.render_mode == "human":
            self.render()
        shown_here = {key: value[0].numpy() for key, value in zip(observation, shown, strict=True)}
        return shown_here, float(rewards[0]), terminated, truncated, self._with_mask(info)

    def render(self) -> str | None:
        """The episode so far, see `render_mode`."""
        return render(self.render_mode, self.transcript, self._score)

    def action_masks(self) -> np.ndarray:
        """Bool `(V,)`: the actions that are allowed now."""
        return self.task.action_masks()[0].cpu().numpy()

    def attach_policy(self, policy: Policy) -> None:
        """Hands over the policy whose exact KL is paid in `kl_mode="exact"`: `policy.log_prob(observation, action)`."""
        self.task.attach_policy(policy)

    @property
    def transcript(self) -> dict[str, Any]:
        """`prompt`, `completion` and the columns of the episode under way, or just ended."""
        return self.task.transcript(0)

    def _observation(self) -> ObsType:
        observation = self.task.episodes.observation()
        return {key: value[0].numpy() for key, value in zip(observation, to_host(*observation.values()), strict=True)}

    def _with_mask(self, info: dict[str, Any]) -> dict[str, Any]:
        return {**info, "action_mask": self.action_masks()} if self.info_action_mask else info
