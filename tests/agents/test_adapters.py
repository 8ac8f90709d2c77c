"""Agents whose policy carries a trained adapter: the KL starts at 0, and is the same after save, load and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from transformers import AutoModelForCausalLM

from textgym.agents import DPO, DQN, NLPO, PPO, SFT, DQNConfig, NLPOConfig, Pathwise, PathwiseConfig, PPOConfig
from textgym.agents.common.supervised import SupervisedConfig
from textgym.data.corpora.sources import cache_dir
from textgym.models.actor_critic import ActorCritic
from textgym.models.sequences import Sequences
from textgym.models.token_model import TokenModel
from textgym.rewards.reference import SyncReference
from textgym.testing import assert_close, byte_tokenizer, mock_lm, terms_of

pytestmark = pytest.mark.numerics

peft = pytest.importorskip("peft")

FORWARD = terms_of(mock_lm())
IDS = torch.randint(3, 250, (3, 9), generator=torch.Generator().manual_seed(0))
SEQUENCES = Sequences(IDS, torch.tensor([2, 4, 3]), torch.tensor([5, 2, 6]))
ROUNDING = 1e-5


def lora(**settings: Any) -> Any:
    return peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], **settings})


ADAPTERS = {
    "lora": lora,
    "output embedding trained": lambda: lora(modules_to_save=["lm_head"]),
    "random pissa": lambda: lora(init_lora_weights="pissa_niter_2", target_modules=["q_proj", "lm_head"]),
    "dora": lambda: lora(use_dora=True),
}


def make_policy(kind: str = "lora", critic: str = "separate") -> ActorCritic:
    policy = ActorCritic.from_pretrained(mock_lm(tie_word_embeddings=True), critic=critic, lora=ADAPTERS[kind]())
    train(policy)
    return policy


def train(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in module.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.1)


def make_envs(**kwargs: Any) -> Any:
    settings = {"kl_mode": "deferred", "kl_coef": 0.1, "max_new_tokens": 4, **kwargs}
    return gym.make_vec(
        "textgym/Text-v0", 4, prompts=["one", "two"], tokenizer=byte_tokenizer(), reward=count, **settings
    )


def count(completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


def log_probs(model: TokenModel) -> torch.Tensor:
    return model.sequence_log_probs(SEQUENCES)


def assert_same_model(
    actual: TokenModel, expected: dict[str, torch.Tensor], scored: torch.Tensor, dtype: torch.dtype = torch.float32
) -> None:
    """The weights bit for bit, and what they compute up to rounding, which depends on where weights lie."""
    weights = actual.lm.state_dict()
    assert weights.keys() == expected.keys()
    assert [name for name, weight in weights.items() if not torch.equal(weight, expected[name])] == []
    assert_close(log_probs(actual), scored, terms=FORWARD, dtype=dtype)


def weights_of(model: TokenModel) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in model.lm.state_dict().items()}


def learn(agent: Any, total: int) -> dict[str, float]:
    metrics: list[dict[str, float]] = []
    agent.learn(total, callback=[lambda _, new: metrics.append(new)])
    return {name: value for name, value in metrics[-1].items() if not name.startswith("time/")}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_kl_starts_at_zero_and_resuming_goes_on_exactly(kind: str, tmp_path: Path) -> None:
    policy = make_policy(kind)
    start, scored = weights_of(policy), log_probs(policy)
    agent = PPO(policy, make_envs(), PPOConfig(episodes_per_update=4, learning_rate=0.01))
    assert abs(learn(agent, 4)["objective/kl"]) < ROUNDING
    assert_same_model(agent.penalty.reference, start, scored)

    agent.save(tmp_path)
    again = PPO.load(tmp_path, envs=make_envs())
    assert_same_model(again.policy, weights_of(policy), log_probs(policy))
    values = policy.sequence_values(SEQUENCES)
    assert_close(
        again.policy.sequence_values(SEQUENCES), values, terms=FORWARD, scale=max(1.0, float(values.abs().max()))
    )
    assert_same_model(again.penalty.reference, start, scored)
    trained = [[name for name, w in p.named_parameters() if w.requires_grad] for p in (policy, again.policy)]
    assert trained[0] == trained[1], "modules_to_save too (peft#503)"
    assert learn(again, 8) == pytest.approx(learn(agent, 8), abs=ROUNDING, nan_ok=True)


@pytest.mark.filterwarnings("ignore:sampling is filtered:UserWarning")
@pytest.mark.parametrize("reloaded", [False, True])
@pytest.mark.parametrize(
    "agent_class",
    [
        lambda policy: PPO(policy, make_envs(), PPOConfig(episodes_per_update=4)),
        lambda policy: NLPO(policy, make_envs(), NLPOConfig(episodes_per_update=4)),
        lambda policy: DQN(policy, make_envs(), DQNConfig(episodes_per_update=4)),
        lambda policy: Pathwise(policy, make_envs(), PathwiseConfig(episodes_per_update=4)),
    ],
    ids=["ppo", "nlpo", "dqn", "pathwise"],
)
def test_models_that_share_the_policys_weights_are_converted_with_it(
    agent_class: Any, reloaded: bool, tmp_path: Path
) -> None:
    agent = agent_class(make_policy())
    if reloaded:
        agent.save(tmp_path)
        agent = type(agent).load(tmp_path, envs=make_envs())
    agent.policy.to(torch.float64)
    models = [agent.penalty.reference, *agent.frozen_models().values()]
    models += [module for module in getattr(agent, "further", torch.nn.Module()).modules() if hasattr(module, "lm")]
    for model in models:
        assert {weight.dtype for weight in model.lm.parameters()} == {torch.float64}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_peft_reads_what_an_agent_saved_as_base_and_adapter(kind: str, tmp_path: Path) -> None:
    policy = make_policy(kind)
    PPO(policy, make_envs(), PPOConfig(episodes_per_update=4)).save(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    read = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert_close(log_probs(TokenModel(read)), log_probs(policy), terms=FORWARD)


def test_supervised_and_preference_training_leave_a_policy_that_is_its_own_reference(tmp_path: Path) -> None:
    policy = ActorCritic.from_pretrained(mock_lm(), lora=lora())
    data = [{"prompt": "ab", "completion": "cd"}]
    settings = {"batch_size": 1, "max_steps": 3, "learning_rate": 0.1}
    SFT(policy, data, byte_tokenizer(), SupervisedConfig(**settings)).learn().save(tmp_path / "sft")
    pairs = [{"prompt": "ab", "chosen": "cd", "rejected": "ef"}]
    dpo = DPO(policy, pairs, byte_tokenizer())
    sums = policy.sequence_log_probs(dpo.sequences(range(len(dpo.texts)))).sum(1)
    assert_close(dpo.reference_log_probs, sums, terms=FORWARD)

    loaded = SFT.load(tmp_path / "sft", data).policy
    for start in (policy, loaded):
        agent = PPO(start, make_envs(), PPOConfig(episodes_per_update=4))
        assert abs(learn(agent, 4)["objective/kl"]) < ROUNDING
    plain = ActorCritic.from_pretrained(mock_lm())
    assert (log_probs(loaded) - log_probs(plain)).abs().max() > 0.1, "training has moved it"


@pytest.mark.filterwarnings("ignore:sampling is filtered")
def test_the_mask_model_of_nlpo_is_the_policy_of_that_moment_also_after_loading(tmp_path: Path) -> None:
    policy = make_policy("output embedding trained")
    agent = NLPO(policy, make_envs(), NLPOConfig(episodes_per_update=4, top_p=0.9, mask_update_interval=None))
    start, scored = weights_of(policy), log_probs(policy)
    agent.learn(4)
    assert_same_model(agent.mask.model, start, scored)
    agent.save(tmp_path)
    again = NLPO.load(tmp_path, envs=make_envs())
    assert_same_model(again.mask.model, start, scored)
    assert_same_model(again.penalty.reference, start, scored)


@pytest.mark.parametrize(("kind", "config"), [(DQN, DQNConfig), (Pathwise, PathwiseConfig)])
def test_targets_start_as_the_policy_and_are_loaded_as_they_were(kind: Any, config: Any, tmp_path: Path) -> None:
    policy = make_policy("output embedding trained")
    small = {"episodes_per_update": 4, "batch_size": 4, "learning_starts": 4, "gradient_steps": 1}
    agent = kind(policy, make_envs(), config(**small, learning_rate=0.01, target_update_interval=100))
    start, scored = weights_of(policy), log_probs(policy)
    targets = [target.lm for target, _ in agent.follow()]
    agent.learn(4)
    assert (log_probs(policy) - scored).abs().max() > ROUNDING
    for target in targets:
        assert_same_model(TokenModel(target), start, scored)
    agent.save(tmp_path)
    again = kind.load(tmp_path, envs=make_envs())
    for target, _ in again.follow():
        assert_same_model(TokenModel(target.lm), start, scored)
    assert_same_model(again.policy, weights_of(policy), log_probs(policy))
    assert_same_model(again.penalty.reference, start, scored)


def test_several_adapters_are_loaded_with_those_in_use(tmp_path: Path) -> None:
    model = peft.get_peft_model(mock_lm(), lora(init_lora_weights=False))
    model.add_adapter("second", lora(init_lora_weights=False, target_modules=["k_proj"]))
    model.set_adapter("second")
    policy = ActorCritic.from_pretrained(model, critic="separate")
    train(policy)
    agent = PPO(policy, make_envs(), PPOConfig(episodes_per_update=4, learning_rate=0.01))
    reference, scored = weights_of(agent.penalty.reference), log_probs(agent.penalty.reference)
    assert abs(learn(agent, 4)["objective/kl"]) < ROUNDING
    agent.save(tmp_path)
    again = PPO.load(tmp_path, envs=make_envs())
    assert_same_model(again.policy, weights_of(policy), log_probs(policy))
    assert_same_model(again.penalty.reference, reference, scored)
    assert again.policy.lora.active_adapters == ["second"]
    again.policy.lora.set_adapter("default")  # the one that was not in use is there, too
    policy.lora.set_adapter("default")
    assert_same_model(again.policy, weights_of(policy), log_probs(policy))


def test_a_peft_model_is_a_policy() -> None:
    agent = PPO(peft.get_peft_model(mock_lm(), lora()), make_envs(), PPOConfig(episodes_per_update=4))
    assert abs(learn(agent, 4)["objective/kl"]) < ROUNDING


def test_a_reference_that_is_the_policy_itself_stays_what_it_was() -> None:
    policy = make_policy()
    for given in (policy, policy.lm, policy.lora):
        start, scored = weights_of(policy), log_probs(policy)
        agent = PPO(policy, make_envs(reference=given), PPOConfig(episodes_per_update=4, learning_rate=0.05)).learn(4)
        assert_same_model(agent.penalty.reference, start, scored)
        assert (log_probs(policy) - scored).abs().max() > ROUNDING


def test_a_reference_that_follows_the_policy_takes_the_whole_of_it(tmp_path: Path) -> None:
    policy = make_policy("output embedding trained")
    agent = PPO(policy, make_envs(), PPOConfig(episodes_per_update=4, learning_rate=0.01))
    agent.learn(4, callback=[SyncReference(every=1)])
    assert_close(log_probs(agent.penalty.reference), log_probs(policy), terms=FORWARD)
    agent.save(tmp_path)
    again = PPO.load(tmp_path, envs=make_envs())
    assert_close(log_probs(again.penalty.reference), log_probs(policy), terms=FORWARD)


def test_a_frozen_reference_keeps_its_precision(tmp_path: Path) -> None:
    policy = ActorCritic.from_pretrained(mock_lm(), dtype=torch.bfloat16)
    agent = PPO(policy, make_envs(), PPOConfig(episodes_per_update=4))
    start, scored = weights_of(agent.penalty.reference), log_probs(agent.penalty.reference)
    agent.save(tmp_path)
    again = PPO.load(tmp_path, envs=make_envs())
    assert again.penalty.reference.lm.dtype == torch.bfloat16
    assert_same_model(again.penalty.reference, start, scored, torch.bfloat16)


def test_layers_that_the_user_froze_are_frozen_after_loading(tmp_path: Path) -> None:
    policy = ActorCritic.from_pretrained(mock_lm(), critic="separate")
    policy.lm.get_input_embeddings().requires_grad_(False)
    agent = PPO(policy, make_envs(), PPOConfig(episodes_per_update=4, learning_rate=0.01)).learn(4)
    agent.save(tmp_path)
    again = PPO.load(tmp_path, envs=make_envs())
    assert not again.policy.lm.get_input_embeddings().weight.requires_grad
    assert again.policy.head.weight.requires_grad
    assert learn(again, 8) == pytest.approx(learn(agent, 8), abs=ROUNDING, nan_ok=True)


def test_agents_saved_by_version_0_1_are_refused_with_their_version(tmp_path: Path) -> None:
    """That version wrote no manifest, so nobody could tell whether the files are whole."""
    agent = PPO(make_policy("lora"), make_envs(), PPOConfig(episodes_per_update=4))
    agent.save(tmp_path)
    (tmp_path / "textgym_manifest.json").unlink()
    with pytest.raises(ValueError, match=r"is of textgym 0.1, whose format 1 is not read any more"):
        PPO.load(tmp_path, envs=make_envs())


@pytest.mark.slow
@pytest.mark.skipif(not (cache_dir() / "models" / "smollm2").exists(), reason="SmolLM2 is not in the cache folder")
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]], ids=["layers", "tied head"])
def test_a_real_model_after_sft_and_ppo_is_read_back_with_the_log_probs_and_the_kl_that_were_reported(
    targets: list[str], tmp_path: Path
) -> None:
    adapter = lora(r=8, target_modules=targets, init_lora_weights="gaussian")
    policy = ActorCritic.from_pretrained("smollm2", lora=adapter)
    plain = TokenModel.load("smollm2")

    # 1. SFT, until the policy is far from the plain model.
    data = [
        {"prompt": "The film is", "completion": " a joy from beginning to end."},
        {"prompt": "The actors are", "completion": " as good as they have ever been."},
    ]
    SFT(policy, data, "smollm2", SupervisedConfig(batch_size=2, max_steps=6, learning_rate=3e-3)).learn()
    policy.save_pretrained(tmp_path / "start")

    # 2. PPO: its KL begins at 0, not at the distance from the plain model.
    envs = gym.make_vec(
        "textgym/Text-v0", 4, prompts=["The film is"], tokenizer="smollm2", max_new_tokens=8, reward=count, kl_coef=0.05
    )
    agent = PPO(policy, envs, PPOConfig(episodes_per_update=4, learning_rate=3e-3))
    assert abs(learn(agent, 4)["objective/kl"]) < 1e-3
    agent.learn(8)

    # 3. Policy and start, merged and read back by transformers, are as far apart as the agent reports.
    agent.save(tmp_path / "agent")
    rollout = agent.play()
    reported = agent.measure_kl(rollout)
    final, start = (
        TokenModel(AutoModelForCausalLM.from_pretrained(tmp_path / part)) for part in ("agent/policy", "start")
    )
    log_probs, start_log_probs = (model.sequence_log_probs(rollout.sequences) for model in (final, start))
    torch.testing.assert_close(log_probs, rollout.log_probs, atol=2e-3, rtol=0.0)
    torch.testing.assert_close(log_probs - start_log_probs, reported, atol=4e-3, rtol=0.0)
    assert reported.abs().max() > 0.05, "PPO has moved it"
    assert (plain.sequence_log_probs(rollout.sequences) - start_log_probs).abs().max() > 0.1, "SFT has moved it"

    # 4. The agent, loaded, has the same policy and the same reference.
    again = PPO.load(tmp_path / "agent", envs=envs)
    loaded = again.policy.lm.state_dict()
    assert [name for name, weight in policy.lm.state_dict().items() if not torch.equal(loaded[name], weight)] == []
    scored = policy.sequence_log_probs(rollout.sequences)
    assert_close(again.policy.sequence_log_probs(rollout.sequences), scored, terms=terms_of(policy.lm))
    torch.testing.assert_close(again.measure_kl(rollout), reported)
