"""The environments that launchers give their processes, and what is made of them."""

import pytest

from bitfleet.launch.cluster.places import (
    FIRST_PORT,
    LOOPBACK,
    NUM_PORTS,
    Place,
    first_host,
    place_from,
    rank_of,
    tasks_of_node,
)


def variables(text: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in text.split())


TORCHRUN = variables(
    "RANK=5 LOCAL_RANK=1 GROUP_RANK=1 ROLE_RANK=5 ROLE_NAME=default LOCAL_WORLD_SIZE=4 WORLD_SIZE=8 GROUP_WORLD_SIZE=2 "
    "ROLE_WORLD_SIZE=8 MASTER_ADDR=node1 MASTER_PORT=29400 TORCHELASTIC_RESTART_COUNT=0 TORCHELASTIC_MAX_RESTARTS=0 "
    "TORCHELASTIC_RUN_ID=none TORCHELASTIC_USE_AGENT_STORE=True"
)
DEEPSPEED = variables(
    "MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 WORLD_SIZE=4 CROSS_RANK=1 CROSS_SIZE=2 LOCAL_SIZE=2 RANK=2 LOCAL_RANK=0"
)
# srun --nodes=2 --ntasks-per-node=4 --gpus-per-node=4, task 6 (srun(1), OUTPUT ENVIRONMENT
# VARIABLES)
SRUN = variables(
    "SLURM_JOB_ID=4711 SLURM_STEP_ID=0 SLURM_PROCID=6 SLURM_LOCALID=2 SLURM_NODEID=1 SLURM_NTASKS=8 SLURM_NNODES=2 "
    "SLURM_STEP_NUM_TASKS=8 SLURM_STEP_NUM_NODES=2 SLURM_STEP_TASKS_PER_NODE=4(x2) SLURM_NTASKS_PER_NODE=4 "
    "SLURM_JOB_NODELIST=gpu[003-004] SLURM_STEP_NODELIST=gpu[003-004] SLURM_LAUNCH_NODE_IPADDR=10.9.9.9 "
    "SLURM_GPUS_ON_NODE=4 SLURM_TASKS_PER_NODE=4(x2) SLURMD_NODENAME=gpu004"
)
# What the batch script itself has, before srun.
BATCH = variables("SLURM_JOB_ID=4711 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_NTASKS=8 SLURM_NNODES=2")
OPEN_MPI = variables(  # recorded from Open MPI 4.1.4: mpirun -n 2
    "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=2 "
    "OMPI_COMM_WORLD_NODE_RANK=1 OMPI_MCA_orte_ess_num_procs=2 PMIX_RANK=1 PMIX_NAMESPACE=317849601"
)
HYDRA = variables("PMI_RANK=3 PMI_SIZE=4 PMI_FD=9 MPI_LOCALRANKID=1 MPI_LOCALNRANKS=2")
POD = variables("JOB_COMPLETION_INDEX=1 HOSTNAME=bitfleet-1")


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (TORCHRUN, Place("torchrun", 5, 8, 1, 4, "node1", 29400)),
        (DEEPSPEED, Place("deepspeed", 2, 4, 0, 2, "10.0.0.1", 29500)),
        (HYDRA | {"MASTER_ADDR": "node1"}, Place("mpirun", 3, 4, 1, 2, "node1", 29500)),
        (variables("RANK=1 WORLD_SIZE=2 MASTER_ADDR=node1"), Place("by hand", 1, 2, 0, 1, "node1", 29500)),
        (variables("RANK=1 WORLD_SIZE=2 MASTER_ADDR=localhost"), Place("by hand", 1, 2, 1, 2, "localhost", 29500)),
        (variables("RANK=1 WORLD_SIZE=2 LOCAL_WORLD_SIZE=2"), Place("by hand", 1, 2, 1, 2, LOOPBACK, 29500)),
        (variables("RANK=0 WORLD_SIZE=1"), Place("by hand", 0, 1, 0, 1, LOOPBACK, None)),
        (variables("WORLD_SIZE=1"), Place("alone", 0, 1, 0, 1, LOOPBACK, None)),
        ({}, Place("alone", 0, 1, 0, 1, LOOPBACK, None)),
        (BATCH, Place("alone", 0, 1, 0, 1, LOOPBACK, None)),
        (POD, Place("alone", 0, 1, 0, 1, LOOPBACK, None)),
        (
            POD | variables("WORLD_SIZE=4 MASTER_ADDR=bitfleet-0.bitfleet MASTER_PORT=29500"),
            Place("kubernetes", 1, 4, 0, 1, "bitfleet-0.bitfleet", 29500),
        ),
        # A launcher inside another: the inner one started this process.
        (SRUN | TORCHRUN, Place("torchrun", 5, 8, 1, 4, "node1", 29400)),
        (SRUN | DEEPSPEED, Place("deepspeed", 2, 4, 0, 2, "10.0.0.1", 29500)),
        (POD | TORCHRUN, Place("torchrun", 5, 8, 1, 4, "node1", 29400)),
        (SRUN | HYDRA | {"MASTER_ADDR": "node1"}, Place("mpirun", 3, 4, 1, 2, "node1", 29500)),
    ],
)
def test_place(environ: dict[str, str], expected: Place) -> None:
    assert place_from(environ) == expected


def test_srun_begins_at_the_first_host_of_the_step() -> None:
    place = place_from(SRUN)
    assert (place.launcher, place.rank, place.world_size, place.local_rank, place.local_world_size) == (
        "srun",
        6,
        8,
        2,
        4,
    )
    assert place.master_addr == "gpu003"
    assert place.master_port is not None
    assert FIRST_PORT <= place.master_port < FIRST_PORT + NUM_PORTS
    every_rank = [place_from(SRUN | {"SLURM_PROCID": str(rank)}).master_port for rank in range(8)]
    assert set(every_rank) == {place.master_port}
    others = {place_from(SRUN | change).master_port for change in ({"SLURM_JOB_ID": "4712"}, {"SLURM_STEP_ID": "1"})}
    assert len(others | {place.master_port}) == 3
    without = {key: value for key, value in SRUN.items() if not key.startswith("SLURM_STEP_NODELIST")}
    assert place_from(without | {"SLURM_JOB_NODELIST": "n7,gpu[003-004]"}).master_addr == "n7"
    nowhere = {key: value for key, value in SRUN.items() if "NODELIST" not in key}
    assert place_from(nowhere).master_addr == "10.9.9.9"


def test_srun_on_one_node_and_with_uneven_nodes() -> None:
    one = SRUN | variables("SLURM_STEP_NUM_TASKS=4 SLURM_PROCID=2 SLURM_STEP_NUM_NODES=1 SLURM_STEP_TASKS_PER_NODE=4")
    assert place_from(one | {"SLURM_NODEID": "0"}).master_addr == LOOPBACK
    uneven = SRUN | variables("SLURM_STEP_TASKS_PER_NODE=6,2 SLURM_LOCALID=0 SLURM_GPUS_ON_NODE=2")
    assert place_from(uneven).local_world_size == 2
    old = {key: value for key, value in SRUN.items() if not key.startswith("SLURM_STEP_T")}
    assert place_from(old).local_world_size == 4


def test_open_mpi_on_one_machine_has_a_port_of_its_own() -> None:
    place = place_from(OPEN_MPI)
    assert place == Place("mpirun", 1, 2, 1, 2, LOOPBACK, place.master_port)
    assert place.master_port not in (None, 29500, place_from(OPEN_MPI | {"PMIX_NAMESPACE": "2"}).master_port)


@pytest.mark.parametrize("environ", [SRUN, OPEN_MPI, TORCHRUN, DEEPSPEED])
def test_address_and_port_of_the_user_win(environ: dict[str, str]) -> None:
    place = place_from(environ | {"MASTER_ADDR": "ib0.node1", "MASTER_PORT": "1234"})
    assert (place.master_addr, place.master_port) == ("ib0.node1", 1234)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (variables("RANK=3 WORLD_SIZE=2 MASTER_ADDR=a"), "RANK is 3, but WORLD_SIZE is 2"),
        (variables("RANK=3"), "RANK is 3, but WORLD_SIZE is not set"),
        (variables("WORLD_SIZE=2"), "WORLD_SIZE is 2, but RANK is not set"),
        (variables("RANK=0 WORLD_SIZE=0"), "WORLD_SIZE is 0"),
        (variables("RANK=first WORLD_SIZE=2"), "RANK .*'first'"),
        (variables("RANK=-1 WORLD_SIZE=2"), "RANK .*'-1'"),
        (variables("RANK=1 WORLD_SIZE=2"), "RANK is 1 of 2 ranks .*MASTER_ADDR is not set"),
        (
            variables("RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 MASTER_ADDR=a LOCAL_WORLD_SIZE=1"),
            "LOCAL_RANK is 1, but LOCAL_WORLD",
        ),
        (
            variables("RANK=1 WORLD_SIZE=2 MASTER_ADDR=a LOCAL_WORLD_SIZE=4"),
            "LOCAL_WORLD_SIZE is 4, but there are 2 ranks",
        ),
        (DEEPSPEED | {"MASTER_PORT": "http"}, "MASTER_PORT .*'http'"),
        (TORCHRUN | {"MASTER_PORT": "70000"}, "MASTER_PORT .*'70000'"),
        (SRUN | {"WORLD_SIZE": "4"}, r"WORLD_SIZE is 4, but srun says 8 \(SLURM_STEP_NUM_TASKS\): unset WORLD_SIZE"),
        (SRUN | {"RANK": "0"}, r"RANK is 0, but srun says 6 \(SLURM_PROCID\): unset RANK"),
        (
            SRUN | {"SLURM_STEP_TASKS_PER_NODE": "1(x8)", "SLURM_LOCALID": "0"},
            "with 4 GPUs .* --ntasks-per-node=4 to srun",
        ),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "many"}, r"8\(x3\),4, not 'many'"),
        (
            OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
            "mpirun -x MASTER_ADDR=node1",
        ),
        (OPEN_MPI | {"WORLD_SIZE": "4"}, r"WORLD_SIZE is 4, but mpirun says 2 \(OMPI_COMM_WORLD_SIZE\)"),
        (variables("PMI_RANK=1 PMI_SIZE=2"), "PMI_LOCAL_RANK is not set"),
        (HYDRA, "PMI_RANK is 3 of 4 ranks .*MASTER_ADDR is not set"),
        (POD | variables("WORLD_SIZE=4"), "JOB_COMPLETION_INDEX is 1 of 4 ranks"),
        (POD | variables("WORLD_SIZE=1 MASTER_ADDR=a"), "JOB_COMPLETION_INDEX is 1, but WORLD_SIZE is 1"),
    ],
)
def test_contradictions_are_one_sentence(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        place_from(environ)


def test_one_task_on_several_gpus_can_be_meant() -> None:
    environ = SRUN | variables("SLURM_STEP_NUM_TASKS=2 SLURM_PROCID=1 SLURM_STEP_TASKS_PER_NODE=1(x2) SLURM_LOCALID=0")
    with pytest.raises(ValueError, match=r"LOCAL_WORLD_SIZE=1"):
        place_from(environ)
    assert place_from(environ | {"LOCAL_WORLD_SIZE": "1"}).local_world_size == 1


@pytest.mark.parametrize(
    ("environ", "rank"),
    [({}, 0), (SRUN, 6), (SRUN | {"RANK": "0"}, 6), ({"RANK": "3"}, 3), ({"RANK": "x"}, 0), (HYDRA, 3)],
)
def test_who_speaks_is_known_even_in_a_contradiction(environ: dict[str, str], rank: int) -> None:
    assert rank_of(environ) == rank


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu003", "gpu003"),
        ("gpu[003-007,9],login1", "gpu003"),
        ("login1,gpu[003-007]", "login1"),
        ("rack[2,4]-node", "rack2-node"),
        ("a-1.site.org,b", "a-1.site.org"),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize("nodes", ["", "[]", "r[1-2]n[3-4]"])
def test_host_lists_that_cannot_be_read(nodes: str) -> None:
    with pytest.raises(ValueError, match="MASTER_ADDR"):
        first_host(nodes)


def test_tasks_of_node() -> None:
    assert [tasks_of_node("8(x2),4", node) for node in range(3)] == [8, 8, 4]
    with pytest.raises(ValueError, match="SLURM_NODEID is 3, but .* has 3 nodes"):
        tasks_of_node("8(x2),4", 3)
