"""Rank and world size of this process, from the environment variables of torchrun or SLURM.

Without torch, which takes seconds to import: the command line needs the rank before anything else.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from cifar_ignite.errors import InputError

TORCHRUN_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
SLURM_NAMES = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")


@dataclass(frozen=True)
class DistEnv:
    """Place of this process among all processes of a run.

    Attributes:
        rank: Rank of this process, from 0.
        local_rank: Rank among the processes on the same machine, from 0.
        world_size: Number of processes.
        restart_count: How often torchrun has restarted the processes.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    restart_count: int = 0

    @property
    def is_distributed(self) -> bool:
        return self.world_size > 1

    @property
    def is_primary(self) -> bool:
        return self.rank == 0


def dist_env_from_environ(environ: Mapping[str, str] = os.environ) -> DistEnv:
    """Return the place of this process; rank 0 of 1 unless torchrun or srun started it.

    Variables of a SLURM job alone do not count: a plain command inside `salloc` or a batch script is a single process.

    Raises:
        InputError: If variables are missing, malformed or contradictory.
    """
    if environ.get("WORLD_SIZE", "1") != "1" or ("RANK" in environ and "WORLD_SIZE" in environ):
        names = TORCHRUN_NAMES
    elif environ.get(SLURM_NAMES[2], "1") != "1":
        names = SLURM_NAMES
    else:
        return DistEnv()
    if missing := [name for name in names if name not in environ]:
        raise InputError(
            f"{', '.join(missing)}: not set, although {names[2]} is; start the processes with torchrun or srun"
        )
    try:
        rank, local_rank, world_size = (int(environ[name]) for name in names)
        restart_count = int(environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    except ValueError as error:
        raise InputError(f"{', '.join(names)}: expected integers ({error})") from None
    if not 0 <= local_rank <= rank < world_size:
        raise InputError(f"{', '.join(names)}: expected {local_rank} <= {rank} < {world_size}")
    return DistEnv(rank, local_rank, world_size, restart_count)


def is_local_primary() -> bool:
    """Return whether this process reports, for its machine, an error that all ranks find, such as a wrong option."""
    try:
        return dist_env_from_environ().local_rank == 0
    except InputError:
        return True
