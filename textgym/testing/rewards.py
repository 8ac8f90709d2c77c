"""check_reward: find problems of a reward function before a run does."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np

from textgym.data.continuations import encode_continuations
from textgym.rewards.engine.calling import Caller, Log, ReadsIds, arguments_for
from textgym.rewards.engine.checking import Value, checked
from textgym.rewards.engine.completions_to_score import Finished, RewardError
from textgym.rewards.engine.scoring import RewardSpec, load_reward
from textgym.testing.mocks import byte_tokenizer


def check_reward(
    reward: RewardSpec, columns: Mapping[str, Any] | None = None, *, tokenizer: Any = None, timeout: float = 60.0
) -> list[str]:
    """Call a reward function with difficult batches and return a list of the problems found.

    The batches are ordinary texts, one row, a thousand rows, empty completions, white space, many scripts, EOS inside a
    text, and a very long text. For every batch, the function must not raise, must return one finite number (or one per
    token, or `None`) per row, and must not change its arguments. Scores must be the same on a second call, for a row
    alone, and in another order. The function must be picklable, because environments in other processes need that.

    Args:
        reward: A function, a `"module:attribute"` string, or a reward model.
        columns: Value of each column that the function reads, the same for all rows.
        tokenizer: Tokenizer of the policy; the default is a byte tokenizer.
        timeout: Seconds that the function may take for a batch.

    Returns:
        One message per problem; an empty list if there are none.

    >>> def brevity(completions):
    ...     return [1 / len(text) for text in completions]
    >>> check_reward(brevity)[0]
    "empty completion: reward function 'brevity' raised ZeroDivisionError: division by zero while scoring 3 rows, ..."
    """
    function = load_reward(reward)
    name = getattr(function, "__name__", type(function).__name__)
    problems: list[str] = []
    if tokenizer is not None and isinstance(function, ReadsIds):
        function.share_ids_with(tokenizer)
    tokenizer = byte_tokenizer() if tokenizer is None else tokenizer

    caller = Caller(timeout)
    changed: list[Finished] = []

    def score(finished: Finished) -> list[Value | RewardError]:
        arguments = arguments_for(name, function, finished, Log(name, len(finished)), None)
        columns = [column for column in arguments.values() if isinstance(column, list)]
        before = pickle.dumps(columns)
        values = checked(name, caller.start(name, function, arguments, finished).wait(), finished)
        if pickle.dumps(columns) != before:
            changed.append(finished)
        return values

    for title, texts in _awkward_batches(tokenizer.eos_token).items():
        finished = _finished(texts, columns or {}, tokenizer)
        try:
            problems += [f"{title}: {error}" for error in score(finished) if isinstance(error, RewardError)][:1]
        except RewardError as error:  # it cannot be called, for example because a column is missing
            return [str(error)]
        if finished in changed:
            problems.append(f"{title}: it changes its arguments, which are copies: what it leaves there is lost")
    problems += [] if problems else _inconsistencies(score, columns or {}, tokenizer)
    try:
        pickle.dumps(function)
    except Exception as error:
        problems.append(f"it does not pickle ({error}): define it at the top level of a module, or as a class there")
    return problems


def _inconsistencies(score: Any, columns: Mapping[str, Any], tokenizer: Any) -> list[str]:
    texts = _awkward_batches(tokenizer.eos_token)["ordinary texts"]
    together = score(_finished(texts, columns, tokenizer))
    again = score(_finished(texts, columns, tokenizer))
    alone = [score(_finished([text], columns, tokenizer))[0] for text in texts]
    turned = score(_finished(texts[::-1], columns, tokenizer))[::-1]
    problems = {"it gives other scores when it is called again": again}
    if _same(together, again):
        problems = {
            "it gives a row another score alone than in a batch": alone,
            "it gives a row another score when the batch is in another order": turned,
        }
    return [problem for problem, other in problems.items() if not _same(together, other)]


def _same(first: list[Any], second: list[Any]) -> bool:
    pairs = zip(first, second, strict=True)
    return all(b is None if a is None else b is not None and np.allclose(a, b, atol=1e-4) for a, b in pairs)


def _awkward_batches(eos: str) -> dict[str, list[tuple[str, str]]]:
    """Return batches of prompts and completions by what is difficult about them."""
    ordinary = [
        ("The film", " was a joy."),
        ("The actors", " shine"),
        ("2 + 2 =", " 4"),
        ("Say", " it is so, he said."),
    ]
    return {
        "ordinary texts": ordinary,
        "one row": ordinary[:1],
        "1,000 rows": [ordinary[index % 4] for index in range(1000)],
        "empty completion": [ordinary[0], ("The film", ""), ordinary[1]],
        "white space": [("The film", " \n\t "), ordinary[0]],
        "many scripts": [
            ("Это", " фильм 🎬"),
            ("映画", "は素晴らしい。"),
            ("naïve", " cafe\u0301"),
            ("\u05e1\u05e8\u05d8", " \u200f\u05d8\u05d5\u05d1"),
        ],
        "EOS inside the text": [("The film", f" was{eos} a joy"), (f"One.{eos}Two", eos)],
        "a long completion": [("The film", " was long" * 2000), ordinary[1]],
    }


def _finished(texts: list[tuple[str, str]], columns: Mapping[str, Any], tokenizer: Any) -> Finished:
    prompts, completions = ([pair[side] for pair in texts] for side in (0, 1))
    encoded = encode_continuations(tokenizer, texts)
    return Finished(
        list(prompts),
        list(completions),
        [prompt for prompt, _ in encoded],
        [[*completion, tokenizer.eos_token_id] for _, completion in encoded],
        {name: [copy.deepcopy(value) for _ in texts] for name, value in columns.items()},
    )
