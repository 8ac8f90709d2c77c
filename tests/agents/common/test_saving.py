"""Saved agents: a folder is data, so loading it runs nothing that it names, and every file in it is checked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

from textgym.agents import GRPO, PPO, SFT, PPOConfig, SFTConfig
from textgym.data.manifests import MANIFEST, write_manifest
from textgym.errors import ConfigError, DamagedFolderError, UntrustedNameError
from textgym.models.actor_critic import ActorCritic
from textgym.rewards.models import RewardModel
from textgym.testing import byte_tokenizer, mock_lm

PLANTED = (
    "import pathlib\npathlib.Path({trace!r}).touch()\ndef reward(completions):\n    return [1.0] * len(completions)\n"
)


def text_length(completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


def make_envs(**changes: Any) -> Any:
    arguments = {
        "prompts": ["one", "two"],
        "tokenizer": byte_tokenizer(),
        "reward": text_length,
        "kl_mode": "deferred",
        "max_new_tokens": 3,
    }
    return gym.make_vec("textgym/Text-v0", num_envs=4, **{**arguments, **changes})


def make_agent(**changes: Any) -> PPO:
    policy = ActorCritic.from_pretrained(mock_lm(), critic="separate")
    return PPO(policy, make_envs(**changes), PPOConfig(episodes_per_update=4, minibatch_size=4))


@pytest.fixture
def plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An agent whose environment was made of plain values, so that it can be made again."""
    mock_lm().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    make_agent(tokenizer="model", reward="textgym.rewards.functions:completion_length").learn(4).save("agent")
    return tmp_path / "agent"


def rewritten(folder: Path, change: Callable[[dict[str, Any]], Any], name: str = "agent.json") -> None:
    """Change a JSON file as an attacker would, who also makes the manifest fit."""
    saved = json.loads((folder / name).read_text())
    change(saved)
    (folder / name).write_text(json.dumps(saved))
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).unlink()
    write_manifest(folder, manifest["kind"], manifest["made_by"], manifest["config"])


# --- a folder is data ---


def test_an_environment_of_plain_values_is_made_again(plain: Path) -> None:
    agent = PPO.load(plain)
    assert agent.envs.unwrapped.task.scorer.names == ["completion_length"]
    assert agent.learn(8).updates == 2


@pytest.mark.parametrize(
    "reward",
    [
        "planted:reward",
        "subprocess:getoutput",
        "textgym.data.files:shutil.rmtree",
        "textgym.data.importing:import_attribute",
        "textgym.rewards.functions:__loader__.load_module",
        "textgym.data.prompts:Path",
        ["textgym.rewards.functions:completion_length", "planted:reward"],
        {"a": "planted:reward"},
    ],
)
def test_loading_runs_no_function_that_the_folder_names(
    plain: Path, reward: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = plain.parent / "trace"
    (plain.parent / "planted.py").write_text(PLANTED.format(trace=str(trace)))
    monkeypatch.syspath_prepend(plain.parent)
    rewritten(plain, lambda saved: saved["env"]["kwargs"].update(reward=reward))
    with pytest.raises(
        UntrustedNameError, match=r"as reward, and loading a folder runs no code that it names.*reward="
    ):
        PPO.load(plain)
    assert not trace.exists()
    with pytest.warns(UserWarning, match="changed: reward function"):
        agent = PPO.load(plain, reward=text_length)
    assert agent.envs.unwrapped.task.scorer.names == ["text_length"]


@pytest.mark.parametrize("argument", ["prompts", "tokenizer", "reference", "action_mask"])
def test_no_argument_of_the_environment_imports_what_the_folder_names(plain: Path, argument: str) -> None:
    rewritten(plain, lambda saved: saved["env"]["kwargs"].update({argument: "planted:Thing-v0"}))
    with pytest.raises(UntrustedNameError, match=f"'planted:Thing-v0' as {argument}"):
        PPO.load(plain)


@pytest.mark.parametrize("env_id", ["planted:Env-v0", "Unknown-v0"])
def test_environments_come_from_the_registry_alone(plain: Path, env_id: str) -> None:
    rewritten(plain, lambda saved: saved["env"].update(id=env_id))
    with pytest.raises(UntrustedNameError, match="is not registered"):
        PPO.load(plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda saved: saved["policy"].update(trust_remote_code=True),
            "policy has an unknown field 'trust_remote_code'",
        ),
        (lambda saved: saved["policy"].update(critic="someone/model"), "critic must be 'shared' or 'separate'"),
        (lambda saved: saved["policy"].update(dtype="load"), "dtype must be"),
        (lambda saved: saved["policy"].update(temperature=float("nan")), "temperature must be a finite number"),
        (lambda saved: saved["env"].update(entry_point="subprocess:getoutput"), "unknown field 'entry_point'"),
        (lambda saved: saved["env"].update(num_envs=-1), "num_envs must be at least 1"),
        (lambda saved: saved["config"].update(minibatchsize=1), "unknown field 'minibatchsize': did you mean"),
        (lambda saved: saved["config"].update(clip_range=-1.0), "clip_range must be above 0"),
        (lambda saved: saved.update(progress=[1, 2]), "progress must be 3 values"),
        (lambda saved: saved.update(progress=[1, -2, 3]), "progress must be"),
        (lambda saved: saved.update(further=1), "unknown field 'further'"),
        (lambda saved: saved.pop("scorers"), "has no field 'scorers'"),
    ],
)
def test_every_field_of_the_file_is_checked(plain: Path, change: Any, message: str) -> None:
    rewritten(plain, change)
    with pytest.raises(ConfigError, match=message):
        PPO.load(plain)


def test_a_model_that_brings_code_is_refused(plain: Path, tmp_path: Path) -> None:
    """Also where the caller passes the environment, so that the policy alone is read."""
    trace = tmp_path / "trace"
    (plain / "policy" / "modeling.py").write_text(PLANTED.format(trace=str(trace)))
    auto_map = {"AutoConfig": "modeling.reward", "AutoModelForCausalLM": "modeling.reward"}
    rewritten(plain / "policy", lambda saved: saved.update(auto_map=auto_map, model_type="planted"), "config.json")
    rewritten(plain, lambda saved: None)
    with pytest.raises(ValueError, match="cannot load a model"):
        PPO.load(plain, make_envs())
    assert not trace.exists()


def test_an_adapter_for_megatron_is_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    policy = ActorCritic.from_pretrained(mock_lm(), lora=peft.LoraConfig(target_modules=["q_proj"]))
    PPO(policy, make_envs(), PPOConfig(episodes_per_update=4)).save(tmp_path / "agent")
    PPO.load(tmp_path / "agent", make_envs())
    named = {"megatron_config": {"a": 1}, "megatron_core": "planted"}
    rewritten(tmp_path / "agent", lambda saved: saved.update(named), "adapter/adapter_config.json")
    with pytest.raises(UntrustedNameError, match="peft imports the module that the file names"):
        PPO.load(tmp_path / "agent", make_envs())


def test_a_reward_model_has_no_other_settings_than_its_own(tmp_path: Path) -> None:
    RewardModel.from_pretrained("tiny").save_pretrained(tmp_path / "reward")
    rewritten(tmp_path / "reward", lambda saved: saved.update(trust_remote_code=True), "reward_model.json")
    with pytest.raises(ConfigError, match="unknown field 'trust_remote_code'"):
        RewardModel.from_pretrained(tmp_path / "reward")


# --- damage ---


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "flipped", "swapped"])
@pytest.mark.parametrize("kind", ["agent", "supervised", "policy", "reward model"])
def test_every_damaged_file_of_every_kind_of_folder_is_named(tmp_path: Path, kind: str, damage: str) -> None:
    save, load = KINDS[kind]
    save(tmp_path / "saved")
    load(tmp_path / "saved")
    for name in files_of(tmp_path / "saved"):
        path = tmp_path / "saved" / name
        whole = path.read_bytes()
        flipped = bytes([*whole[:-1], whole[-1] ^ 1])
        damaged = {"empty": b"", "cut": whole[: len(whole) // 2], "flipped": flipped, "swapped": b"{}"}
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes(damaged[damage])
        if not (kind in ("policy", "reward model") and (name, damage) == (MANIFEST, "missing")):  # a model of others
            with pytest.raises(DamagedFolderError, match=path.name):
                load(tmp_path / "saved")
        path.write_bytes(whole)


def _sft() -> SFT:
    rows = [{"prompt": f"{i} is", "completion": " one"} for i in range(4)]
    return SFT(ActorCritic.from_pretrained(mock_lm()), rows, byte_tokenizer(), SFTConfig(batch_size=4, max_steps=2))


KINDS: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any]]] = {
    "agent": (lambda folder: make_agent().learn(4).save(folder), lambda folder: PPO.load(folder, make_envs())),
    "supervised": (
        lambda folder: _sft().learn([lambda agent, metrics: agent.updates < 1]).save(folder),
        lambda folder: SFT.load(folder, [{"prompt": f"{i} is", "completion": " one"} for i in range(4)]),
    ),
    "policy": (
        lambda folder: ActorCritic.from_pretrained(mock_lm(), critic="separate").save_pretrained(
            folder, byte_tokenizer()
        ),
        lambda folder: ActorCritic.from_pretrained(folder, critic="separate"),
    ),
    "reward model": (
        lambda folder: RewardModel.from_pretrained("tiny").save_pretrained(folder),
        RewardModel.from_pretrained,
    ),
}


def test_a_flipped_bit_is_named(tmp_path: Path) -> None:
    make_agent().save(tmp_path / "agent")
    path = tmp_path / "agent" / "policy" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    with pytest.raises(DamagedFolderError, match=r"policy/model.safetensors is not as it was written"):
        PPO.load(tmp_path / "agent", make_envs())


def test_loading_into_another_class_says_which(tmp_path: Path) -> None:
    make_agent().save(tmp_path / "agent")
    with pytest.raises(DamagedFolderError, match=r"holds a PPO: load it with PPO.load, not GRPO.load"):
        GRPO.load(tmp_path / "agent", make_envs())


def test_a_critic_without_its_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    ActorCritic.from_pretrained(mock_lm()).save_pretrained(tmp_path / "policy")
    weights = load_file(tmp_path / "policy" / "critic.safetensors")
    weights.pop("value_head.bias")
    save_file(
        {**weights, "value_head.other": weights["value_head.weight"].clone()},
        tmp_path / "policy" / "critic.safetensors",
    )
    (tmp_path / "policy" / MANIFEST).unlink()
    with pytest.raises(DamagedFolderError, match=r"differ in value_head.bias, value_head.other"):
        ActorCritic.from_pretrained(tmp_path / "policy")


def test_a_language_model_without_some_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    mock_lm().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"has not all weights of its model \(missing: model.norm.weight\)"):
        ActorCritic.from_pretrained(tmp_path)


# --- what changed since ---


def other_length(completions: list[str]) -> list[float]:
    return [2.0 * len(text) for text in completions]


def test_what_changed_since_is_reported(tmp_path: Path) -> None:
    make_agent().save(tmp_path / "agent")
    PPO.load(tmp_path / "agent", make_envs())  # pytest turns warnings into errors
    with pytest.warns(UserWarning, match=r"saved with other inputs .*changed: prompts, .*text_length.*other_length"):
        PPO.load(tmp_path / "agent", make_envs(prompts=["three"], reward=other_length))
    with pytest.warns(UserWarning, match=r"changed: setting max_new_tokens was 3 and is 4, setting kl_clamp was null"):
        PPO.load(tmp_path / "agent", make_envs(max_new_tokens=4, kl_clamp=1.0))


def test_overwriting_an_agent_has_to_be_asked_for(tmp_path: Path) -> None:
    agent = make_agent()
    agent.save(tmp_path / "agent")
    with pytest.raises(FileExistsError, match="holds a textgym agent already"):
        agent.save(tmp_path / "agent")
    agent.learn(4).save(tmp_path / "agent", overwrite=True)
    assert PPO.load(tmp_path / "agent", make_envs()).updates == 1
