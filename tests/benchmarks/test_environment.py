"""The environment of a result."""

import os

import torch

from benchmarks.environment import current_commit, device_name, peak_memory


def test_current_commit_without_git_is_unknown(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert current_commit() == "unknown"


def test_device_name_of_the_cpu_counts_cores():
    assert device_name(torch.device("cpu")) == f"{os.cpu_count()} CPU cores"


def test_peak_memory_is_in_bytes():
    assert 10**7 < peak_memory() < 10**12
