from __future__ import annotations

import pytest

from runmgr import ranks
from runmgr.errors import AgreementError

SLURM = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize(
    ("environ", "rank", "world_size", "local_rank"),
    [
        ({}, 0, 1, 0),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, 5, 8, 1),
        (SLURM, 3, 4, 1),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, 1, 2, 1),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, 1, 2, 0),
        (SLURM | {"WORLD_SIZE": "4"}, 3, 4, 1),
        (SLURM | {"RANK": "0", "WORLD_SIZE": "1"}, 0, 1, 0),
        ({"WORLD_SIZE": "1"}, 0, 1, 0),
    ],
    ids=["alone", "torchrun", "srun", "openmpi", "pmi", "world size exported in sbatch", "torchrun in a step", "one"],
)
def test_the_first_complete_pair_says_who_this_is(environ, rank, world_size, local_rank):
    found = ranks.from_environment(environ)
    assert (found.rank, found.world_size, found.local_rank) == (rank, world_size, local_rank)
    assert found.is_main is (rank == 0)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE=8 is set but RANK is not"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK=4 and WORLD_SIZE=4 contradict each other"),
        ({"RANK": "-1", "WORLD_SIZE": "4"}, "contradict"),
        ({"RANK": "zero", "WORLD_SIZE": "4"}, "RANK='zero' is not a whole number"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID is not"),
    ],
)
def test_half_an_environment_is_an_error_and_never_a_guess(environ, message):
    with pytest.raises(AgreementError, match=message):
        ranks.from_environment(environ)


def test_the_agents_store_is_used_only_under_torchrun():
    address = {"MASTER_ADDR": "host", "MASTER_PORT": "29400"}
    assert ranks.agent_store_address(address) is None
    assert ranks.agent_store_address(address | {"TORCHELASTIC_USE_AGENT_STORE": "True"}) == ("host", 29400)


@pytest.mark.parametrize(("given", "expected"), [("", None), ("none", None), ("job-7", "job-7")])
def test_a_launch_is_named_by_the_user_or_not_at_all(given, expected):
    assert ranks.launch_id({"RUNMGR_LAUNCH_ID": given}) == expected
    assert ranks.launch_id({"TORCHELASTIC_RUN_ID": "always-the-same"}) is None


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": ""}, None),
        ({"SLURM_JOB_ID": "7"}, ("7", 0, "batch")),
        ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2", "SLURM_CLUSTER_NAME": "c"}, ("c-7", 2, "batch")),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "3"}, ("7", 0, "3")),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "4294967290"}, ("7", 0, "batch")),
    ],
    ids=["no job", "empty", "script", "requeued", "step of srun", "shell of salloc"],
)
def test_a_place_in_a_slurm_job(environ, expected):
    assert ranks.slurm_start(environ) == expected


def test_a_count_of_requeues_that_is_no_number_is_an_error():
    with pytest.raises(AgreementError, match="SLURM_RESTART_COUNT='x'"):
        ranks.slurm_start({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "x"})
