"""Answers of SLURM's commands and their errors. The texts are the output of SLURM 22.05."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.slurm import client
from trainer.errors import ConfigError, WorldError

JOB = """JobId=7 JobName=samecurve
   JobState=RUNNING Reason=None Dependency=(null)
   RunTime=00:00:00 TimeLimit={limit} TimeMin=N/A
   StartTime=2026-11-21T10:14:31 EndTime=2026-11-21T12:14:31 Deadline=N/A
   NodeList=n[1-2]
     {nodes}
   Command=/tmp/a b/slurm/train.sh --config digits
   StdOut=/tmp/a b/out-7.log
"""
ENV = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_CPUS_PER_NODE": "16(x2)"}
SetNodes = Callable[..., None]


@pytest.fixture
def set_nodes(monkeypatch: pytest.MonkeyPatch) -> SetNodes:
    """Replaces scontrol by a fake that shows a job on given nodes; tests/slurm/test_train_job.py calls the real one."""

    def replace_scontrol(nodes: str, limit: str = "02:00:00") -> None:
        def scontrol(*argv: str) -> str:
            if argv[2] != "hostnames":
                return JOB.format(nodes=nodes, limit=limit)
            return "n1\nn2\n" if argv[3] in ("n[1-2]", "n1,n2") else f"{argv[3]}\n"

        monkeypatch.setattr(client, "call_with_retry", scontrol)

    return replace_scontrol


def test_parse_counts_reads_repeated_counts() -> None:
    assert client.parse_counts("16(x2)") == [16, 16] and client.parse_counts("16,8(x3)") == [16, 8, 8, 8]
    with pytest.raises(client.SlurmError, match=r"cannot read '16\(' as a list of counts"):
        client.parse_counts("16(")


def test_allocation_with_gpus(set_nodes: SetNodes) -> None:
    set_nodes("Nodes=n[1-2] CPU_IDs=0-15 Mem=128000 GRES=gpu:h100:8(IDX:0-7)")
    allocation = client.read_allocation(ENV | {"SLURM_NTASKS_PER_NODE": "4"})
    assert (allocation.job_id, allocation.job_number, allocation.nodes) == ("7", 7, ("n1", "n2"))
    assert (allocation.gpus_per_node, allocation.cpus_per_node, allocation.tasks_per_node) == (8, 16, 4)
    assert allocation.ranks_per_node == 8 and allocation.array_task is None and allocation.log == "/tmp/a b/out-7.log"
    assert allocation.end_time is not None


def test_allocation_without_time_limit_has_no_end_time(set_nodes: SetNodes) -> None:
    set_nodes("Nodes=n[1-2] CPU_IDs=0-15 Mem=128000 GRES=", limit="UNLIMITED")
    assert client.read_allocation(ENV).end_time is None


def test_allocation_of_array_task_has_the_id_of_the_task(set_nodes: SetNodes) -> None:
    set_nodes("Nodes=n[1-2] CPU_IDs=0-15 Mem=128000 GRES=")
    allocation = client.read_allocation(ENV | {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"})
    assert allocation.job_id == "7_3" and allocation.array_task == 3 and allocation.ranks_per_node == 1


def test_allocation_with_unequal_nodes_is_refused(set_nodes: SetNodes) -> None:
    set_nodes("Nodes=n1 CPU_IDs=0 Mem=1 GRES=gpu:2(IDX:0-1)\n     Nodes=n2 CPU_IDs=0 Mem=1 GRES=gpu:1(IDX:0)")
    with pytest.raises(WorldError, match=r"same number of GPUs, got n1: 2, n2: 1; request them with --gpus-per-node"):
        client.read_allocation(ENV)
    set_nodes("Nodes=n1,n2 CPU_IDs=0-15 Mem=128000 GRES=")
    with pytest.raises(WorldError, match=r"same number of CPU cores, got n1: 16, n2: 8; .*--cpus-per-task"):
        client.read_allocation(ENV | {"SLURM_JOB_CPUS_PER_NODE": "16,8"})
    with pytest.raises(WorldError, match="heterogeneous"):
        client.read_allocation(ENV | {"SLURM_HET_SIZE": "2"})


def test_allocation_outside_a_job_is_refused() -> None:
    with pytest.raises(client.SlurmError, match=r"not part of a SLURM job.*from the project's folder"):
        client.read_allocation({})


def test_call_of_missing_or_failing_command_raises_slurm_error() -> None:
    with pytest.raises(client.SlurmError, match="no-such-sbatch is not installed on this machine"):
        client.call("no-such-sbatch")
    with pytest.raises(client.SlurmError, match="exit code 3"):
        client.call("bash", "-c", "exit 3")
    with pytest.raises(client.SlurmError, match="sleep gave no answer within 0 s"):
        client.call("sleep", "9", timeout_seconds=0.01)


def test_call_without_cluster_configuration_raises_slurm_error() -> None:
    # Output of sbatch 22.05 where it is installed and no file names a cluster.
    text = (
        "sbatch: error: fetch_config: DNS SRV lookup failed\nsbatch: fatal: Could not establish a configuration source"
    )
    with pytest.raises(client.SlurmError, match=r"^bash finds no cluster from this machine; run this") as error:
        client.call("bash", "-c", f"echo '{text}' >&2; exit 1")
    assert "\n" not in str(error.value)


def test_call_with_retry_repeats_while_controller_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = ["slurm_load_jobs error: Unable to contact slurm controller", "Socket timed out on send/recv", ""]

    def call(*argv: str, timeout_seconds: float) -> str:
        if problem := problems.pop(0):
            raise client.SlurmError(problem)
        return "done"

    monkeypatch.setattr(client, "call", call)
    monkeypatch.setattr(client, "_RETRY_INTERVAL_SECONDS", 0.0)
    assert client.call_with_retry("scontrol", "requeue", "7") == "done" and not problems
    problems.append("Requested operation is presently disabled")
    with pytest.raises(client.SlurmError, match="presently disabled"):
        client.call_with_retry("scontrol", "requeue", "7")


def test_call_with_retry_gives_up_after_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_RETRY_FOR_SECONDS", 0.0)
    with pytest.raises(client.SlurmError, match="Unable to contact"):
        client.call_with_retry("bash", "-c", "echo Unable to contact slurm controller >&2; exit 1")


def test_task_variables_are_removed_for_srun() -> None:
    assert client.without_task_variables({"SLURM_NTASKS_PER_NODE": "4", "SLURM_JOB_ID": "7"}) == {"SLURM_JOB_ID": "7"}


def test_submit_finds_the_job_id_among_other_lines() -> None:
    for output in ("7", "7;cluster", "Welcome\n12 nodes are free\n7;c\nBye 8"):
        assert client.submit("printf", "%s\n", output, env={}) == "7"
    with pytest.raises(client.SlurmError, match=r"printed no job id \(got 'Welcome'\); squeue --me shows"):
        client.submit("printf", "Welcome\n", env={})


def test_submit_without_answer_says_that_the_job_may_be_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(*argv: str, env: object) -> str:
        raise client.NoAnswerError("sbatch gave no answer within 60 s")

    monkeypatch.setattr(client, "call", call)
    with pytest.raises(client.SlurmError, match="squeue --me shows whether the job is in the queue"):
        client.submit("sbatch", env={})


def test_submit_takes_the_job_id_that_sbatch_printed_before_it_hung(monkeypatch: pytest.MonkeyPatch) -> None:
    call = client.call
    monkeypatch.setattr(client, "call", lambda *argv, env: call(*argv, env=env, timeout_seconds=0.3))
    assert client.submit("bash", "-c", "echo 7; exec sleep 9", env=dict(os.environ)) == "7"
    with pytest.raises(client.SlurmError, match="squeue --me shows whether"):
        client.submit("bash", "-c", "exec sleep 9", env=dict(os.environ))


def test_variables_of_the_user_do_not_change_the_output_of_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SQUEUE_PARTITION", "SQUEUE_NAMES", "SINFO_FORMAT", "SLURM_TIME_FORMAT"):
        monkeypatch.setenv(name, "x")
    names = [line for line in client.call("env").splitlines() if line.startswith(("SQUEUE_", "SINFO_", "SLURM_TIME"))]
    assert names == ["SLURM_TIME_FORMAT=standard"]


@pytest.mark.parametrize(
    "option",
    [
        "--chdir=/tmp",
        "-D/tmp",
        "--output=x",
        "--outp=x",
        "-ox",
        "--array=0-3",
        "-a",
        "--wait",
        "-W",
        "-HW",
        "-N2",
        "--wrap=x",
    ],
)
def test_option_that_contradicts_our_records_is_refused(option: str) -> None:
    with pytest.raises(ConfigError, match="samecurve cannot pass this on; ") as error:
        client.check_sbatch_options(["--exclusive", option])
    assert f"--sbatch={option}:" in str(error.value)


def test_other_options_of_sbatch_are_passed_on() -> None:
    client.check_sbatch_options(
        ["--begin=now+20", "-H", "--wait-all-nodes=1", "--signal=B:USR1@60", "-A", "a", "--no-requeue", "--gpus=2"]
    )
    client.check_sbatch_variables({"SBATCH_ACCOUNT": "a", "SBATCH_OUTPUT": "x"})
    with pytest.raises(ConfigError, match=r"SBATCH_WAIT is set, which is sbatch's --wait; unset it"):
        client.check_sbatch_variables({"SBATCH_WAIT": ""})


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("exit 1", "--after 12: SLURM does not know this job"),
        ("echo 'JobId=12 JobState=FAILED Reason=x'", "this job ended as FAILED"),
        ("echo 'JobId=12 JobState=COMPLETED'; echo; echo 'JobId=13 JobState=TIMEOUT'", "ended as TIMEOUT"),
        ("echo 'JobId=12 JobState=RUNNING Reason=None'", ""),
        ("echo 'JobId=12 JobState=COMPLETED'", ""),
    ],
)
def test_job_to_wait_for_must_be_able_to_succeed(
    output: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in (("scontrol", output), ("squeue", "")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    if not message:
        client.check_dependency("12")
        return
    with pytest.raises(client.SlurmError, match=message):
        client.check_dependency("12")


@pytest.mark.parametrize("job", ["", "x", "-1", "12_", "1 2", "12;13", "²"])
def test_job_to_wait_for_must_be_a_number(job: str) -> None:
    with pytest.raises(ConfigError, match="expected the number of a job"):
        client.check_dependency(job)


@pytest.mark.parametrize("text", ["--x 'y", '"', "a\\"])
def test_open_quote_in_srun_arguments_is_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match="not readable as arguments of srun") as error:
        client.site_srun_arguments({"SAMECURVE_SRUN_ARGS": text})
    assert "\n" not in str(error.value)


def test_clock_offset_compares_with_the_controllers_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What sdiag of SLURM 22.05 printed.
    text = (
        "*****\nsdiag output at Sun Nov 29 20:51:09 2026 ({})\nData since      Sun Nov 29 20:00:00 2026 (1795982400)\n"
    )
    (tmp_path / "sdiag").write_text(f"#!/bin/sh\nprintf '{text.format(int(time.time()) - 7200)}'\n")
    (tmp_path / "sdiag").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert client.clock_offset() == pytest.approx(7200, abs=3)
    (tmp_path / "sdiag").write_text("#!/bin/sh\nexit 1\n")
    assert client.clock_offset() is None
