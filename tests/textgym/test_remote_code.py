"""Code that comes with a model runs only if the command line says so, also when a run is resumed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from textgym import cli
from textgym.testing import byte_tokenizer, mock_lm

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({trace!r}).touch()

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.mark.slow
def test_code_of_a_model_runs_only_with_the_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    trace = tmp_path / "trace"
    mock_lm().save_pretrained("model")
    byte_tokenizer().save_pretrained("model")
    Path("model", "own.py").write_text(CODE.format(trace=str(trace)))
    config = json.loads(Path("model", "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    Path("model", "config.json").write_text(json.dumps({**config, "model_type": "own"}))

    env = json.dumps({"prompts": ["a"], "reward": "textgym.rewards.functions:DistinctN", "max_new_tokens": 3})
    train = ["train", "--model", "model", "--env", "textgym/Text-v0", "--num-envs", "4", "--env-kwargs", env]
    train += ["--total-episodes", "8", "--episodes-per-update", "4", "--kl-coef", "0.1", "--output-dir", "run"]
    evaluate = ["evaluate", "--policy", "run/policy", "--reference", "model", "--env", "textgym/Text-v0"]
    evaluate += ["--env-kwargs", env, "--prompts", "1", "--num-envs", "1"]

    with pytest.raises(SystemExit, match="cannot load a model called 'model'"):
        cli.main(train)
    assert not trace.exists()
    cli.main([*train, "--trust-remote-code"])
    assert trace.exists()
    for command in ([*train, "--resume"], evaluate):
        trace.unlink(missing_ok=True)
        with pytest.raises(SystemExit, match="cannot load a model called"):
            cli.main(command)
        assert not trace.exists()
        cli.main([*command, "--trust-remote-code"])
