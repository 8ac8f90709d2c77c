"""TextEnv: the contract of an environment, step by step."""

from __future__ import annotations

import random
import re
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.env_checker import check_env as sb3_check_env

import textgym
from textgym.envs.text import TextEnv
from textgym.envs.vector import TextVectorEnv
from textgym.errors import CutPromptsWarning
from textgym.models.actor_critic import ActorCritic
from textgym.models.token_model import TokenModel
from textgym.testing import assert_close, byte_tokenizer, mock_lm, terms_of, tolerance

FORWARD = terms_of(mock_lm())
LOG_PROB = 8.0  # the size of the mock model's log-probs
ROUNDING = tolerance(FORWARD, scale=LOG_PROB)

EOS = 256


def test_gymnasiums_and_sb3s_checkers_have_nothing_to_say(settings: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", CutPromptsWarning)
        env = gym.make("textgym/Text-v0", disable_env_checker=True, **settings).unwrapped
        check_env(env, skip_render_check=True)
        sb3_check_env(env)


def test_the_spaces_hold_the_tokens_of_the_vocabulary_and_no_others(settings: dict[str, Any]) -> None:
    env = TextEnv(**settings)
    observation, _ = env.reset(seed=0)
    ids, last = observation["input_ids"], env.action_space.n - 1
    for token, allowed in ((0, True), (last, True), (last + 1, False), (-1, False)):
        ids[0] = token
        assert env.observation_space.contains(observation) == allowed


@pytest.mark.parametrize("env_id", ["textgym/Text-v0", "textgym:textgym/Text-v0"])
def test_made_by_id(env_id: str, settings: dict[str, Any]) -> None:
    textgym.registration.register_environments()  # a second time: nothing happens
    env = gym.make(env_id, **settings)
    assert isinstance(env.unwrapped, TextEnv)


def test_plain_arguments_keep_the_spec_json() -> None:
    env = gym.make("textgym/Text-v0", prompts=["a b"], tokenizer="tiny", reward="builtins:len", max_new_tokens=3)
    assert gym.envs.registration.EnvSpec.from_json(env.spec.to_json()).kwargs["max_new_tokens"] == 3


def test_each_observation_is_the_last_plus_one_token(settings: dict[str, Any]) -> None:
    env = TextEnv(**settings)
    observation, _ = env.reset(seed=0, options={"prompt_index": 1})
    assert bytes(observation["input_ids"][:8].tolist()) == b"good day"
    assert observation["attention_mask"].sum() == 8
    for t, action in enumerate([97, 98, 99]):
        following, *_ = env.step(action)
        assert following["input_ids"][8 + t] == action
        changed = (following["input_ids"] != observation["input_ids"]).nonzero()[0]
        assert changed.tolist() == [8 + t]
        assert following["attention_mask"].sum() == 9 + t
        assert following["input_ids"] is not observation["input_ids"]
        observation = following


def test_long_prompts_are_cut_from_the_left(settings: dict[str, Any]) -> None:
    observation, _ = TextEnv(**settings).reset(options={"prompt_index": 0})
    assert bytes(observation["input_ids"][:8].tolist()) == b"lo world"


def test_eos_ends_the_row_and_gets_the_score(settings: dict[str, Any]) -> None:
    env = TextEnv(**{**settings, "kl_coef": 0.0})
    env.reset(seed=0)
    assert env.step(97)[1:] == (0.0, False, False, {})
    _, reward, terminated, truncated, info = env.step(EOS)
    assert (reward, terminated, truncated) == (1.0, True, False)
    assert info["ended_by_stop"] is True
    assert info["response_tokens"] == 2
    assert info["reward/length_reward"] == info["score"] == 1.0
    assert all(type(value) in (bool, int, float) for value in info.values())
    assert env.transcript["completion"] == "a"


def test_the_length_limit_terminates_unless_asked_to_truncate(settings: dict[str, Any]) -> None:
    for limit, expected in (("terminate", (True, False)), ("truncate", (False, True))):
        env = TextEnv(**{**settings, "length_limit": limit, "missing_eos_penalty": 2.0, "kl_coef": 0.0})
        env.reset(seed=0)
        for _ in range(5):
            _, reward, *flags, info = env.step(97)
        assert tuple(flags) == expected
        assert reward == info["score"] == 5.0 - 2.0
        assert info["ended_by_stop"] is False


def test_stop_ids_and_stop_strings(settings: dict[str, Any]) -> None:
    env = TextEnv(**{**settings, "stop": [ord("!"), "yz"], "missing_eos_penalty": 1.0, "kl_coef": 0.0})
    env.reset(seed=0)
    assert env.step(ord("!"))[2]
    env.reset()
    assert [env.step(ord(letter))[2] for letter in "zyz"] == [False, False, True]
    assert env.transcript["completion"] == "z"
    env.reset()
    for letter in "abcyz":  # the stop string at the length limit is a stop, not a cut
        _, reward, _, _, info = env.step(ord(letter))
    assert info["ended_by_stop"] is True
    assert reward == 3.0


def test_a_stop_string_that_is_complete_too_early_is_text(settings: dict[str, Any]) -> None:
    """Neither does a later token with its last character end the text, nor is the completion cut at it."""
    settings |= {"stop": ["ab"], "max_new_tokens": 8, "kl_coef": 0.0}
    for early, text, completion in (
        (4, "abxyzbqq", "abxyzbqq"),
        (4, "abxyzab", "abxyz"),
        (1, "ab", ""),
        (2, "abab", "ab"),
        (3, "xxab", "xx"),
    ):
        env = TextEnv(**settings, min_new_tokens=early)
        env.reset(seed=0)
        ends = [env.step(ord(letter))[2] for letter in text]
        assert ends == [False] * (len(text) - 1) + [True]
        assert env.transcript["completion"] == completion


def test_rows_end_at_all_stop_tokens_of_the_references_generation_config_and_at_no_others(
    settings: dict[str, Any],
) -> None:
    """What ends a row is the environment's stop rule; sampling itself ends nothing, whatever the config says."""
    lm = mock_lm()
    more = list(range(100, 140))
    lm.generation_config.eos_token_id = [EOS, *more]
    lm.config.eos_token_id = 97
    policy = ActorCritic(lm)
    policy.seed(0)
    envs = TextVectorEnv(64, **{**settings, "reference": lm}, array="torch", autoreset_mode="Disabled")
    assert envs.single_action_space.stop.ids == (*more, EOS)
    observation, _ = envs.reset(seed=0)
    alive = torch.ones(64, dtype=torch.bool)
    by_stop = torch.zeros(64, dtype=torch.bool)
    stops = torch.tensor([EOS, *more])
    for step in range(5):
        actions = policy.act(observation).action
        observation, _, terminated, _, infos = envs.step(actions)
        stopped = alive & torch.isin(actions, stops)
        assert torch.equal(terminated, stopped | (alive & torch.tensor(step == 4)))
        if "ended_by_stop" in infos:
            assert infos["ended_by_stop"][stopped.numpy()].all()
        by_stop |= stopped
        alive &= ~terminated
    assert 0 < by_stop.sum() < 64


def test_min_new_tokens_masks_the_stop_tokens(settings: dict[str, Any]) -> None:
    env = TextEnv(**{**settings, "min_new_tokens": 2, "info_action_mask": True})
    _, info = env.reset(seed=0)
    assert not env.action_masks()[EOS]
    assert not info["action_mask"][EOS]
    assert env.action_masks().sum() == 257
    env.step(97)
    assert not env.action_masks()[EOS]
    _, _, _, _, info = env.step(97)
    assert info["action_mask"].all()
    assert env.step(EOS)[2]


def test_one_new_token_at_least(settings: dict[str, Any]) -> None:
    """The first token is no stop token, and the second may be one."""
    env = TextEnv(**{**settings, "min_new_tokens": 1})
    env.reset(seed=0)
    assert not env.action_masks()[EOS]
    assert not env.step(97)[2]
    assert env.action_masks().all()
    assert env.step(EOS)[2]


def test_reference_mode_pays_the_log_prob_of_the_reference(settings: dict[str, Any]) -> None:
    env = TextEnv(**settings)
    env.reset(options={"prompt_index": 2})
    ids, rewards = [ord("a")], []
    for action in [98, 99, 100, 101, 102]:
        rewards.append(env.step(action)[1])
        ids.append(action)
    log_probs = settings["reference"](torch.tensor([ids])).logits.log_softmax(-1)[0]
    expected = 0.1 * log_probs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    expected[-1] += 5.0
    assert_close(rewards, expected.detach(), terms=FORWARD, scale=LOG_PROB)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_exact_mode_pays_the_kl_of_the_attached_policy(settings: dict[str, Any], estimator: str) -> None:
    policy = ActorCritic.from_pretrained(mock_lm(seed=7))
    env = TextEnv(**{**settings, "kl_mode": "exact", "kl_estimator": estimator})
    env.reset(options={"prompt_index": 2})
    with pytest.raises(ValueError, match=r"attach_policy\(policy\)"):
        env.step(98)
    env.attach_policy(policy)
    ids = [ord("a"), 98, 99, 100, 101, 102]
    rewards = [env.step(action)[1] for action in ids[1:-1]]
    *_, info = env.step(ids[-1])
    p, q = (lm(torch.tensor([ids])).logits.log_softmax(-1)[0] for lm in (policy.lm, settings["reference"]))
    d = (p - q)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].detach()
    kl = {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() - 1 + d}[estimator]
    rounding = ROUNDING * max(1.0, float(kl.abs().max()))  # k2 and k3 of a large difference magnify its error
    torch.testing.assert_close(torch.tensor(rewards), -0.1 * kl[:-1], atol=0.1 * rounding, rtol=0, check_dtype=False)
    assert info["kl"] == pytest.approx(kl.sum().item(), abs=rounding)
    assert info["kl_reward"] == pytest.approx(-0.1 * kl.sum().item(), abs=0.1 * rounding)


def test_columns_reach_the_reward_and_the_transcript(settings: dict[str, Any]) -> None:
    def reward(prompts: list[str], completions: list[str], *, completion_ids: Any, answer: list[str]) -> list[float]:
        assert completion_ids == [[ord("7"), EOS]]
        return [float(text == wanted) for text, wanted in zip(completions, answer, strict=True)]

    env = TextEnv(**{**settings, "prompts": [{"prompt": "3+4=", "answer": "7"}], "reward": reward, "info_text": True})
    env.reset()
    env.step(ord("7"))
    *_, info = env.step(EOS)
    assert info["reward/reward"] == 1.0
    assert info["is_success"] is True
    assert (info["prompt"], info["completion"], info["answer"]) == ("3+4=", "7", "7")


def test_prompts_are_drawn_without_replacement(settings: dict[str, Any]) -> None:
    env = TextEnv(**settings)
    env.reset(seed=3)
    drawn = [int(env.task.current[0])]
    for _ in range(9):
        env.reset()
        drawn.append(int(env.task.current[0]))
    assert sorted(drawn[:5]) == sorted(drawn[5:]) == [0, 1, 2, 3, 4]


def test_an_epoch_of_prompts_is_drawn_when_it_begins(settings: dict[str, Any]) -> None:
    env = TextEnv(**settings)
    env.reset(seed=3)
    drawn = env.np_random.bit_generator.state
    for _ in range(4):  # five prompts are one epoch
        env.reset()
    assert env.np_random.bit_generator.state == drawn
    env.reset()
    assert env.np_random.bit_generator.state != drawn


def test_same_seed_same_episodes_and_global_generators_untouched(settings: dict[str, Any]) -> None:
    env = TextEnv(**settings)

    def episode() -> tuple[Any, ...]:
        observation, _ = env.reset(seed=11)
        total = sum(env.step(97 + t)[1] for t in range(5))
        env.reset()
        return observation["input_ids"].tolist(), total, env.transcript["prompt"]

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    assert episode() == episode()
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()
    assert torch.equal(torch.get_rng_state(), before[2])


def test_rendering(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    for mode, expected in (("ansi", "\x1b[1mx\x1b[0m"), ("html", ">x</span>")):
        env = TextEnv(**settings, render_mode=mode)
        env.reset(seed=0)
        env.step(ord("x"))
        assert expected in env.render()
    env = TextEnv(**settings, render_mode="human")
    env.reset(options={"prompt_index": 3})
    env.step(ord("x"))
    assert "fourx" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="'rgb_array' is ignored"):
        TextEnv(**settings, render_mode="rgb_array")


def test_html_has_a_span_a_token_with_what_the_models_say_of_it(settings: dict[str, Any]) -> None:
    env = TextEnv(**{**settings, "reference": mock_lm(), "kl_mode": "reference", "render_mode": "html"})
    env.reset(seed=0)
    rewards = [env.step(action)[1] for action in (ord("x"), *"é".encode(), ord("<"))]
    page = env.render()
    assert page is not None
    spans = re.findall(r'<span style="[^"]*" title="([^"]*)">([^<]*)</span>', page)
    assert [text for _, text in spans] == ["x", "", "é", "&lt;"]
    for (title, _), reward in zip(spans, rewards, strict=True):
        [shown] = re.findall(r"reference_log_prob (-[\d.e+-]+)", title)
        assert env.task.kl_coef * float(shown) == pytest.approx(reward, rel=1e-3)
    assert "score" not in page
    *_, info = env.step(EOS)
    page = env.render()
    assert page is not None
    titles = re.findall(r'title="([^"]*)"', page)
    assert len(titles) == 5
    assert titles[-1].endswith(f"&#10;reward {info['score']:.4g}")
    assert f"score {info['score']:+.3f}" in page


def test_rows_of_a_batch_show_their_score(settings: dict[str, Any]) -> None:
    envs = TextVectorEnv(2, **{**settings, "render_mode": "html"})
    envs.reset(seed=0)
    envs.step(np.array([ord("x"), ord("y")]))
    assert all(page is not None and "score" not in page for page in envs.render())
    *_, info = envs.step(np.array([ord("z"), EOS]))
    playing, ended = envs.render()
    assert playing is not None
    assert "score" not in playing
    assert playing.count("<span") == 3, "the prompt and two tokens"
    assert f"score {info['score'][1]:+.3f}" in str(ended)


def test_all_rows_are_rendered_in_one_pass_of_each_model(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of finished, playing and new episodes alike, and each shows what it shows in an environment of its own."""
    settings = {**settings, "reference": mock_lm(), "kl_mode": "exact", "render_mode": "html"}
    policy = TokenModel(mock_lm(seed=3))
    actions = [[ord("x"), *"é".encode(), EOS], [*b"yzyz"], [EOS]]
    envs = TextVectorEnv(3, **settings, autoreset_mode=AutoresetMode.DISABLED)
    envs.attach_policy(policy)
    envs.reset(seed=0)
    assert [str(page).count("<span") for page in envs.render()] == [1, 1, 1], "the prompts"
    for step in range(4):
        envs.step(np.array([row[min(step, len(row) - 1)] for row in actions]))

    passes: list[int] = []
    score = TokenModel.sequence_log_probs

    def counted(model: TokenModel, sequences: Any) -> Any:
        passes.append(len(sequences))
        return score(model, sequences)

    monkeypatch.setattr(TokenModel, "sequence_log_probs", counted)
    pages = envs.render()
    assert passes == [3, 3]

    prompts = [row["prompt"] for row in envs.transcript]
    for page, prompt, row in zip(pages, prompts, actions, strict=True):
        env = TextEnv(**{**settings, "prompts": [prompt]})
        env.attach_policy(policy)
        env.reset(seed=0)
        for action in row:
            env.step(action)
        assert figures_of(page) == pytest.approx(figures_of(env.render()), abs=1e-3)


def figures_of(page: str | None) -> list[float]:
    assert page is not None
    assert "kl " in page
    return [float(number) for number in re.findall(r"(?:kl|log_prob|reward) (-?[\d.e+-]+)", page)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "no prompts in a list"),
        ({"prompts": [{"text": "no"}]}, "has no 'prompt', only"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens must be at least 1"),
        ({"min_new_tokens": 9}, "min_new_tokens must be from 0"),
        ({"tokenizer": "/no/such/tokenizer"}, "cannot load a tokenizer called"),
        ({"reference": "/no/such/model"}, "cannot load a model called"),
        ({"reference": None}, "there is no reference"),
        ({"kl_mode": "sometimes"}, "kl_mode must be 'reference' or 'exact' or 'deferred' or None, got 'sometimes'"),
        ({"kl_estimator": "k3"}, "'deferred' has all estimators"),
        ({"kl_coef": -1.0}, "kl_coef must be at least 0"),
        ({"length_limit": "stop"}, "length_limit must be 'terminate' or 'truncate', got 'stop'"),
        ({"stop": "end"}, "write stop="),
        ({"stop": [999]}, "outside the tokenizer's vocabulary"),
        ({"reward": []}, "reward is empty"),
        ({"reward_weights": [1.0, 2.0]}, "2 values for 1 reward"),
        ({"reward": "no.such.module:reward"}, "there is no module 'no'"),
    ],
)
def test_bad_arguments_are_explained(settings: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextEnv(**{**settings, **change})


def test_a_tokenizer_without_eos_is_refused(settings: dict[str, Any]) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has no EOS token"):
        TextEnv(**{**settings, "tokenizer": tokenizer})


def test_bad_steps_are_explained(settings: dict[str, Any]) -> None:
    env = TextEnv(**settings)
    with pytest.raises(gym.error.ResetNeeded, match=r"call env.reset\(\)"):
        env.step(97)
    env.reset(seed=0)
    for action in (-1, 258, 10_000):
        with pytest.raises(ValueError, match="use token ids from 0 to 257"):
            env.step(action)
    env.step(EOS)
    with pytest.raises(gym.error.ResetNeeded):
        env.step(97)
    with pytest.raises(ValueError, match="prompt_index"):
        env.reset(options={"prompt_index": 5})
