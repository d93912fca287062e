"""What SLURM says, read. The texts are what a real SLURM 22.05 printed."""

from collections.abc import Callable

import pytest

from launch.slurm import client
from trainer.errors import WorldError

JOB = """JobId=7 JobName=samecurve
   JobState=RUNNING Reason=None Dependency=(null)
   RunTime=00:00:00 TimeLimit=02:00:00 TimeMin=N/A
   StartTime=2026-11-21T10:14:31 EndTime=2026-11-21T12:14:31 Deadline=N/A
   NodeList=n[1-2]
     {nodes}
   Command=/tmp/a b/slurm/train.sh --config digits
   StdOut=/tmp/a b/out-7.log
"""
ENV = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_CPUS_PER_NODE": "16(x2)"}
Answer = Callable[[str], None]


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Answer:
    """scontrol, as far as these tests need it; tests/test_slurm_train.py asks the real one."""

    def scontrol(nodes: str) -> None:
        def call(*argv: str) -> str:
            if argv[2] != "hostnames":
                return JOB.format(nodes=nodes)
            return "n1\nn2\n" if argv[3] in ("n[1-2]", "n1,n2") else f"{argv[3]}\n"

        monkeypatch.setattr(client, "call_patiently", call)

    return scontrol


def test_counts_of_nodes_are_read() -> None:
    assert client.counts("16(x2)") == [16, 16] and client.counts("16,8(x3)") == [16, 8, 8, 8]
    with pytest.raises(client.SlurmError, match="is not a list of counts"):
        client.counts("16(")


def test_what_a_job_was_given(answer: Answer) -> None:
    answer("Nodes=n[1-2] CPU_IDs=0-15 Mem=128000 GRES=gpu:h100:8(IDX:0-7)")
    given = client.allocation(ENV | {"SLURM_NTASKS_PER_NODE": "4"})
    assert (given.job_id, given.number, given.nodes) == ("7", 7, ("n1", "n2"))
    assert (given.gpus_per_node, given.cpus_per_node, given.tasks_per_node) == (8, 16, 4)
    assert given.ranks_per_node == 8 and given.array_task is None and given.log == "/tmp/a b/out-7.log"
    assert given.end_time is not None


def test_a_task_of_an_array_is_not_the_whole_array(answer: Answer) -> None:
    answer("Nodes=n[1-2] CPU_IDs=0-15 Mem=128000 GRES=")
    given = client.allocation(ENV | {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"})
    assert given.job_id == "7_3" and given.array_task == 3 and given.ranks_per_node == 1


def test_nodes_that_differ_are_refused(answer: Answer) -> None:
    answer("Nodes=n1 CPU_IDs=0 Mem=1 GRES=gpu:2(IDX:0-1)\n     Nodes=n2 CPU_IDs=0 Mem=1 GRES=gpu:1(IDX:0)")
    with pytest.raises(WorldError, match=r"different numbers of GPUs \(n1: 2, n2: 1\).*--gpus-per-node"):
        client.allocation(ENV)
    answer("Nodes=n1,n2 CPU_IDs=0-15 Mem=128000 GRES=")
    with pytest.raises(WorldError, match=r"different numbers of CPU cores \(n1: 16, n2: 8\)"):
        client.allocation(ENV | {"SLURM_JOB_CPUS_PER_NODE": "16,8"})
    with pytest.raises(WorldError, match="heterogeneous"):
        client.allocation(ENV | {"SLURM_HET_SIZE": "2"})


def test_outside_of_a_job_there_is_nothing(answer: Answer) -> None:
    with pytest.raises(client.SlurmError, match="this is not a SLURM job"):
        client.allocation({})


def test_a_command_that_is_not_there_is_told() -> None:
    with pytest.raises(client.SlurmError, match="no-such-sbatch is not on this machine"):
        client.call("no-such-sbatch")
    with pytest.raises(client.SlurmError, match="exit code 3"):
        client.call("bash", "-c", "exit 3")
    # What sbatch 22.05 prints where it is installed and nothing says which cluster this is.
    text = (
        "sbatch: error: fetch_config: DNS SRV lookup failed\nsbatch: fatal: Could not establish a configuration source"
    )
    with pytest.raises(
        client.SlurmError, match=r"^bash knows of no cluster from this machine; run this on a SLURM"
    ) as told:
        client.call("bash", "-c", f"echo '{text}' >&2; exit 1")
    assert "\n" not in str(told.value)


def test_a_controller_that_is_away_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = ["slurm_load_jobs error: Unable to contact slurm controller", "Socket timed out on send/recv", ""]

    def call(*argv: str, timeout_seconds: float) -> str:
        if problem := answers.pop(0):
            raise client.SlurmError(problem)
        return "well"

    monkeypatch.setattr(client, "call", call)
    monkeypatch.setattr(client, "_RETRY_SECONDS", 0.0)
    assert client.call_with_retry("scontrol", "requeue", "7") == "well" and not answers
    answers.append("Requested operation is presently disabled")
    with pytest.raises(client.SlurmError, match="presently disabled"):
        client.call_with_retry("scontrol", "requeue", "7")
