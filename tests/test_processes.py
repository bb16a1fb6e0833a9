"""Several processes train one model as one would: on the CPU, forked, since importing torch takes long."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import ignite.distributed as idist
import pandas as pd
import pytest
import torch
from conftest import REPOSITORY, assert_same_training, the_run
from ignite.engine import Events
from torch import nn

from benchmarks import faults
from cifar_ignite import checkpoints, handlers, processes, signals, train, trained
from cifar_ignite.augment import create_augment
from cifar_ignite.checkpoints import load_checkpoint
from cifar_ignite.config import AugmentConfig, InputError, RunFailedError
from cifar_ignite.data import Images
from cifar_ignite.engines import create_evaluator, create_forward, weigh
from cifar_ignite.handlers import attach_metrics
from cifar_ignite.loader import EvalLoader, TrainLoader, part_of
from cifar_ignite.models import create_model

CPU = torch.device("cpu")
MEAN, STD = (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)
SEED = torch.Generator().manual_seed(0)
IMAGES = torch.randint(0, 256, (90, 3, 32, 32), dtype=torch.uint8, generator=SEED)
LABELS = torch.randint(0, 10, (90,), generator=SEED)
OPTIONS = {"train.epochs": 3, "train.patience": 4, "train.ema_decay": 0.8}
SECONDS = 60


def arguments(file, **changes):
    words = [word for key, value in (OPTIONS | changes).items() for word in ("--set", f"{key}={value}")]
    return ["train", "--config", str(file), *words]


@pytest.fixture
def job(tmp_path):
    """Run a command in several processes: returns the exit status of each, and all that they printed."""
    log = tmp_path / "job.log"

    def run(words, count=2):
        log.write_text("")
        pids = faults.start_job([str(word) for word in words], log, count)
        statuses = [faults.wait(pid, SECONDS) for pid in pids]
        for pid, status in zip(pids, statuses, strict=True):
            if status is None:
                os.kill(pid, signal.SIGKILL)
        return statuses, log.read_text()

    return run


@pytest.fixture
def compute(job, tmp_path, monkeypatch):
    """Call a function in several processes that have joined: returns what each of them returned."""

    def run(work, count=2):
        def command(_):
            with processes.joined(CPU) as launch:
                torch.save(work(), tmp_path / f"result{launch.rank}.pt")
            return 0

        with monkeypatch.context() as patched:
            patched.setattr(faults, "run_command", command)
            statuses, log = job([], count)
        assert statuses == [0] * count, log
        return [torch.load(tmp_path / f"result{rank}.pt") for rank in range(count)]

    return run


def rank():
    return int(os.environ.get("RANK", "0"))


def at_iteration(monkeypatch, iteration, call):
    """Have every process call a function in the middle of an iteration of its training."""
    original = handlers.attach_stop

    def attach(trainer, *rest):
        trainer.add_event_handler(Events.ITERATION_STARTED(once=iteration), lambda: call())
        original(trainer, *rest)

    monkeypatch.setattr(handlers, "attach_stop", attach)


# --- The same batches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_parts_of_a_batch_cover_it_and_differ_by_one_image_at_most(processes):
    for count in range(20):
        parts = [range(count)[part_of(count, one, processes)] for one in range(processes)]
        assert [row for part in parts for row in part] == list(range(count))
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert sizes == sorted(sizes, reverse=True)


def train_loader(rank=0, processes=1, batch_size=16, **options):
    augment = create_augment(AugmentConfig(**options), 10, 2)
    return TrainLoader(IMAGES, LABELS, batch_size=batch_size, seed=5, augment=augment, rank=rank, processes=processes)


@pytest.mark.parametrize(
    ("count", "batch_size", "options"),
    [
        (2, 16, {}),  # the last batch has 10 images
        (2, 15, {"cutmix_p": 1.0}),
        (3, 89, {"cutmix_p": 0.0, "mixup_p": 1.0}),  # the last batch has 1 image
        (4, 22, {"trivial_augment": "wide", "crop_padding": 4, "flip_mode": "alternating", "cutout_size": 8}),
    ],
)
def test_the_batches_of_all_processes_together_are_those_of_one(count, batch_size, options):
    """Bit for bit, over two epochs, uneven last batches and images that mix with their neighbours included."""
    whole = train_loader(batch_size=batch_size, **options)
    expected = [batch for _ in range(2) for batch in whole]
    loaders = [train_loader(one, count, batch_size, **options) for one in range(count)]
    parts = [[(*batch, loader.weight) for _ in range(2) for batch in loader] for loader in loaders]
    assert len(expected) == 2 * len(whole)
    for (images, targets), *shares in zip(expected, *parts, strict=True):
        assert torch.equal(torch.cat([share[0] for share in shares]), images)
        assert torch.equal(torch.cat([share[1] for share in shares]), targets)
        weights = [share[2] for share in shares]
        assert weights == pytest.approx([len(share[0]) * count / len(images) for share in shares])
        assert sum(weights) == pytest.approx(count)


def test_what_is_drawn_after_augmentation_differs_between_processes_and_repeats():
    def draws(rank, processes):
        loader = train_loader(rank, processes)
        return torch.stack([torch.rand(3) for _ in loader])

    first, second = draws(0, 2), draws(1, 2)
    assert not torch.eq(first, second).any()
    assert len(first.flatten().unique()) == first.numel()
    assert torch.equal(first, draws(0, 2))
    resumed = train_loader(1, 2)
    resumed.iteration = 3
    assert torch.equal(torch.stack([torch.rand(3) for _ in resumed]), second[3:])


@pytest.mark.parametrize("count", [2, 3, 4])
def test_processes_take_turns_at_whole_batches_of_evaluation(count):
    whole = list(EvalLoader(IMAGES, LABELS, batch_size=20, mean=MEAN, std=STD))
    loaders = [
        EvalLoader(IMAGES, LABELS, batch_size=20, mean=MEAN, std=STD, rank=one, processes=count) for one in range(count)
    ]
    assert {len(loader) for loader in loaders} == {-(-5 // count)}
    turns = [batch for turn in zip(*loaders, strict=True) for batch in turn]
    assert all(len(images) == 0 for images, _ in turns[5:])
    for (images, labels), (expected, expected_labels) in zip(turns[:5], whole, strict=True):
        assert torch.equal(images, expected)
        assert torch.equal(labels, expected_labels)


# --- The same gradients and metrics -------------------------------------------------------------------------------


def plain_net():
    """No BatchNorm, no dropout: nothing depends on who computes it with whom."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 10))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_gradients_are_those_of_one_process(compute, dtype, tolerance):
    """But for rounding, in every batch of two epochs; the last has one image, of which one process has none."""
    loss_fn = nn.CrossEntropyLoss(label_smoothing=0.1)

    def gradients(loader, forward, model, loss):
        for _ in range(2):
            for images, targets in loader:
                model.zero_grad()
                loss(forward(images.to(dtype)), targets.to(dtype)).backward()
                yield torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    def work():
        model, loader = plain_net().to(dtype), train_loader(rank(), 2, 89)
        forward = processes.wrap(model, model, CPU, sync_batch_norm=False)
        return list(gradients(loader, forward, model, weigh(loss_fn, lambda: loader.weight)))

    first, second = compute(work)
    model = plain_net().to(dtype)
    expected = list(gradients(train_loader(batch_size=89), model, model, loss_fn))
    assert len(expected) == len(first) == 4
    for one, other, wanted in zip(first, second, expected, strict=True):
        assert torch.equal(one, other)
        assert (one - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("count", [2, 3])
def test_validation_metrics_are_exactly_those_of_one_process(compute, count):
    """Also where batches are uneven and a process has none in the last turn."""

    def metrics(rank=0, processes=1):
        torch.manual_seed(2)
        model = create_model(num_classes=10, name="hybrid_resnet", width=2)
        evaluator = create_evaluator(model, create_forward(model, CPU, torch.float32))
        attach_metrics(evaluator, nn.functional.cross_entropy, CPU)
        loader = EvalLoader(IMAGES, LABELS, batch_size=13, mean=MEAN, std=STD, rank=rank, processes=processes)
        return evaluator.run(loader).metrics

    expected = metrics()
    assert compute(lambda: metrics(rank(), count), count) == [expected] * count


def test_evaluation_is_exactly_that_of_one_process(command, job, tiny_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command("train", "--config", tiny_file)[0] == 0
    folders = []
    for run in (lambda words: command(*words)[0], lambda words: job(words)[0]):
        assert run(["evaluate", "--tta", "shift", "--set", f"output_dir={tmp_path / 'outputs'}"]) in (0, [0, 0])
        (folder,) = set((tmp_path / "outputs" / "evaluations").iterdir()) - set(folders)
        folders.append(folder)
    for name in ("metrics.json", "predictions.csv", "predictions_tta_shift.csv", "confusion_matrix.png"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


@pytest.mark.parametrize("wanted", [False, True])
def test_batch_norm_is_synchronised_if_asked_for(monkeypatch, wanted):
    """Torch has it for GPUs alone, so here only what is asked of Ignite."""
    asked = {}
    monkeypatch.setattr(processes.idist, "auto_model", lambda module, **options: asked.update(options))
    processes.wrap(plain_net(), plain_net(), CPU, sync_batch_norm=wanted)
    assert asked["sync_bn"] == wanted


# --- A run --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    return tmp_path_factory.mktemp("straight")


@pytest.fixture
def straight(job, tiny_file, once):
    """The run folder of an undisturbed run of two processes."""
    if not list(once.iterdir()):
        statuses, log = job(arguments(tiny_file, output_dir=once))
        assert statuses == [0, 0], log
        (once / "log").write_text(log)
    return next((once / "training_runs").iterdir())


def test_one_process_writes_and_tells(straight, once):
    log = (once / "log").read_text()
    for line in ("2 processes, each on cpu", "run folder ", "epoch 1/3", "done after epoch 3"):
        assert log.count(line) == 1
    assert (straight / "logs" / "training.log").read_text().count("epoch 3/3") == 1
    assert len(list((once / "training_runs").iterdir())) == 1
    assert len(list((straight / "logs" / "tensorboard").iterdir())) == 1
    assert pd.read_csv(straight / "logs" / "metrics.csv")["epoch"].tolist() == [1, 2, 3]
    assert not list(Path(straight).rglob("*.tmp"))


def test_saved_validation_metrics_are_those_of_the_saved_model(straight, tiny_config, tmp_path):
    """The statistics of BatchNorm that both processes validated with are those that the first one saved."""
    from cifar_ignite.data import load_images, split_images

    state = load_checkpoint(max((straight / "checkpoints").glob("latest_*.pt")))
    config = tiny_config()
    model = create_model(num_classes=10, **config.model.model_dump())
    model.load_state_dict(state["ema"])
    _, val = split_images(config.data, load_images(config.data, train=True))
    evaluator = create_evaluator(model, create_forward(model, CPU, torch.float32))
    attach_metrics(evaluator, nn.functional.cross_entropy, CPU)
    augment = config.augment
    evaluator.run(EvalLoader(val.images, val.labels, batch_size=32, mean=augment.mean, std=augment.std))
    row = state["record"].history[-1]
    assert evaluator.state.metrics["accuracy"] == row["val_acc"]
    assert evaluator.state.metrics["loss"] == pytest.approx(row["val_loss"], rel=1e-2)  # bf16 where the CPU has it


@pytest.mark.parametrize("iteration", [6, 8])
@pytest.mark.parametrize("signalled", [0, 1])
def test_a_signal_to_one_stops_all_and_any_number_goes_on(
    job, command, tiny_file, tmp_path, monkeypatch, straight, signalled, iteration
):
    """Iteration 8 is the last of its epoch."""
    with monkeypatch.context() as patched:
        at_iteration(patched, iteration, lambda: os.kill(os.getpid(), signal.SIGTERM) if rank() == signalled else None)
        statuses, log = job(arguments(tiny_file))
    assert statuses == [143, 143]
    assert log.count("cifar_ignite: ") == 1
    assert f"cifar_ignite: stopped by SIGTERM after epoch {(iteration - 1) // 4}, iteration {iteration}; " in log
    (path,) = (the_run(tmp_path) / "checkpoints").glob(f"latest_{iteration:09d}.pt")
    counted = load_checkpoint(path)["metrics"]
    for metric in counted.values():
        ((state,),) = metric.values()
        assert state["_num_examples"] == {6: 64, 8: 100}[iteration]
    shutil.copytree(tmp_path / "outputs", tmp_path / "copy")
    resume = [*arguments(tiny_file), "--resume", "latest"]
    statuses, log = job(resume)
    assert statuses == [0, 0], log
    assert_same_training(straight, the_run(tmp_path))
    if signalled:
        return
    # One process and three go on too; how they share the images, and so the statistics of BatchNorm, is another.
    for count in (1, 3):
        shutil.rmtree(tmp_path / "outputs")
        shutil.copytree(tmp_path / "copy", tmp_path / "outputs")
        statuses, log = job(resume, count)
        assert statuses == [0] * count, log
        table = pd.read_csv(the_run(tmp_path) / "logs" / "metrics.csv")
        assert table["epoch"].tolist() == [1, 2, 3]
        before = pd.read_csv(straight / "logs" / "metrics.csv")
        assert table["lr"].tolist() == before["lr"].tolist()
        assert table["train_loss"][0] == before["train_loss"][0] or iteration == 8


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_is_killed_ends_all_and_resuming_is_exact(
    job, tiny_file, tmp_path, monkeypatch, straight, killed
):
    with monkeypatch.context() as patched:
        at_iteration(patched, 7, lambda: os.kill(os.getpid(), signal.SIGKILL) if rank() == killed else None)
        began = time.monotonic()
        statuses, log = job(arguments(tiny_file, **{"train.save_every_seconds": 0}))
    assert time.monotonic() - began < SECONDS / 2
    assert sorted(statuses) == [-9, 1]
    assert log.count("cifar_ignite: ") == (0 if killed == 0 else 1)  # the store that says who tells went with the first
    if killed:
        assert "another process of this run has ended" in log
        assert "latest_000000006.pt" in log
    statuses, log = job([*arguments(tiny_file), "--resume", "latest"])
    assert statuses == [0, 0], log
    assert_same_training(straight, the_run(tmp_path))


def test_a_failing_disk_ends_all(job, tiny_file, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.torch, "save", fail)
    monkeypatch.setattr(processes, "_write_images", lambda path, parts: _save(path, parts))
    statuses, log = job(arguments(tiny_file, **{"train.save_failures_allowed": 0}))
    assert statuses == [1, 1], log
    assert log.count("cifar_ignite: ") == 1
    assert "No space left on device" in log


_torch_save = torch.save


def _save(path, parts):
    _torch_save([vars(images) for images in parts], path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.root": "nowhere/{missing}"}, "data"),
        ({"data.batch_size": 1}, "data.batch_size: 1 images cannot be shared by 2 processes"),
        ({"train.sync_batch_norm": "true"}, "train.sync_batch_norm: works between GPUs only"),
        ({"output_dir": "{file}"}, "output_dir: cannot write into"),
        ({"device": "cuda"}, "device: no CUDA GPU"),
    ],
    ids=str,
)
def test_bad_input_is_told_once(job, tiny_file, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr("cifar_ignite.data.download_and_extract_archive", _no_network)
    changes = {key: str(value).format(file=tiny_file, missing=tmp_path.name) for key, value in changes.items()}
    statuses, log = job(arguments(tiny_file, **changes))
    assert 2 in statuses
    assert set(statuses) <= {1, 2}  # 1: the other one has ended
    assert log.count("cifar_ignite: ") == 1, log
    assert message in log
    assert "Traceback" not in log


@pytest.mark.parametrize(
    ("part", "error", "status", "message"),
    [
        ("create_loaders", MemoryError(), 1, "out of memory (MemoryError)"),
        ("find_resumed", InputError("latest.pt: damaged"), 2, "latest.pt: damaged"),
    ],
)
def test_what_one_process_alone_cannot_do_ends_all_and_is_told(
    job, tiny_file, monkeypatch, part, error, status, message
):
    original = getattr(train, part)

    def fail(*arguments):
        if os.environ["RANK"] == "1":
            raise error
        return original(*arguments) if part == "create_loaders" else None

    monkeypatch.setattr(train, part, fail)
    statuses, log = job([*arguments(tiny_file), "--resume", "latest"] if status == 2 else arguments(tiny_file))
    assert statuses == [1, status], log
    assert log.count("cifar_ignite: ") == 1, log
    assert message in log


def _no_network(*_, **__):
    raise OSError("no network")


def test_more_processes_than_gpus_are_refused(monkeypatch):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with (
        pytest.raises(InputError, match=r"device: more processes than GPUs \(1\) on this machine") as caught,
        processes.joined(torch.device("cuda")),
    ):
        pass
    assert caught.value.is_first  # one tells, and the third would not


def test_slurm_starts_processes_too(tiny_file, tmp_path):
    """As srun does: no RANK, no MASTER_ADDR."""
    log = tmp_path / "srun.log"
    job = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_NUM_NODES": "1",
    }
    words = arguments(tiny_file, **{"train.epochs": 1})
    pids = [
        faults.start(words, log, environment=job | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)})
        for task in range(2)
    ]
    assert [faults.wait(pid, SECONDS) for pid in pids] == [0, 0], log.read_text()
    assert log.read_text().count("2 processes, each on cpu") == 1
    assert log.read_text().count("done after epoch 1") == 1


def test_a_signal_that_comes_twice_at_once_counts_once(monkeypatch):
    """To all processes of a group, and passed on by torchrun; one that is meant comes later."""
    exits, now = [], [0.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(signals.os, "_exit", exits.append)
    flag = signals.StopFlag(agree=int)
    flag.look()
    flag.signum = int(signal.SIGINT)  # another process got one, and all have agreed
    for moment, exited in [(5, 0), (5.2, 0), (6.5, 1)]:
        now[0] = moment
        flag.on_signal(signal.SIGTERM, None)
        assert len(exits) == exited
    with pytest.raises(signals.StopRequested):
        flag.look()
    assert flag.signum == signal.SIGINT


# --- Shared memory ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
def test_images_lie_in_memory_once(compute, tmp_path):
    """The share of each process in the pages of the mapped file (PSS) is half of them."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (4000, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.arange(4000) % 10

    def work():
        loaded = []

        def load():
            loaded.append(rank())
            return [Images(images, labels, list(range(4000)), ("a", "b"))]

        (shared,) = processes.load_once(load)
        same = torch.equal(shared.images, images) and torch.equal(shared.labels, labels)
        processes.agree(0)  # all have looked at all pages
        kilobytes = {"Rss": 0, "Pss": 0}
        inside = False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            name, _, value = line.partition(":")
            inside = "cifar_ignite-" in line if "-" in name.split()[0] else inside
            if inside and name in kilobytes:
                kilobytes[name] += int(value.split()[0])
        processes.agree(0)
        return same, shared.class_names, loaded, kilobytes

    results = compute(work)
    assert [result[:3] for result in results] == [(True, ("a", "b"), [0]), (True, ("a", "b"), [])]
    for *_, kilobytes in results:
        assert kilobytes["Rss"] >= 12_000
        assert kilobytes["Pss"] <= 0.6 * kilobytes["Rss"]


# --- torchrun itself ----------------------------------------------------------------------------------------------

KILLED_ONCE = """
import os, signal, sys
from ignite.engine import Events
from cifar_ignite import handlers
from cifar_ignite.__main__ import main

original = handlers.attach_stop

def attach(trainer, *rest):
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        trainer.add_event_handler(Events.ITERATION_STARTED(once=7), lambda: os.kill(os.getpid(), signal.SIGKILL))
    original(trainer, *rest)

handlers.attach_stop = attach
sys.exit(main(sys.argv[2:]) or main(["evaluate", "--set", "output_dir=" + sys.argv[1]]))
"""


def test_torchrun_restarts_a_killed_job_which_goes_on_with_its_own_run(tiny_file, tmp_path, straight):
    script = tmp_path / "killed_once.py"
    script.write_text(KILLED_ONCE)
    # A newer run of the same experiment that is not this job's.
    shutil.copytree(straight, tmp_path / "outputs" / "training_runs" / "other")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    words = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "--max-restarts=1",
        str(script),
        str(tmp_path / "outputs"),
    ]
    words += arguments(tiny_file, **{"train.save_every_seconds": 0})
    with (tmp_path / "torchrun.log").open("wb") as log:
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, *words],
            environment,
            file_actions=[(os.POSIX_SPAWN_DUP2, log.fileno(), 1), (os.POSIX_SPAWN_DUP2, log.fileno(), 2)],
        )
        status = faults.wait(pid, 2 * SECONDS)
    told = (tmp_path / "torchrun.log").read_text()
    assert status == 0, told
    assert "started anew by torchrun (1): going on with " in told
    assert "resuming after epoch 1, iteration 6, from " in told
    (run_dir,) = set((tmp_path / "outputs" / "training_runs").iterdir()) - {
        tmp_path / "outputs" / "training_runs" / "other"
    }
    assert_same_training(straight, run_dir)
    assert json.loads((run_dir / "config.json").read_text())["train"]["epochs"] == 3
    assert told.count("test accuracy") == 1


def test_what_broke_a_connection_is_told(monkeypatch):
    monkeypatch.setattr(idist, "get_world_size", lambda: 2)
    told = r"another process .* \(NCCL error: Duplicate GPU detected\)$"
    with pytest.raises(RunFailedError, match=told), processes.noticing_lost_processes():
        raise RuntimeError("NCCL error: Duplicate GPU detected\nlong trace")


def test_a_process_on_its_own_has_lost_nobody():
    with pytest.raises(RuntimeError, match="no connection"), processes.noticing_lost_processes():
        raise RuntimeError("no connection in this word")


def test_weights_wait_on_the_cpu_until_a_process_knows_its_gpu(command, tiny_file, tmp_path, monkeypatch):
    assert command("train", "--config", tiny_file)[0] == 0
    monkeypatch.setattr(trained, "select_device", lambda name: torch.device("cuda"))
    loaded = trained.load_trained(None, None)
    assert loaded.device.type == "cuda"
    assert all(parameter.device.type == "cpu" for parameter in loaded.model.parameters())
