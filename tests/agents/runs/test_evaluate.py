"""`evaluate` in Python: a policy beside its reference, as the command prints them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from rich.console import Console
from torch import nn

from textgym import cli
from textgym.agents import PPO, PPOConfig, RunFolder, evaluate, measure
from textgym.agents.runs.claims import RunClaim
from textgym.agents.runs.evaluation import generate
from textgym.errors import ConfigError, RunFolderError, UntrustedNameError
from textgym.models.actor_critic import ActorCritic
from textgym.rewards.intervals import Interval
from textgym.testing import assert_close, byte_tokenizer, mock_lm, terms_of, tolerance

PROMPTS = ["ab", "c", "de", "f"]


def rounding_of_kl(figures: dict[str, float], lm: nn.Module) -> float:
    """How far a KL may be off: it sums differences of log-probs over the tokens of a response."""
    return tolerance(terms_of(lm) * figures["length"], scale=math.log(figures["reference_ppl"]))


def assert_alike(figures: dict[str, float], expected: dict[str, float], lm: nn.Module) -> None:
    """The same figures, however the machine rounds; the log-probs behind a KL may cancel."""
    assert figures["kl"] == pytest.approx(expected["kl"], abs=rounding_of_kl(expected, lm))
    assert_close({**figures, "kl": 0.0}, {**expected, "kl": 0.0}, terms=terms_of(lm))


def make_envs(**settings: Any) -> Any:
    return gym.make_vec(
        "textgym/Text-v0",
        num_envs=2,
        prompts=PROMPTS,
        tokenizer=byte_tokenizer(),
        max_new_tokens=4,
        **{"reward": lambda completions: [float(len(text)) for text in completions], **settings},
    )


@pytest.fixture(scope="module")
def policy() -> ActorCritic:
    return ActorCritic.from_pretrained(mock_lm(seed=1))


def test_a_policy_in_memory_is_measured_beside_its_reference_as_measure_does(policy: ActorCritic) -> None:
    envs = make_envs()
    found = evaluate(policy, envs, reference=mock_lm(), seed=3, prompts=3)
    reference = ActorCritic.from_pretrained(mock_lm())
    for name, model in (("policy", policy), ("reference", reference)):
        samples = generate(model, envs, range(3), seed=3)
        assert_alike(found.figures[name], measure(samples, reference), model.lm)
        assert found.samples[name].completions == samples.completions
    assert found.figures["policy"]["kl"] != pytest.approx(0, abs=1e-3)
    same = found.figures["reference"]
    assert same["kl"] == pytest.approx(0, abs=rounding_of_kl(same, reference.lm))


def test_an_environment_brings_its_reference(policy: ActorCritic) -> None:
    given = evaluate(policy, make_envs(reference=mock_lm()), against=mock_lm(seed=2))
    assert given.figures.keys() == {"reference", "policy", "other policy"}
    expected = evaluate(policy, make_envs(), reference=mock_lm())
    assert_alike(given.figures["policy"], expected.figures["policy"], policy.lm)
    with pytest.raises(ConfigError, match="need a reference, and the environment has none"):
        evaluate(policy, make_envs())


def test_the_kl_of_a_policy_with_a_temperature_is_to_the_reference_at_the_same() -> None:
    envs = make_envs(reference=mock_lm())
    cold = ActorCritic.from_pretrained(mock_lm(), temperature=0.5)
    figures = evaluate(cold, envs).figures
    assert figures["policy"]["kl"] == pytest.approx(0, abs=rounding_of_kl(figures["policy"], cold.lm))
    assert_alike(figures["policy"], figures["reference"], cold.lm)
    assert envs.unwrapped.reference.temperature == 1.0


def test_evaluating_changes_neither_the_sampling_nor_the_scale_of_a_run(policy: ActorCritic) -> None:
    envs = make_envs(reference=mock_lm(), score_scaling="running")
    policy.seed(7)
    before, scale = policy.generator.get_state(), envs.unwrapped.scorer.state()  # type: ignore[union-attr]
    evaluate(policy, envs)
    assert policy.generator.get_state().equal(before)  # type: ignore[union-attr]
    assert envs.unwrapped.scorer.state() == scale


def test_what_is_missing_is_named(policy: ActorCritic, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give env=, the id of one or a TextVectorEnv"):
        evaluate(policy)
    with pytest.raises(ConfigError, match="env_kwargs are of an environment that is made of an id"):
        evaluate(policy, make_envs(), env_kwargs={"max_new_tokens": 3})
    with pytest.raises(ConfigError, match="textgym/Text-v0 cannot be made"):
        evaluate(policy, "textgym/Text-v0", reference=mock_lm())
    with RunClaim(tmp_path), pytest.raises(RunFolderError, match="has no policy, which is written when a run ends"):
        evaluate(tmp_path, make_envs())


WRONG = {
    "temperature must be": {"temperature": "hot"},
    "env must be": {"env": 3},
    "model must be": {"model": ["tiny"]},
    "env_kwargs is not JSON": {"env_kwargs": "{"},
    "kwargs must be a mapping": {"env_kwargs": "[1]"},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_setting_of_a_run_is_named(policy: ActorCritic, tmp_path: Path, message: str) -> None:
    RunClaim(tmp_path).release()
    policy.save_pretrained(tmp_path / "policy")
    (tmp_path / "config.json").write_text(json.dumps({"env": "textgym/Copy-v0", **WRONG[message]}))
    with pytest.raises(ConfigError, match=message) as caught:
        evaluate(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_an_id_that_there_is_not_is_named(policy: ActorCritic) -> None:
    with pytest.raises(ConfigError, match=r"'textgym/Sentimen-v0' is no environment: .*Did you mean: `Sentiment`"):
        evaluate(policy, "textgym/Sentimen-v0")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("trained", [True, False])
def test_a_reference_in_memory_stays_as_it_is(policy: ActorCritic, trained: bool) -> None:
    """A frozen one needs no word on what an agent could not train."""
    lm = mock_lm().requires_grad_(trained)
    evaluate(policy, make_envs(), reference=lm, prompts=1)
    assert {weight.requires_grad for weight in lm.parameters()} == {trained}


@pytest.mark.slow
def test_a_run_that_names_somebody_elses_code_needs_the_environment(tmp_path: Path) -> None:
    PPO(ActorCritic.from_pretrained(mock_lm()), make_envs(), PPOConfig(episodes_per_update=2, minibatch_size=2)).learn(
        2, folder=tmp_path
    )
    assert evaluate(tmp_path, make_envs(), reference=mock_lm()).figures["policy"]["length"] > 0
    with pytest.raises(ConfigError, match="textgym/Text-v0 cannot be made"):  # its prompts and reward have no names
        evaluate(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["env_kwargs"] = json.dumps({"prompts": ["a"], "reward": "somebody:code", "tokenizer": "tiny"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UntrustedNameError, match="somebody:code"):
        evaluate(tmp_path)


@pytest.mark.slow
def test_a_run_is_evaluated_as_the_command_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    agent = PPO("tiny", "textgym/Sentiment-v0", PPOConfig(episodes_per_update=8, minibatch_size=8))
    agent.learn(16, folder="run")
    found = evaluate("run", prompts=8)
    expected = evaluate(agent.policy, "textgym/Sentiment-v0", prompts=8)
    assert_alike(found.figures["policy"], expected.figures["policy"], agent.policy.lm)
    capsys.readouterr()
    Console().print(found.table())
    table = capsys.readouterr().out
    cli.main(["evaluate", "run", "--prompts", "8"])
    printed = capsys.readouterr().out
    assert table in printed
    assert found.samples["policy"].completions[0].split()[0] in printed


@pytest.mark.slow
def test_a_tasks_own_metrics_have_intervals() -> None:
    found = evaluate("tiny", "textgym/Summarize-v0", prompts=4, num_envs=4)
    assert any(isinstance(value, Interval) for value in found.figures["policy"].values())


def test_importing_them_loads_no_torch_before_their_first_use() -> None:
    code = "import sys, textgym.agents as a; assert {'evaluate', 'measure', 'RunFolder'} <= set(dir(a)); "
    subprocess.run([sys.executable, "-c", code + "assert 'torch' not in sys.modules"], check=True)
    assert callable(RunFolder)
