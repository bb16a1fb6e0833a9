"""Exit statuses, and the translation of out-of-memory errors."""

import pickle

import pytest
import torch

from cifar_ignite.errors import (
    InputError,
    NonFiniteError,
    TrainingError,
    TrainingInterrupted,
    first_line,
    translate_missing_operators,
    translate_oom_errors,
)


def test_errors_have_their_exit_status():
    assert InputError("x").status == 2
    assert TrainingError("x").status == NonFiniteError("x").status == 1
    assert TrainingInterrupted("x", 143).status == 143


def test_errors_are_reported_by_all_ranks_until_ranks_agree():
    for error in (InputError("x"), TrainingError("x"), TrainingInterrupted("x", 130)):
        assert error.should_report is None
    assert not TrainingError("x").peer_lost


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nA second line"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError(
            "MPS backend out of memory (MPS allocated: 9.05 GB, max allowed: 9.07 GB). Tried to allocate 1 GB."
        ),
        RuntimeError("Invalid buffer size: 12.00 GiB"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_translate_oom_errors_names_cause_and_fix_in_one_line(error):
    with pytest.raises(TrainingError, match="^out of memory") as raised, translate_oom_errors():
        raise error
    assert str(error).split("\n")[0] in str(raised.value)
    assert all(key in str(raised.value) for key in ("data.batch_size", "model.width", "data.image_size"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), RuntimeError(), ValueError("out of memory")])
def test_translate_oom_errors_lets_other_errors_through(error):
    with pytest.raises(type(error)) as raised, translate_oom_errors():
        raise error
    assert raised.value is error


def test_translate_missing_operators_names_operator_and_fix_in_one_line():
    message = (
        "The operator 'aten::heaviside.out' is not currently implemented for the MPS device. If you want this op to be "
        "considered for addition, please comment on an issue. As a temporary fix, you can set an environment variable."
    )
    with pytest.raises(TrainingError) as raised, translate_missing_operators():
        raise NotImplementedError(message)
    assert str(raised.value).startswith("aten::heaviside.out: ")
    assert "PYTORCH_ENABLE_MPS_FALLBACK=1" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_translate_missing_operators_lets_other_errors_through():
    with pytest.raises(NotImplementedError, match="^abstract$"), translate_missing_operators():
        raise NotImplementedError("abstract")


def test_training_interrupted_survives_pickling():
    """As in a benchmark whose runs are processes."""
    error = pickle.loads(pickle.dumps(TrainingInterrupted("stopped by SIGINT", 130)))
    assert (str(error), error.status) == ("stopped by SIGINT", 130)


def test_first_line_skips_empty_lines():
    assert first_line(ValueError("\n  first \nsecond")) == "first"


def test_first_line_of_empty_message_is_type():
    assert first_line(ValueError()) == "ValueError"
