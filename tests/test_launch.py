"""What the environment tells about the other processes of a job."""

import subprocess

import pytest
from conftest import REPOSITORY

from cifar_ignite.config import InputError
from cifar_ignite.launch import Launch, is_first_on_machine, read_launch

TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}
SLURM = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_JOB_ID": "7"}


@pytest.mark.parametrize(
    ("environment", "launch"),
    [
        ({}, None),
        (TORCHRUN, Launch(3, 1, 4)),
        (TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "2"}, Launch(3, 1, 4, 2)),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, Launch(0, 0, 1)),
        (SLURM, Launch(3, 1, 4)),
        # A plain command within a job of several tasks, in its batch script say, is no step of it.
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, None),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),
        # torchrun within a step of SLURM
        (SLURM | {"SLURM_PROCID": "0"} | TORCHRUN, Launch(3, 1, 4)),
        # Somebody's own variable
        ({"RANK": "colonel"}, None),
    ],
)
def test_the_environment_tells_the_place(environment, launch):
    assert read_launch(environment) == launch


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"WORLD_SIZE": "2"},
            "RANK, LOCAL_RANK: not set, but WORLD_SIZE is; start the processes with torchrun or srun",
        ),
        (TORCHRUN | {"RANK": "x"}, "RANK, LOCAL_RANK, WORLD_SIZE: expected whole numbers"),
        (TORCHRUN | {"RANK": "4"}, "RANK, LOCAL_RANK, WORLD_SIZE: 1 <= 4 < 4 does not hold"),
    ],
)
def test_an_environment_that_cannot_be_is_refused(environment, message):
    with pytest.raises(InputError, match=message):
        read_launch(environment)


def test_one_process_of_a_machine_tells_what_all_find(command, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert not is_first_on_machine()
    assert command("train", "--config", "nowhere.json") == (2, "", "")
    assert command("train", "--confg", "nowhere.json") == (2, "", "")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert command("train", "--config", "nowhere.json")[2].count("\n") == 1


def test_a_contradiction_is_one_line(command, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, err = command("train", "--config", "nowhere.json")
    assert status == 2
    assert err.startswith("cifar_ignite: RANK, LOCAL_RANK: not set")


def make(*arguments):
    return subprocess.run(["make", *arguments], cwd=REPOSITORY, capture_output=True, text=True)


@pytest.mark.parametrize("target", ["train", "evaluate"])
def test_make_starts_as_many_processes_as_asked_for(target):
    shown = make("-n", target, "NPROC=2").stdout
    assert "n='2'" in shown
    assert '-m torch.distributed.run --standalone --nproc_per_node="$n" -m cifar_ignite ' + target in shown
    assert "torch.distributed" not in make("-n", target).stdout


@pytest.mark.parametrize("count", ["0", "-1", "two", "2x", "1.5", "2; echo oh", "'"])
def test_make_refuses_what_is_no_number_of_processes(count):
    done = make("train", f"NPROC={count}")
    assert done.returncode == 2
    assert f"cifar_ignite: NPROC: expected a whole number from 1 on, got {count}\n" in done.stderr
    assert "Traceback" not in done.stderr
