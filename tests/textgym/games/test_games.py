"""Games of several turns: what the environment writes is context, and nothing is learned from it."""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable
from enum import Enum
from typing import Any

import numpy as np
import pytest
import torch

from textgym.agents import PPO, PPOConfig
from textgym.agents.common.advantages import gae
from textgym.agents.common.means import whiten
from textgym.agents.common.rollout import collect, merge
from textgym.games import TurnActions, from_gem, from_textarena
from textgym.games.game_env import GameEnv, GameVectorEnv
from textgym.models.actor_critic import ActorCritic
from textgym.rewards.kl import KLPenalty
from textgym.testing import assert_close, byte_tokenizer, mock_lm, terms_of, tolerance
from textgym.testing.small_tokenizers import byte_level, sentencepiece, unigram
from textgym.wrappers import TextObservation

FORWARD = terms_of(mock_lm())

EOS = 256


class Hints:
    """Guess a digit; three turns; each hint costs a quarter."""

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        self.secret, self.turn = seed % 10, 0
        return f"{seed}?", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.turn += 1
        if action == str(self.secret):
            return "yes", 1.0, True, False, {}
        return ">up" if action < str(self.secret) else ">down", -0.25, False, self.turn == 3, {}


SETTINGS: dict[str, Any] = {"tokenizer": byte_tokenizer(), "max_prompt_tokens": 6, "max_new_tokens": 16}


def test_replies_are_grey_and_without_numbers() -> None:
    envs = GameVectorEnv(2, Hints, **{**SETTINGS, "reference": mock_lm(), "render_mode": "html"})
    envs.reset(options={"prompt_index": [5, 5]})
    for actions in ([ord("3"), ord("4")], [EOS, ord("4")]):
        envs.step(np.array(actions))
    with_reply, without = envs.render()
    assert re.findall(r'style="(opacity:.6)?[^"]*" title="([^"]*log_prob none)?', with_reply) == [
        *[("", "")] * 2,
        *[("opacity:.6", "reference_log_prob none")] * 3,
    ]
    assert "none" not in without


def test_a_scripted_player_plays_to_the_end() -> None:
    env = TurnActions(TextObservation(GameEnv(Hints, **SETTINGS)))
    assert env.reset(options={"prompt_index": 5})[0] == "5?"
    observation, reward, terminated, *_ = env.step("3")
    assert (observation, reward, terminated) == ("5?3<eos>>up", 0.0, False)
    observation, reward, terminated, _, info = env.step("5")
    assert (observation, terminated, info["ended_by_stop"]) == ("5?3<eos>>up5<eos>", True, True)
    assert reward == info["score"] == 0.75
    assert env.unwrapped.task.last[0].tokens.generated == [True, True, False, False, False, True, True]
    sequences = env.unwrapped.task.episodes.sequences()
    assert sequences.response_mask.tolist() == [[True, True, False, False, False, True, True]]
    assert bytes(token for token in sequences.actions.tolist() if token != EOS) == b"35"


class Talk:
    """Three turns, of which it keeps what it hears."""

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        self.heard: list[str] = []
        return "What is a film?", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.heard.append(action)
        return " So it is. ", float(len(self.heard)), len(self.heard) == 3, False, {}


@pytest.mark.parametrize("make_tokenizer", [sentencepiece, byte_level, unigram])
def test_a_game_hears_each_turn_as_it_follows_the_context(make_tokenizer: Callable[[], Any]) -> None:
    env = TurnActions(GameEnv(Talk, make_tokenizer(), max_prompt_tokens=24, max_new_tokens=80))
    env.reset()
    turns = ["a film", "It is a joy", " no"]
    for turn in turns:
        *_, terminated, _, _ = env.step(turn)
    assert terminated
    assert env.unwrapped.task.games[0].heard == turns
    assert env.unwrapped.transcript["completion"] == "a film So it is. It is a joy So it is.  no"
    assert env.unwrapped.transcript["prompt"] == "What is a film?"


def test_a_stop_string_is_searched_in_the_turn_under_way_alone() -> None:
    env = GameEnv(Talk, byte_tokenizer(), max_prompt_tokens=24, max_new_tokens=80, stop=["."])
    env.reset()
    for turn in ("one.", "two."):
        for token in turn.encode():
            *_, terminated, _, info = env.step(token)
            assert not terminated
    assert env.task.games[0].heard == ["one", "two"]
    for token in b"thr":
        *_, terminated, _, _ = env.step(token)
        assert not terminated
    assert env.transcript["completion"] == "one So it is. two So it is. thr"
    for token in b"ee.":
        *_, terminated, _, info = env.step(token)
    assert terminated
    assert info["score"] == 6.0
    assert env.task.games[0].heard == ["one", "two", "three"]
    assert env.transcript["completion"] == "one So it is. two So it is. three"


@pytest.mark.parametrize(
    ("minimum", "text", "turn"),
    [(3, "abxyzbqab", "abxyzbq"), (3, "abaab", "aba"), (2, "abab", "ab"), (2, "xab", "x"), (1, "ab", "")],
)
def test_a_stop_string_that_is_complete_too_early_closes_no_turn(minimum: int, text: str, turn: str) -> None:
    """Neither does a later token with its last character; and of later turns no token is too early."""
    env = GameEnv(Talk, byte_tokenizer(), max_prompt_tokens=24, max_new_tokens=80, stop=["ab"], min_new_tokens=minimum)
    env.reset()
    heard = env.task.games[0].heard
    for letter in text:
        assert heard == []
        env.step(ord(letter))
    assert heard == [turn]
    env.step(ord("a"))
    env.step(ord("b"))
    assert heard == [turn, ""]
    assert env.transcript["completion"] == f"{turn} So it is.  So it is. "


def test_a_reply_that_does_not_fit_ends_the_row_by_length() -> None:
    env = GameEnv(Hints, **{**SETTINGS, "max_new_tokens": 6})
    env.reset(options={"prompt_index": 5})
    env.step(ord("7"))
    _, reward, terminated, _, info = env.step(EOS)
    assert (reward, terminated, info["ended_by_stop"]) == (-0.25, True, False)
    env.reset(options={"prompt_index": 5})
    env.step(ord("3"))
    assert env.step(EOS)[2] is False, ">up and one token more fit"
    assert env.step(ord("5"))[2] is True


def test_rows_equal_single_games() -> None:
    envs, single = GameVectorEnv(3, Hints, **SETTINGS, autoreset_mode="Disabled"), GameEnv(Hints, **SETTINGS)
    actions = np.random.default_rng(0).choice([ord("3"), ord("5"), EOS], (16, 3))
    for row in range(3):
        envs.reset(options={"prompt_index": [3, 15, 4]})
        single.reset(options={"prompt_index": [3, 15, 4][row]})
        for step in actions:
            observations, rewards, terminated, *_ = envs.step(step)
            observation, reward, ended, *_ = single.step(int(step[row]))
            assert (rewards[row], terminated[row]) == (reward, ended)
            np.testing.assert_array_equal(observations["input_ids"][row], observation["input_ids"])
            if ended:
                break


def scripted(texts: list[str]) -> Any:
    """Rows of games that were played so; log-probs and values are those of a policy."""
    policy = ActorCritic(mock_lm())
    torch.nn.init.normal_(policy.value_head.weight, generator=torch.Generator().manual_seed(0))
    envs = GameVectorEnv(len(texts), Hints, **SETTINGS, autoreset_mode="Disabled", array="torch")
    plan = [[EOS if letter == "." else ord(letter) for letter in text] for text in texts]
    played = [iter(row) for row in plan]
    act = policy.act

    def follow(observation: Any, *args: Any, **kwargs: Any) -> Any:
        step = act(observation, *args, **kwargs)
        action = torch.tensor([next(row, EOS) for row in played])
        return step._replace(action=action, log_prob=policy.log_prob(observation, action))

    policy.act = follow  # type: ignore[method-assign]
    seeds = {"prompt_index": [5] * len(texts)}
    rollout = collect(envs, policy, seeds)
    return policy, rollout


def test_environment_tokens_carry_no_loss_no_kl_and_gae_steps_over_them() -> None:
    policy, rollout = scripted(["3.5.", "7.6.4.", "5."])
    mask = rollout.response_mask
    assert mask.sum(1).tolist() == [4, 6, 2]
    assert [row.nonzero()[0].item() for row in ~mask[:2]] == [2, 2]

    # what was noted while playing stands at the token that it belongs to, and is that of a full pass
    new = policy.evaluate(rollout.sequences)
    assert_close(new.log_prob.detach(), rollout.log_probs, terms=FORWARD)
    assert_close(new.value.detach(), rollout.values, terms=FORWARD)
    assert not new.log_prob[~mask].any()
    assert not new.entropy[~mask].any()

    # no KL
    penalty = KLPenalty(mock_lm(seed=3), 0.1)
    kl = penalty.of_sequences(policy, rollout.sequences, rollout.log_probs)
    assert not kl[~mask].any()
    assert kl[mask].all()

    # each turn's reward at the token that closed it; GAE as if the replies were not there
    rewards = rollout.rewards
    assert [row[row != 0].tolist() for row in rewards] == [[-0.25, 1.0], [-0.25, -0.25, -0.25], [1.0]]
    advantages, returns = gae(rewards, rollout.values, mask, 0.9, 0.8)
    for row in range(3):
        own = mask[row]
        alone = [x[row][own][None] for x in (rewards, rollout.values)]
        expected = gae(*alone, torch.ones_like(alone[0], dtype=torch.bool), 0.9, 0.8)
        torch.testing.assert_close(advantages[row][own][None], expected[0])
        torch.testing.assert_close(returns[row][own][None], expected[1])
    assert not advantages[~mask].any()
    assert whiten(advantages, mask)[mask].mean().abs() < tolerance(terms=int(mask.sum()), scale=2.0)

    # no loss: the gradient is that of the player's tokens in their contexts, one by one
    new.log_prob[mask].sum().backward()
    gradient = policy.head.weight.grad.clone()
    policy.zero_grad()
    ids, starts = rollout.sequences.input_ids, rollout.sequences.prompt_lengths
    for row, step in mask.nonzero().tolist():
        end = int(starts[row]) + step
        policy.lm(ids[row : row + 1, :end]).logits[0, -1].log_softmax(-1)[ids[row, end]].backward()
    assert_close(policy.head.weight.grad, gradient, terms=FORWARD, scale=1.0)


def test_rollouts_of_games_merge() -> None:
    _, games = scripted(["3.5.", "7.6.4."])
    _, short = scripted(["5."])
    both = merge([short, games])
    assert both.response_mask.sum(1).tolist() == [2, 4, 6]
    torch.testing.assert_close(both[1:].log_probs, games.log_probs)


def test_ppo_trains_on_games() -> None:
    envs = GameVectorEnv(4, Hints, **SETTINGS, kl_mode="deferred", kl_coef=0.05, reference=mock_lm(), stop=[ord("x")])
    agent = PPO(ActorCritic(mock_lm()), envs, PPOConfig(episodes_per_update=8, learning_rate=1e-3))
    seen: list[dict[str, float]] = []
    agent.learn(16, [lambda agent, metrics: seen.append(metrics)])
    assert abs(seen[0]["objective/kl"]) < 1e-4
    assert seen[0]["val/ratio"] == pytest.approx(1.0, abs=0.2)


def test_global_generators_are_left_alone_and_games_keep_theirs() -> None:
    """Trap 36: games of GEM's and TextArena's draw from the global generators."""

    class Dice(Hints):
        def step(self, action: str) -> Any:
            return str(random.randrange(10)), 0.0, False, False, {}

    env = TurnActions(TextObservation(from_gem(Dice, **SETTINGS)))
    before, shown = random.getstate(), []
    for _ in range(2):
        env.reset(options={"prompt_index": 3})
        shown.append([env.step("a")[0], env.step("b")[0]])
        assert random.getstate() == before
        random.random()
        before = random.getstate()
    assert shown[0] == shown[1]


def test_games_of_other_libraries_are_made_anew_for_each_episode(capsys: pytest.CaptureFixture[str]) -> None:
    class Heap(Hints):
        """Keeps what it said in earlier episodes, and prints."""

        def __init__(self) -> None:
            self.said: list[str] = []
            print("made")

        def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
            print("reset")
            self.said.append(super().reset(seed)[0])
            return "".join(self.said), {}

        def step(self, action: str) -> Any:
            print("step", file=sys.stderr)
            return super().step(action)

    env = TurnActions(TextObservation(from_gem(Heap, **SETTINGS)))
    for _ in range(3):
        assert env.reset(options={"prompt_index": 5})[0] == "5?"
        env.step("3")
    assert capsys.readouterr() == ("", "")


def test_a_game_that_fails_leaves_the_global_generators_alone() -> None:
    class Broken(Hints):
        def step(self, action: str) -> Any:
            random.seed(0)
            raise RuntimeError("out of order")

    env = TurnActions(TextObservation(from_gem(Broken, **SETTINGS)))
    env.reset()
    before = random.getstate()
    with pytest.raises(RuntimeError, match="out of order"):
        env.step("3")
    assert random.getstate() == before


def test_a_game_that_says_no_strings_is_refused() -> None:
    class Lists(Hints):
        def reset(self, seed: int) -> Any:
            return [(0, "hello")], {}

    env = from_gem(Lists, **SETTINGS)
    with pytest.raises(TypeError, match="says strings, got a list"):
        env.reset()


def test_the_board_that_gem_puts_into_infos_is_read() -> None:
    class Board(Hints):
        def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
            return "rules\n", {"prefix": "hi\n", "suffix": "board 0"}

        def step(self, action: str) -> Any:
            return "moved", 0.0, False, False, {"suffix": "board 1"}

    settings = {**SETTINGS, "max_prompt_tokens": 40, "max_new_tokens": 40}
    env = TurnActions(TextObservation(from_gem(Board, **settings)))
    assert env.reset()[0] == "hi\nrules\nboard 0"
    assert env.step("up")[0] == "hi\nrules\nboard 0up<eos>moved\nboard 1"


class Kind(Enum):
    """As textarena's kinds of messages."""

    PROMPT = 1
    PLAYER_ACTION = 2


class Arena:
    """A game with textarena's interface, for faults that no game of textarena's has on demand."""

    players, player, rewards = 1, 0, {0: 0.5}

    def reset(self, num_players: int, seed: int) -> None:
        assert num_players == self.players, f"The number of players has to be {self.players}"

    def get_observation(self) -> tuple[int, Any]:
        return self.player, [(-1, "rules", Kind.PROMPT)]

    def step(self, action: str) -> tuple[bool, dict[str, Any]]:
        return True, {}

    def close(self) -> tuple[Any, dict[int, Any]]:
        return self.rewards, {}


ARENA: dict[str, Any] = {**SETTINGS, "max_prompt_tokens": 20}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"players": 2}, "for one player, and this one cannot be: The number of players has to be 2"),
        ({"player": 1}, "for one player, and in this one it is player 1's turn"),
        ({"rewards": None}, "ended without rewards"),
    ],
)
def test_a_game_of_textarenas_that_cannot_be_played_alone_is_refused(changes: dict[str, Any], message: str) -> None:
    env = TurnActions(TextObservation(from_textarena(type("Changed", (Arena,), changes), **ARENA)))
    with pytest.raises(ValueError, match=message):
        env.reset() and env.step("a")
