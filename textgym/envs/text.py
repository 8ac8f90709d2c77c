"""TextEnv: token generation as a Gymnasium environment."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec

from textgym.data.rows import Row
from textgym.envs.config import NO_STEP_LIMIT, TextConfig, takes
from textgym.envs.interface import TextProperties
from textgym.envs.rendering import RENDER_MODES, checked_render_mode, render
from textgym.envs.reset_options import check_options, prompt_choice
from textgym.envs.spaces import as_action
from textgym.envs.text_task import Policy, TextTask
from textgym.errors import ConfigError
from textgym.models.machine.transfer import to_host
from textgym.models.token_model import TokenModel

ObsType = dict[str, np.ndarray]


class TextEnv(TextProperties, gym.Env[ObsType, int]):
    """Token-by-token generation of one text as a Gymnasium environment.

    ## Description
    The state is the context: a prompt and the tokens so far. An action appends one token. After a stop token, or at the
    length limit, reward functions score the completion.

    ## Action Space
    `Discrete(V)`: a token id. `action_masks()` returns which tokens are allowed: all, unless `min_new_tokens` or
    `action_mask` is set.

    ## Observation Space
    `Dict(input_ids=Box(0, V-1, (W,), int64), attention_mask=Box(0, 1, (W,), int64))` with
    `W = max_prompt_tokens + max_new_tokens`, right-padded: the slot of a token is its position, and each observation is
    the last one with one more slot filled.

    For an encoder-decoder model, with `decoder_start_ids`, `input_ids` and `attention_mask` are the prompt, with
    `W = max_prompt_tokens`, and `decoder_input_ids` and `decoder_attention_mask` are the start tokens and the response,
    with `W = len(decoder_start_ids) + max_new_tokens`. Each action fills one slot of the decoder's arrays.

    ## Rewards
    The last token (usually a stop token) has the score: the weighted sum of the reward functions, minus
    `missing_eos_penalty` if the row ended at the length limit. Every token has the KL term of `kl_mode`:

    * `"reference"`: `+ kl_coef * log pi_ref(a | s)`. An agent that adds `kl_coef` times the policy's entropy to its
      *return* maximises the KL-regularised return, because -KL = E[log pi_ref] + H(pi).
    * `"exact"`: `- kl_coef * KL estimate`, after `attach_policy(policy)`.
    * `"deferred"`: nothing; an agent with the behaviour policy's log-probs applies the penalty.

    By default agents of `textgym.agents` apply the penalty, and for all other agents the environment does, as in
    `"reference"`.

    Token-level rewards are known only when the text is complete, so here their sum is part of the score.

    ## Starting State
    A prompt, sampled without replacement until all have been used; `options={"prompt_index": i}` chooses one.

    ## Episode End
    An episode terminates at a stop token or stop string, and at the length limit, because the score is that of the text
    up to the limit. `length_limit="truncate"` reports the length limit as truncation, for agents that bootstrap there.

    ## Information
    At the end: `score`, `kl_reward` (sum of the KL terms of the episode), `response_tokens`, `is_success` (score above
    0), `ended_by_stop`, and `reward/<name>` for each function. In some configurations: `kl` (nats in the episode; only
    in `kl_mode="exact"`, because otherwise the environment does not know the policy), `metric/<name>` (logged by a
    reward function), `score_paid` (the score after scaling and clipping) and `reward_errors` (number of functions that
    failed). Unknown values, such as those of a function that returned `None`, have no key; there is no NaN. Text is in
    `env.unwrapped.transcript`, and in `info` with `info_text=True`.

    ## Arguments
    The fields of `textgym.envs.config.TextConfig`; `prompts`, `tokenizer` and `reward` have no default.

    Raises:
        ConfigError: If an argument has an invalid value; a `ValueError`.
        UnknownArgumentError: If an argument does not exist; a `TypeError`.
        ValueError: If other arguments are wrong, an action is outside the vocabulary, or `kl_mode="exact"` has no
            policy.
        gymnasium.error.ResetNeeded: If `step` is called before `reset`, or after the end of the episode.

    >>> import gymnasium as gym, textgym
    >>> env = gym.make("textgym/Text-v0", prompts=["Hello"], tokenizer="tiny",
    ...                reward=lambda completions: [1.0], max_new_tokens=2)
    >>> observation, info = env.reset(seed=0)
    >>> observation["input_ids"].shape, int(observation["attention_mask"].sum())
    ((3,), 1)
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

    @takes(TextConfig)
    def __init__(self, config: TextConfig) -> None:
        self.task = self.task_class(1, config)
        self.task.check_kl_mode()
        self._take_spaces()
        self.render_mode = checked_render_mode(config.render_mode)
        self.info_text = config.info_text
        self.info_action_mask = config.info_action_mask
        self._spec: EnvSpec | None = None

    @property
    def spec(self) -> EnvSpec | None:
        """The specification that `gym.make` made the environment from, if it did."""
        return self._spec

    @spec.setter
    def spec(self, spec: EnvSpec | None) -> None:
        self._spec = spec
        # Gymnasium passes max_episode_steps only to its TimeLimit wrapper, so read the registration of the id.
        if spec is not None and spec.id in gym.registry and gym.registry[spec.id].max_episode_steps is not None:
            raise ConfigError(f"{spec.id} is registered with max_episode_steps: {NO_STEP_LIMIT}")

    def fit(self, policy: TokenModel) -> None:
        """Compare a policy with tokenizer, reference and lengths; see `TextVectorEnv.fit`."""
        self.task.fit(policy)
        self._take_spaces()

    def _take_spaces(self) -> None:
        self.observation_space: gym.Space[Any] = self.task.observation_space
        self.action_space: gym.Space[Any] = self.task.action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[ObsType, dict[str, Any]]:
        """Start an episode; `options={"prompt_index": i}` chooses its prompt."""
        check_options(options, ["prompt_index"])
        super().reset(seed=seed)
        if seed is not None:
            self.task.forget_prompts()
        prompt = prompt_choice(options, 1, len(self.task.rows))
        self.task.begin(np.array([0]), self.task.next_prompts(1, self.np_random) if prompt is None else prompt)
        return self._observation(), self._with_mask({})

    def step(self, action: int) -> tuple[ObsType, float, bool, bool, dict[str, Any]]:
        """Append one token."""
        if not bool(self.task.episodes.alive[0]):
            raise gym.error.ResetNeeded("there is no episode under way: call env.reset() before env.step(action)")
        outcome = self.task.play(as_action(action, self.task.device))
        observation = self.task.episodes.observation()
        by_length, rewards, *shown = to_host(outcome.ends.by_length, outcome.rewards, *observation.values())
        truncated = bool(by_length[0]) and self.task.truncates
        info: dict[str, Any] = {key: value.item() for key, (value,) in outcome.infos.items() if outcome.known(key)[0]}
        if info and self.info_text:
            info |= self.transcript
        terminated = bool(outcome.ended[0]) and not truncated
        if self.render_mode == "human":
            self.render()
        shown_here = {key: value[0].numpy() for key, value in zip(observation, shown, strict=True)}
        return shown_here, float(rewards[0]), terminated, truncated, self._with_mask(info)

    def render(self) -> str | None:
        """Render the episode so far, as `render_mode` says."""
        finished = None if bool(self.task.episodes.alive[0]) else self.task.last[0]
        return render(self.render_mode, self.task, [self.transcript], [finished])[0]

    def close(self) -> None:
        """End the threads and processes of reward functions."""
        self.task.scorer.close()

    def action_masks(self) -> np.ndarray:
        """Return bool `(V,)`: the actions that are currently allowed."""
        return self.task.action_masks()[0].cpu().numpy()

    def replace_prompts(self, prompts: list[Row]) -> None:
        """Use other prompts in all episodes that begin after this call; observations may become wider."""
        super().replace_prompts(prompts)
        self.observation_space = self.task.observation_space

    def attach_policy(self, policy: Policy) -> None:
        """Set the policy of `kl_mode="exact"`; it needs `policy.log_prob(observation, action)`."""
        self.task.attach_policy(policy)

    @property
    def transcript(self) -> dict[str, Any]:
        """`prompt`, `completion` and the columns of the current episode, or of the one that has just ended."""
        return self.task.transcript(0)

    def _observation(self) -> ObsType:
        observation = self.task.episodes.observation()
        return {key: value[0].numpy() for key, value in zip(observation, to_host(*observation.values()), strict=True)}

    def _with_mask(self, info: dict[str, Any]) -> dict[str, Any]:
        return {**info, "action_mask": self.action_masks().astype(np.int8)} if self.info_action_mask else info
