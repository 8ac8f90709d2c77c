"""The demo, without its training: what is learned from and what is kept for evaluations."""

from __future__ import annotations

from typing import Any

import pytest

from textgym.agents.configs.demo import DemoConfig
from textgym.agents.runs import demo
from textgym.agents.runs.progress import LiveProgress
from textgym.data.corpora.sources import Snippet

SNIPPETS = [Snippet(f"text {number}", float(number % 9 - 4)) for number in range(400)]


def test_the_reward_model_is_measured_on_texts_that_it_was_not_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def train(pairs: Any, *_: Any, heldout: Any, **__: Any) -> Any:
        seen.update(pairs=pairs, heldout=heldout)
        return None, "accuracy"

    monkeypatch.setattr(demo, "train_reward_model", train)
    demo.learn_reward(DemoConfig(), SNIPPETS, None, LiveProgress(quiet=True))
    split = {snippet.text: snippet.split for snippet in SNIPPETS}

    def splits(pairs: Any) -> set[str]:
        return {split[pair[side]] for pair in pairs for side in ("chosen", "rejected")}

    assert splits(seen["pairs"]) == {"train"}
    assert splits(seen["heldout"]) == {"policy", "test"}
