"""check_text_env: check a text environment against the contracts of Gymnasium, SB3 and textgym."""

from __future__ import annotations

import copy
import math
import random
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from stable_baselines3.common.env_checker import check_env as sb3_check_env

from textgym.errors import CutPromptsWarning

ROWS, EPISODES = 3, 4
"""Number of rows of the vector environment that is compared, and of episodes that are run."""


def check_text_env(env: gym.Env[Any, Any], envs: Any = None, seed: int = 0) -> None:
    """Run a few episodes of random tokens in an environment and check them.

    The checks are:

    - `check_env` of Gymnasium and of Stable-Baselines3 reports no problem or warning.
    - Each observation is the previous one plus the chosen token, in a new object.
    - Reward and end flags have the types `float` and `bool`, and the flags match what ended the episode.
    - The components of the score add up to the score, and score and KL term to the rewards.
    - The same seed gives the same episode, and global random generators are not used.
    - A row of the vector environment equals the single environment.

    Args:
        env: A `TextEnv` with its original observations and actions; it may have wrappers of Gymnasium.
        envs: The vector environment with the same arguments. If it is not given and the environment comes from
            `gym.make`, it is made with `gym.make_vec`.
        seed: Seed of episodes and tokens.

    Raises:
        AssertionError: At the first problem; the message says how to fix it.

    >>> import gymnasium as gym, textgym
    >>> check_text_env(gym.make("textgym/Sentiment-v0", max_new_tokens=4))
    """
    _check_limit(env)
    for name, check in (("Gymnasium", _by_gymnasium), ("Stable-Baselines3", sb3_check_env)):
        _check_quietly(name, check, env.unwrapped)
    rng = np.random.default_rng(seed)
    for episode in range(EPISODES):
        _check_episode(env, rng, seed if episode == 0 else None, stop_rate=0.3 * (episode % 2))
    _check_seed(env, seed)
    if envs is None and env.spec is not None and env.spec.vector_entry_point is not None:
        envs = gym.make_vec(env.spec.id, num_envs=ROWS, **copy.deepcopy(env.spec.kwargs))
    if envs is not None:
        _check_rows(env, envs, rng)


def _by_gymnasium(env: gym.Env[Any, Any]) -> None:
    gymnasium_check_env(env, skip_render_check=True)


def _check_limit(env: gym.Env[Any, Any]) -> None:
    while isinstance(env, gym.Wrapper):
        assert not isinstance(env, gym.wrappers.TimeLimit), (
            "max_episode_steps ends episodes before they are scored: make the environment without it, and limit "
            "responses by max_new_tokens"
        )
        env = env.env


def _check_quietly(name: str, check: Callable[[Any], None], env: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", CutPromptsWarning)  # the checkers make the environment anew
        try:
            check(env)
        except Exception as error:  # warnings of the checkers count as problems
            raise AssertionError(f"{name}'s check_env reports: {error}") from error


def _check_episode(env: Any, rng: np.random.Generator, seed: int | None, stop_rate: float) -> None:
    """Check an episode of random allowed tokens, in which stop tokens have the probability `stop_rate`."""
    text = env.unwrapped
    observation, _ = env.reset(seed=seed)
    total, steps, ended = 0.0, 0, False
    while not ended:
        kept = {key: value.copy() for key, value in observation.items()}
        action = _token(text, env.unwrapped.action_masks(), rng, stop_rate)
        following, reward, terminated, truncated, info = env.step(action)
        steps, total = steps + 1, total + reward
        for name, value, kind in (
            ("reward", reward, float),
            ("terminated", terminated, bool),
            ("truncated", truncated, bool),
        ):
            assert type(value) is kind, (
                f"step returned {name}={value!r}, a {type(value).__name__}: return {kind.__name__}(...)"
            )
        assert math.isfinite(reward), f"the reward of step {steps} is {reward}: return a finite number"
        _check_one_token(kept, following, action)
        observation, ended = following, terminated or truncated
        assert ended or steps < text.max_new_tokens, (
            f"the episode continues after max_new_tokens={text.max_new_tokens} tokens: end it there"
        )
    _check_end(text, info, total, steps, terminated, truncated)


def _check_one_token(kept: dict[str, np.ndarray], following: dict[str, np.ndarray], action: int) -> None:
    part = "decoder_" if "decoder_input_ids" in kept else ""  # the response is the decoder's, if there is one
    slot = int(kept[f"{part}attention_mask"].sum())
    expected = {key: value.copy() for key, value in kept.items()}
    expected[f"{part}input_ids"][slot], expected[f"{part}attention_mask"][slot] = action, 1
    for key, value in expected.items():
        wrong = np.flatnonzero(value != following[key])
        assert not len(wrong), (
            f"{key} after token {action} is not the previous observation plus that token: it differs at the positions "
            f"{wrong.tolist()}, and the token belongs to position {slot}"
        )


def _check_end(text: Any, info: dict[str, Any], total: float, steps: int, terminated: bool, truncated: bool) -> None:
    assert terminated != truncated, (
        f"the episode ended with terminated={terminated} and truncated={truncated}: set exactly one"
    )
    missing = {"scored", "kl_reward", "response_tokens", "ended_by_stop"} - set(info)
    missing |= {"score"} - set(info) if info.get("scored", True) else set()
    assert not missing, f"the last info has no {sorted(missing)}: pass on what TextEnv puts there"
    assert info["response_tokens"] == steps, f"response_tokens is {info['response_tokens']} after {steps} steps"
    assert terminated or not info["ended_by_stop"], (
        "the end by a stop token was reported as truncation: return terminated=True"
    )
    assert truncated == (text.truncates and not info["ended_by_stop"]), (
        f"the length limit was reported with truncated={truncated}: the score covers the text as it is, so return "
        "terminated=True, unless length_limit='truncate'"
    )
    if not info["scored"]:
        assert math.isclose(total, info["kl_reward"], rel_tol=1e-4, abs_tol=1e-4), (
            f"the row has no score, but its rewards are {total:.6g} and not the KL term alone, {info['kl_reward']:.6g}"
        )
        return
    names, weights = text.scorer.names, text.scorer.weights
    score = sum(weight * info.get(f"reward/{name}", 0.0) for name, weight in zip(names, weights, strict=True))
    score -= text.missing_eos_penalty * (not info["ended_by_stop"])
    assert math.isclose(score, info["score"], abs_tol=1e-4), (
        f"the components add up to {score:.6g}, but the score is {info['score']:.6g}: make any other reward a reward "
        "function, so that it is logged"
    )
    paid = info.get("score_paid", info["score"]) + info["kl_reward"]
    assert math.isclose(paid, total, rel_tol=1e-4, abs_tol=1e-4), (
        f"score and KL term add up to {paid:.6g}, but the rewards to {total:.6g}: info must include all rewards"
    )


def _check_seed(env: Any, seed: int) -> None:
    def state() -> list[Any]:
        return [random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()]  # noqa: NPY002

    def episode() -> list[dict[str, list[int]]]:
        rng, ids, ended = np.random.default_rng(seed), [], False
        observation, _ = env.reset(seed=seed)
        while not ended:
            ids.append(_listed(observation))
            action = _token(env.unwrapped, env.unwrapped.action_masks(), rng, 0.0)
            observation, _, terminated, truncated, _ = env.step(action)
            ended = terminated or truncated
        return [*ids, _listed(env.reset()[0])]

    before = state()
    first = episode()
    assert state() == before, "reset or step used a global random generator: use self.np_random only"
    assert episode() == first, f"two episodes after reset(seed={seed}) differ: use self.np_random only"


def _listed(observation: dict[str, np.ndarray]) -> dict[str, list[int]]:
    return {key: value.tolist() for key, value in observation.items()}


def _check_rows(env: Any, envs: Any, rng: np.random.Generator) -> None:
    """Compare each row of the vector environment with the single one, with the same prompts and tokens."""
    text = env.unwrapped
    prompts = rng.integers(0, len(text.prompts), envs.num_envs)
    actions = rng.integers(0, text.vocab_size, (text.max_new_tokens, envs.num_envs))
    observations, _ = envs.reset(options={"prompt_index": prompts.tolist()})
    seen: list[Any] = [(observations, None, None, None)]
    seen += [envs.step(step)[:4] for step in actions]
    for row in range(envs.num_envs):
        outcome: Any = (env.reset(options={"prompt_index": int(prompts[row])})[0], None, None, None)
        for t, together in enumerate(seen):
            for key, value in outcome[0].items():
                assert np.array_equal(value, together[0][key][row]), (
                    f"row {row} of the vector environment has other {key} after {t} tokens than the single environment "
                    "with the same prompt and tokens"
                )
            for name, alone, batch in zip(
                ("reward", "terminated", "truncated"), outcome[1:], together[1:], strict=True
            ):
                assert alone is None or math.isclose(alone, batch[row], rel_tol=1e-3, abs_tol=1e-4), (
                    f"row {row} of the vector environment returned {name}={batch[row]} for token {t}, but the single "
                    f"environment {alone}: use the same code in both"
                )
            if t == len(actions) or outcome[2] or outcome[3]:
                break
            outcome = env.step(int(actions[t, row]))[:4]


def _token(text: Any, allowed: np.ndarray, rng: np.random.Generator, stop_rate: float) -> int:
    stops = [token for token in text.stop.ids if allowed[token]]
    others = np.setdiff1d(np.flatnonzero(allowed), stops)
    return int(rng.choice(stops if len(stops) and rng.random() < stop_rate else others))
