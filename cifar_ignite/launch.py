"""Which of how many processes this is, as torchrun or SLURM tell it in the environment.

Without torch, which takes seconds to import: it is asked before anything else.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from cifar_ignite.config import InputError

# As torchrun names them, and as SLURM's srun does.
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
SLURM = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")


@dataclass(frozen=True)
class Launch:
    """One of the processes that train together.

    Attributes:
        rank: its number among all, from 0.
        local_rank: its number among those of its machine.
        processes: how many there are.
        restarts: how often torchrun has started all of them anew.
    """

    rank: int
    local_rank: int
    processes: int
    restarts: int = 0


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """The launch that this process belongs to; None for a process on its own.

    Variables of a SLURM job alone do not count: within `salloc` or a batch script, a plain command is on its own.

    Raises:
        InputError: the variables are incomplete or contradict each other.
    """
    several = environment.get("WORLD_SIZE", "1") != "1"
    if several or ("RANK" in environment and "WORLD_SIZE" in environment):
        names = TORCHRUN
    elif environment.get(SLURM[2], "1") != "1":
        names = SLURM
    else:
        return None
    if missing := [name for name in names if name not in environment]:
        raise InputError(f"{', '.join(missing)}: not set, but {names[2]} is; start the processes with torchrun or srun")
    try:
        rank, local_rank, processes = (int(environment[name]) for name in names)
        launch = Launch(rank, local_rank, processes, int(environment.get("TORCHELASTIC_RESTART_COUNT", "0")))
    except ValueError as error:
        raise InputError(f"{', '.join(names)}: expected whole numbers ({error})") from None
    if not 0 <= local_rank <= rank < processes:
        raise InputError(f"{', '.join(names)}: {local_rank} <= {rank} < {processes} does not hold")
    return launch


def is_first_on_machine() -> bool:
    """Whether this process speaks for its machine in what all of its processes find alike, such as a wrong option."""
    try:
        launch = read_launch()
    except InputError:
        return True
    return launch is None or launch.local_rank == 0
