"""Rewards as the environments pay and report them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from textgym.envs.text import TextEnv
from textgym.envs.vector import TextVectorEnv
from textgym.models.distributions.masks import TopKMask
from textgym.rewards.kl import AdaptiveKL
from textgym.testing import assert_close, byte_tokenizer, mock_lm, terms_of

FORWARD = terms_of(mock_lm())

EOS, PAD = 256, 257
TEMPLATE = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def write(env: Any, ids: list[int]) -> tuple[float, dict[str, Any]]:
    """Plays these tokens; the reward of the last one, and its info."""
    for token in ids:
        _, reward, _, _, info = env.step(token)
    return reward, info


def test_a_prompt_may_be_a_conversation(settings: dict[str, Any]) -> None:
    seen: list[Any] = []

    def looks(prompts: list[Any], completions: list[Any]) -> list[float]:
        seen.append((prompts[0], completions[0]))
        return [1.0] * len(prompts)

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    messages = [{"role": "user", "content": "hi"}]
    changes = {"prompts": [{"prompt": messages}, "plain"], "tokenizer": tokenizer, "reward": looks}
    env = TextEnv(**{**settings, **changes}, render_mode="ansi")
    observation, _ = env.reset(options={"prompt_index": 0})
    assert bytes(observation["input_ids"][observation["attention_mask"] == 1].tolist()) == b"<u>hi<a>"
    write(env, [*b"yo", EOS])
    assert seen == [(messages, [{"role": "assistant", "content": "yo"}])]
    assert env.transcript == {"prompt": "<u>hi<a>", "completion": "yo"}
    env.reset(options={"prompt_index": 1})
    write(env, [*b"yo", EOS])
    assert seen[1] == ("plain", "yo")
    with pytest.raises(ValueError, match="no chat template"):
        TextEnv(**{**settings, "prompts": [{"prompt": messages}]})


def test_what_functions_log_reaches_info_and_transcript(settings: dict[str, Any]) -> None:
    def logs(completions: list[str], log_metric: Any, log_extra: Any) -> list[float]:
        log_metric("accuracy", 0.5)
        log_extra("upper", [text.upper() for text in completions])
        return [0.0] * len(completions)

    env = TextEnv(**{**settings, "reward": logs}, info_text=True)
    env.reset(seed=0)
    _, info = write(env, [*b"ab", EOS])
    assert info["metric/accuracy"] == 0.5
    assert info["upper"] == env.transcript["upper"] == "AB"
    envs = TextVectorEnv(2, **{**settings, "reward": logs}, info_text=True)
    envs.reset(seed=0)
    _, info = write(envs, [np.array([98, EOS])])
    assert info["upper"].tolist() == [None, ""]
    assert info["metric/accuracy"][1] == 0.5


def test_scaled_scores_are_paid_and_raw_ones_reported(settings: dict[str, Any]) -> None:
    changes = {"score_scaling": "running", "score_clip": 0.75, "missing_eos_penalty": 1.0, "kl_coef": 0.0}
    envs = TextVectorEnv(3, **{**settings, **changes})
    envs.reset(seed=0)
    envs.step(np.array([98, 98, 98]))
    _, rewards, *_, infos = envs.step(np.array([98, EOS, EOS]))  # two completions of 1 character
    assert infos["score"][1:].tolist() == [1.0, 1.0]
    assert rewards.tolist() == [0.0, 0.0, 0.0]
    for _ in range(3):
        _, rewards, *_, infos = envs.step(np.array([98, 98, 98]))
    # 5 characters, ended by length: the mean of 1, 1, 5 is 7/3, the deviation 1.886; 1.41 is clipped, then fined.
    assert infos["score"][0] == 4.0
    assert infos["score_paid"][0] == rewards[0] == pytest.approx(-0.25)


def test_failures_are_counted_in_info(settings: dict[str, Any]) -> None:
    def broken(completions: list[str]) -> list[float]:
        return [math.nan] * len(completions)

    env = TextEnv(**{**settings, "reward": broken, "kl_coef": 0.0}, on_reward_error="penalise")
    env.reset(seed=0)
    with pytest.warns(UserWarning, match="said once"):
        reward, info = write(env, [98, EOS])
    assert (reward, info["reward_errors"]) == (-1.0, 1)
    assert "reward_errors" not in _last_info(TextEnv(**settings))


def _last_info(env: TextEnv) -> dict[str, Any]:
    env.reset(seed=0)
    return write(env, [98, EOS])[1]


@pytest.mark.parametrize(("end", "fined"), [([EOS], False), ([PAD], False), ([10], False), ([98], True)])
def test_a_missing_end_is_one_by_any_stop_token(settings: dict[str, Any], end: list[int], fined: bool) -> None:
    """Stop tokens are the environment's: EOS, a stop id that is not EOS, and one that is the pad token."""
    env = TextEnv(**{**settings, "kl_coef": 0.0}, missing_eos_penalty=100.0, stop=[10, PAD])
    env.reset(seed=0)
    reward, info = write(env, [*b"abcd", *end])
    assert info["ended_by_stop"] == (not fined)
    assert reward == info["score"] == (5.0 - 100.0 if fined else 4.0)


def test_kl_of_a_token_is_clamped(settings: dict[str, Any]) -> None:
    paid = []
    for clamp in (None, 0.05):
        env = TextEnv(**settings, kl_mode="exact", kl_clamp=clamp)
        env.attach_policy(_Confident())
        env.reset(seed=0)
        paid.append([env.step(token)[1] for token in b"abc"])
    assert min(paid[0]) < -0.1
    assert_close(paid[1], np.clip(paid[0], -0.005, 0.005), terms=FORWARD, scale=0.1 * 8)
    with pytest.raises(ValueError, match="kl_clamp must be above 0"):
        TextEnv(**settings, kl_mode="exact", kl_clamp=-1.0)


def test_what_reference_mode_cannot_do_is_refused(settings: dict[str, Any]) -> None:
    for change in ({"kl_clamp": 1.0}, {"kl_coef": AdaptiveKL(6.0)}):
        with pytest.raises(ValueError, match="kl_mode='reference' does not compute the KL"):
            TextEnv(**{**settings, **change})


def test_exact_mode_tells_its_controller(settings: dict[str, Any]) -> None:
    controller = AdaptiveKL(target=1e-6, horizon=10, coef=0.1)
    env = TextEnv(**{**settings, "kl_coef": controller}, kl_mode="exact")
    env.attach_policy(_Confident())
    env.reset(seed=0)
    write(env, [98, EOS])
    assert env.task.penalty is not None
    assert env.task.penalty.coef == pytest.approx(0.1 * 1.02)


class _Confident:
    def log_prob(self, observation: Any, action: Any) -> torch.Tensor:
        return torch.zeros(1)


def test_filtered_sampling_with_k1_is_said(settings: dict[str, Any]) -> None:
    mask = TopKMask(mock_lm(), k=9)
    with pytest.warns(UserWarning, match="sampling is filtered by TopKMask and the KL estimator is 'k1'"):
        TextEnv(**settings, action_mask=mask)
    TextEnv(**settings, action_mask=mask, kl_mode="exact", kl_estimator="k3")  # a warning now would be an error
    TextEnv(**{**settings, "kl_coef": 0.0}, action_mask=mask)
    TextEnv(**settings, action_mask=mask, kl_mode="deferred")  # who pays then says it


def test_a_function_that_empties_its_columns_does_not_change_the_next_epoch() -> None:
    seen: list[list[str]] = []

    def pops(completions: list[str], references: list[list[str]]) -> list[float]:
        seen.extend(list(row) for row in references)
        for row in references:
            row.clear()
        return [0.0] * len(completions)

    rows = [{"prompt": "a", "references": ["one", "two"]}]
    env = TextEnv(rows, "tiny", pops, max_new_tokens=1)
    for _ in range(3):
        env.reset(seed=0)
        env.step(5)
        env.unwrapped.transcript["references"].pop()
    assert seen == [["one", "two"]] * 3
    assert rows[0]["references"] == ["one", "two"]
