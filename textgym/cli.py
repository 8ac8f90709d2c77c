"""The `textgym` command: demo, train, resume, reward-model, data, evaluate, chat, list, compare.

    textgym demo
    textgym train --env textgym/Sentiment-v0 --model tiny --total-episodes 4096 --output-dir runs/ppo --seed 1
    textgym resume runs/ppo --total-episodes 8192
    textgym train --config runs/ppo/config.json --output-dir runs/again --seed 2
    textgym train --output-dir runs/ppo --profile
    textgym train --agent grpo --group-size 8 --output-dir runs/grpo
    textgym train --agent sft --data rows.jsonl --output-dir runs/sft
    textgym train --agent dpo --data pairs.jsonl --model runs/sft/policy --output-dir runs/dpo
    textgym reward-model --output-dir runs/reward
    textgym reward-model --output-dir runs/mine --preferences pairs.jsonl --model smollm2
    textgym data pairs.jsonl
    textgym evaluate runs/ppo
    textgym evaluate runs/ppo --pairwise-sheet sheets/ppo
    textgym read-sheet sheets/ppo.key.json anna.csv ben.csv
    textgym chat runs/ppo
    textgym list runs
    textgym compare runs/ppo runs/grpo
    accelerate launch --config_file examples/accelerate/ddp.yaml -m textgym train --output-dir runs/ppo

Only the command line, its flags and `commands/` import `textgym.agents`; the rest of `textgym` does not.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym

from textgym.agents.configs.demo import DemoConfig
from textgym.display import printable, show_all_characters
from textgym.errors import TextgymError
from textgym.flags import Chat, Compare, Data, Evaluate, ListRuns, ReadSheet, Train, TrainReward, View, parse
from textgym.models.machine.determinism import prepare_environment

# Where each command is; it is loaded when it runs, since torch and transformers take seconds, and help needs neither.
RUNS: dict[type, tuple[str, str]] = {
    DemoConfig: ("textgym.agents.runs.demo", "run"),
    Train: ("textgym.commands.train", "train"),
    TrainReward: ("textgym.commands.reward_model", "train_reward"),
    Data: ("textgym.commands.runs", "show_data"),
    View: ("textgym.commands.runs", "view"),
    Evaluate: ("textgym.commands.evaluate", "evaluate"),
    ReadSheet: ("textgym.commands.sheets", "read"),
    Chat: ("textgym.commands.evaluate", "answer"),
    ListRuns: ("textgym.commands.runs", "list_runs"),
    Compare: ("textgym.commands.runs", "compare"),
}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exit with 130 after Ctrl-C, and with a message of one line after a wrong input."""
    show_all_characters(sys.stdout, sys.stderr)
    sys.path.append(str(Path.cwd()))  # for "module:attribute" of a file beside the user; last, so it hides no module
    if arguments is None:
        prepare_environment(sys.argv[1:])  # torch reads it when it is imported
    try:
        run(parse(arguments))
    except KeyboardInterrupt:
        sys.exit(130)
    except (TextgymError, ValueError, OSError, ImportError, MemoryError, gym.error.Error) as error:
        sys.exit(f"textgym: {printable(' '.join(str(error).split()))}")


def run(command: Any) -> None:
    """Run a command that `parse` returned."""
    import torch

    from textgym.models.machine.seeding import deterministic

    if command.deterministic:
        deterministic()
    else:
        torch.set_num_threads(1)  # two threads collapse when another process runs
    module, function = next(place for kind, place in RUNS.items() if isinstance(command, kind))
    getattr(importlib.import_module(module), function)(command)


if __name__ == "__main__":
    main()
