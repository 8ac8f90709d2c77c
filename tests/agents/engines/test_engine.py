"""collect_from: what an engine has written becomes a rollout that agents learn from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import gymnasium as gym
import pytest
import torch
from gymnasium.vector import AutoresetMode
from torch import Tensor

from textgym.agents import PPO, PPOConfig
from textgym.agents.common.rollout import Rollout
from textgym.agents.engines.engine import collect_from
from textgym.models.actor_critic import ActorCritic
from textgym.models.distributions.log_probs import StopRule
from textgym.testing import assert_close, byte_tokenizer, mock_lm, terms_of, tolerance

FORWARD = terms_of(mock_lm())
ROUNDING = tolerance(FORWARD, scale=8.0)  # of the mock model's log-probs

STOPS = list(range(0, 256, 8))


class Transformers:
    """The plainest engine: `generate` of transformers, on weights of its own."""

    def __init__(self) -> None:
        self.lm = mock_lm()
        self.loads, self.responses = 0, [[0]]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.loads += 1
        self.lm.load_state_dict({name: weight.detach() for name, weight in weights}, strict=False)

    def generate(
        self, prompts: list[list[int]], *, max_new_tokens: int, stop: StopRule, temperature: float, seed: int
    ) -> list[list[int]]:
        torch.manual_seed(seed)
        settings = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": temperature, "pad_token_id": 0}
        settings |= {"max_new_tokens": max_new_tokens, "min_new_tokens": stop.min_new_tokens}
        settings |= {"eos_token_id": list(stop.ids)}
        self.responses = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            output = self.lm.generate(ids, attention_mask=torch.ones_like(ids), **settings)
            self.responses.append(output[0, len(prompt) :].tolist())
        return self.responses


class Hasty(Transformers):
    """Ends responses as it likes."""

    def generate(self, prompts: list[list[int]], **settings: Any) -> list[list[int]]:
        return [[1]] * len(prompts)


def make_envs(**changes: Any) -> Any:
    settings: dict[str, Any] = {"tokenizer": byte_tokenizer(), "reference": mock_lm(), "kl_coef": 0.02, "stop": STOPS}
    settings |= {"prompts": ["one", "three"], "reward": lambda completions: [float(len(text)) for text in completions]}
    settings |= {"max_prompt_tokens": 8, "max_new_tokens": 6, "min_new_tokens": 2, "kl_mode": "deferred"}
    return gym.make_vec("textgym/Text-v0", num_envs=8, array="torch", **{**settings, **changes})


class EnginePPO(PPO):
    """PPO whose episodes an engine writes."""

    engine = Transformers()

    def collect(self) -> Rollout:
        self.engine.load_weights(self.policy.lm.named_parameters())
        return collect_from(self.engine, self.envs, self.policy, self.episode_options())


@pytest.fixture
def policy() -> ActorCritic:
    policy = ActorCritic.from_pretrained(mock_lm(), critic="separate", temperature=0.9)
    policy.seed(0)
    return policy


def test_a_rollout_holds_what_the_engine_wrote_and_the_trainers_log_probs(policy: ActorCritic) -> None:
    engine, envs = Transformers(), make_envs()
    envs.unwrapped.set_autoreset_mode(AutoresetMode.DISABLED)
    engine.load_weights(policy.lm.named_parameters())
    rollout = collect_from(engine, envs, policy)
    lengths = rollout.sequences.response_lengths.tolist()
    assert len(set(lengths)) > 1
    assert [row.tolist() for row in rollout.sequences.actions.split(lengths)] == engine.responses
    expected = policy.evaluate(rollout.sequences)
    assert_close(rollout.log_probs, expected.log_prob.detach(), terms=FORWARD)
    assert_close(rollout.values, expected.value.detach(), terms=FORWARD)
    assert (rollout.log_probs < 0)[rollout.response_mask].all()
    assert rollout.scores.tolist() == [float(len(t["completion"])) for t in envs.unwrapped.transcript]


def test_an_agent_learns_from_an_engine_that_has_the_weights_of_the_last_update(policy: ActorCritic) -> None:
    agent = EnginePPO(policy, make_envs(), PPOConfig(episodes_per_update=16, num_epochs=1, minibatch_size=None))
    history: list[dict[str, float]] = []
    agent.learn(48, [lambda _, metrics: history.append(metrics)])
    assert agent.engine.loads == 6, "two rollouts an update"
    assert [metrics["val/ratio"] for metrics in history] == pytest.approx([1.0] * 3, abs=ROUNDING)
    assert history[0]["objective/kl"] == pytest.approx(0.0, abs=ROUNDING)
    assert all(metrics["val/grad_norm"] > 0 for metrics in history)


def test_a_response_that_ends_before_the_environment_does_is_an_error(policy: ActorCritic) -> None:
    envs = make_envs()
    envs.unwrapped.set_autoreset_mode(AutoresetMode.DISABLED)
    with pytest.raises(ValueError, match="must end with its first stop token"):
        collect_from(Hasty(), envs, policy)
