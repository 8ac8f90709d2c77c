"""EpisodeReplayBuffer: the transitions of SB3's own buffer, from episodes that are kept once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3 import DQN
from stable_baselines3.common.buffers import DictReplayBuffer
from stable_baselines3.common.vec_env import VecNormalize

from textgym.games.game_env import GameVectorEnv
from textgym.models.architectures.attention import PackedStates
from textgym.sb3 import EpisodeReplayBuffer, TextQPolicy, make_vec_env
from textgym.sb3.replay_buffer import Episode
from textgym.testing import byte_tokenizer

MakeEnv = Any
Transition = tuple[Any, ...]


def played(env: Any, buffers: list[Any], steps: int = 40, seed: int = 0) -> None:
    """Random play, stored as SB3's off-policy algorithms store it."""
    rng, observation = np.random.default_rng(seed), env.reset()
    for _ in range(steps):
        actions = rng.integers(30, 120, env.num_envs)
        following, rewards, dones, infos = env.step(actions)
        stored = {key: value.copy() for key, value in following.items()}
        for row in np.flatnonzero(dones):
            for key in stored:
                stored[key][row] = infos[row]["terminal_observation"][key]
        for buffer in buffers:
            buffer.add(observation, stored, actions, rewards, dones, infos)
        observation = following


def test_a_buffer_of_another_number_of_rows_is_refused(make_env: MakeEnv, lm_folder: str, tmp_path: Path) -> None:
    """SB3 loads it without a word, and would fail while it adds the first step."""

    def model_of(rows: int) -> DQN:
        return DQN(
            TextQPolicy,
            make_env(rows, kl_mode="reference"),
            replay_buffer_class=EpisodeReplayBuffer,
            policy_kwargs={"model": lm_folder},
            gamma=1.0,
            learning_starts=1000,
        )

    first = model_of(4)
    first.learn(24)
    first.save_replay_buffer(tmp_path / "buffer.pkl")
    other = model_of(2)
    other.load_replay_buffer(tmp_path / "buffer.pkl")
    with pytest.raises(ValueError, match=r"texts of 4 rows, and the environment has 2: make .*n_envs=4"):
        other.learn(24)
    again = model_of(4)
    again.load_replay_buffer(tmp_path / "buffer.pkl")
    before = again.replay_buffer.size()
    again.learn(24)
    assert again.replay_buffer.size() > before > 0


def contexts(states: PackedStates) -> list[tuple[int, ...]]:
    """The token ids of each packed state."""
    ids, segments = states.packed.input_ids.flatten(), states.packed.segments.flatten()
    found = []
    for last in states.index.tolist():
        first = int(states.packed.starts[segments[last] - 1])
        found.append(tuple(ids[first : last + 1].tolist()))
    return found


def transitions(batch: Any) -> list[Transition]:
    columns = (batch.actions, batch.rewards, batch.dones)
    rest = zip(*(column.flatten().tolist() for column in columns), strict=True)
    return [
        (before, after, *values)
        for before, after, values in zip(
            contexts(batch.observations), contexts(batch.next_observations), rest, strict=True
        )
    ]


def stock_transitions(buffer: DictReplayBuffer) -> set[Transition]:
    """All that SB3's buffer holds, in the same form."""

    def context(store: Any, step: int, row: int) -> tuple[int, ...]:
        length = store["attention_mask"][step, row].sum()
        return tuple(store["input_ids"][step, row, :length].tolist())

    return {
        (
            context(buffer.observations, step, row),
            context(buffer.next_observations, step, row),
            int(buffer.actions[step, row, 0]),
            float(buffer.rewards[step, row]),
            float(buffer.dones[step, row] * (1 - buffer.timeouts[step, row])),
        )
        for step in range(buffer.pos)
        for row in range(buffer.n_envs)
    }


@pytest.mark.parametrize("length_limit", ["terminate", "truncate"])
def test_transitions_are_those_of_the_stock_buffer(make_env: MakeEnv, length_limit: str) -> None:
    env = make_env(3, kl_mode="reference", length_limit=length_limit)
    spaces = (env.observation_space, env.action_space)
    ours = EpisodeReplayBuffer(1000, *spaces, n_envs=3)
    stock = DictReplayBuffer(1000, *spaces, n_envs=3)
    played(env, [ours, stock])
    assert ours.size() == 120
    np.random.seed(0)
    seen = {transition for _ in range(200) for transition in transitions(ours.sample(32))}
    assert seen == stock_transitions(stock)


@pytest.mark.parametrize("batch_size", [1, 32, 100])
def test_every_transition_is_as_likely(make_env: MakeEnv, batch_size: int) -> None:
    """The last one of a text carries the score; texts are shorter and longer than a batch."""
    env = make_env(1, kl_mode="reference")
    buffer = EpisodeReplayBuffer(1000, env.observation_space, env.action_space)
    sizes = (1, 3, 24, 48, 64)
    for size in sizes:
        buffer.episodes.append(Episode(np.arange(size + 1), np.arange(1, size + 2), np.zeros(size), True))
    np.random.seed(0)
    counts = {size: np.zeros(size) for size in sizes}
    draws = 20_000 // batch_size
    for _ in range(draws):
        pieces = buffer._sample_pieces(batch_size)
        assert sum(piece.last - piece.first for piece in pieces) == batch_size
        for piece in pieces:
            counts[len(piece.episode.rewards)][piece.first : piece.last] += 1
    expected = draws * batch_size / sum(sizes)  # 143 each; one a batch at most, so their deviation is at most 12
    assert np.abs(np.concatenate([*counts.values()]) - expected).max() < 6 * expected**0.5


def test_a_batch_has_no_transition_twice(make_env: MakeEnv) -> None:
    env = make_env(3, kl_mode="reference")
    buffer = EpisodeReplayBuffer(1000, env.observation_space, env.action_space, n_envs=3)
    played(env, [buffer], steps=12)
    assert len(set(transitions(buffer.sample(36)))) == 36  # all that there are
    assert len(transitions(buffer.sample(50))) == 50  # from the beginning again


def test_batch_has_the_size_asked_for_and_one_pass_an_episode(make_env: MakeEnv) -> None:
    env = make_env(3, kl_mode="reference", stop=())
    buffer = EpisodeReplayBuffer(1000, env.observation_space, env.action_space, n_envs=3)
    played(env, [buffer])
    for size in (1, 7, 50):
        batch = buffer.sample(size)
        assert len(batch.actions) == len(batch.observations) == len(batch.next_observations) == size
        assert batch.discounts is None
        assert len(batch.observations.packed.starts) <= 1 + -(-size // 5)  # every episode has 5 tokens


def test_n_step_transitions(make_env: MakeEnv) -> None:
    env = make_env(1, kl_mode="reference", stop=())
    spaces = (env.observation_space, env.action_space)
    one = EpisodeReplayBuffer(1000, *spaces)
    three = EpisodeReplayBuffer(1000, *spaces, n_steps=3, gamma=0.5)
    played(env, [one, three], steps=5)
    rewards = one.episodes[0].rewards
    batch = three.sample(5)
    ends = np.array([len(context) for context in contexts(batch.next_observations)])
    starts = np.array([len(context) for context in contexts(batch.observations)])
    order = starts.argsort()  # a batch begins anywhere
    expected = [sum(0.5**k * rewards[t + k] for k in range(3) if t + k < 5) for t in range(5)]
    np.testing.assert_allclose(batch.rewards.flatten()[order], expected, rtol=1e-6)
    assert batch.dones.flatten()[order].tolist() == [0, 0, 1, 1, 1]
    assert batch.discounts.flatten()[order].tolist() == [0.125, 0.125, 0.125, 0.25, 0.5]
    assert (ends - starts)[order].tolist() == [3, 3, 3, 2, 1]


class Rounds:
    """Three turns; the replies are of different lengths, and each turn pays."""

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        self.turn = 0
        return "q?", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.turn += 1
        return "R" * self.turn, 1.0, self.turn == 3, False, {}


def played_rounds(buffers: list[Any], turns: list[bytes], end: bool = True) -> None:
    envs = make_vec_env(GameVectorEnv(1, Rounds, byte_tokenizer(), max_prompt_tokens=4, max_new_tokens=20))
    observation = envs.reset()
    for token in [token for turn in turns for token in [*turn, 256]]:
        following, rewards, dones, infos = envs.step(np.array([token]))
        stored = {key: value.copy() for key, value in following.items()}
        if dones[0]:
            stored = {key: value[None] for key, value in infos[0]["terminal_observation"].items()}
        for buffer in buffers:
            buffer.add(observation, stored, np.array([token]), rewards, dones, infos)
        observation = following
    assert dones[0] == end


def game_buffers(*settings: dict[str, Any]) -> list[Any]:
    envs = GameVectorEnv(1, Rounds, byte_tokenizer(), max_prompt_tokens=4, max_new_tokens=20)
    spaces = (envs.single_observation_space, envs.single_action_space)
    return [EpisodeReplayBuffer(100, *spaces, **more) for more in settings]


def test_a_game_is_one_episode_whose_states_have_the_replies() -> None:
    [ours] = game_buffers({})
    stock = DictReplayBuffer(100, ours.observation_space, ours.action_space)
    played_rounds([ours, stock], [b"a", b"bc", b""])
    assert len(ours.episodes) == 1
    assert ours.episodes[0].terminated
    assert ours.size() == 6, "the tokens of the agent"
    seen = set(transitions(ours.sample(6)))
    assert seen == stock_transitions(stock)
    after = dict.fromkeys(next_state for _, next_state, *_ in seen)
    assert (*b"q?a", 256, *b"R") in after
    assert (*b"q?a", 256, *b"Rbc", 256, *b"RR") in after


def test_n_steps_are_the_agents_own_across_the_turns_of_a_game() -> None:
    [buffer] = game_buffers({"n_steps": 3, "gamma": 0.5})
    played_rounds([buffer], [b"a", b"b", b""])
    rewards = np.array([0.0, 1.0, 2.0, 4.0, 8.0], dtype=np.float32)
    buffer.episodes[0].rewards[:] = rewards
    batch = buffer.sample(5)
    actions = batch.actions.flatten().numpy().tolist()
    found = sorted(
        zip(map(len, contexts(batch.observations)), batch.rewards.flatten().tolist(), strict=True)
    )  # by the length of the state
    assert [value for _, value in found] == [1.0, 3.0, 6.0, 8.0, 8.0]
    assert sorted(actions) == [97, 98, 256, 256, 256]
    ends = sorted(map(len, contexts(batch.next_observations)))
    assert ends == [6, 9, 10, 10, 10]


def test_a_game_under_way_bootstraps_from_the_state_with_the_reply() -> None:
    [buffer] = game_buffers({})
    played_rounds([buffer], [b"a"], end=False)
    batch = buffer.sample(2)
    assert max(map(len, contexts(batch.next_observations))) == len("q?a") + 1 + len("R")
    played_rounds([buffer], [b"a", b"b", b"c"])  # after a reset
    assert [episode.terminated for episode in buffer.episodes] == [False, True]
    assert [len(episode.rewards) for episode in buffer.episodes] == [2, 6]


def test_sb3s_dqn_learns_from_games(lm_folder: str) -> None:
    envs = GameVectorEnv(
        2, Rounds, byte_tokenizer(), max_prompt_tokens=4, max_new_tokens=12, stop=list(range(0, 256, 3)), kl_coef=0.0
    )
    model = DQN(
        TextQPolicy,
        make_vec_env(envs),
        replay_buffer_class=EpisodeReplayBuffer,
        replay_buffer_kwargs={"n_steps": 2, "gamma": 1.0},
        policy_kwargs={"model": lm_folder},
        gamma=1.0,
        learning_starts=8,
        batch_size=8,
    )
    before = [weight.detach().clone() for weight in model.policy.parameters()]
    model.learn(48)
    assert any((episode.sizes[1:] - episode.sizes[:-1]).max() > 1 for episode in model.replay_buffer.episodes)
    assert any(not torch.equal(*pair) for pair in zip(before, model.policy.parameters(), strict=True))


def test_oldest_episodes_make_room(make_env: MakeEnv) -> None:
    env = make_env(2, kl_mode="reference", stop=())
    buffer = EpisodeReplayBuffer(20, env.observation_space, env.action_space, n_envs=2)
    played(env, [buffer], steps=50)
    assert 10 < buffer.num_transitions <= 20
    assert buffer.size() == buffer.num_transitions
    buffer.reset()
    assert buffer.size() == 0
    with pytest.raises(ValueError, match="is empty"):
        buffer.sample(4)


def test_episodes_cut_short_by_a_reset_end_without_an_end(make_env: MakeEnv) -> None:
    env = make_env(2, kl_mode="reference", stop=())
    buffer = EpisodeReplayBuffer(100, env.observation_space, env.action_space, n_envs=2)
    played(env, [buffer], steps=3)
    played(env, [buffer], steps=5)
    assert [len(episode.rewards) for episode in buffer.episodes] == [3, 3, 5, 5]
    assert [episode.terminated for episode in buffer.episodes] == [False, False, True, True]


@pytest.mark.slow
def test_memory_a_transition(make_env: MakeEnv) -> None:
    env = make_env(4, kl_mode="reference")
    buffer = EpisodeReplayBuffer(10**6, env.observation_space, env.action_space, n_envs=4)
    played(env, [buffer], steps=200)
    assert buffer.nbytes() / buffer.size() < 20


def test_rewards_are_normalised_by_the_environment(make_env: MakeEnv) -> None:
    env = VecNormalize(make_env(2, kl_mode="reference", stop=()), norm_obs=False)
    buffer = EpisodeReplayBuffer(100, env.observation_space, env.action_space, n_envs=2)
    played(env.venv, [buffer], steps=5)
    env.ret_rms.var = np.array(25.0)
    np.random.seed(0)
    plain = buffer.sample(5).rewards
    np.random.seed(0)
    torch.testing.assert_close(buffer.sample(5, env=env).rewards, plain / 5, atol=1e-6, rtol=1e-5)


def test_bad_arguments(make_env: MakeEnv) -> None:
    env = make_env(1)
    spaces = (env.observation_space, env.action_space)
    with pytest.raises(ValueError, match="leave optimize_memory_usage off"):
        EpisodeReplayBuffer(10, *spaces, optimize_memory_usage=True)
    with pytest.raises(ValueError, match="n_steps must be at least 1"):
        EpisodeReplayBuffer(10, *spaces, n_steps=0)


def test_episodes_without_a_score_are_not_kept(make_env: MakeEnv) -> None:
    def none_or_one(completion_ids: list[list[int]]) -> list[float | None]:
        return [None if ids[0] % 2 else 1.0 for ids in completion_ids]

    env = make_env(reward=none_or_one)
    buffer = EpisodeReplayBuffer(1000, env.observation_space, env.action_space, "cpu", n_envs=env.num_envs)
    played(env, [buffer], steps=60)
    assert len(buffer.episodes) > 3
    assert all(episode.input_ids[episode.sizes[0]] % 2 == 0 for episode in buffer.episodes)
    assert all(episode.rewards[-1] == 1.0 for episode in buffer.episodes)
    assert buffer.num_transitions == sum(len(episode.rewards) for episode in buffer.episodes)
