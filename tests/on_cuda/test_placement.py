"""Where things are: what moves with a policy, what is refused, and what a second GPU changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from textgym import ActorCritic
from textgym.agents import DPO, DQN, PPO, SFT, DPOConfig, DQNConfig, PPOConfig, SFTConfig
from textgym.agents.engines.engine import collect_from
from textgym.agents.runs.evaluation import generate, measure
from textgym.models.distributions.log_probs import StopRule
from textgym.models.distributions.masks import TopPMask
from textgym.models.loading import load_causal_lm
from textgym.models.machine.flops import FlopCount
from textgym.models.token_model import TokenModel
from textgym.rewards.functions import Perplexity
from textgym.rewards.kl import KLPenalty
from textgym.rewards.models import RewardEnsemble, RewardModelConfig, train_reward_model
from textgym.testing.table import TableConfig, TableLM

Make = Callable[..., Any]
ROWS = [{"prompt": "The film is", "completion": " a joy."}] * 4
PAIRS = [{"prompt": "The film is", "chosen": " a joy.", "rejected": " a bore."}] * 4
ANYTIME = StopRule((0,), 0)


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 50, (4, 20), generator=torch.Generator().manual_seed(0))
    return ids, torch.tensor([3, 4, 5, 6])


# --- moving ---


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_a_policy_that_has_acted_can_be_moved_there_and_back(make_envs: Make, critic: str) -> None:
    policy = ActorCritic.from_pretrained("tiny", critic=critic)
    there, back = make_envs().reset(seed=0)[0], make_envs("cpu").reset(seed=0)[0]
    before = policy.act(back, deterministic=True)
    policy.to("cuda")
    assert policy.cache_bytes == 0
    step = policy.act(there, deterministic=True)
    assert step.action.is_cuda
    policy.cpu()
    after = policy.act(back, deterministic=True)
    assert step.action.tolist() == before.action.tolist() == after.action.tolist()


def test_a_policy_that_has_written_can_be_moved() -> None:
    policy, ids = ActorCritic.from_pretrained("tiny"), prompts()
    policy.generate(*ids, 4, ANYTIME)
    policy.to("cuda")
    for _ in range(3):  # the third one replays
        assert policy.generate(*ids, 4, ANYTIME).tokens.is_cuda
    policy.cpu()
    assert not policy.generate(*ids, 4, ANYTIME).tokens.is_cuda


def test_sampling_after_a_move_follows_from_the_seed_before_it() -> None:
    texts = []
    for seed in (5, 5, 6):
        policy = ActorCritic.from_pretrained("tiny")
        policy.seed(seed)
        texts.append(policy.to("cuda").generate(*prompts(), 8, StopRule((0,), 8)).tokens.tolist())
    assert texts[0] == texts[1] != texts[2]


def test_a_reference_under_lora_follows_the_policy_that_it_shares_weights_with(make_envs: Make) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"])
    policy = ActorCritic.from_pretrained("tiny", critic="separate", lora=lora)
    reference = policy.reference()
    reference.next_logits(make_envs("cpu").reset(seed=0)[0])
    policy.to("cuda")
    observation = make_envs().reset(seed=0)[0]
    policy.act(observation)
    assert reference.next_logits(observation).is_cuda


def test_a_table_acts_where_it_was_moved() -> None:
    policy = ActorCritic(TableLM(TableConfig(vocab_size=5, max_tokens=4))).to("cuda")
    observation = {"input_ids": torch.tensor([[1, 0, 0, 0]]), "attention_mask": torch.tensor([[1, 0, 0, 0]])}
    assert policy.act(observation).action.is_cuda


def test_models_that_masks_and_rewards_load_by_name_follow_the_environment(make_envs: Make) -> None:
    mask, perplexity, ensemble = TopPMask("tiny"), Perplexity(), RewardEnsemble(["tiny"])
    envs = make_envs(reward=[perplexity, ensemble], action_mask=mask, max_new_tokens=2)
    envs.reset(seed=0)
    for _ in range(2):
        envs.step(np.array([3, 4, 5, 6]))
    assert mask.model.device.type == perplexity.where.type == ensemble.members[0].device.type == "cuda"


def test_a_device_that_was_chosen_for_a_mask_stays(make_envs: Make) -> None:
    mask = TopPMask("tiny", device="cpu")
    envs = make_envs(action_mask=mask)
    envs.reset(seed=0)
    assert envs.action_masks().is_cuda
    assert mask.model.device.type == "cpu"


@pytest.mark.parametrize("algorithm", ["DQN", "QRDQN"])
def test_the_warm_up_of_sb3_explores_on_the_policys_device(algorithm: str) -> None:
    stable_baselines3 = pytest.importorskip("stable_baselines3")
    sb3_contrib = pytest.importorskip("sb3_contrib")

    from textgym.sb3 import EpisodeReplayBuffer, TextQPolicy, TextQuantilePolicy, make_vec_env

    kind, policy = {
        "DQN": (stable_baselines3.DQN, TextQPolicy),
        "QRDQN": (sb3_contrib.QRDQN, TextQuantilePolicy),
    }[algorithm]
    envs = make_vec_env(
        "textgym/Sentiment-v0",
        n_envs=2,
        max_new_tokens=2,
        device="cuda",
        kl_mode="reference",
        reference="tiny",
        kl_coef=0.1,
    )
    model = kind(
        policy,
        envs,
        learning_starts=4,
        batch_size=4,
        gamma=1.0,
        policy_kwargs={"model": "tiny"},
        device="cuda",
        replay_buffer_class=EpisodeReplayBuffer,
        buffer_size=100,
        exploration_initial_eps=1.0,
    )
    assert model.policy.explorer.actor.device.type == "cuda"
    model.learn(8)


# --- parts on different devices ---


def test_agents_refuse_an_environment_or_reference_on_another_device(make_policy: Make, make_envs: Make) -> None:
    config = PPOConfig(episodes_per_update=4, minibatch_size=4)
    with pytest.raises(ValueError, match=r"policy is on 'cuda:0' and the environment on 'cpu'.*device='cuda:0'"):
        PPO(make_policy(), make_envs("cpu"), config)
    with pytest.raises(ValueError, match="policy is on 'cpu' and the environment on 'cuda:0'"):
        DQN(make_policy("cpu"), make_envs(kl_coef=0.1), DQNConfig(episodes_per_update=4))
    with pytest.raises(ValueError, match="policy is on 'cuda:0' and the reference on 'cpu'"):
        PPO(make_policy(), make_envs(reference=TokenModel.load("tiny"), kl_coef=0.1), config)
    with pytest.raises(ValueError, match="policy is on 'cuda:0' and the environment on 'cpu'"):
        generate(make_policy(), make_envs("cpu"), range(4), 0)


def test_a_device_without_its_number_is_the_same_one(make_policy: Make, make_envs: Make) -> None:
    PPO(make_policy("cuda"), make_envs("cuda:0"), PPOConfig(episodes_per_update=4, minibatch_size=4))


def test_an_environment_leaves_the_users_reference_where_it_is(make_envs: Make) -> None:
    lm = load_causal_lm("tiny")
    envs = make_envs("cuda", reference=lm, kl_mode="reference", kl_coef=0.1)
    assert lm.device.type == "cpu"
    envs.reset(seed=0)
    assert envs.step(np.array([3, 4, 5, 6]))[1].is_cuda


def test_an_environment_without_a_device_goes_where_its_reference_is(make_envs: Make) -> None:
    reference = TokenModel.load("tiny", device="cuda")
    assert make_envs(None, reference=reference, kl_coef=0.1).unwrapped.task.device == torch.device("cuda", 0)
    assert make_envs(None).unwrapped.task.device == torch.device("cpu")


def test_a_reference_elsewhere_is_read_where_it_is(make_policy: Make, make_envs: Make) -> None:
    policy, reference = make_policy(), TokenModel.load("tiny")
    samples = generate(policy, make_envs(), range(4), 0)
    assert measure(samples, reference)["kl"] == pytest.approx(0, abs=1e-4)
    rollout = samples.rollout
    kl = KLPenalty(reference, 0.1).of_sequences(policy, rollout.sequences, rollout.log_probs)
    assert kl.is_cuda
    with pytest.raises(ValueError, match="policy is on 'cuda:0' and the reference on 'cpu'"):
        KLPenalty(reference, 0.1, "full").of_sequences(policy, rollout.sequences, rollout.log_probs)
    DPO(policy, PAIRS, config=DPOConfig(batch_size=4), reference=reference)


def test_whole_responses_may_come_from_the_cpu(make_policy: Make, make_envs: Make) -> None:
    class Engine:
        def load_weights(self, weights: Any) -> None:
            pass

        def generate(self, prompts: list[list[int]], *, max_new_tokens: int, **_: Any) -> list[list[int]]:
            return [[5] * max_new_tokens for _ in prompts]

    assert collect_from(Engine(), make_envs(), make_policy()).log_probs.is_cuda
    envs = make_envs()
    envs.reset(seed=0)
    assert envs.unwrapped.submit(torch.full((4, 6), 5), torch.full((4,), 6))[0].is_cuda


# --- a second GPU ---


@pytest.mark.usefixtures("the_cpus_numbers")
def test_a_policy_on_another_gpu_than_the_current_one_writes_as_on_the_cpu(two_gpus: None, make_policy: Make) -> None:
    policy, expected = make_policy("cuda:1"), make_policy("cpu")
    for _ in range(3):  # the third one replays
        for generator in (policy, expected):
            generator.seed(0)
        there, here = (generator.generate(*prompts(), 8, StopRule((0,), 8)) for generator in (policy, expected))
        assert there.tokens.tolist() == here.tokens.tolist()
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_two_gpus_double_no_batch_and_move_no_policy(two_gpus: None, make_policy: Make, device: str) -> None:
    for agent in (
        SFT(make_policy(device), ROWS, config=SFTConfig(batch_size=2)),
        DPO(make_policy(device), PAIRS, config=DPOConfig(batch_size=2)),
    ):
        agent.learn()
        assert agent.updates == 2
        assert {str(weight.device) for weight in agent.policy.parameters()} == {device}
        assert type(agent.trainer.model_wrapped).__name__ == "_Scored"
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_a_reward_model_is_trained_on_one_gpu_of_two(two_gpus: None, device: str) -> None:
    class Steps(TrainerCallback):
        seen = 0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seen = state.global_step

    steps = Steps()
    pairs = [{**PAIRS[0], "group": group} for group in range(4)]
    config = RewardModelConfig(num_layers=1, batch_size=2)
    model, _ = train_reward_model(pairs, config=config, heldout=[], callbacks=[steps], device=device)
    assert steps.seen == 2
    assert str(model.device) == device


# --- precision ---


def test_writing_under_autocast_is_writing_without(make_policy: Make, same: Make) -> None:
    """bfloat16 would move log-probs by more than 1e-3; captured steps round otherwise than the first ones."""
    policy = make_policy()
    written = []
    for enabled in (False, True, True):
        policy.seed(0)
        with torch.autocast("cuda", torch.bfloat16, enabled=enabled):
            written.append(policy.generate(*prompts(), 8, StopRule((0,), 8)))
    for responses in written[1:]:
        assert responses.tokens.tolist() == written[0].tokens.tolist()
        same(responses.log_probs, written[0].log_probs)


# --- counting ---


def test_replayed_steps_count_as_if_they_were_carried_out(make_policy: Make) -> None:
    products: dict[str, list[int]] = {}
    for device in ("cuda", "cpu"):
        policy = make_policy(device)
        for _ in range(3):  # the first one captures and replays, the third one only replays
            with FlopCount() as count:
                policy.generate(*prompts(), 8, StopRule((0,), 8))
            products.setdefault(device, []).append(count.by_operation["mm"])
    assert products["cuda"] == products["cpu"]
    assert min(products["cuda"]) > 0
