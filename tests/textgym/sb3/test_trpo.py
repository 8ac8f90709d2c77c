"""TRPO on TextActorCriticPolicy: eager attention, one vector for all weights, a critic step that leaves them alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sb3_contrib import TRPO

from textgym.sb3.flat import FlatWeights
from textgym.testing import assert_close, byte_tokenizer, mock_lm, terms_of

FORWARD = terms_of(mock_lm())

MakeEnv = Any


@pytest.fixture
def trpo(make_model: Any) -> Any:
    def train(env: Any, **changes: Any) -> Any:
        model = make_model(env, TRPO, **{"target_kl": 0.01, "n_critic_updates": 2, **changes})
        with pytest.warns(UserWarning, match="eager attention"):
            model.learn(48)
        return model

    return train


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_trpo_steps_within_its_trust_region(make_env: MakeEnv, lm_folder: str, critic: str, trpo: Any) -> None:
    """The line search may try 10 steps, each with 0.64 of the KL of the one before; each of 10 seeds needed 1 or 2."""
    model = trpo(make_env(), policy_kwargs={"model": lm_folder, "critic": critic})
    assert model.logger.name_to_value["train/is_line_search_success"] == 1
    assert 0 < model.logger.name_to_value["train/kl_divergence_loss"] < 0.01
    moved = {
        name: (weight != mock_lm().state_dict()[name]).any()
        for name, weight in model.policy.actor_critic.lm.state_dict().items()
    }
    assert all(moved.values())
    assert model.policy.actor_critic.value_head.weight.any()
    model.learn(48, reset_num_timesteps=False)  # acts with the new weights


@pytest.mark.bit_for_bit
def test_trpo_critic_updates_leave_the_policy_alone(make_env: MakeEnv, lm_folder: str, trpo: Any) -> None:
    vectors = []
    for updates in (1, 5):
        model = trpo(make_env(), n_critic_updates=updates, batch_size=48)
        vectors.append(torch.cat([weight.flatten() for weight in model.policy.actor_critic.lm.parameters()]))
    torch.testing.assert_close(vectors[0], vectors[1], atol=0, rtol=0)


def test_trpo_saves_the_new_weights(make_env: MakeEnv, lm_folder: str, tmp_path: Path, trpo: Any) -> None:
    model = trpo(make_env(), n_critic_updates=1)
    model.save(tmp_path / "model")
    loaded = TRPO.load(tmp_path / "model")
    head = "actor_critic.lm.lm_head.weight"
    assert (loaded.policy.state_dict()[head] != mock_lm().lm_head.weight).any()
    torch.testing.assert_close(loaded.policy.state_dict()[head], model.policy.state_dict()[head])


def test_trpo_moves_projections_called_value(make_env: MakeEnv, tmp_path: Path, trpo: Any) -> None:
    """GPT-NeoX: TRPO would leave `query_key_value` to the critic, by its name."""
    mock_lm(architecture="gpt_neox").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    env = make_env(reference=None, kl_coef=0.0, reward=lambda completions: [float(len(text)) for text in completions])
    model = trpo(env, folder=str(tmp_path), rollout_buffer_kwargs={})
    before, after = mock_lm(architecture="gpt_neox").state_dict(), model.policy.actor_critic.lm.state_dict()
    assert model.logger.name_to_value["train/is_line_search_success"] == 1
    (name, *_) = (name for name in before if "query_key_value.weight" in name)
    assert (before[name] != after[name]).any()


def test_trpo_sub_sampling(make_env: MakeEnv, lm_folder: str, trpo: Any) -> None:
    assert trpo(make_env(), sub_sampling_factor=3).num_timesteps == 48


def test_flat_weights_have_the_gradient_of_the_weights(
    make_env: MakeEnv, lm_folder: str, make_model: Any, collect: Any
) -> None:
    model = make_model(make_env())
    (batch,) = collect(model).get(None)
    actor_critic = model.policy.actor_critic
    flat = FlatWeights(actor_critic)
    assert_close(flat.logits(batch.observations), actor_critic.logits(batch.observations), terms=FORWARD)
    flat.logits(batch.observations).square().mean().backward()
    actor_critic.logits(batch.observations).square().mean().backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in actor_critic.lm.parameters()])
    assert_close(flat.vector.grad, expected, terms=FORWARD, scale=max(1.0, float(expected.norm())))
