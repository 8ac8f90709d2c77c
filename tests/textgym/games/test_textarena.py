"""Games of textarena itself (extra `textarena`)."""

from __future__ import annotations

import random
from typing import Any

import pytest

from textgym.games import TurnActions, from_textarena
from textgym.testing import byte_tokenizer
from textgym.wrappers import TextObservation

textarena = pytest.importorskip("textarena")

SETTINGS: dict[str, Any] = {"tokenizer": byte_tokenizer(), "max_prompt_tokens": 6000, "max_new_tokens": 3000}
HISTORIES = {  # of each wrapper of observations that textarena registers ids with
    "LLMObservationWrapper": "GuessTheNumber-v0",
    "GameMessagesObservationWrapper": "GuessTheNumber-v0-train",
    "GameMessagesAndCurrentBoardObservationWrapper": "FrozenLake-v0-train",
    "GameBoardObservationWrapper": "FifteenPuzzle-v0-train",
    "no wrapper": "GuessTheNumber-v0-raw",
}


def make(env_id: str) -> TurnActions:
    return TurnActions(TextObservation(from_textarena(lambda: textarena.make(env_id), **SETTINGS)))


def play(env: TurnActions, seed: int, actions: list[str]) -> tuple[str, str, float, bool]:
    """Return what the player read first, what was added to it, the last reward, and whether the game has ended."""
    first, _ = env.reset(options={"prompt_index": seed})
    text, reward, ended = first, 0.0, False
    for action in actions:
        text, reward, ended, *_ = env.step(action)
    assert text.startswith(first)
    return first, text[len(first) :], reward, ended


@pytest.mark.parametrize("env_id", HISTORIES.values(), ids=HISTORIES)
def test_the_rules_stand_once_in_the_third_game(env_id: str) -> None:
    env = make(env_id)
    for seed in range(3):
        first, added, *_ = play(env, seed, ["[up]" if "Guess" not in env_id else "[3]"] * 2)
        rules = first.splitlines()[0]
        assert rules.startswith("[GAME] ")
        assert (first + added).count(rules) == 1


def test_only_what_is_new_is_appended() -> None:
    for env_id in ("GuessTheNumber-v0", "GuessTheNumber-v0-raw"):
        first, added, *_ = play(make(env_id), 3, ["[3]", "[5]"])
        assert first.endswith("Enter your guess.")
        assert added == ("[3]<eos>\n[GAME] The target number is higher.[5]<eos>\n[GAME] The target number is higher.")


def test_rewards_are_those_that_the_game_closes_with() -> None:
    game = textarena.make("GuessTheNumber-v0-raw")
    kept = random.getstate()
    game.reset(num_players=1, seed=3)
    secret = game.state.game_state["game_number"]
    random.setstate(kept)
    *_, reward, ended = play(make("GuessTheNumber-v0"), 3, [f"[{secret}]"])
    assert (reward, ended) == (1.0, True)
    *_, reward, ended = play(make("GuessTheNumber-v0"), 3, ["[2]", "nothing", "nothing"])
    assert 0 < reward < 1, "the game pays for guesses that are near"
    assert ended, "a second invalid move ends the game"


def test_games_leave_the_generator_and_the_display_alone(capsys: pytest.CaptureFixture[str]) -> None:
    before = random.getstate()
    env = make("FrozenLake-v0-random")
    again = [play(env, 7, ["[up]"])[:2] for _ in range(2)]
    assert again[0] == again[1], "a seed is a game"
    assert play(env, 8, ["[up]"])[0] != again[0][0]
    assert random.getstate() == before
    assert capsys.readouterr() == ("", "")


def test_rows_play_their_own_games() -> None:
    envs = from_textarena(lambda: textarena.make("FrozenLake-v0-random"), num_envs=2, **SETTINGS)
    envs.reset(options={"prompt_index": [7, 8]})
    together = [transcript["prompt"] for transcript in envs.transcript]
    assert together == [play(make("FrozenLake-v0-random"), seed, [])[0] for seed in (7, 8)]


def test_games_for_several_players_are_refused() -> None:
    with pytest.raises(ValueError, match="plays games for one player, and this one cannot be"):
        make("TicTacToe-v0").reset()
    quantum = make("QuantumTicTacToe-v0")
    quantum.reset()
    with pytest.raises(ValueError, match="it is player 1's turn"):
        quantum.step("[0,4]")
