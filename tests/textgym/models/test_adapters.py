"""LoRA: policy, critic and reference are adapters on one frozen model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch

from textgym.models.actor_critic import ActorCritic
from textgym.models.adapters import is_twin
from textgym.models.sequences import Sequences
from textgym.testing import assert_close, byte_tokenizer, mock_lm, terms_of

pytestmark = pytest.mark.numerics

FORWARD = terms_of(mock_lm())

peft = pytest.importorskip("peft")


def make_policy(model: Any = None, **config: Any) -> ActorCritic:
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **config)
    return ActorCritic.from_pretrained(mock_lm() if model is None else model, critic="separate", lora=lora)


@pytest.fixture
def sequences() -> Sequences:
    ids = torch.randint(3, 250, (3, 9), generator=torch.Generator().manual_seed(0))
    return Sequences(ids, torch.tensor([2, 4, 3]), torch.tensor([5, 2, 6]))


def test_policy_critic_and_reference_hold_one_copy_of_the_weights() -> None:
    lm = mock_lm()
    start = {weight.data_ptr(): weight.nbytes for weight in lm.parameters()}
    policy = make_policy(lm)
    reference = policy.reference()
    roles = (policy.lm, policy.critic, reference.lm)
    held = {weight.data_ptr(): weight.nbytes for module in roles for weight in module.parameters()}
    adapters = {
        weight.data_ptr(): weight.nbytes
        for module in roles
        for name, weight in module.named_parameters()
        if "lora" in name
    }
    assert held == start | adapters
    assert len(adapters) == 3 * 2 * 2 * 2, "two matrices for two projections of two layers, of each role"
    trained = [name for name, weight in policy.named_parameters() if weight.requires_grad]
    assert all("lora" in name or name.startswith("value_head") for name in trained)


def test_neither_adapter_moves_the_other_model(sequences: Sequences) -> None:
    policy = make_policy()
    reference = policy.reference()
    torch.nn.init.normal_(policy.value_head.weight)

    def figures() -> list[torch.Tensor]:
        with torch.no_grad():
            new = policy.evaluate(sequences)
            return [new.log_prob, new.value, reference.sequence_log_probs(sequences)]

    def scramble(module: torch.nn.Module) -> None:
        for name, weight in module.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight)

    before = figures()
    scramble(policy.critic)
    log_prob, value, reference_log_prob = figures()
    assert_close(log_prob, before[0], terms=FORWARD)
    assert_close(reference_log_prob, before[2], terms=FORWARD)
    assert (value - before[1]).abs().max() > 0.1
    scramble(policy.lm)
    assert (figures()[0] - before[0]).abs().max() > 0.1
    assert_close(figures()[1], value, terms=FORWARD)
    assert_close(figures()[2], before[2], terms=FORWARD)


def test_an_update_trains_both_adapters_and_nothing_below_them() -> None:
    from textgym.agents import PPO, PPOConfig

    lm = mock_lm()
    start = {name: weight.clone() for name, weight in lm.named_parameters()}
    policy = make_policy(lm)
    adapters = {name: w.detach().clone() for name, w in policy.named_parameters() if "lora" in name}
    settings = {"reward": lambda completions: [float(len(text)) for text in completions], "kl_mode": "deferred"}
    envs = gym.make_vec(
        "textgym/Text-v0", 4, prompts=["one", "two"], tokenizer=byte_tokenizer(), max_new_tokens=4, **settings
    )
    agent = PPO(policy, envs, PPOConfig(episodes_per_update=4, gradient_checkpointing=True)).learn(8)
    for name, weight in agent.policy.named_parameters():
        if name in adapters:
            assert not torch.equal(weight, adapters[name]), name
    plain = dict(agent.policy.reference().lm.named_parameters())
    for name, weight in plain.items():
        if "lora" not in name:
            assert torch.equal(weight, start[name.replace(".base_layer", "")]), name


def test_checkpointed_layers_run_again_under_their_own_adapter(sequences: Sequences) -> None:
    policy, gradients = make_policy(), []
    torch.nn.init.normal_(policy.value_head.weight)
    for checkpointed in (False, True):
        if checkpointed:
            policy.checkpoint_layers()
        policy.zero_grad()
        new = policy.evaluate(sequences)
        (new.log_prob.sum() + new.value.square().sum()).backward()
        gradients.append({name: w.grad.clone() for name, w in policy.named_parameters() if w.requires_grad})
    for name, expected in gradients[0].items():
        assert_close(gradients[1][name], expected, terms=FORWARD, scale=max(1.0, float(expected.norm())), what=name)
    assert all(gradient.any() for gradient in gradients[0].values())


def test_saved_merged_and_loaded_with_or_without_a_new_adapter(sequences: Sequences, tmp_path: Path) -> None:
    policy = make_policy()
    torch.nn.init.normal_(policy.value_head.weight)
    with torch.no_grad():
        expected = policy.evaluate(sequences)
        policy.save_pretrained(tmp_path)
        loaded = ActorCritic.from_pretrained(tmp_path, critic="separate")
        plain = loaded.evaluate(sequences)
        again = ActorCritic.from_pretrained(
            tmp_path, critic="separate", lora=peft.LoraConfig(r=2, target_modules=["q_proj"])
        )
        adapted = again.evaluate(sequences)
    for new in (plain, adapted):
        assert_close(new.log_prob, expected.log_prob, terms=FORWARD)
        assert_close(new.value, expected.value, terms=FORWARD)
    assert not is_twin(again.critic, again.lm), "its weights are its own, which were trained"


def test_dropout_of_the_adapter_is_off_even_in_training_mode(sequences: Sequences) -> None:
    policy = make_policy(lora_dropout=0.5).train()
    torch.nn.init.normal_(policy.value_head.weight)
    first, second = policy.evaluate(sequences), policy.evaluate(sequences)
    assert_close(first.log_prob, second.log_prob, terms=FORWARD)
    assert_close(first.value, second.value, terms=FORWARD)
