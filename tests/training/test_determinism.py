"""Operators of training and validation: none has results on a GPU that depend on the order of its threads.

The list is that of `torch.use_deterministic_algorithms`. It is checked on a CPU, where the backward pass runs as well.
"""

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cifar_ignite.config_io import load_config
from tests.helpers import REPOSITORY
from tests.training.helpers import CPU_OVERRIDES

train_command = importlib.import_module("cifar_ignite.train")  # cifar_ignite.train is the function
CONFIGS = sorted(path.stem for path in (REPOSITORY / "configs").glob("*.json") if path.stem != "schema")
# Operators that add with atomic operations on a GPU; sums of integers do not depend on their order.
NONDETERMINISTIC_FOR_FLOATS = {"cumsum", "index_add", "put", "scatter_add", "scatter_reduce", "histc", "bincount"}
NONDETERMINISTIC = {
    "_adaptive_avg_pool2d_backward",
    "adaptive_max_pool2d_backward",
    "avg_pool3d_backward",
    "embedding_dense_backward",
    "fractional_max_pool2d_backward",
    "grid_sampler_2d_backward",
    "index_copy",
    "median",
    "nll_loss2d_backward",
    "nll_loss2d_forward",
    "reflection_pad2d_backward",
    "replication_pad2d_backward",
    "scatter.src",
    "upsample_bicubic2d_backward",
    "upsample_bilinear2d_backward",
}


class NondeterministicOperators(TorchDispatchMode):
    """Records the names of all operators, and those whose results may differ from run to run on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        name = "scatter.src" if name == "scatter" and func._overloadname == "src" else name
        self.names.add(name)
        has_floats = any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in tree_leaves((args, kwargs)))
        # index_put adds where accumulate, its fourth argument, is true; otherwise, indices must not repeat.
        is_sum = name == "index_put" and len(args) > 3 and args[3]
        if name in NONDETERMINISTIC or (has_floats and (is_sum or name in NONDETERMINISTIC_FOR_FLOATS)):
            self.found.add(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("blank_figures")
@pytest.mark.parametrize("recipe", CONFIGS)
def test_training_has_no_nondeterministic_operators(tmp_path, recipe):
    config = load_config(REPOSITORY / "configs" / f"{recipe}.json", [*CPU_OVERRIDES, f"output_dir={tmp_path}"])
    with NondeterministicOperators() as operators:
        train_command.train(config)
    assert {"convolution_backward", "native_batch_norm_backward", "_fused_sgd"} <= operators.names
    assert operators.found == set()


@pytest.mark.parametrize(
    ("name", "compute"),
    [
        ("_adaptive_avg_pool2d_backward", lambda x: F.adaptive_avg_pool2d(x, 2)),
        ("grid_sampler_2d_backward", lambda x: F.grid_sample(x, torch.zeros(1, 4, 4, 2), align_corners=False)),
        ("reflection_pad2d_backward", lambda x: F.pad(x, [1] * 4, mode="reflect")),
        ("index_put", lambda x: x[torch.tensor([0, 0])]),
        ("index_add", lambda x: x.index_select(0, torch.tensor([0, 0]))),
        ("cumsum", lambda x: x.cumsum(0)),
        ("scatter_add", lambda x: x.gather(0, torch.zeros(1, 1, 1, 1, dtype=torch.long))),
    ],
)
def test_check_notices_nondeterministic_operator(name, compute):
    images = torch.rand(1, 3, 8, 8, requires_grad=True)
    with NondeterministicOperators() as operators:
        compute(images).sum().backward()
    assert operators.found == {name}


def test_check_accepts_sums_of_integers():
    with NondeterministicOperators() as operators:
        torch.zeros(3, dtype=torch.long).scatter_add_(0, torch.tensor([1, 1]), torch.tensor([2, 3])).cumsum(0)
    assert operators.found == set()
