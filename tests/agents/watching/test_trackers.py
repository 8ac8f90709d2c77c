"""Trackers get settings, metrics and samples; what was logged is read back. A tracker that fails ends nothing."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import gymnasium as gym
import pytest
from accelerate import PartialState

from textgym import ActorCritic, cli
from textgym.agents import PPO, PPOConfig
from textgym.agents.watching import trackers
from textgym.agents.watching.trackers import Trackers, flat, markdown
from textgym.errors import ConfigError
from textgym.testing import byte_tokenizer, mock_lm


def make() -> PPO:
    envs = gym.make_vec(
        "textgym/Text-v0",
        num_envs=2,
        prompts=["ab|", "c"],
        tokenizer=byte_tokenizer(),
        reward=lambda completions: [float(len(text)) for text in completions],
        max_new_tokens=2,
    )
    return PPO(ActorCritic.from_pretrained(mock_lm()), envs, PPOConfig(episodes_per_update=2, minibatch_size=2))


class InMemory:
    """A tracker with the interface of accelerate's."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.fail_at = fail_at
        self.settings: dict[str, Any] = {}
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.finished = False

    def start(self) -> None:
        pass

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings = values

    def log(self, values: dict[str, Any], step: int) -> None:
        if step == self.fail_at:
            raise ConnectionError("the server refused the connection")
        self.rows.append((step, values))

    def finish(self) -> None:
        self.finished = True


def track(monkeypatch: pytest.MonkeyPatch, **given: InMemory) -> None:
    monkeypatch.setattr(trackers, "check_tracker", lambda name: None)
    monkeypatch.setattr(trackers, "tracker_of", lambda name, folder: given[name])
    monkeypatch.setattr(trackers, "log_samples", lambda name, tracker, rows, step: tracker.log({"samples": rows}, step))


def test_settings_metrics_and_samples_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = InMemory()
    track(monkeypatch, wandb=tracker)
    metrics: list[dict[str, float]] = []
    make().learn(4, lambda agent, new: metrics.append(new), log_with="wandb")
    assert tracker.settings["agent"] == "ppo"
    assert tracker.settings["config/minibatch_size"] == 2
    *updates, (last, figures) = [(step, row) for step, row in tracker.rows if "samples" not in row]
    assert updates == [(2, metrics[0]), (4, metrics[1])]
    assert (last, figures["closing/after/score"]) == (4, metrics[1]["eval/score"]), "without a folder, too"
    [(step, row)] = [(step, row) for step, row in tracker.rows if "samples" in row]
    assert step == 2
    assert sorted(prompt for prompt, _, _ in row["samples"]) == ["ab|", "c"]
    assert all(score == len(completion) for _, completion, score in row["samples"])
    assert tracker.finished


@pytest.mark.slow
def test_the_figures_of_the_closing_table_are_sent_once_per_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is finished has no new ones if it is begun again."""
    tracker = InMemory()
    track(monkeypatch, wandb=tracker)
    agent = make()
    agent.learn(4, folder=tmp_path / "run", log_with="wandb")
    [(step, figures)] = [(step, row) for step, row in tracker.rows if "closing/after/score" in row]
    assert step == 4
    table = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert figures == {
        f"closing/{column}/{name}": value for column in ("before", "after") for name, value in table[column].items()
    }
    tracker.rows.clear()
    agent.learn(4, folder=tmp_path / "run", log_with="wandb")
    assert tracker.rows == []


def test_a_tracker_that_refuses_in_the_middle_of_a_run_is_warned_of_once_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken, whole = InMemory(fail_at=4), InMemory()
    track(monkeypatch, wandb=broken, mlflow=whole)
    agent = make()
    with pytest.warns(UserWarning, match="the tracker wandb failed.*the server refused the connection") as caught:
        agent.learn(8, log_with=["wandb", "mlflow"])
    assert sum("the tracker" in str(warning.message) for warning in caught) == 1
    assert agent.updates == 4
    assert [step for step, row in broken.rows if "samples" not in row] == [2]
    assert [step for step, row in whole.rows if "samples" not in row] == [2, 4, 6, 8, 8]
    assert whole.finished


def test_a_tracker_that_cannot_begin_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = InMemory()
    monkeypatch.setattr(broken, "start", lambda: 1 / 0)
    track(monkeypatch, wandb=broken)
    with pytest.warns(UserWarning, match="the tracker wandb failed.*ZeroDivisionError"):
        assert make().learn(2, log_with="wandb").updates == 1


@pytest.mark.parametrize("given", [None, "99"])
@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_trackers_wait_for_a_server_as_long_as_the_user_says_and_else_not_for_minutes(
    name: str, given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, str] = {}
    track(monkeypatch, **{name: InMemory()})
    monkeypatch.setattr(trackers, "tracker_of", lambda *_: seen.update(os.environ) or InMemory())
    for variable in trackers.PATIENCE[name]:
        if given is None:
            monkeypatch.delenv(variable, raising=False)
        else:
            monkeypatch.setenv(variable, given)
    make().learn(2, log_with=name)
    for variable, value in trackers.PATIENCE[name].items():
        assert seen[variable] == (given or value)


def test_names_of_trackers_are_checked_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tracker 'wandbb': did you mean 'wandb'"):
        make().learn(2, folder=tmp_path / "run", log_with="wandbb")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert Trackers(["tensorboard,tensorboard tensorboard"]).names == ["tensorboard"]


def test_a_missing_package_is_named_as_pip_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="the tracker comet_ml is not installed: pip install comet-ml"):
        Trackers(["comet_ml"])


def test_names_that_mlflow_refuses_are_written_otherwise() -> None:
    values = {"rewards/<lambda>/mean": 1.0, "my:reward-1.x/std": 2.0, "größe": 3.0}
    assert trackers.allowed("mlflow", values) == {"rewards/_lambda_/mean": 1.0, "my:reward-1.x/std": 2.0, "gr__e": 3.0}
    assert trackers.allowed("wandb", values) == values


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("wandb", "log_table"),
        ("clearml", "log_table"),
        ("tensorboard", "log"),
        ("comet_ml", "tracker.log_text"),
    ],
)
def test_samples_are_sent_in_the_form_that_a_tracker_has_for_them(name: str, call: str) -> None:
    tracker = Mock()
    trackers.log_samples(name, tracker, [["a prompt", "a completion", 1.0]], step=3)
    [(called, arguments, keywords)] = tracker.mock_calls
    assert called == call
    assert "a completion" in str((arguments, keywords))
    assert keywords["step"] == 3


@pytest.mark.parametrize(
    ("name", "with_folder", "without"),
    [
        ("tensorboard", {"logging_dir": "a/run/trackers"}, {"logging_dir": "runs"}),
        ("aim", {"logging_dir": "a", "experiment": "textgym"}, {"logging_dir": "runs", "experiment": "textgym"}),
        ("mlflow", {"run_name": "run"}, {"run_name": "run"}),
        ("wandb", {"name": "run"}, {"name": "run"}),
        ("trackio", {"name": "run"}, {"name": "run"}),
        ("comet_ml", {}, {}),
    ],
)
def test_trackers_keep_a_run_where_its_folder_is_and_under_its_name(
    name: str, with_folder: dict[str, str], without: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = Mock()
    monkeypatch.setitem(trackers.tracking.LOGGER_TYPE_TO_CLASS, name, kind)
    for folder, expected in ((Path("a/run"), with_folder), (None, without)):
        trackers.tracker_of(name, folder)
        assert kind.call_args.kwargs == expected


def test_settings_are_flat_and_samples_are_a_table() -> None:
    assert flat({"a": {"b": None, "c": [1, 2]}, "d": Path("x")}) == {"a/b": "None", "a/c": "[1, 2]", "d": "x"}
    assert markdown([["a|b", "c\nd", None]]).splitlines()[1:] == ["| --- | --- | --- |", r"| a\|b | c d | None |"]


@pytest.fixture
def no_accelerate() -> None:
    """As in a new process: other tests may have made accelerate's state, without which its trackers do not log."""
    PartialState._reset_state()


@pytest.mark.slow
@pytest.mark.usefixtures("no_accelerate")
def test_tensorboard_has_settings_metrics_and_samples(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    make().learn(4, folder=tmp_path / "run", log_with="tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "trackers" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("objective/scores")] == [2, 4]
    [sample] = events.Tensors("samples/text_summary")
    assert b"| prompt | completion | score |" in sample.tensor_proto.string_val[0]
    [settings] = (tmp_path / "run" / "trackers").rglob("hparams.yml")
    assert "config/minibatch_size: 2" in settings.read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("no_accelerate")
def test_weights_and_biases_offline_has_settings_metrics_and_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the library's own
        make().learn(4, folder=tmp_path / "run", log_with="wandb")
        found = wandb_records(next(tmp_path.glob("wandb/offline-run-*/*.wandb")))
    assert found["config/minibatch_size"] == "2"
    assert len(found["objective/scores"]) == 2
    assert found["samples/nrows"] == ["2"]
    [table] = tmp_path.glob(f"wandb/offline-run-*/files/{json.loads(found['samples/path'][0])}")
    assert json.loads(table.read_text())["columns"] == ["prompt", "completion", "score"]


def wandb_records(file: Path) -> dict[str, Any]:
    """Settings and the history of each metric in the file of an offline run."""
    from wandb.proto import wandb_internal_pb2 as records

    found: dict[str, Any] = {}
    for data in log_records(file.read_bytes()[7:], first_block=32768 - 7):
        record = records.Record()
        record.ParseFromString(data)
        for update in (*record.run.config.update, *record.config.update):
            found["/".join(update.nested_key) or update.key] = update.value_json
        for item in record.history.item:
            found.setdefault("/".join(item.nested_key) or item.key, []).append(item.value_json)
    return found


def log_records(data: bytes, first_block: int) -> Iterator[bytes]:
    """Records of a log in LevelDB's format: parts with a checksum (4), a length (2) and a kind (1), in blocks."""
    block, start, record = first_block, 0, b""
    while start + 7 <= len(data):
        if block < 7:  # no room for another part
            start, block = start + block, 32768
            continue
        length, kind = int.from_bytes(data[start + 4 : start + 6], "little"), data[start + 6]
        record += data[start + 7 : start + 7 + length]
        start, block = start + 7 + length, block - 7 - length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield record
            record = b""


@pytest.mark.slow
@pytest.mark.usefixtures("no_accelerate")
def test_mlflow_with_a_database_has_settings_metrics_and_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'runs.db'}")
    make().learn(4, folder=tmp_path / "run", log_with="mlflow")
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("textgym")
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "run"
    assert run.data.params["config/minibatch_size"] == "2"
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "objective/scores")] == [2, 4]
    table = json.loads(mlflow.artifacts.load_text(f"{run.info.artifact_uri}/samples.json"))
    assert table["columns"] == ["step", "prompt", "completion", "score"]
    assert len(table["data"]) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("no_accelerate")
def test_aim_has_settings_metrics_and_samples(tmp_path: Path) -> None:
    """Run with aim 3.29.1, installed by `pip install aim`; aim is in no extra because it is large."""
    aim = pytest.importorskip("aim")
    make().learn(4, folder=tmp_path / "run", log_with="aim")
    [folder] = (tmp_path / ".aim" / "meta" / "chunks").iterdir()
    run = aim.Run(folder.name, repo=str(tmp_path))  # one that is only read lacks what no server has put into an index
    assert (run.experiment, run.name) == ("textgym", "run")
    assert run["hparams"]["config/minibatch_size"] == 2
    everywhere = import_module("aim.storage.context").Context({})
    assert list(run.get_metric("objective/scores", everywhere).dataframe()["step"]) == [2, 4]
    [(step, (sample, *_))] = run.get_text_sequence("samples", everywhere).data.items()
    assert step == 2
    assert sample.data.startswith("| prompt | completion | score |")
    run.close()


class Service(BaseHTTPRequestHandler):
    """What MLflow's client asks of a server; it answers so many requests, and then there is no server any more."""

    answers: int

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        info = {"run_id": "r", "run_uuid": "r", "experiment_id": "1", "status": "RUNNING", "lifecycle_stage": "active"}
        experiment = {"experiment_id": "1", "name": "textgym", "lifecycle_stage": "active"}
        text = json.dumps({"experiments": [experiment], "experiment": experiment, "run": {"info": info, "data": {}}})
        type(self).answers -= 1
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())
        self.close_connection = True
        if type(self).answers <= 0:
            self.server.socket.close()  # from now on the port refuses

    do_GET = do_PATCH = do_POST

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.slow
@pytest.mark.usefixtures("no_accelerate")
@pytest.mark.parametrize("answers", [0, 4, 6])
def test_a_server_of_mlflow_that_refuses_is_warned_of_once_and_does_not_stall_the_run(
    answers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the beginning, or in the middle of the run; MLflow's own client tries it again."""
    mlflow = pytest.importorskip("mlflow")
    from urllib3.util.retry import Retry

    waited: list[float] = []
    seconds = Retry.get_backoff_time
    monkeypatch.setattr(Retry, "get_backoff_time", lambda self: waited.append(seconds(self)) or 0.0)
    for variable in trackers.PATIENCE["mlflow"]:
        monkeypatch.delenv(variable, raising=False)
    kind = type("ServiceOfOneTest", (Service,), {"answers": answers})
    with HTTPServer(("127.0.0.1", 0), kind) as server:
        if answers:
            threading.Thread(target=until_closed, args=(server,), daemon=True).start()
        else:
            server.socket.close()
        mlflow.set_tracking_uri(f"http://127.0.0.1:{server.server_port}")
        agent = make()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            agent.learn(12, folder=tmp_path / "run", log_with="mlflow")
            with contextlib.suppress(mlflow.MlflowException):
                mlflow.end_run()  # as at the end of the process
    assert agent.updates == 6
    messages = [str(warning.message) for warning in caught]
    assert sum("the tracker mlflow failed" in message for message in messages) == 1, messages
    assert 0 < sum(waited) < 30, "seconds between attempts"
    assert kind.answers <= 0, "the server refused in the middle"


def until_closed(server: HTTPServer) -> None:
    """Answer requests until the socket is closed."""
    while server.socket.fileno() >= 0:
        try:
            server.handle_request()
        except (OSError, ValueError):
            return


@pytest.mark.slow
@pytest.mark.usefixtures("no_accelerate")
def test_trackio_has_settings_metrics_and_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    make().learn(4, folder=tmp_path / "run", log_with="trackio")
    [database] = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT step, metrics FROM metrics ORDER BY step").fetchall()
        configs = connection.execute("SELECT config FROM configs").fetchall()
    logged = [json.loads(metrics) for _, metrics in rows]
    assert sum("objective/scores" in metrics for metrics in logged) == 2
    assert any("samples" in metrics for metrics in logged)
    assert json.loads(configs[0][0])["config/minibatch_size"] == 2


@pytest.mark.slow
def test_the_command_logs_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    flags = [
        "--num-envs",
        "4",
        "--episodes-per-update",
        "4",
        "--minibatch-size",
        "4",
        "--total-episodes",
        "4",
        "--quiet",
    ]
    cli.main(["train", "--output-dir", "run", *flags, "--log-with", "tensorboard"])
    assert list(Path("run/trackers/tensorboard").glob("events*"))
    with pytest.raises(SystemExit, match="no tracker 'tensorbord': did you mean 'tensorboard'"):
        cli.main(["train", "--output-dir", "other", *flags, "--log-with", "tensorbord"])
    assert not Path("other").exists()
