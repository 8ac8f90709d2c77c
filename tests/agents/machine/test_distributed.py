"""Several processes on the CPU, by gloo: they learn what one would from all episodes, and do not wait in vain."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import multiprocessing
from torch.distributed import TCPStore

from textgym.agents import (
    DPO,
    DQN,
    GRPO,
    NLPO,
    PPO,
    REINFORCE,
    RLOO,
    SFT,
    DPOConfig,
    ExpertIteration,
    OnlineDPO,
    Pathwise,
    PathwiseConfig,
    SFTConfig,
)
from textgym.agents.common.policy_gradient import PolicyGradientAgent
from textgym.agents.common.replay_agent import ReplayAgent
from textgym.agents.common.rollout import Rollout
from textgym.agents.machine import distributed
from textgym.agents.machine.distributed import (
    ProcessLostError,
    column_total,
    count,
    everyone,
    gather_columns,
    join,
    raise_on_termination,
    rank,
    shares_of,
    sum_gradients,
)
from textgym.agents.runs.checkpoints import Checkpoints
from textgym.data import files
from textgym.data.files import TEMPORARY
from textgym.data.manifests import checked_manifest
from textgym.models.actor_critic import ActorCritic
from textgym.models.architectures.attention import checkpointing_layers
from textgym.rewards.kl import AdaptiveKL
from textgym.rewards.models import RewardModelConfig, train_reward_model
from textgym.testing import assert_close, assert_trained_alike, byte_tokenizer, mock_lm, terms_of

FORWARD = terms_of(mock_lm())
LEARNING_RATE = 1e-3
"""Of agents on data and of reward models."""

Weights = dict[str, np.ndarray]
SETTINGS = Path(__file__).parents[3] / "examples" / "accelerate"
TOKEN_MEANS = {"policy/approxkl_avg", "policy/clipfrac_avg", "policy/entropy_avg", "val/ratio"}
BY_EPISODES = {"grpo, mean over episodes", "rloo", "reinforce", "online dpo"}
"""Whose figures weigh parts of a batch by episodes, as their losses do, so that means over tokens are not exact."""
PROCESSES, EPISODES, UPDATES = 2, 16, 3
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
PARALLEL = pytest.mark.parametrize(
    "environment",
    [pytest.param({}, id="data parallel"), pytest.param(SHARDED, id="fsdp2", marks=pytest.mark.slow)],
)
FORK = multiprocessing.get_context("fork")  # what has been imported need not be imported again
PPO_SETTINGS = {
    "num_epochs": 2,
    "minibatch_size": None,
    "micro_batch_size": 5,
    "whiten_rewards": True,
    "entropy_coef": 0.01,
    "target_kl": 1.0,
}
AGENTS: dict[str, tuple[type[PolicyGradientAgent], dict[str, Any]]] = {
    "ppo": (PPO, PPO_SETTINGS),
    "ppo, penalty": (PPO, {**PPO_SETTINGS, "variant": "penalty"}),
    "grpo": (GRPO, {"group_size": 4, "num_epochs": 2}),
    "grpo, mean over episodes": (GRPO, {"group_size": 4, "kl_in": "loss", "loss_type": "grpo"}),
    "grpo, constrained": (
        GRPO,
        {
            "group_size": 4,
            "kl_in": "loss",
            "scale": "each",
            "entropy_share": 0.5,
            "importance_cap": 2.0,
            "constraints": {"digits": 0.1},
            "ema_decay": 0.5,
        },
    ),
    "rloo": (RLOO, {"group_size": 4, "normalise": "batch"}),
    "reinforce": (REINFORCE, {}),
    "nlpo": (NLPO, {**PPO_SETTINGS, "top_p": 0.8, "mask_update_interval": 2}),
    "ppo, lora": (PPO, {**PPO_SETTINGS, "gradient_checkpointing": True}),
    "expert iteration": (ExpertIteration, {"group_size": 4, "keep": 2, "min_score": 0.5}),
    "online dpo": (OnlineDPO, {"group_size": 4, "num_epochs": 2, "micro_batch_size": 1}),
}
SUPERVISED: dict[str, Any] = {"sft": (SFT, SFTConfig), "dpo": (DPO, DPOConfig)}
FAST = ("ppo", "grpo")
"""Those that `make test` runs; the others share their update and differ in the loss."""


def digits(completion_ids: list[list[int]]) -> list[float]:
    """Another score for nearly every text: equal ones would leave nothing but rounding to be whitened."""
    return [sum(ids) % 17 / 4 for ids in completion_ids]


def nothing(completions: list[str]) -> list[float]:
    return [0.0] * len(completions)


def make_envs(num_envs: int, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "prompts": ["one", "three", "a longer prompt"],
        "tokenizer": byte_tokenizer(),
        "reward": digits,
        "stop": list(range(0, 256, 8)),  # so that lengths differ
        "reference": mock_lm(),
        "kl_coef": AdaptiveKL(0.01, horizon=64),
        "kl_mode": "deferred",
        "max_prompt_tokens": 8,
        "max_new_tokens": 6,
    }
    return gym.make_vec("textgym/Text-v0", num_envs=num_envs, **{**settings, **changes})


def make_agent(name: str, num_envs: int, env: dict[str, Any] | None = None, **changes: Any) -> PolicyGradientAgent:
    """An agent whose settings are the same however many processes there are."""
    kind, settings = AGENTS[name]
    envs = make_envs(num_envs, **(env or {}))
    lora = None
    if "lora" in name:
        lora = pytest.importorskip("peft").LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # peft draws from torch's global generator
        policy = ActorCritic.from_pretrained(mock_lm(), critic="separate", lora=lora)
    # A small epsilon would magnify what rounding does to the smallest gradients.
    config = {"episodes_per_update": EPISODES, "learning_rate": 1e-3, "adam_epsilon": 1e-3, **settings, **changes}
    agent = kind(policy, envs, kind.config_class(**config))
    trained = agent.learner.policy  # under FSDP2 a copy
    for trunk in (trained.lm.base_model, trained.critic):
        assert bool(checkpointing_layers(trunk)) == agent.config.gradient_checkpointing
    return agent


def learn(agent: PolicyGradientAgent) -> tuple[Weights, list[dict[str, float]]]:
    """Trains for a few updates; weights and metrics."""
    history: list[dict[str, float]] = []
    agent.learn(agent.config.episodes_per_update * UPDATES, [lambda _, metrics: history.append(metrics)])
    return weights_of(agent), history


def rollouts_of(agent: Any) -> list[Rollout]:
    """Those of the updates that the agent is going to make."""
    rollouts: list[Rollout] = []
    play = agent.play
    agent.play = lambda: rollouts.append(play()) or rollouts[-1]
    return rollouts


def give(agent: Any, rollouts: list[Rollout]) -> Any:
    """The agent, which takes this process's rows of rollouts instead of collecting its own."""
    shares = shares_of(agent.config.episodes_per_update // agent.episodes_per_prompt)
    start, end = (agent.episodes_per_prompt * sum(shares[:number]) for number in (rank(), rank() + 1))
    given = iter(rollouts)
    agent.play = lambda: next(given)[start:end]
    return agent


def weights_of(agent: PolicyGradientAgent | SFT | DPO) -> Weights:
    return {name: weight.detach().numpy().copy() for name, weight in agent.policy.named_parameters()}


REPLAY: dict[str, tuple[type[ReplayAgent], dict[str, Any]]] = {
    "dqn": (DQN, {"batch_size": 12}),
    "dqn, greedy": (
        DQN,
        {"backup": "greedy", "prioritised": True, "batch_size": 7, "micro_batch_size": 2, "n_quantiles": 3},
    ),
}


def make_any_agent(name: str, num_envs: int) -> Any:
    if name not in REPLAY:
        changes = {"minibatch_size": 5} if name == "ppo" else {}
        return make_agent(name, num_envs, **changes)
    kind, settings = REPLAY[name]
    config = {"episodes_per_update": EPISODES, "learning_starts": EPISODES, "target_update_interval": 3, **settings}
    config |= {"learning_rate": 1e-3, "adam_epsilon": 1e-3, "gradient_steps": 3}
    envs = make_envs(num_envs, kl_coef=0.1)
    return kind(ActorCritic.from_pretrained(mock_lm()), envs, kind.config_class(**config))


def learn_replaying_a_share_of(name: str, rollouts: list[Rollout]) -> tuple[Weights, list[dict[str, float]], Weights]:
    """The run of one process, whose rollouts are given, with a share of their rows; and its replay buffer."""
    agent = give(make_any_agent(name, EPISODES // count()), rollouts)
    weights, history = learn(agent)
    return weights, history, {key: values.numpy() for key, values in agent.memory.tensors.items()}


@pytest.mark.parametrize(
    ("name", "processes"),
    [("dqn", 2), *(pytest.param(name, 4, marks=pytest.mark.slow) for name in REPLAY)],
)
def test_processes_replay_what_one_replays_from_all_episodes(name: str, processes: int) -> None:
    whole = make_any_agent(name, EPISODES)
    rollouts = rollouts_of(whole)
    before = weights_of(whole)
    expected = learn(whole)
    assert max(abs(weight - before[name]).max() for name, weight in expected[0].items()) > 1e-3
    results = launched(learn_replaying_a_share_of, name, rollouts, processes=processes)
    assert_same([result[:2] for result in results], expected, by_episodes=False)
    for _, _, memory in results:
        for key, values in whole.memory.tensors.items():
            assert_close(memory[key], values.numpy(), terms=FORWARD, scale=10.0, what=key)


def learn_pathwise(folder: Path) -> tuple[Weights, list[float]]:
    config = PathwiseConfig(episodes_per_update=EPISODES, learning_starts=EPISODES, batch_size=5, learning_rate=1e-3)
    policy = ActorCritic.from_pretrained(mock_lm())
    agent = Pathwise(policy, make_envs(EPISODES // count(), kl_coef=0.1), config)
    weights, history = learn(agent)  # type: ignore[arg-type]
    agent.save(folder)
    return weights, [row["val/td_error_avg"] for row in history]


@pytest.mark.slow
def test_processes_learn_pathwise_together(tmp_path: Path) -> None:
    """Their noise differs, and their weights do not."""
    (first, errors), (second, same) = launched(learn_pathwise, tmp_path / "agent")
    for name, weight in first.items():
        np.testing.assert_array_equal(second[name], weight, err_msg=name)
    assert errors == same
    assert errors[-1] > 0


def learn_from_a_share_of(
    name: str, rollouts: list[Rollout], changes: dict[str, Any]
) -> tuple[Weights, list[dict[str, float]]]:
    """The run of one process, whose rollouts are given, with a share of their rows."""
    return learn(give(make_agent(name, 3, **changes), rollouts))


def launched(work: Callable[..., Any], *arguments: Any, processes: int = PROCESSES, **environment: str) -> list[Any]:
    """What `work` gives, or raises, in each of several processes."""
    answers, meeting = FORK.SimpleQueue(), FORK.SimpleQueue()
    shared = {"WORLD_SIZE": str(processes), **environment}
    started = [
        FORK.Process(target=_run, args=(answers, meeting, number, shared, work, arguments))
        for number in range(processes)
    ]
    for process in started:
        process.start()
    # The server takes a port that nobody else can take. It begins after the forks: while it accepts a connection it
    # holds a lock of the C library's resolver, and a process forked at that moment would wait for that lock for ever.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    address = {"MASTER_ADDR": store.host, "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for _ in started:
        meeting.put(address)
    results: dict[int, Any] = {}
    while len(results) < processes:
        alive = any(process.is_alive() for process in started)  # asked first: the last words are heard in any case
        if not answers.empty():
            number, result = answers.get()
            results[number] = result
        elif alive:
            time.sleep(0.01)
        else:
            break
    for process in started:
        process.join()
    return [results.get(number) for number in range(processes)]


def _run(
    answers: Any, meeting: Any, number: int, shared: dict[str, str], work: Callable[..., Any], arguments: Any
) -> None:
    shared = {**shared, **meeting.get()}
    os.environ.update(shared, RANK=str(number), LOCAL_RANK=str(number), LOCAL_WORLD_SIZE=shared["WORLD_SIZE"])
    AcceleratorState._reset_state(reset_partial_state=True)  # a Trainer of an earlier test has said it is alone
    try:
        join()
        torch.set_num_threads(1)
        answers.put((number, work(*arguments)))
    except BaseException as error:
        traceback.print_exc()
        answers.put((number, error))


def assert_same(results: list[Any], expected: tuple[Weights, list[dict[str, float]]], by_episodes: bool) -> None:
    for weights, history in results:
        for name, weight in expected[0].items():
            assert_close(weights[name], weight, terms=FORWARD, scale=1.0, what=name)
        for metrics, whole in zip(history, expected[1], strict=True):
            assert metrics.keys() == whole.keys()
            # Accuracies are signs of differences, which at first are nothing but rounding.
            for key in metrics.keys() - (TOKEN_MEANS if by_episodes else set()) - {"rewards/accuracies"}:
                if not key.startswith("time/"):
                    assert metrics[key] == pytest.approx(whole[key], abs=2e-5, rel=1e-4), key


@pytest.mark.parametrize(
    ("name", "environment"),
    [
        *(pytest.param(name, {}, id=name, marks=() if name in FAST else pytest.mark.slow) for name in AGENTS),
        *(
            pytest.param(name, SHARDED, id=f"{name}, fsdp2", marks=pytest.mark.slow)
            for name in ("ppo", "ppo, lora", "grpo")
        ),
    ],
)
def test_two_processes_learn_what_one_learns_from_all_episodes(name: str, environment: dict[str, str]) -> None:
    assert_shared_alike(name, PROCESSES, EPISODES, {}, environment)


def assert_shared_alike(
    name: str, processes: int, rows: int, changes: dict[str, Any], environment: dict[str, str]
) -> None:
    """Processes learn from their shares of the episodes what one learns, in an environment of `rows`, from all."""
    whole = make_agent(name, rows, **changes)
    rollouts = rollouts_of(whole)
    before = weights_of(whole)
    expected = learn(whole)
    assert max(abs(weight - before[name]).max() for name, weight in expected[0].items()) > 1e-4
    tokens = [rollout.response_mask.sum(1).tolist() for rollout in rollouts]
    assert any(len(set(each)) > 1 for each in tokens), "means of means would do as well"
    work = launched(learn_from_a_share_of, name, rollouts, changes, processes=processes, **environment)
    assert_same(work, expected, name in BY_EPISODES)


@pytest.mark.parametrize(
    ("name", "processes", "changes"),
    [
        pytest.param(
            *("ppo", 3, {"episodes_per_update": 7, "minibatch_size": 4, "micro_batch_size": 1}),
            marks=pytest.mark.slow,
        ),
        ("grpo", 2, {"episodes_per_update": 12, "minibatch_size": 5}),
    ],
)
def test_uneven_episodes_and_minibatches_are_shared_by_processes(
    name: str, processes: int, changes: dict[str, Any]
) -> None:
    """Neither the processes nor the rows of the environment divide them; the last minibatches are not full."""
    assert_shared_alike(name, processes, 4, changes, {})


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_any_number_of_episodes_and_processes_gives_the_weights_of_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    name, processes = [*AGENTS][seed % len(AGENTS)], int(rng.integers(2, 4))
    each = AGENTS[name][1].get("group_size", 1)
    episodes = each * int(rng.integers(processes, 20 // each + processes))
    changes: dict[str, Any] = {"episodes_per_update": episodes, "seed": seed}
    changes["micro_batch_size"] = int(rng.integers(1, 6)) if rng.random() < 0.7 else None
    if name != "reinforce":
        changes["minibatch_size"] = int(rng.integers(2, episodes + 3)) if rng.random() < 0.8 else None
    assert_shared_alike(name, processes, int(rng.integers(1, 9)), changes, {})


def prompts_of_rounds(name: str, episodes: int, total: int) -> list[list[tuple[int, ...]]]:
    """The prompts of each update of this process, in an environment of five rows."""
    agent = make_agent(name, 5, {"prompts": PROMPTS}, episodes_per_update=episodes)
    rollouts = rollouts_of(agent)
    agent.learn(total)
    return [[row[0] for row in rollout.sequences.input_ids.tolist()] for rollout in rollouts]


@pytest.mark.parametrize(("name", "episodes", "last", "each"), [("ppo", 7, 4, 1), ("grpo", 12, 8, 4)])
def test_processes_take_uneven_shares_of_one_order_of_prompts(name: str, episodes: int, last: int, each: int) -> None:
    """The last update is smaller, since the total is no multiple of an update."""
    total = 2 * episodes + last
    alone = prompts_of_rounds(name, episodes, total)
    assert [len(prompts) for prompts in alone] == [episodes, episodes, last]
    shares = launched(prompts_of_rounds, name, episodes, total)
    assert [[*first, *second] for first, second in zip(*shares, strict=True)] == alone
    assert len({prompt for rollout in alone for prompt in rollout}) == total // each, "a prompt came twice"


PROMPTS = [*"abcdefghijklmnopqrstuvwx"]  # eight are drawn as the environment is made, and a rollout takes the rest


def learn_with_scaled_scores() -> tuple[list[Any], tuple[float, ...], list[float]]:
    """Prompts and tokens of the first rollout, what scores are scaled by at last, and all the scores."""
    agent = make_agent("ppo", EPISODES // count(), {"score_scaling": "running", "prompts": PROMPTS})
    rollouts = rollouts_of(agent)
    learn(agent)
    scores = [score for rollout in rollouts for score in rollout.raw_scores.tolist()]
    return rollouts[0].sequences.input_ids.tolist(), agent.envs.unwrapped.task.scorer.scale.moments(), scores


def test_processes_have_prompts_and_seeds_of_their_own_and_scale_scores_alike() -> None:
    (first, moments, scores), (second, same, others) = launched(learn_with_scaled_scores)
    prompts = [[row[0] for row in rows] for rows in (first, second)]
    assert len({*prompts[0], *prompts[1]}) == EPISODES, "a prompt was drawn twice in one epoch"
    assert [row[1:] for row in first] != [row[1:] for row in second]
    assert moments == same
    every = np.array(scores + others)
    assert len(every) == EPISODES * UPDATES
    assert moments == pytest.approx((len(every), every.sum(), (every**2).sum()))


def learn_until_killed(folder: Path, killed: bool) -> Weights:
    def after(agent: Any, metrics: dict[str, float]) -> None:
        if agent.updates == 1:
            agent.save(folder)
        if killed and agent.updates == 2 and rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    return weights_of(make_agent("grpo", EPISODES // count()).learn(EPISODES * UPDATES, [after]))


def resume(folder: Path) -> Weights:
    return weights_of(GRPO.load(folder, envs=make_envs(EPISODES // count())).learn(EPISODES * UPDATES))


@pytest.mark.bit_for_bit
@PARALLEL
def test_a_killed_process_ends_the_others_and_the_run_resumes_bit_for_bit(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    whole = launched(learn_until_killed, tmp_path / "whole", False, **environment)
    # Without an end of its own the survivor would wait for gloo's 30 minutes, and this test only for its 300 s.
    survivor, killed = launched(learn_until_killed, tmp_path / "agent", True, **environment)
    assert killed is None
    assert isinstance(survivor, ProcessLostError)
    assert "process 0 of 2 has lost another one" in str(survivor)
    for resumed in launched(resume, tmp_path / "agent", **environment):
        for name, weight in whole[0].items():
            np.testing.assert_array_equal(resumed[name], weight, err_msg=name)


def saved_after_one(name: str, rollouts: list[Rollout], folder: Path) -> None:
    agent = give(make_any_agent(name, 3), rollouts)
    agent.learn(EPISODES * UPDATES, [lambda agent, _: False])
    agent.save(folder)


def resumed_with_rollouts(name: str, rollouts: list[Rollout], folder: Path) -> tuple[Weights, list[float], str]:
    """Weights, random numbers to come, and what was said."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fresh = make_any_agent(name, 3)
        agent: Any = give(type(fresh).load(folder, envs=fresh.envs), rollouts[1:])
    drawn = torch.rand(2, generator=agent.sampler).tolist()
    weights = weights_of(agent.learn(EPISODES * UPDATES))
    return weights, drawn, " ".join(str(warning.message) for warning in said)


@pytest.mark.parametrize(
    ("name", "saved_by", "loaded_by"),
    [
        pytest.param(name, *numbers, marks=pytest.mark.slow)
        for name in ("reinforce", "ppo", "dqn")
        for numbers in [(2, 1), (1, 3), (4, 2), (3, 4)]
    ],
)
def test_a_run_goes_on_with_another_number_of_processes(
    tmp_path: Path, name: str, saved_by: int, loaded_by: int
) -> None:
    """It learns the same from the same episodes; its own would have other random numbers, and a warning says so."""
    whole = make_any_agent(name, EPISODES)
    rollouts = rollouts_of(whole)
    expected = weights_of(whole.learn(EPISODES * UPDATES))
    launched(saved_after_one, name, rollouts, tmp_path / "agent", processes=saved_by)
    results = launched(resumed_with_rollouts, name, rollouts, tmp_path / "agent", processes=loaded_by)
    for weights, _, said in results:
        assert f"was saved by {saved_by} processes, and this run has {loaded_by}" in said
        for parameter, weight in expected.items():
            assert_close(weights[parameter], weight, terms=FORWARD, scale=1.0, what=parameter)
    assert len({tuple(drawn) for _, drawn, _ in results}) == loaded_by, "processes would sample the same texts"


def learn_from_few(kind: str) -> float:
    """Minibatches of two episodes in passes of one; the second process has none to learn from."""
    agent = make_agent(kind, 8, {"reward": digits if rank() == 0 else nothing}, minibatch_size=4)
    agent.config.micro_batch_size = 1
    return learn(agent)[1][-1]["val/grad_norm"]


@pytest.mark.parametrize("kind", ["expert iteration", pytest.param("online dpo", marks=pytest.mark.slow)])
def test_a_process_with_nothing_to_learn_from_keeps_step_with_the_others(kind: str) -> None:
    first, second = launched(learn_from_few, kind, **SHARDED)
    assert first == pytest.approx(second)
    assert second > 0


def texts_for(kind: str, rows: int) -> list[dict[str, str]]:
    """Texts of different lengths, so that means of means would differ."""
    texts = ["ab" * (i % 5) + "." for i in range(rows)]
    if kind == "sft":
        return [{"prompt": f"{i} ", "completion": text} for i, text in enumerate(texts)]
    return [{"prompt": f"{i} ", "chosen": text, "rejected": text[::-1] + "?"} for i, text in enumerate(texts)]


def supervised_agent(kind: str, rows: int, **settings: Any) -> SFT | DPO:
    agent, config = SUPERVISED[kind]
    policy = ActorCritic.from_pretrained(mock_lm())
    return agent(
        policy, texts_for(kind, rows), byte_tokenizer(), config(**{"learning_rate": LEARNING_RATE, **settings})
    )


def learn_from_texts(
    kind: str, rows: int, settings: dict[str, Any]
) -> tuple[Weights, list[dict[str, float]], list[int]]:
    """Weights, metrics, and the items that this process trained on."""
    agent = supervised_agent(kind, rows, **settings)
    collate, seen = agent.collate, []

    def noted(items: Any) -> Any:
        seen.extend(items)
        return collate(items)

    agent.collate = noted  # type: ignore[method-assign]
    history: list[dict[str, float]] = []
    agent.learn([lambda _, metrics: history.append(metrics)])
    return weights_of(agent), history, seen


def assert_learns_alike(kind: str, processes: int, rows: int, settings: dict[str, Any]) -> None:
    weights, history, seen = learn_from_texts(kind, rows, settings)
    shares = launched(learn_from_texts, kind, rows, settings, processes=processes)
    for others, figures, _ in shares:
        assert_trained_alike(others, weights, LEARNING_RATE)
        for metrics, whole in zip(figures, history, strict=True):
            # Accuracies are signs of differences, which at first are nothing but rounding.
            for name in metrics.keys() - {"time/update_s", "rewards/accuracies"}:
                assert metrics[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-5), name
    if seen:  # each item as often as in one process; the first may stand in for an empty batch, without counting
        trained = Counter(item for _, _, items in shares for item in items)
        assert all(trained[item] == number for item, number in Counter(seen).items() if item != 0)


@pytest.mark.parametrize(
    ("kind", "processes", "rows", "settings"),
    [
        ("sft", 2, 5, {"batch_size": 4}),
        pytest.param("dpo", 3, 7, {"batch_size": 5, "micro_batch_size": 1, "epochs": 2.0}, marks=pytest.mark.slow),
    ],
)
def test_several_processes_learn_what_one_learns_from_all_texts(
    kind: str, processes: int, rows: int, settings: dict[str, Any]
) -> None:
    """Also where the last batch is not full and cannot be divided; nothing is trained on twice."""
    assert_learns_alike(kind, processes, rows, settings)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_any_number_of_texts_and_processes_gives_the_weights_of_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    micro = int(rng.integers(1, 4)) if rng.random() < 0.7 else None
    settings = {
        "batch_size": int(rng.integers(1, 5)) * (micro or 1),
        "micro_batch_size": micro,
        "epochs": float(rng.choice([0.5, 1.0, 1.7, 2.0])),
        "seed": seed,
    }
    assert_learns_alike(str(rng.choice(["sft", "dpo"])), int(rng.choice([2, 3])), int(rng.integers(1, 20)), settings)


def learn_preferences(base: Path, rows: int, settings: dict[str, Any]) -> Weights:
    # Every third pair has the prompt of the one before, so that clusters have different sizes.
    pairs = [{**row, "prompt": f"{i - (i % 3 == 1)} "} for i, row in enumerate(texts_for("dpo", rows))]
    config = RewardModelConfig(learning_rate=LEARNING_RATE, allow_faulty_rows=1.0, **settings)
    reward_model, _ = train_reward_model(pairs, base, config=config, heldout=[], device="cpu")
    return {name: weight.numpy().copy() for name, weight in reward_model.scorer.state_dict().items()}


@pytest.mark.parametrize(
    ("processes", "rows", "settings"),
    [
        (2, 5, {"batch_size": 3}),
        pytest.param(3, 7, {"batch_size": 1, "epochs": 2.0}, marks=pytest.mark.slow),
        pytest.param(3, 19, {"batch_size": 5, "epochs": 2.0, "matrix_learning_rate": 0.01}, marks=pytest.mark.slow),
        pytest.param(2, 19, {"batch_size": 8, "center_coefficient": 0.1}, marks=pytest.mark.slow),
    ],
)
def test_several_processes_train_the_reward_model_of_one(
    tmp_path: Path, processes: int, rows: int, settings: dict[str, Any]
) -> None:
    mock_lm().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    weights = learn_preferences(tmp_path, rows, settings)
    for others in launched(learn_preferences, tmp_path, rows, settings, processes=processes):
        assert_trained_alike(others, weights, LEARNING_RATE)


def interrupted(folder: Path, kind: str) -> Weights:
    """The first two updates, saved."""
    agent = supervised_agent(kind, 11, batch_size=3, micro_batch_size=1, epochs=2.0)
    agent.learn([lambda agent, _: agent.updates < 2])
    agent.save(folder)
    return weights_of(agent)


def continued(folder: Path, kind: str) -> Weights:
    return weights_of(SUPERVISED[kind][0].load(folder, texts_for(kind, 11)).learn())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.parametrize(("saved_by", "loaded_by"), [(2, 3), (3, 1), (1, 2)])
def test_texts_are_learned_from_on_with_another_number_of_processes(
    tmp_path: Path, kind: str, saved_by: int, loaded_by: int
) -> None:
    whole = supervised_agent(kind, 11, batch_size=3, micro_batch_size=1, epochs=2.0).learn()
    launched(interrupted, tmp_path / "agent", kind, processes=saved_by)
    for weights in launched(continued, tmp_path / "agent", kind, processes=loaded_by):
        assert_trained_alike(weights, weights_of(whole), LEARNING_RATE)


class Laggard:
    """Callback that saves after every update, each process in its own time, and counts what is whole afterwards."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.checkpoints = Checkpoints(folder, every=1, keep=keep)
        self.rng = np.random.default_rng(rank())
        self.whole: list[bool] = []

    def lag(self) -> None:
        time.sleep(float(self.rng.choice([0.0, 0.02, 0.3], p=[0.5, 0.4, 0.1])))

    def __call__(self, agent: Any, metrics: dict[str, float]) -> None:
        self.lag()
        self.checkpoints(agent, metrics)
        newest = self.checkpoints.folder / f"step-{agent.updates:06d}"
        checked_manifest(newest)  # raises if it is damaged or not there
        self.whole.append(newest == self.checkpoints.newest())
        assert not list(self.checkpoints.folder.glob(f"{TEMPORARY}*")) or rank() > 0


def save_with_lags(folder: Path, kind: str, saves: int) -> list[bool]:
    laggard = Laggard(folder, keep=2)
    write = files.write_manifest

    def slow(*arguments: Any, **settings: Any) -> None:
        laggard.lag()
        write(*arguments, **settings)

    files.write_manifest = slow  # the folder has its files and not yet its name
    if kind in AGENTS:
        agent: Any = make_agent(kind, EPISODES // count())
        agent.learn(EPISODES * saves, [laggard])
    else:
        supervised_agent(kind, 3 * saves, batch_size=3).learn([laggard])
    return laggard.whole


@pytest.mark.parametrize(
    ("kind", "saves"),
    [
        pytest.param("sft", 3),
        *(pytest.param(kind, 50, marks=pytest.mark.slow) for kind in ("sft", "dpo", "ppo", "grpo")),
    ],
)
def test_checkpoints_of_lagging_processes_are_written_once_and_none_is_lost(
    tmp_path: Path, kind: str, saves: int
) -> None:
    """Each process wrote its own, and the first one's cleaning removed those of the others before they were whole."""
    for whole in launched(save_with_lags, tmp_path / "checkpoints", kind, saves):
        assert whole == [True] * saves
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [f"step-{saves - 1:06d}", f"step-{saves:06d}"]


def save_where_files_are(folder: Path) -> str:
    agent = supervised_agent("sft", 3)
    try:
        agent.save(folder)
    except OSError as error:
        return str(error)
    return "saved"


def test_an_error_of_saving_ends_all_processes(tmp_path: Path) -> None:
    """Nobody waits for a process that could not write."""
    (tmp_path / "agent").mkdir()
    (tmp_path / "agent" / "notes.txt").write_text("mine")
    first, second = launched(save_where_files_are, tmp_path / "agent")
    assert "has files that textgym did not write" in first
    assert second.startswith("process 0, which writes for all, could not: FileExistsError")
    assert (tmp_path / "agent" / "notes.txt").read_text() == "mine"


def test_columns_of_all_processes_are_aligned_whoever_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process without a column has as many NaN as it has rows."""
    own = {"score": torch.tensor([1.0]), "cost": torch.tensor([0.5])}
    other = {"score": torch.tensor([3.0, 4.0]), "length": torch.tensor([6.0, 7.0])}
    assert gather_columns(own) == own, "of a single process"
    monkeypatch.setattr(distributed, "count", lambda: 2)
    monkeypatch.setattr(distributed, "everyone", lambda columns: [columns, other])
    gathered = gather_columns(own)
    assert gathered["score"].tolist() == [1.0, 3.0, 4.0]
    for name, expected in (("cost", [0.5, torch.nan, torch.nan]), ("length", [torch.nan, 6.0, 7.0])):
        assert gathered[name].tolist() == pytest.approx(expected, nan_ok=True)


def test_gradients_are_sums_over_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [torch.nn.Parameter(torch.ones(shape)) for shape in ((3,), (2, 2), (1,))]
    for weight in weights[:2]:
        weight.grad = torch.arange(1.0, 1 + weight.numel()).view_as(weight)
    monkeypatch.setattr(distributed, "count", lambda: 2)
    monkeypatch.setattr(distributed, "sum_over_processes", lambda gradients: gradients + 10)
    for most in (3, 100):  # in buckets of one gradient and of both
        monkeypatch.setattr(distributed, "BUCKET", most)
        sum_gradients(weights)
    assert weights[0].grad is not None
    assert weights[0].grad.tolist() == [21.0, 22.0, 23.0]
    assert weights[1].grad is not None
    assert weights[1].grad.tolist() == [[21.0, 22.0], [23.0, 24.0]]
    assert weights[2].grad is None


def test_a_single_process_keeps_its_way_to_end() -> None:
    before = signal.getsignal(signal.SIGTERM)
    raise_on_termination()
    assert signal.getsignal(signal.SIGTERM) is before


def sums_of_different_widths() -> Any:
    return everyone(rank()), column_total(torch.ones(rank() + 1)).tolist()


def test_columns_of_different_widths_are_summed() -> None:
    assert launched(sums_of_different_widths, processes=3) == [
        ([0, 1, 2], [3.0]),
        ([0, 1, 2], [3.0, 2.0]),
        ([0, 1, 2], [3.0, 2.0, 1.0]),
    ]


def refused(kind: str) -> None:
    if kind == "fsdp":
        os.environ.update(SHARDED)
        supervised_agent("sft", 4).learn()
    elif kind == "memory":
        os.environ.update(SHARDED)
        DQN(ActorCritic.from_pretrained(mock_lm()), make_envs(8, kl_coef=0.1))
    else:
        make_agent("grpo", 4, episodes_per_update=4)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("memory", "does not shard its target networks"),
        ("groups", "at least one for each of 2 processes: the nearest is 8"),
        ("fsdp", "SFT and DPO do not shard weights by FSDP"),
    ],
)
def test_what_processes_cannot_share_is_an_error(kind: str, message: str) -> None:
    for error in launched(refused, kind):
        assert isinstance(error, ValueError)
        assert message in str(error)


def test_the_launchers_mixed_precision_is_not_ignored_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.warns(UserWarning, match=r"mixed_precision=bf16.* set bf16=True"):
        make_agent("ppo", 8)


def train_launched(settings: str, folder: Path, reward: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(SETTINGS / settings)]
    launcher += ["--main_process_port", "0"]  # any that is free
    sizes = ["--num-envs", "4", "--episodes-per-update", "16", "--minibatch-size", "8", "--total-episodes", "32"]
    env = ["--env-kwargs", json.dumps({"max_new_tokens": 4, "reward": reward})]
    train = ["-m", "textgym", "train", "--output-dir", str(folder / "run"), *sizes, *env]
    return subprocess.run([*launcher, *train], cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_accelerate_launch_trains_with_sharded_weights(tmp_path: Path) -> None:
    done = train_launched("fsdp2.yaml", tmp_path, "textgym.rewards.functions:lexicon_sentiment")
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    ActorCritic.from_pretrained(tmp_path / "run" / "policy")


@pytest.mark.slow
def test_accelerate_launch_ends_with_a_message_when_a_process_is_killed(tmp_path: Path) -> None:
    (tmp_path / "deadly.py").write_text(
        "import os\ncalls = []\ndef deadly(completions):\n    calls.append(1)\n"
        "    if os.environ['RANK'] == '1' and len(calls) > 2:\n        os.kill(os.getpid(), 9)\n"
        "    return [0.0] * len(completions)\n"
    )
    done = train_launched("ddp.yaml", tmp_path, "deadly:deadly")
    assert done.returncode != 0
    assert "process 0 of 2 has lost another one" in done.stderr
    assert "SIGKILL" in done.stderr
