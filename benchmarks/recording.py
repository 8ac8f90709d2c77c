"""What records of tokens cost: CPU time of a record beside that of an update, and bytes.

    python benchmarks/recording.py

PPO on the embedded task with the settings of `textgym train`, every second update recorded with 64 rows. The time of a
record is that of the recorder itself, so it is compared with the update that it belongs to.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch

from textgym import ActorCritic
from textgym.agents import PPO, PPOConfig
from textgym.agents.runs.records import Recorder
from textgym.agents.runs.run_folder import RunFolder
from textgym.viewer import write_page
from textgym.viewer.records import records_of


def main(updates: int = 9, every: int = 10) -> None:
    torch.set_num_threads(1)
    envs = gym.make_vec("textgym:textgym/Sentiment-v0", num_envs=64)
    agent = PPO(ActorCritic.from_pretrained("tiny"), envs, PPOConfig())
    with tempfile.TemporaryDirectory() as temporary:
        run = Path(temporary) / "run"
        folder = RunFolder(run, agent.config)
        recorder = Recorder(run, agent, every=2)
        own: list[float] = []

        def timed(function: Any) -> Any:
            def call(*arguments: Any) -> None:
                started = time.process_time()
                function(*arguments)
                own[-1] += time.process_time() - started

            return call

        laps: list[float] = []

        def lap(*_: Any) -> None:
            laps.append(time.process_time())
            own.append(0.0)

        recorder.on_rollout_end = timed(recorder.on_rollout_end)  # type: ignore[method-assign]
        recorder.on_update_end = timed(recorder.on_update_end)  # type: ignore[method-assign]
        lap()
        agent.learn(updates * agent.config.episodes_per_update, [folder, recorder, lap])
        folder.close()
        seconds = [after - before for before, after in itertools.pairwise(laps)]
        recorded = range(1, updates, 2)  # update 2, 4, ...; the first one is always slow
        shares = [own[i] / (seconds[i] - own[i]) for i in recorded]
        page = write_page([run])
        in_page = [path.stat().st_size for path in page.parent.glob("data/run*.js")]
        in_run = [path.stat().st_size for path in records_of(run)]
    share = statistics.median(shares)
    print(f"a record of 64 rows: {share:.1%} of the CPU time of its update (median of {len(shares)})")
    print(f"a run with a record every {every} updates: {share / every:.1%} more")
    for name, sizes in (("run folder", in_run), ("page", in_page)):
        mean = statistics.mean(sizes)
        print(f"{name}: {mean / 1e3:.1f} kB a record, {200 * mean / 1e6:.1f} MB for 200 updates")


if __name__ == "__main__":
    main()
