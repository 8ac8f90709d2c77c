"""The commands that go on from a run, with all that they need to work."""

from __future__ import annotations

import shlex

from textgym.agents.configs.supervised import SupervisedConfig
from textgym.flags import Train
from textgym.saved_flags import TRUST, needs_trust


def resume_hint(command: Train) -> str:
    """Return the command that continues a run which has stopped."""
    return f"textgym resume {_run(command)}{_consent(command)}"


def further_commands(command: Train) -> list[str]:
    """Return the commands that show a finished run, measure it, try it out and make it longer."""
    run, consent = _run(command), _consent(command)
    return [
        f"textgym view {run}",
        f"textgym evaluate {run}{consent}",
        f"textgym chat {run}{consent}",
        f"{resume_hint(command)} {_longer(command)}",
    ]


def _run(command: Train) -> str:
    return shlex.quote(str(command.output_dir))


def _consent(command: Train) -> str:
    """Return the flags for code that is not textgym's, which a run folder cannot ask for."""
    trust = f" {TRUST}" if needs_trust(command.output_dir) else ""
    return f"{trust} --trust-remote-code" if command.trust_remote_code else trust


def _longer(command: Train) -> str:
    """Return what makes a run twice as long; agents that learn from data play no episodes."""
    config = command.config
    if not isinstance(config, SupervisedConfig):
        return f"--total-episodes {2 * command.total_episodes}"
    return f"--epochs {2 * config.epochs:g}" if config.max_steps is None else f"--max-steps {2 * config.max_steps}"
