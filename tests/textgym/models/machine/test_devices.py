"""Devices by name, and the states of random generators."""

import pytest
import torch

from textgym.models.loading import load_causal_lm
from textgym.models.machine.devices import check_fork, generator_state, resolve_device, restore_generator


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine that says that it has two GPUs, the first of which is the current one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)


@pytest.mark.parametrize("device", [None, "cpu", "cpu:0", torch.device("cpu", 0)])
def test_all_names_of_the_cpu_are_one_device(device):
    assert resolve_device(device) == torch.device("cpu")


def test_a_gpu_without_a_number_is_the_current_one(two_gpus):
    assert resolve_device("cuda") == torch.device("cuda", 1)
    assert resolve_device(torch.device("cuda")) == resolve_device("cuda:1") == resolve_device("auto")
    assert resolve_device("cuda:0") == torch.device("cuda", 0)


def test_auto_is_the_cpu_without_a_gpu(no_gpu):
    assert resolve_device("auto") == torch.device("cpu")


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps", "gpu", "cuda:x"])
def test_a_device_that_is_not_there_is_refused_in_one_line(no_gpu, device):
    with pytest.raises(ValueError, match=f"{device}.*pass 'cpu'") as refusal:
        resolve_device(device)
    assert "\n" not in str(refusal.value)


def test_a_gpu_beyond_the_last_is_refused_with_those_that_there_are(two_gpus):
    with pytest.raises(ValueError, match=r"'cuda:3'.* 2 GPUs, 'cuda:0' to 'cuda:1'"):
        resolve_device("cuda:3")


def test_what_takes_a_device_by_name_checks_it(no_gpu):
    from textgym.envs.text import TextEnv
    from textgym.rewards.models.reward_model import RewardModel

    with pytest.raises(ValueError, match="no device 'cuda'"):
        load_causal_lm("tiny", device="cuda")
    with pytest.raises(ValueError, match="no device 'cuda'"):
        RewardModel.from_pretrained("tiny", device="cuda")
    with pytest.raises(ValueError, match="no device 'cuda'"):
        TextEnv(["The film is"], "tiny", len, device="cuda")


def test_cuda_in_a_forked_process_is_refused_with_the_way_out(two_gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    for device in ("cuda", "cuda:0", "auto"):
        with pytest.raises(ValueError, match=r"forked process.*spawn"):
            resolve_device(device)
    with pytest.raises(ValueError, match=r"forked process.*spawn"):
        check_fork("cuda")
    check_fork("cpu")
    assert resolve_device("cpu").type == "cpu"


def test_models_that_came_along_into_a_forked_process_say_so(two_gpus, monkeypatch):
    """Their weights are on the GPU of the process that was forked; here their device says so."""
    from textgym.models.actor_critic import ActorCritic
    from textgym.rewards.models.reward_model import RewardModel

    policy, reward = ActorCritic.from_pretrained("tiny"), RewardModel.from_pretrained("tiny")
    observation = {"input_ids": torch.ones(4, dtype=torch.long), "attention_mask": torch.ones(4, dtype=torch.long)}
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    for kind in (ActorCritic, RewardModel):
        monkeypatch.setattr(kind, "device", property(lambda self: torch.device("cuda", 0)))
    with pytest.raises(ValueError, match=r"forked process.*spawn"):
        policy.act(observation)
    with pytest.raises(ValueError, match=r"forked process.*spawn"):
        reward(["The film"], [" is a joy."])


def test_a_generator_goes_on_where_it_was():
    generator = torch.Generator().manual_seed(3)
    saved = generator_state(generator)
    drawn = torch.randint(2**31, (8,), generator=generator)

    restore_generator(generator, saved)

    assert saved["kind"] == "cpu"
    assert torch.equal(torch.randint(2**31, (8,), generator=generator), drawn)


def test_a_state_of_another_kind_of_device_seeds_a_stream_of_its_own():
    """16 bytes are what a CUDA generator saves."""
    states = [torch.full((16,), byte, dtype=torch.uint8) for byte in (0, 0, 255)]
    drawn = []
    for state in states:
        generator = torch.Generator()
        restore_generator(generator, {"kind": "cuda", "state": state})
        drawn.append(torch.randint(2**31, (8,), generator=generator))

    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
