"""textgym reward-model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from textgym.agents.machine.distributed import join, raise_on_termination, rank
from textgym.agents.runs.heldout import judge_of
from textgym.agents.runs.progress import LiveProgress, TrainingProgress
from textgym.commands.models import place_of
from textgym.data.corpora.sources import movie_snippets
from textgym.data.files import atomic_file, check_free
from textgym.data.preferences import PAIRS_PER_GROUP, heldout_pairs, make_preferences
from textgym.flags import TrainReward
from textgym.models.machine.devices import device_name
from textgym.rewards.models import pairwise_accuracy, train_reward_model
from textgym.rewards.models.rankings import make_rankings
from textgym.rewards.models.report import PreferenceReport
from textgym.rewards.models.reward_model import REWARD_MODEL
from textgym.rewards.models.training import read_and_split


def train_reward(command: TrainReward) -> None:
    """A reward model, its accuracy on held-out pairs, and a picture of both: `report.json` and `report.png`."""
    join()
    raise_on_termination()
    check_free(command.output_dir, REWARD_MODEL, overwrite=command.overwrite)
    live, place = LiveProgress(), place_of(command)
    live.console.print(f"device: {device_name(place)}", markup=False)
    settings = command.settings
    if command.preferences is None and settings.batch_size is None:
        settings = replace(settings, batch_size=PAIRS_PER_GROUP if settings.loss == "pairwise" else 16)
    rows, heldout, calibration = _preferences(command)
    with live:
        live.stage("training the reward model", 1)
        reward, _ = train_reward_model(
            rows,
            command.model,
            config=settings,
            heldout=heldout,
            callbacks=[TrainingProgress(live)],
            device=place,
            trust_remote_code=command.trust_remote_code,
        )
        if rank() > 0:  # the first process writes for all of them
            return
        if settings.loss != "regression":  # whose scores are in the unit of the ratings
            reward.calibrate(calibration)
        live.finish()
    reward.save_pretrained(command.output_dir, overwrite=command.overwrite)
    report = PreferenceReport.of(reward, heldout)
    with atomic_file(command.output_dir / "report.json") as temporary:
        temporary.write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    try:
        report.plot(command.output_dir / "report.png")
    except ImportError as error:
        live.console.print(str(error), markup=False)
    for line in report.lines():
        live.console.print(line, markup=False)
    judge = judge_of("textgym/Sentiment-v0") if command.preferences is None else None
    if judge is not None:
        lexicon = pairwise_accuracy(judge, heldout)
        live.console.print(f"held-out pairwise accuracy: lexicon {lexicon}", markup=False)
    live.console.print(f"reward model and report: {command.output_dir}", markup=False)


def _preferences(command: TrainReward) -> tuple[list[Any], list[Any], list[Any]]:
    """Pairs or rankings to train on, pairs to measure on, and texts to calibrate on."""
    settings = command.settings
    if command.preferences is None:
        snippets = movie_snippets()
        train = [s for s in snippets if s.split == "train"]
        heldout = heldout_pairs([s for s in snippets if s.split != "train"])
        make: Callable[..., list[Any]] = make_preferences if settings.loss == "pairwise" else make_rankings
        return make(train, seed=settings.seed), heldout, [s.text for s in train[:1000]]
    rows, heldout = read_and_split(command.preferences, command.heldout, settings)
    if not heldout:
        raise ValueError("no pairs are held out: give pairs with several prompts or groups, or --heldout")
    return rows, heldout, [text for row in rows[:500] for text in row.texts]
