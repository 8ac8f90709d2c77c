"""One thread, no network: what every test runs under."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: an unknown name fails at once, with no request
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

from textgym.data import sources

torch.set_num_threads(1)  # two collapse when another process runs


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("data") is None:
        return
    archive = sources.cache_dir() / "downloads" / sources.VADER.filename
    if not archive.exists():
        pytest.skip(f"needs {archive}, which `textgym demo` fetches")
