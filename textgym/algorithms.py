"""The algorithms of `--agent`, and their hyperparameters; loading them needs no torch."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from textgym import agents
from textgym.agents.configs.rollout import RolloutAgentConfig
from textgym.agents.configs.supervised import SupervisedConfig

# An algorithm of textgym/agents/__init__.py is a choice of --agent: ExpertIteration is "expert-iteration". Its class is
# loaded when it trains, since that needs torch; its config is read here.
ALGORITHMS: dict[str, str] = {
    re.sub("(?<=[a-z])(?=[A-Z])", "-", name).lower(): name
    for name in agents.__all__
    if f"{name}Config" in agents.__all__
}
CONFIGS: dict[str, type[RolloutAgentConfig] | type[SupervisedConfig]] = {
    name: getattr(agents, f"{algorithm}Config") for name, algorithm in ALGORITHMS.items()
}
AGENTS = tuple(name for name, config in CONFIGS.items() if issubclass(config, RolloutAgentConfig))
"""Agents that learn from episodes."""
OFFLINE = tuple(name for name, config in CONFIGS.items() if issubclass(config, SupervisedConfig))
"""Agents that learn from data instead of episodes."""
DEFAULT = "ppo"


def agent_named(words: Sequence[str]) -> str | None:
    """Return the agent that a command line names, the last one if there are several."""
    named = None
    for word, after in itertools.pairwise([*words, ""]):
        if word == "--agent":
            named = after
        elif word.startswith("--agent="):
            named = word.removeprefix("--agent=")
    return named
