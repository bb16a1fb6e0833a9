"""Distributed runs: one result, one report, one end."""

import dataclasses
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta

import ignite.distributed as idist
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch.distributed import TCPStore
from torch.distributed import run as torchrun

from benchmarks import forked_jobs
from cifar_ignite.checkpointing import savers
from cifar_ignite.checkpointing.io import load_checkpoint
from cifar_ignite.data import DATASETS, cifar_files, file_dataset
from cifar_ignite.data.dataset import train_val_split
from cifar_ignite.data.loaders import EvalLoader
from cifar_ignite.data.registry import load_dataset
from cifar_ignite.distributed.env import DistEnv
from cifar_ignite.distributed.process_group import (
    distributed_context,
    report_missing_ranks,
    translate_connection_errors,
)
from cifar_ignite.errors import InputError, TrainingError
from cifar_ignite.evaluation.inference import create_inference_forward, run_inference
from cifar_ignite.evaluation.trained_model import load_trained_model
from cifar_ignite.models import create_model
from cifar_ignite.training import calibration
from cifar_ignite.training.calibration import fit_temperature
from cifar_ignite.training.engines import create_evaluator
from cifar_ignite.training.forward import create_forward, create_tta_forward
from cifar_ignite.training.metrics import attach_metrics
from tests.distributed.helpers import TIMEOUT
from tests.helpers import REPOSITORY, assert_same_training, only_run
from tests.helpers.images import write_photos
from tests.helpers.runs import call_at_iteration, latest_checkpoint, raise_disk_full, send_signal, set_options

CPU = torch.device("cpu")
train_module = importlib.import_module("cifar_ignite.train")  # cifar_ignite.train is the function
# 2 epochs of 4 iterations.
OPTIONS = {"train.epochs": 2, "train.patience": 4, "train.ema_decay": 0.8}
RESUME = ("--resume", "latest")
pytestmark = pytest.mark.usefixtures("blank_figures")


@pytest.fixture
def train(tiny_file):
    """A function that returns the words of a train command with further overrides."""
    return lambda **options: ["train", "--config", tiny_file, *set_options(OPTIONS | options)]


@pytest.fixture(scope="module")
def uninterrupted_output(tmp_path_factory):
    return tmp_path_factory.mktemp("uninterrupted")


@pytest.fixture
def uninterrupted(job, train, uninterrupted_output):
    """Directory of an uninterrupted run of two ranks, which is made once."""
    if not list(uninterrupted_output.iterdir()):
        statuses, log = job(train(output_dir=uninterrupted_output))
        assert statuses == [0, 0], log
        (uninterrupted_output / "log").write_text(log)
    return next((uninterrupted_output / "training_runs").iterdir())


def test_several_processes_on_apple_gpu_are_refused():
    with (
        pytest.raises(InputError, match=r"^device: 2 processes .*device=cpu"),
        distributed_context(torch.device("mps"), DistEnv(world_size=2)),
    ):
        pass


def current_rank():
    return int(os.environ.get("RANK", "0"))


# --- The context --------------------------------------------------------------------------------------------------


def test_context_of_single_process_joins_nothing():
    with distributed_context(CPU, DistEnv()) as context:
        assert not torch.distributed.is_initialized()
        assert (context.env, context.cpu_group) == (DistEnv(), None)
        assert context.duplicate_signal_window == 0


@pytest.mark.parametrize("has_joined", [False, True])
def test_missing_ranks_are_reported(monkeypatch, caplog, has_joined):
    """With the number of ranks that have joined, and the variable that makes this process one of several."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if has_joined else None
    monkeypatch.setenv("MASTER_PORT", str(store.port if store else 1))
    with report_missing_ranks(DistEnv(0, 0, 3), after=timedelta(seconds=0.5)):
        for _ in range(100):
            if caplog.messages:
                break
            time.sleep(0.05)
    (message,) = caplog.messages
    assert f"{int(has_joined)} of 3 processes" in message
    assert "unset " in message


def test_ranks_that_join_in_time_are_not_reported(monkeypatch, caplog):
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with report_missing_ranks(DistEnv(0, 0, 2), after=timedelta(seconds=0.3)):
        pass
    time.sleep(0.5)
    assert caplog.messages == []


def test_more_processes_than_gpus_are_refused_once(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    reports = []
    for local_rank in (1, 2):
        with (
            pytest.raises(InputError, match=r"^device: more processes than GPUs \(1\)") as caught,
            distributed_context(torch.device("cuda"), DistEnv(local_rank, local_rank, 3)),
        ):
            pass
        reports.append(caught.value.should_report)
    assert reports == [True, False]


def test_broken_connection_names_first_line_of_cause(monkeypatch):
    monkeypatch.setattr(idist, "get_world_size", lambda: 2)
    with (
        pytest.raises(TrainingError, match=r"\(NCCL error: Duplicate GPU detected\)$") as caught,
        translate_connection_errors(),
    ):
        raise RuntimeError("NCCL error: Duplicate GPU detected\nlong trace")
    assert caught.value.peer_lost


def test_connection_errors_of_single_process_are_not_translated():
    with pytest.raises(RuntimeError, match="^no connection$"), translate_connection_errors():
        raise RuntimeError("no connection")


# --- One result ---------------------------------------------------------------------------------------------------


def test_only_rank_0_writes_and_logs(uninterrupted, uninterrupted_output):
    log = (uninterrupted_output / "log").read_text()
    for line in ("device      cpu, ", "world size 2", "run         ", "epoch 1/2", "done after epoch 2"):
        assert log.count(line) == 1, line
    assert (uninterrupted / "logs" / "training.log").read_text().count("epoch 2/2") == 1
    assert len(list((uninterrupted_output / "training_runs").iterdir())) == 1
    assert len(list((uninterrupted / "logs" / "tensorboard").iterdir())) == 1
    assert pd.read_csv(uninterrupted / "logs" / "metrics.csv")["epoch"].tolist() == [1, 2]
    assert not list(uninterrupted.rglob("*.tmp"))


def test_saved_validation_metrics_are_those_of_saved_model(uninterrupted, tiny_config):
    """Both ranks validate with the BatchNorm statistics that rank 0 saves."""
    checkpoint, config = load_checkpoint(latest_checkpoint(uninterrupted)), tiny_config()
    model = create_model(num_classes=10, **config.model.model_dump())
    model.load_state_dict(checkpoint["ema"])
    _, val_set = train_val_split(load_dataset(config.data, train=True), config.data.val_size, config.data.split_seed)
    evaluator = create_evaluator(model, create_forward(model, CPU, torch.float32))
    attach_metrics(evaluator, F.cross_entropy, CPU)
    metrics = evaluator.run(EvalLoader(val_set, batch_size=32, augment=config.augment)).metrics
    last_epoch = checkpoint["record"].history[-1]
    assert metrics["accuracy"] == last_epoch["val_acc"]
    assert metrics["loss"] == pytest.approx(last_epoch["val_loss"], rel=1e-2)  # bf16 if the CPU has it


def test_temperatures_of_two_ranks_are_those_of_one_process(uninterrupted):
    """Fitted on the logits of all validation images, which the ranks share."""
    (path,) = (uninterrupted / "checkpoints").glob("best_epoch_*.pth")
    trained = load_trained_model(path, None)
    data, forward = trained.config.data, create_inference_forward(trained)
    _, val_set = train_val_split(load_dataset(data, train=True), data.val_size, data.split_seed)
    temperatures = load_checkpoint(path)["temperatures"]
    assert temperatures.keys() == {"plain", "flip", "shift"}
    for name, temperature in temperatures.items():
        predict = forward if name == "plain" else create_tta_forward(forward, name)
        logits, _ = run_inference(trained, predict, val_set)
        assert temperature == pytest.approx(fit_temperature(logits, val_set.labels), rel=1e-6), name


@pytest.fixture(scope="module")
def observed_output(tmp_path_factory):
    return tmp_path_factory.mktemp("observed")


@pytest.fixture
def observed(job, train, observed_output, monkeypatch):
    """Directory of a run of two ranks, made once, with what each rank noted: its views of images, its result."""
    if list(observed_output.iterdir()):
        return observed_output
    create_tta_forward, load_cifar10 = calibration.create_tta_forward, DATASETS["cifar10"]
    train_function = train_module.train

    def count_images(forward, tta):
        predict, file = create_tta_forward(forward, tta), observed_output / f"{tta}_{current_rank()}"
        file.touch()

        def count(images):
            file.write_text(f"{file.read_text()}{len(images)} ")
            return predict(images)

        return count

    def write_result(**options):
        result = train_function(**options)
        (observed_output / f"result_{current_rank()}").write_text(f"{result}\n{result.history.to_csv()}")

    def download_slowly(config, **options):
        marker = observed_output / "downloaded"
        if current_rank() == 0:
            time.sleep(0.5)
            marker.touch()
        (observed_output / f"found_{current_rank()}").write_text(str(marker.exists()))
        return load_cifar10(config, **options)

    monkeypatch.setattr(calibration, "create_tta_forward", count_images)
    monkeypatch.setattr(train_module, "train", write_result)
    monkeypatch.setitem(DATASETS, "cifar10", download_slowly)
    statuses, log = job(train(**{"train.epochs": 1, "data.batch_size": 8, "output_dir": observed_output / "outputs"}))
    assert statuses == [0, 0], log
    return observed_output


def test_validation_images_with_tta_are_shared_by_the_ranks(observed):
    """One rank that predicts all of them would let the others wait until they give up."""
    val_size = json.loads((only_run(observed) / "config.json").read_text())["data"]["val_size"]
    for tta in ("flip", "shift"):
        counts = [sum(map(int, (observed / f"{tta}_{rank}").read_text().split())) for rank in range(2)]
        assert sum(counts) == val_size
        assert min(counts) > 0


def test_dataset_is_loaded_by_local_rank_0_first(observed):
    """The other ranks find what it has downloaded."""
    assert [(observed / f"found_{rank}").read_text() for rank in range(2)] == ["True", "True"]


def test_train_returns_the_same_result_on_all_ranks(observed):
    first, second = ((observed / f"result_{rank}").read_text() for rank in range(2))
    assert str(only_run(observed) / "checkpoints" / "best_epoch_0001.pth") in first
    assert [line.split(",")[:6] for line in first.splitlines()] == [line.split(",")[:6] for line in second.splitlines()]


@pytest.mark.parametrize(
    ("function", "rank", "error"),
    [
        ("load_checkpoint", 0, InputError("damaged")),
        ("_predict", 1, RuntimeError("no memory")),
        ("save_checkpoint", 0, OSError(28, "No space left on device")),
    ],
)
def test_temperatures_that_one_rank_fails_to_add_end_no_run(job, train, tmp_path, monkeypatch, function, rank, error):
    original = getattr(calibration, function)

    def fail(*arguments):
        if current_rank() == rank:
            raise error
        return original(*arguments)

    monkeypatch.setattr(calibration, function, fail)
    statuses, log = job(train(**{"train.epochs": 1}))
    assert statuses == [0, 0], log
    assert log.count("no temperatures with test-time augmentation (") == 1, log
    (path,) = (only_run(tmp_path) / "checkpoints").glob("best_epoch_*.pth")
    assert load_checkpoint(path)["temperatures"].keys() == {"plain"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Options of a run on a folder of images."""
    root = write_photos(tmp_path_factory.mktemp("photos"), {"train": 8, "test": 2})
    return {"train.epochs": 1, "data.dataset": "folder", "data.root": root, "data.image_size": 32, "data.val_size": 6}


def test_image_files_are_decoded_by_all_ranks_at_once(job, train, tmp_path, monkeypatch, photos):
    """Ranks that take turns would wait longer than the timeout of a collective for a large folder."""
    original = file_dataset.load_images

    def load(files, size):
        name = files[0].parent.parent.name
        (tmp_path / f"{name}_{current_rank()}").touch()
        for _ in range(200):
            if (tmp_path / f"{name}_{1 - current_rank()}").exists():
                return original(files, size)
            time.sleep(0.05)
        raise InputError("the other rank does not decode")

    monkeypatch.setattr(file_dataset, "load_images", load)
    for words in (train(**photos), ["evaluate", "--set", f"output_dir={tmp_path / 'outputs'}"]):
        statuses, log = job(words)
        assert statuses == [0, 0], log


@pytest.mark.parametrize("failing", [{0}, {1}, {0, 1}], ids=str)
def test_files_that_are_not_decoded_end_all_ranks_and_are_reported_once(job, train, monkeypatch, photos, failing):
    original = file_dataset.load_images

    def load(files, size):
        if current_rank() in failing:
            raise InputError("photos: unreadable")
        return original(files, size)

    monkeypatch.setattr(file_dataset, "load_images", load)
    statuses, log = job(train(**photos))
    assert 2 in statuses
    assert set(statuses) <= {1, 2}
    assert log.count("cifar_ignite: ") == 1, log
    assert "photos: unreadable" in log


@pytest.mark.usefixtures("uninterrupted")
def test_evaluation_by_two_ranks_equals_that_by_one(command, job, uninterrupted_output, tmp_path):
    shutil.copytree(uninterrupted_output, tmp_path / "outputs")
    evaluations, words = tmp_path / "outputs" / "evaluations", ["evaluate", "--tta", "shift"]
    assert command(*words)[0] == 0
    (single,) = evaluations.iterdir()
    statuses, log = job(words)
    assert statuses == [0, 0], log
    (distributed,) = set(evaluations.iterdir()) - {single}
    for name in ("predictions.csv", "predictions_tta_shift.csv", "confusion_matrix.png"):
        assert (single / name).read_bytes() == (distributed / name).read_bytes()
    metrics, distributed_metrics = (
        json.loads((directory / "metrics.json").read_text()) for directory in (single, distributed)
    )
    environments = [each.pop("environment") for each in (metrics, distributed_metrics)]
    assert metrics == distributed_metrics
    assert [environment["world_size"] for environment in environments] == [1, 2]


# --- One end ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("receiver", "iteration"), [(0, 6), (1, 4)])  # 4 is the last iteration of its epoch
def test_signal_to_one_rank_stops_all_and_any_world_size_resumes(
    job, train, tmp_path, uninterrupted, receiver, iteration
):
    attach = call_at_iteration(iteration, lambda: send_signal() if current_rank() == receiver else None)
    statuses, log = job(train(), attach=attach)
    assert statuses == [143, 143], log
    assert log.count("cifar_ignite: ") == 1
    assert f"cifar_ignite: stopped by SIGTERM after epoch {(iteration - 1) // 4}, iteration {iteration}; " in log
    metrics = load_checkpoint(only_run(tmp_path) / "checkpoints" / f"latest_{iteration:09d}.pt")["metrics"]
    for metric in metrics.values():
        ((state,),) = metric.values()
        assert state["_num_examples"] == {6: 64, 4: 100}[iteration]
    shutil.copytree(tmp_path / "outputs", tmp_path / "copy")
    statuses, log = job([*train(), *RESUME])
    assert statuses == [0, 0], log
    assert_same_training(uninterrupted, only_run(tmp_path))
    if receiver:
        return
    # One and three processes resume too; they share the images differently, and so compute other BatchNorm statistics.
    expected = pd.read_csv(uninterrupted / "logs" / "metrics.csv")
    for world_size in (1, 3):
        shutil.rmtree(tmp_path / "outputs")
        shutil.copytree(tmp_path / "copy", tmp_path / "outputs")
        statuses, log = job([*train(), *RESUME], world_size)
        assert statuses == [0] * world_size, log
        table = pd.read_csv(only_run(tmp_path) / "logs" / "metrics.csv")
        assert table["epoch"].tolist() == [1, 2]
        assert table["lr"].tolist() == expected["lr"].tolist()
        assert table["train_loss"][0] == expected["train_loss"][0]


def test_run_of_three_ranks_resumes_bit_identically(job, train, tmp_path):
    """A sum over three ranks depends on the layout of DDP's buckets, which changes after the first backward pass."""
    words = train(**{"model.width": 8})
    statuses, log = job([*words, *set_options({"output_dir": tmp_path / "uninterrupted"})], 3)
    assert statuses == [0] * 3, log
    statuses, log = job(words, 3, attach=call_at_iteration(6, send_signal))
    assert statuses == [143] * 3, log
    statuses, log = job([*words, *RESUME], 3)
    assert statuses == [0] * 3, log
    (uninterrupted,) = (tmp_path / "uninterrupted" / "training_runs").iterdir()
    assert_same_training(uninterrupted, only_run(tmp_path))


@pytest.mark.parametrize("killed", [0, 1])
def test_killed_rank_ends_all_and_resume_is_bit_identical(job, train, tmp_path, uninterrupted, killed):
    """The job whose rank 1 is killed is resumed in the test of torchrun's restart."""
    attach = call_at_iteration(7, lambda: send_signal(signal.SIGKILL) if current_rank() == killed else None)
    started = time.monotonic()
    statuses, log = job(train(**{"train.save_every_seconds": 0}), attach=attach)
    assert time.monotonic() - started < TIMEOUT / 2
    assert sorted(statuses) == [-9, 1]
    # The store that decides which rank reports is on rank 0.
    assert log.count("cifar_ignite: ") == killed
    if killed:
        assert "another process of this run exited" in log
        assert "latest_000000006.pt" in log
        return
    statuses, log = job([*train(), *RESUME])
    assert statuses == [0, 0], log
    assert_same_training(uninterrupted, only_run(tmp_path))


def test_full_disk_ends_all_ranks(job, train, monkeypatch):
    monkeypatch.setattr(savers, "save_checkpoint", raise_disk_full)
    statuses, log = job(train(**{"train.max_save_failures": 0}))
    assert statuses == [1, 1], log
    assert log.count("cifar_ignite: ") == 1
    assert "No space left on device" in log


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data.root": "nowhere"}, "CIFAR-10"),
        ({"data.dataset": "mnist"}, "data.dataset: unknown dataset 'mnist'"),
        ({"data.batch_size": 1}, "data.batch_size: 1 images cannot be split over 2 processes"),
        ({"train.sync_batch_norm": "true"}, "train.sync_batch_norm: requires GPUs"),
        ({"output_dir": "tiny.json"}, "output_dir: cannot write to"),
        ({"device": "cuda"}, "device: torch finds no CUDA GPU"),
    ],
    ids=str,
)
def test_invalid_input_is_reported_once(job, train, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cifar_files, "download_and_extract_archive", raise_disk_full)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    statuses, log = job(train(**options))
    assert 2 in statuses
    assert set(statuses) <= {1, 2}  # 1: because the other one exited
    assert log.count("cifar_ignite: ") == 1, log
    assert message in log
    assert "Traceback" not in log


@pytest.mark.parametrize(
    ("function", "error", "status", "message"),
    [
        ("create_loaders", MemoryError(), 1, "out of memory (MemoryError)"),
        ("resolve_resume", InputError("latest.pt: damaged"), 2, "latest.pt: damaged"),
    ],
)
def test_failure_of_one_rank_ends_all_and_is_reported_once(job, train, monkeypatch, function, error, status, message):
    original = getattr(train_module, function)

    def fail(*arguments):
        if current_rank() == 1:
            raise error
        return original(*arguments) if function == "create_loaders" else None

    monkeypatch.setattr(train_module, function, fail)
    statuses, log = job([*train(), *(RESUME if status == 2 else ())])
    assert statuses == [1, status], log
    assert log.count("cifar_ignite: ") == 1, log
    assert message in log


def test_ranks_that_loaded_different_images_are_refused(job, train, tmp_path, monkeypatch):
    """One training image differs in one value on rank 1."""
    original = train_module.load_splits

    def load(*arguments):
        train_set, val_set = original(*arguments)
        train_set.images[0, 0, 0, 0] ^= current_rank()
        return train_set, val_set

    monkeypatch.setattr(train_module, "load_splits", load)
    statuses, log = job(train())
    assert statuses == [2, 2], log
    assert log.count("cifar_ignite: ") == 1, log
    assert "data.root: the ranks loaded different images" in log
    assert not (tmp_path / "outputs").exists()


# --- Launchers ----------------------------------------------------------------------------------------------------


def test_slurm_starts_ranks(train, tmp_path):
    """As srun does, without RANK and MASTER_ADDR."""
    log = tmp_path / "srun.log"
    environ = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_NUM_NODES": "1",
    }
    words = [str(word) for word in train(**{"train.epochs": 1})]
    pids = [
        forked_jobs.start_process(words, log, environ=environ | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)})
        for rank in range(2)
    ]
    assert [forked_jobs.wait(pid, TIMEOUT) for pid in pids] == [0, 0], log.read_text()
    assert log.read_text().count("world size 2") == 1
    assert log.read_text().count("done after epoch 1") == 1


def test_torchrun_trains_as_forked_ranks_do(train, tmp_path, uninterrupted):
    """The command that users type; the other tests save the time in which its processes import torch."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "cifar_ignite"]
    environ = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *torchrun, *map(str, train())], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_training(uninterrupted, only_run(tmp_path))


def test_job_restarted_by_torchrun_resumes_its_own_run(train, tmp_path, uninterrupted, monkeypatch):
    """Rank 1 is killed once. After training, the same processes join again to evaluate.

    torchrun's own program, but its workers are forked: five processes that import torch would take long.
    """
    output_dir, log = tmp_path / "outputs", tmp_path / "torchrun.log"
    # A later run of the same experiment that is not this job's.
    other = output_dir / "training_runs" / "other"
    shutil.copytree(uninterrupted, other)
    elastic_launch, run_command = torchrun.elastic_launch, forked_jobs.run_command

    def kill_once():
        if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
            send_signal(signal.SIGKILL)

    def run_rank(*words):
        evaluate = ["evaluate", "--set", f"output_dir={output_dir}"]
        sys.exit(run_command(words, attach=call_at_iteration(7, kill_once)) or run_command(evaluate))

    def launch(config, entrypoint):
        assert entrypoint == "program"
        return elastic_launch(dataclasses.replace(config, start_method="fork"), run_rank)

    monkeypatch.setattr(torchrun, "elastic_launch", launch)
    monkeypatch.setattr(forked_jobs, "run_command", lambda words: torchrun.main(words) or 0)
    words = map(str, train(**{"train.save_every_seconds": 0}))
    options = ["--standalone", "--nproc_per_node=2", "--max-restarts=1", "--no-python", "program"]
    pid = forked_jobs.start_process([*options, *words], log)
    status, out = forked_jobs.wait(pid, 2 * TIMEOUT), log.read_text()
    assert status == 0, out
    assert "restarted by torchrun (1): resuming " in out
    assert "resuming after epoch 1, iteration 6, from " in out
    assert out.count("test accuracy") == 1
    (run_dir,) = set((output_dir / "training_runs").iterdir()) - {other}
    assert_same_training(uninterrupted, run_dir)
    assert json.loads((run_dir / "config.json").read_text())["train"]["ema_decay"] == 0.8
