"""GameEnv: games of several turns. What the environment writes carries no loss, no KL and no advantage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from textgym.data.continuations import encode_after
from textgym.envs.episodes import Ends
from textgym.envs.prompt_ids import cut_prompts
from textgym.envs.text import TextEnv
from textgym.envs.text_task import TextTask
from textgym.envs.vector import TextVectorEnv
from textgym.rewards.engine.completions_to_score import Finished

PROMPT_TOKENS = 256
"""`max_prompt_tokens` of games, whose prompts are known only when they begin."""


class Game(Protocol):
    """A game in strings, as those of GEM are."""

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        """Start the game of this seed; return what the player reads first, and infos, which are not used."""

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Takes a turn: what the player reads next, reward, terminated, truncated, infos."""


def game(completion_ids: Sequence[list[int]], turn_rewards: Sequence[dict[int, float]]) -> list[list[float]]:
    """The game's own rewards, each at the token that closed its turn."""
    return [
        [turns.get(t, 0.0) for t in range(len(ids))] for ids, turns in zip(completion_ids, turn_rewards, strict=True)
    ]


class GameTask(TextTask):
    """A `TextTask` in which a stop token closes a turn, and the game decides whether there is another."""

    answers = True

    def play_games(self, make_game: Callable[[], Game]) -> None:
        """One game a row; the prompts stand for their seeds."""
        count = len(self.current)
        self.games = [make_game() for _ in range(count)]
        self.turn_starts = [0] * count
        self.turn_rewards: list[dict[int, float]] = [{} for _ in range(count)]
        self.said = [""] * count

    def begin(self, rows: np.ndarray, prompts: np.ndarray) -> None:
        """Starts the games of these seeds; what they say first is the prompt."""
        if self.prompt_ids.shape[1] < self.width:
            self.prompt_ids = np.pad(self.prompt_ids, ((0, 0), (0, self.width - self.prompt_ids.shape[1])))
        for row, index in zip(rows, prompts, strict=True):
            text, _ = self.games[row].reset(seed=int(index))
            self.rows[index] = {**self.rows[index], "prompt": text}
            self.prompt_texts[index] = text
            bos = self.tokenizer.bos_token_id
            [ids] = cut_prompts(self._encode_prompts([text]), self.width, bos, self.max_prompt_tokens)
            self.prompt_ids[index, : len(ids)], self.prompt_lengths[index] = ids, len(ids)
            self.turn_starts[row], self.turn_rewards[row], self.said[row] = 0, {}, ""
        super().begin(rows, prompts)

    def answer(self, ends: Ends, by_stop: np.ndarray) -> Ends:
        """Play the turns that have just ended; append the reply of a game that goes on, whose row stays alive."""
        stopped, by_length = ends.by_stop.clone(), ends.by_length.clone()
        rows = np.flatnonzero(by_stop).tolist()
        for row, (prompt, response) in zip(rows, self._ids(rows), strict=True):
            turn = self.stop_strings.cut(self._turn(row, prompt, response), self._early(row, prompt, response))
            reply, reward, terminated, truncated, _ = self.games[row].step(turn)
            self.turn_rewards[row][len(response) - 1] = float(reward)
            if terminated or truncated:
                continue
            stopped[row] = False
            tokens = encode_after(self.tokenizer, [*prompt, *response], reply)
            fits = len(response) + len(tokens) < self.episodes.max_new_tokens
            by_length[row] = not fits
            if fits:
                self.episodes.reply(row, tokens)
                self.turn_starts[row] = len(response) + len(tokens)
                self.said[row] += turn + reply
        return Ends(stopped, by_length)

    def _turn(self, row: int, prompt: list[int], response: list[int]) -> str:
        start = self.turn_starts[row]
        return self._decode([*prompt, *response[:start]], response[start:])

    def _completion(self, row: int, prompt: list[int], response: list[int]) -> str:
        """Everything after the prompt: earlier turns with their replies, and the last turn."""
        return self.said[row] + super()._completion(row, prompt, response)

    def finished(self, rows: np.ndarray) -> Finished:
        """With a column `turn_rewards`, which `game` reads."""
        finished = super().finished(rows)
        return replace(finished, columns={**finished.columns, "turn_rewards": [self.turn_rewards[row] for row in rows]})


class GameEnv(TextEnv):
    """A game in strings, played token by token.

    ## Description
    The prompt is what the game says first. A stop token (or stop string) closes a turn: the game is given its text and
    answers, and the answer's tokens are appended to the context. They are the environment's: `episodes.sequences()`
    marks them, and agents give them no loss, no KL and no advantage. `TurnActions` plays it a turn a step.

    ## Action Space, Observation Space
    As `TextEnv`, but that a token which closes a turn may bring the tokens of a reply with it.

    ## Rewards
    The sum of the game's rewards, with the last token; agents of textgym's, which collect whole episodes, put each at
    the token that closed its turn. The KL term is that of the player's tokens alone.

    ## Starting State
    A game of a seed from 0 to `num_games - 1`, drawn without replacement; `options={"prompt_index": seed}` chooses.

    ## Episode End
    The game's end; or by length, `max_new_tokens`, replies included, which also ends a row whose reply does not fit.

    ## Arguments
    Args:
        make_game: makes a `Game`, such as a class of GEM's; one that begins alike for one seed.
        tokenizer: and all further arguments: see `TextEnv`.
        num_games: how many seeds there are.
        kwargs: as `TextEnv`, but for `prompts` and `reward`.
    """

    task_class = GameTask
    task: GameTask

    def __init__(self, make_game: Callable[[], Game], tokenizer: Any, *, num_games: int = 1000, **kwargs: Any) -> None:
        super().__init__(_seeds(num_games), tokenizer, game, **{"max_prompt_tokens": PROMPT_TOKENS, **kwargs})
        self.task.play_games(make_game)


class GameVectorEnv(TextVectorEnv):
    """Many rows of `GameEnv`, see there; arguments as `TextVectorEnv`."""

    task_class = GameTask
    task: GameTask

    def __init__(
        self, num_envs: int, make_game: Callable[[], Game], tokenizer: Any, *, num_games: int = 1000, **kwargs: Any
    ) -> None:
        settings = {"max_prompt_tokens": PROMPT_TOKENS, **kwargs}
        super().__init__(num_envs, _seeds(num_games), tokenizer, game, **settings)
        self.task.play_games(make_game)


def _seeds(num_games: int) -> list[str]:
    """What stands in for prompts that the games have not said yet."""
    return ["?"] * num_games
