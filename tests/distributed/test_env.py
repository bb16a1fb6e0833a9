"""Rank and world size from environment variables."""

import pytest

from cifar_ignite.distributed.env import DistEnv, dist_env_from_environ, is_local_primary
from cifar_ignite.errors import InputError

TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}
SLURM = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_JOB_ID": "7"}


def test_dist_env_defaults_to_single_process():
    assert DistEnv() == DistEnv(rank=0, local_rank=0, world_size=1, restart_count=0)
    assert DistEnv().is_primary
    assert not DistEnv().is_distributed
    assert not DistEnv(1, 1, 2).is_primary
    assert DistEnv(1, 1, 2).is_distributed


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, DistEnv()),
        (TORCHRUN, DistEnv(3, 1, 4)),
        (TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "2"}, DistEnv(3, 1, 4, 2)),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, DistEnv()),
        (SLURM, DistEnv(3, 1, 4)),
        # A plain command inside a job of several tasks, for example in its batch script, is no step of the job.
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, DistEnv()),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, DistEnv()),
        # torchrun inside a step of SLURM
        (SLURM | {"SLURM_PROCID": "0"} | TORCHRUN, DistEnv(3, 1, 4)),
        # A variable of the user
        ({"RANK": "colonel"}, DistEnv()),
    ],
)
def test_dist_env_follows_torchrun_or_slurm(environ, expected):
    assert dist_env_from_environ(environ) == expected


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"WORLD_SIZE": "2"}, "^RANK, LOCAL_RANK: not set, although WORLD_SIZE is; .* torchrun or srun"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "^SLURM_PROCID, SLURM_LOCALID: not set"),
        (TORCHRUN | {"RANK": "x"}, "^RANK, LOCAL_RANK, WORLD_SIZE: expected integers"),
        (TORCHRUN | {"RANK": "4"}, "^RANK, LOCAL_RANK, WORLD_SIZE: expected 1 <= 4 < 4"),
    ],
)
def test_dist_env_refuses_contradictory_variables(environ, message):
    with pytest.raises(InputError, match=message):
        dist_env_from_environ(environ)


def test_one_process_per_machine_reports_invalid_input(command, monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert not is_local_primary()
    assert command("train", "--config", "missing.json") == (2, "", "")
    assert command("train", "--confg", "missing.json") == (2, "", "")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert command("train", "--config", "missing.json")[2].count("\n") == 1


def test_contradictory_variables_end_command_with_one_line(command, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, err = command("train", "--config", "missing.json")
    assert status == 2
    assert err.startswith("cifar_ignite: RANK, LOCAL_RANK: not set")
    assert err.count("\n") == 1
