"""Give settings, environments and files wrong values, and count what happens.

    python scripts/breaking/fuzz.py              # settings, environments and saved folders: the table
    python scripts/breaking/fuzz.py settings     # one of them, with every bad case

A case is right if the value is allowed and works, or if it ends in an error of textgym's that names the field or the
file. It is bad if a value that cannot be right is accepted, or if the error names nothing. `tests/test_fuzz.py` has the
same cases as tests.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
import shutil
import sys
import tempfile
import types
import typing
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: unknown names are not asked for

import gymnasium as gym
import torch

from textgym.data.manifests import MANIFEST
from textgym.errors import TextgymError

VALUES: dict[str, Any] = {
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "-1": -1,
    "0": 0,
    "huge": 10**400,
    "half": 2.5,
    "a string": "unknown",
    "True": True,
    "None": None,
    "a list": [math.nan],
    "a dict": {"a": 1},
    "bytes": b"x",
    "an object": object(),
}
"""What every field is given."""

NEGATIVE = {"entropy_coef", "q_scale", "missing_eos_penalty", "min_score"}
"""Numbers that may be below 0."""
ZERO = NEGATIVE | {
    *("adam_epsilon", "center_coefficient", "coef", "epsilon_end", "epsilon_fraction", "epsilon_start", "gamma"),
    *("heldout_fraction", "kl_coef", "kl_min", "label_smoothing", "lam", "learning_rate", "learning_starts", "low"),
    *("matrix_learning_rate", "max_reward_failures", "mean_coefficient", "min_new_tokens", "penalty_coef"),
    *("priority_exponent", "samples", "seed", "target_kl", "tolerance", "value_coef", "warmup", "weight_decay"),
    *("allow_faulty_rows", "critic_lam", "critic_learning_rate", "critic_weight_decay", "ema_decay", "examples"),
    *("eval_every", "priority_correction", "record_every", "word_order"),
}
"""Numbers that may be 0."""


@dataclass(frozen=True)
class Case:
    """The outcome of one value.

    Attributes:
        where: The field, argument or file.
        value: Name of the value, or what was done to the file.
        verdict: "accepted" or "refused", which are right, or "bad".
        words: Of the error, or why it is bad.
    """

    where: str
    value: str
    verdict: str
    words: str = ""


def judged(where: str, name: str, value: str, attempt: Callable[[], Any], possible: bool) -> Case:
    """Return the outcome of an attempt.

    Args:
        where: What is tried, for the table.
        name: The field or file that an error has to name.
        value: Name of the value.
        attempt: Uses the value.
        possible: Whether the value can be right.
    """
    try:
        attempt()
    except (TextgymError, ValueError, OSError, UserWarning) as error:
        words = " ".join(str(error).split())
        ours = isinstance(error, TextgymError) or type(error) in (ValueError, FileNotFoundError, OSError, UserWarning)
        if ours and (name.lower() in words.lower() or "'unknown'" in words):  # or the string that was given
            return Case(where, value, "refused", words)
        return Case(where, value, "bad", f"{type(error).__name__} that does not name {name}: {words[:100]}")
    except Exception as error:
        return Case(where, value, "bad", f"{type(error).__name__}: {' '.join(str(error).split())[:100]}")
    return Case(where, value, "accepted") if possible else Case(where, value, "bad", "accepted")


# --- settings: every field of every dataclass that users fill in ---


def user_dataclasses() -> dict[str, tuple[type, dict[str, Any]]]:
    """Return the dataclasses that users make, by name, with the arguments that have no default."""
    from textgym import algorithms, flags
    from textgym.agents.runs.demo import DemoConfig
    from textgym.envs.config import TextConfig, TextVectorConfig
    from textgym.rewards import functions
    from textgym.rewards.kl import AdaptiveKL, FixedKL, ThresholdKL
    from textgym.rewards.models import RewardModelConfig

    env = {"prompts": ["a"], "tokenizer": "tiny", "reward": len}
    classes: dict[type, dict[str, Any]] = {
        **{config: {} for config in algorithms.CONFIGS.values()},
        RewardModelConfig: {},
        DemoConfig: {},
        TextConfig: env,
        TextVectorConfig: {**env, "num_envs": 2},
        flags.Train: {"output_dir": Path("run")},
        flags.TrainReward: {"output_dir": Path("run")},
        flags.Data: {"file": "rows.jsonl"},
        flags.Evaluate: {"policy": "tiny"},
        FixedKL: {"coef": 0.1},
        AdaptiveKL: {"target": 6.0},
        ThresholdKL: {"low": 1.0, "high": 6.0},
    }
    required = {
        "BertScore": {"model": "encoder"},
        "RegexMatch": {"pattern": "a"},
        "LengthTarget": {"tokens": 4},
        "SoftOverlong": {"max_tokens": 8, "buffer": 4},
        "JsonSchema": {"schema": {"type": "object"}},
        "GrammarMatch": {"grammar": 'start: "a"'},
    }
    for name in functions.__all__:
        function = getattr(functions, name)
        if isinstance(function, type) and dataclasses.is_dataclass(function):
            classes[function] = required.get(name, {})
    return {kind.__name__: (kind, arguments) for kind, arguments in classes.items()}


def settings_cases() -> Iterator[Case]:
    """Try every value in every field of every dataclass that users make."""
    for kind, arguments in user_dataclasses().values():
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            if field.init:
                yield from field_cases(kind, arguments, field.name, hints[field.name])


def field_cases(kind: type, arguments: dict[str, Any], name: str, hint: Any) -> Iterator[Case]:
    """Try every value in a field."""
    for label, value in VALUES.items():

        def make(value: Any = value) -> None:
            kind(**{**arguments, name: value})

        yield judged(f"{kind.__name__}.{name}", name, label, make, can_be(hint, name, value))


def can_be(hint: Any, name: str, value: Any) -> bool:
    """Return whether a value can be right in a field, by the plain type of its annotation and the sets above."""
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return can_be(members[0], name, value)
    if origin in (typing.Union, types.UnionType):
        return any(can_be(member, name, value) for member in members)
    if origin is typing.Literal:
        return any(type(value) is type(member) and value == member for member in members)
    if hint is float or hint is int:
        whole = isinstance(value, int) and not isinstance(value, bool)
        finite = (whole and value != VALUES["huge"]) or (isinstance(value, float) and math.isfinite(value))
        allowed_kind = whole if hint is int else finite
        return allowed_kind and finite and (value > 0 or (value == 0 and name in ZERO) or name in NEGATIVE)
    if hint in (str, bool, type(None), dict, bytes):
        return isinstance(value, hint)
    if hint is Path:
        return isinstance(value, str | Path)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return isinstance(value, hint)
    if isinstance(origin, type) and origin in (list, tuple):
        return isinstance(value, list) and all(can_be(members[0], name, entry) for entry in value)
    text = str(hint)
    if "Sequence" in text and isinstance(value, list):
        return any(can_be(member, name, entry) for member in members for entry in value)
    if "Mapping" in text:
        return isinstance(value, dict)
    return hint is Any or not isinstance(value, int | float | bytes)  # callables, modules and protocols: any object


# --- environments: every argument, used for an episode ---


def environment_cases() -> Iterator[Case]:
    """Try every value in every argument of `gym.make_vec`, and play one episode."""
    from textgym.envs.config import TextVectorConfig

    hints = typing.get_type_hints(TextVectorConfig)
    for field in dataclasses.fields(TextVectorConfig):
        for label, value in VALUES.items():

            def play(name: str = field.name, value: Any = value) -> None:
                _play({name: value})

            possible = can_be(hints[field.name], field.name, value)
            yield judged(f"make_vec({field.name})", field.name, label, play, possible)


def _play(arguments: dict[str, Any]) -> None:
    """Make an environment and play an episode in it."""
    from textgym.testing import byte_tokenizer, mock_lm

    settings = {
        "num_envs": 2,
        "prompts": ["one", "two"],
        "tokenizer": byte_tokenizer(),
        "reward": _no_reward,
        "reference": mock_lm(),
        "kl_coef": 0.1,
        "max_new_tokens": 2,
        **arguments,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        envs = gym.make_vec("textgym:textgym/Text-v0", **settings)
        envs.reset(seed=0)
        envs.action_space.seed(0)
        for _ in range(3):
            envs.step(envs.action_space.sample())
        envs.close()


def _no_reward(completions: list[str]) -> list[float]:
    return [0.0] * len(completions)


# --- files: every file of every kind of folder, damaged in every way ---

Damage = Callable[[Path, Path], None]


def _cut(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path: Path, other: Path) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _link(path: Path, other: Path) -> None:
    path.unlink()
    path.symlink_to(other)


def _dangling(path: Path, other: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent / "nowhere")


DAMAGES: dict[str, Damage] = {
    "missing": lambda path, other: path.unlink(),
    "empty": lambda path, other: path.write_bytes(b""),
    "cut": _cut,
    "one bit flipped": _flip,
    "of another run": lambda path, other: path.write_bytes(other.read_bytes()),
    "link to another run": _link,
    "link to nowhere": _dangling,
}


@dataclass(frozen=True)
class Folder:
    """A kind of folder that textgym writes.

    Attributes:
        write: Writes one; the second argument makes its content another run's.
        load: Loads one.
    """

    write: Callable[[Path, int], None]
    load: Callable[[Path], Any]


def file_cases() -> Iterator[Case]:
    """Damage every file of every kind of folder, and load the folder."""
    for name, kind in folders().items():
        with tempfile.TemporaryDirectory() as temporary:
            ours, others, damaged = (Path(temporary) / part for part in ("ours", "others", "damaged"))
            kind.write(ours, 0)
            kind.write(others, 1)
            kind.load(ours)
            for path in sorted(path for path in ours.rglob("*") if path.is_file()):
                yield from _damaged_cases(name, kind, ours, others, damaged, path.relative_to(ours))


def _damaged_cases(name: str, kind: Folder, ours: Path, others: Path, damaged: Path, file: Path) -> Iterator[Case]:
    for label, damage in DAMAGES.items():
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(ours, damaged)
        if not (others / file).exists():
            continue
        damage(damaged / file, others / file)
        same = (damaged / file).exists() and (damaged / file).read_bytes() == (ours / file).read_bytes()

        def load() -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("error" if name == "run" else "ignore")
                kind.load(damaged)

        # The manifest marks a folder as textgym's; without it a policy is a folder of transformers, which has none.
        plain = label in ("missing", "link to nowhere") and file.name == MANIFEST and name in PLAIN
        unseen = label in IGNORED.get(file.name, ())
        yield judged(f"{name}: {file}", file.name, label, load, same or plain or unseen)


OTHERS = ("of another run", "link to another run")
PLAIN = ("policy", "reward model")
IGNORED = {"run.lock": tuple(DAMAGES), "run.json": ("one bit flipped", *OTHERS), "metrics.jsonl": OTHERS}
"""Files of a run that no manifest has, since they change all the time, and what cannot be seen in them."""


def folders() -> dict[str, Folder]:
    """Return the kinds of folders by name."""
    from textgym import ActorCritic, RewardModel
    from textgym.agents import DPO, DQN, PPO, SFT, DPOConfig, DQNConfig, PPOConfig, SFTConfig
    from textgym.testing import byte_tokenizer, mock_lm

    def policy(seed: int) -> ActorCritic:
        torch.manual_seed(seed)
        return ActorCritic.from_pretrained(mock_lm(seed=seed), critic="separate")

    def envs() -> Any:
        return gym.make_vec(
            "textgym:textgym/Text-v0",
            num_envs=4,
            prompts=["one", "two"],
            tokenizer=byte_tokenizer(),
            reward=_no_reward,
            kl_coef=0.1,
            kl_mode="deferred",
            max_new_tokens=2,
        )

    rows = [{"prompt": f"{i} is", "completion": " one"} for i in range(4)]
    pairs = [{"prompt": f"{i} is", "chosen": " one", "rejected": " two"} for i in range(4)]
    replay = DQNConfig(episodes_per_update=4, learning_starts=1, gradient_steps=1, batch_size=4, buffer_size=8)
    return {
        "policy": Folder(
            lambda path, seed: policy(seed).save_pretrained(path, byte_tokenizer()), ActorCritic.from_pretrained
        ),
        "PPO": Folder(
            lambda path, seed: PPO(policy(seed), envs(), PPOConfig(episodes_per_update=4)).learn(4).save(path),
            lambda path: PPO.load(path, envs()),
        ),
        "DQN": Folder(
            lambda path, seed: DQN(policy(seed), envs(), replay).learn(4).save(path),
            lambda path: DQN.load(path, envs()),
        ),
        "SFT": Folder(
            lambda path, seed: SFT(policy(seed), rows, byte_tokenizer(), SFTConfig(max_steps=1)).learn().save(path),
            lambda path: SFT.load(path, rows),
        ),
        "DPO": Folder(
            lambda path, seed: DPO(policy(seed), pairs, byte_tokenizer(), DPOConfig(max_steps=1)).learn().save(path),
            lambda path: DPO.load(path, pairs),
        ),
        "reward model": Folder(_write_reward_model, RewardModel.from_pretrained),
        "run": Folder(_write_run, _resume_run),
    }


def _write_reward_model(path: Path, seed: int) -> None:
    from textgym.rewards.models import RewardModelConfig, train_reward_model

    pairs = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2
    config = RewardModelConfig(seed=seed, epochs=0.1, num_layers=1)
    train_reward_model(pairs, "tiny", config=config)[0].save_pretrained(path)


@dataclass
class RunSettings:
    """Settings of a run."""

    seed: int = 0


def _write_run(path: Path, seed: int) -> None:
    from textgym.agents.runs.run_folder import RunFolder

    folder = RunFolder(path, RunSettings(seed))
    for update in (1, 2):
        folder(None, {"episodes": 4.0 * update, "objective/scores": float(seed)})  # type: ignore[arg-type]
    folder.close()
    shutil.rmtree(path / "tensorboard", ignore_errors=True)


def _resume_run(path: Path) -> None:
    from textgym.agents.runs.run_folder import RunFolder, changed_settings

    changed = changed_settings(path, RunSettings(), ())
    if changed:
        raise ValueError(f"config.json: {changed}")
    folder = RunFolder(path, RunSettings(), updates=2)
    folder.close()


# --- the table ---


def table(parts: dict[str, list[Case]]) -> str:
    """Return how many cases of each part are right."""
    lines = ["| what | cases | accepted | refused by name | bad |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, cases in parts.items():
        counts = Counter(case.verdict for case in cases)
        lines.append(
            f"| {name} | {len(cases):,} | {counts['accepted']:,} | {counts['refused']:,} | {counts['bad']:,} |"
        )
    return "\n".join(lines)


PARTS: dict[str, Callable[[], Iterator[Case]]] = {
    "settings": settings_cases,
    "environments": environment_cases,
    "files": file_cases,
}


def main(arguments: list[str]) -> None:
    """Print the table of all parts, or of one with its bad cases."""
    chosen = arguments or list(PARTS)
    results = {}
    for name in chosen:
        with contextlib.redirect_stdout(io.StringIO()):
            results[name] = list(PARTS[name]())
    print(table(results))
    for cases in results.values():
        for case in cases:
            if case.verdict == "bad":
                print(f"{case.where} = {case.value}: {case.words}")


if __name__ == "__main__":
    main(sys.argv[1:])
