"""EpisodeReplayBuffer: a replay buffer for SB3 that stores episodes and evaluates each in one forward pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.buffers import BaseBuffer, ReplayBuffer
from stable_baselines3.common.type_aliases import DictReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize
from torch import Tensor

from textgym.models.architectures.attention import PackedStates
from textgym.sb3.policies import token_space


class Episode(NamedTuple):
    """A text with its rewards: T transitions, one for each token of the agent.

    Attributes:
        input_ids: Token ids of prompt and response, with the environment's replies in a game.
        sizes: `(T + 1,)`, number of tokens before each token of the agent, and in the last state.
        rewards: `(T,)`, one for each token of the agent.
        terminated: Whether its last transition has no next state to bootstrap from.
    """

    input_ids: np.ndarray
    sizes: np.ndarray
    rewards: np.ndarray
    terminated: bool


class Piece(NamedTuple):
    """The transitions `first` to `last`, exclusive, of an episode."""

    episode: Episode
    first: int
    last: int


class EpisodeReplayBuffer(ReplayBuffer):
    """Replay buffer that stores each episode once, as token ids, and samples transitions whose states share passes.

    Episodes without a score are removed when they end, because their rewards are unknown.

    A batch consists of whole episodes in random order; the first and the last one may be cut to fit the batch size. All
    transitions are equally likely, no transition occurs twice in a batch unless the buffer has fewer, and both networks
    need one pass over each episode. Transitions of one episode are correlated: a batch of 256 has as many independent
    texts as 10 to 20 single transitions have, at about their cost.

    In a game of several turns the state after the last token of a turn has the reply, and `n_steps` counts the tokens
    of the agent.

    Args:
        buffer_size: Maximum number of transitions; the oldest episodes are removed first.
        observation_space: Observation space of a text environment.
        action_space: Action space of a text environment.
        device: Device of the samples.
        n_envs: Number of rows.
        optimize_memory_usage: Must be False: every token is already stored only once.
        handle_timeout_termination: Whether to bootstrap from the last state of truncated episodes.
        n_steps: Number of rewards that are summed before bootstrapping; with more steps a score at the end reaches
            earlier tokens sooner.
        gamma: Discount of these sums; it must be the algorithm's.

    Raises:
        ValueError: If `optimize_memory_usage` is set, `n_steps` is below 1, or the environment is for encoder-decoder
            models.
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        device: torch.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        handle_timeout_termination: bool = True,
        n_steps: int = 1,
        gamma: float = 1.0,
    ) -> None:
        BaseBuffer.__init__(self, buffer_size, observation_space, action_space, device, n_envs=n_envs)
        if optimize_memory_usage:
            raise ValueError("EpisodeReplayBuffer already stores each token once: leave optimize_memory_usage off")
        if n_steps < 1:
            raise ValueError(f"n_steps must be at least 1, got {n_steps}")
        self.tokens = token_space(action_space)
        if self.tokens.decoder_start:
            raise ValueError(
                "EpisodeReplayBuffer supports only causal models: for an encoder-decoder model use PPO with "
                "EpisodeRolloutBuffer, or textgym.agents.DQN"
            )
        self.handle_timeout_termination = handle_timeout_termination
        self.n_steps, self.gamma = n_steps, gamma
        self.optimize_memory_usage = False
        self.reset()

    def reset(self) -> None:
        """Empty the buffer."""
        width = self.obs_shape["input_ids"][0]  # type: ignore[call-overload]  # a dict, because the space is a Dict
        self.episodes: list[Episode] = []
        self.num_transitions = 0  # in `episodes`
        self.input_ids = np.zeros((self.n_envs, width + 1), dtype=np.min_scalar_type(int(self.tokens.n) - 1))
        self.rewards = np.zeros((self.n_envs, width), dtype=np.float32)
        self.sizes = np.zeros((self.n_envs, width + 1), dtype=np.min_scalar_type(width + 1))  # see `Episode`
        self.lengths = np.zeros(self.n_envs, dtype=np.int64)  # of the current episodes; 0 if there is none
        self.steps = np.zeros(self.n_envs, dtype=np.int64)  # transitions of the current episodes
        super().reset()

    def size(self) -> int:
        """Return the number of transitions in the buffer."""
        return self.num_transitions + int(self.steps.sum())

    def add(  # type: ignore[override]
        self,
        obs: dict[str, np.ndarray],
        next_obs: dict[str, np.ndarray],
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """Add a step of all rows.

        Raises:
            ValueError: If there are not as many rows as the buffer has.
        """
        if len(reward) != self.n_envs:
            raise ValueError(
                f"the replay buffer has the texts of {self.n_envs} rows, and the environment has {len(reward)}: make "
                f"the environment with n_envs={self.n_envs}, as when the buffer was saved, or train without it"
            )
        rows, lengths = np.arange(self.n_envs), obs["attention_mask"].sum(1)
        for row in np.flatnonzero(~self._continues(obs["input_ids"], lengths)):  # its episode was abandoned by a reset
            self._close(row, terminated=False)
            self.input_ids[row, : lengths[row]] = obs["input_ids"][row, : lengths[row]]
        self.input_ids[rows, lengths] = action.reshape(-1)
        self.sizes[rows, self.steps] = lengths
        self.rewards[rows, self.steps] = reward
        self.steps += 1
        self.lengths = lengths + 1
        following = next_obs["attention_mask"].sum(1)
        for row in np.flatnonzero(~done.astype(bool) & (following > self.lengths)):  # the environment has replied
            self.input_ids[row, : following[row]] = next_obs["input_ids"][row, : following[row]]
            self.lengths[row] = following[row]
        self.sizes[rows, self.steps] = self.lengths
        for row in np.flatnonzero(done):
            if not infos[row].get("scored", True):
                self._discard(row)
                continue
            timeout = self.handle_timeout_termination and infos[row].get("TimeLimit.truncated", False)
            self._close(row, terminated=not timeout)

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> Any:
        """Return `batch_size` transitions of whole episodes, except that the first and the last one may be cut.

        Raises:
            ValueError: If the buffer is empty.
        """
        pieces = self._sample_pieces(batch_size)
        current, following, rewards, ended, discounts = (
            np.concatenate(columns) for columns in zip(*map(self._transitions, pieces), strict=True)
        )
        row = np.repeat(np.arange(len(pieces)), [piece.last - piece.first for piece in pieces])
        actions = [p.episode.input_ids[p.episode.sizes[p.first : p.last]] for p in pieces]
        return DictReplayBufferSamples(
            self._states(pieces, row, current),  # type: ignore[arg-type]  # DQN passes them on unchanged
            self._column(np.concatenate(actions).astype(np.int64)),
            self._states(pieces, row, following),  # type: ignore[arg-type]
            self._column(ended.astype(np.float32)),
            self._column(self._normalize_reward(rewards, env)),
            self._column(discounts) if self.n_steps > 1 else None,  # without discounts DQN uses its gamma
        )

    def nbytes(self) -> int:
        """Return the size of all tokens, sizes and rewards in bytes."""
        return sum(e.input_ids.nbytes + e.sizes.nbytes + e.rewards.nbytes for e in self.episodes) + (
            self.input_ids.nbytes + self.sizes.nbytes + self.rewards.nbytes
        )

    def _continues(self, input_ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Return bool `(B,)`: whether each row's observation continues its current episode."""
        beyond = np.arange(input_ids.shape[1]) >= lengths[:, None]
        same = (input_ids == self.input_ids[:, : input_ids.shape[1]]) | beyond
        return np.asarray((lengths == self.lengths) & same.all(1))

    def _transitions(self, piece: Piece) -> tuple[np.ndarray, ...]:
        """Return lengths of states and of next states, rewards, ends and discounts of n-step transitions."""
        episode, count = piece.episode, len(piece.episode.rewards)
        step = np.arange(piece.first, piece.last)
        after = np.minimum(step + self.n_steps, count)
        rewards = np.zeros(len(step), dtype=np.float32)
        for ahead in range(min(self.n_steps, count)):
            inside = step + ahead < count
            rewards[inside] += self.gamma**ahead * episode.rewards[step[inside] + ahead]
        ended = episode.terminated & (after == count)
        discounts = (self.gamma ** (after - step)).astype(np.float32)
        return episode.sizes[step], episode.sizes[after], rewards, ended, discounts

    def _states(self, pieces: list[Piece], row: np.ndarray, sizes: np.ndarray) -> PackedStates:
        """Return the states after `sizes` `(M,)` tokens of the episodes `row` `(M,)`; one pass over each episode."""
        lengths = np.zeros(len(pieces), dtype=np.int64)
        np.maximum.at(lengths, row, sizes)
        ids = np.zeros((len(pieces), lengths.max()), dtype=np.int64)
        for index, piece in enumerate(pieces):
            ids[index, : lengths[index]] = piece.episode.input_ids[: lengths[index]]
        return PackedStates.prefixes(*map(self.to_torch, (ids, lengths, row, sizes.astype(np.int64))))

    def _sample_pieces(self, batch_size: int) -> list[Piece]:
        """Sample consecutive transitions from a ring of all episodes in random order, starting at a random transition.

        If whole episodes were sampled and the last one cut, transitions of short texts would be more likely, and those
        at the ends of texts, which have the score, less likely.
        """
        under_way = np.flatnonzero(self.steps)
        sizes = np.array([len(episode.rewards) for episode in self.episodes] + self.steps[under_way].tolist())
        if not len(sizes):
            raise ValueError(
                "the replay buffer is empty: add transitions before sampling; episodes without a score are not kept"
            )
        order = np.random.permutation(len(sizes))  # noqa: NPY002  (the generator that SB3 seeds)
        ends = sizes[order].cumsum()
        start = np.random.randint(ends[-1])  # noqa: NPY002
        position = int(np.searchsorted(ends, start, side="right"))  # in `order`
        first = int(sizes[order[position]] - (ends[position] - start))
        pieces: list[Piece] = []
        missing = batch_size
        while missing:
            index = int(order[position])
            done = index < len(self.episodes)
            episode = self.episodes[index] if done else self._under_way(under_way[index - len(self.episodes)])
            count = min(missing, len(episode.rewards) - first)
            pieces.append(Piece(episode, first, first + count))
            missing -= count
            position, first = (position + 1) % len(order), 0
        return pieces

    def _under_way(self, row: int | np.integer[Any], terminated: bool = False) -> Episode:
        """Return a copy of the current episode of a row."""
        length, steps = int(self.lengths[row]), int(self.steps[row])
        ids, sizes, rewards = self.input_ids[row, :length], self.sizes[row, : steps + 1], self.rewards[row, :steps]
        return Episode(ids.copy(), sizes.copy(), rewards.copy(), terminated)

    def _close(self, row: int | np.integer[Any], terminated: bool) -> None:
        """Store the current episode of a row, and remove the oldest episodes if the buffer is full."""
        if self.steps[row]:
            self.episodes.append(self._under_way(row, terminated))
            self.num_transitions += len(self.episodes[-1].rewards)
        self._discard(row)
        old = 0
        while self.num_transitions > self.buffer_size and old < len(self.episodes) - 1:
            self.num_transitions -= len(self.episodes[old].rewards)
            old += 1
        del self.episodes[:old]

    def _discard(self, row: int | np.integer[Any]) -> None:
        """Remove the current episode of a row."""
        self.lengths[row] = self.steps[row] = 0

    def _column(self, values: np.ndarray) -> Tensor:
        return self.to_torch(values).reshape(-1, 1)
