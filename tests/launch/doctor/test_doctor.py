"""samecurve doctor: what is made of what was measured; then this machine, alone and among torchrun's ranks."""

import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.processes import REPOSITORY, Done, free_port, torchrun

from launch.doctor.examination import Examination
from launch.doctor.judge import diagnosis
from launch.doctor.judge.findings import Finding, failed, to_json, to_text
from launch.doctor.messages import Message, Unpacker, pack
from launch.doctor.node import facts as node_facts
from launch.doctor.node import pairing, reach
from launch.doctor.node.facts import read_topology

DOCTOR = [str(REPOSITORY / "launch" / "main.py"), "doctor"]
GIB = 1 << 30


def facts(name: str, **changed: Any) -> dict[str, Any]:
    """Those of a node that is well."""
    room = {"path": "/runs", "total": 100 * GIB, "free": 50 * GIB}
    well = {
        "name": name,
        "address": "10.0.0.1",
        "interface": "eth0",
        "link_mbit": 10000,
        "head_problem": "",
        "versions": {"python": "3.11.7", "torch": "2.15.0", "torchvision": "0.29.2", "accelerate": "1.15.0"},
        "torchvision_wants": "2.15.0",
        "gpus": 0,
        "gpus_installed": 0,
        "limits": {"nofile": 65536, "memlock": -1, "nproc": -1},
        "shm": room,
        "room": {"run folder": room, "temp": room},
        "writable": "",
        "data": {"problem": "", "found": "two classes"},
        "wandb": {"key": True, "closed": "", "host": "api.wandb.ai"},
        "clock": 1000.0,
        "heard_at": 1000.0,
    }
    return well | changed


ASKED = {
    "seconds": 60.0,
    "ranks_per_node": 1,
    "gpus_per_node": 0,
    "device": "auto",
    "probe_device": "cpu",
    "run_root": "/runs",
    "data": {"name": "image_folder", "root": "/photos"},
    "workers": 0,
    "wandb": "online",
    "settings": "",
}


def rank(rank_number: int, flops: float = 1e11, pairs_said: tuple[tuple[int, int, float], ...] = (), **end: Any) -> Any:
    lines = [{"what": "seen", "gpus": 0, "torch": "2.15.0"}, {"what": "product", "seconds": 0.01, "flops": flops}]
    for other, first, rate in pairs_said:
        lines.append({"what": "pair", "pair": [first, other], "latency_seconds": 1e-4, "bytes_per_second": rate})
    out = "\n".join(json.dumps(line) for line in lines)
    return {"out": out, "code": 0, "late": False, "last_words": ""} | end


def exam(asked: dict[str, Any] | None = None, **changed: Any) -> Examination:
    """Three nodes, n1, n2 and n3, that are well."""
    names = ("n1", "n2", "n3")
    nodes = {place: facts(name) for place, name in enumerate(names)}
    heard = {place: {"unreachable": {}, "shared": ""} for place in range(3)}
    given = {"facts": nodes, "reach": heard, "answered": frozenset(range(3))} | changed
    return Examination(names, ASKED | (asked or {}), **given)


def node(place: int, **changed: Any) -> dict[int, Any]:
    """The facts of three nodes of which one has something else."""
    return {other: facts(f"n{other + 1}", **(changed if other == place else {})) for other in range(3)}


def bad(examined: Examination) -> list[tuple[str, str, str]]:
    return [(entry.state, entry.check, entry.node) for entry in diagnosis.judge(examined) if entry.state != "ok"]


def test_nothing_is_said_of_nodes_that_are_well() -> None:
    assert bad(exam()) == []


VERSIONS = facts("n2")["versions"]
FULL = {"run folder": {"path": "/runs", "total": GIB, "free": 1}, "temp": None}


@pytest.mark.parametrize(
    ("changed", "state", "check"),
    [
        ({"versions": VERSIONS | {"torch": "2.14.0"}, "torchvision_wants": "2.14.0"}, "fail", "versions"),
        ({"versions": VERSIONS | {"accelerate": None}}, "fail", "versions"),
        ({"versions": VERSIONS | {"python": "3.12.1"}}, "fail", "versions"),
        ({"versions": VERSIONS | {"python": "3.11.9"}}, "warning", "versions"),
        ({"torchvision_wants": "2.16.0"}, "fail", "versions"),
        ({"clock": 1005.0}, "warning", "clock"),
        ({"clock": 900.0}, "fail", "clock"),
        ({"room": FULL}, "fail", "disk"),
        ({"limits": {"nofile": 1024, "memlock": -1, "nproc": -1}}, "warning", "limits"),
        ({"writable": "/runs: Read-only file system"}, "fail", "run folder"),
        ({"data": {"problem": "/photos/train: No such file", "found": ""}}, "fail", "data"),
        ({"data": {"problem": "x", "found": "", "server": "s", "closed": "no route"}}, "fail", "data"),
        ({"data": {"problem": "x", "found": "", "server": "s", "closed": ""}}, "warning", "data"),
        ({"head_problem": "the name n1 is not known here"}, "fail", "reach"),
    ],
)
def test_a_fault_is_named_with_its_node_and_no_other(changed: dict[str, Any], state: str, check: str) -> None:
    assert bad(exam(facts=node(1, **changed))) == [(state, check, "n2")]


def test_a_full_shm_counts_where_it_is_used() -> None:
    small = {"path": "/dev/shm", "total": GIB // 16, "free": GIB // 32}
    assert bad(exam(facts=node(2, shm=small))) == []
    assert bad(exam({"workers": 4}, facts=node(2, shm=small))) == [("fail", "shm", "n3")]


def test_gpus_that_are_not_seen() -> None:
    with_gpus = {place: facts(f"n{place + 1}", gpus=8 - place // 2, gpus_installed=8) for place in range(3)}
    found = [entry for entry in diagnosis.judge(exam({"gpus_per_node": 8}, facts=with_gpus)) if entry.state == "fail"]
    assert [(entry.check, entry.node, entry.got, entry.wanted) for entry in found] == [
        ("gpus", "n3", "7 GPUs seen (8 installed)", "8")
    ]


def test_wandb_fails_only_where_it_must_be_online() -> None:
    without = node(0, wandb={"key": False, "closed": "timed out", "host": "api.wandb.ai"})
    assert bad(exam(facts=without)) == [("fail", "wandb", "n1")]
    assert bad(exam({"wandb": "auto"}, facts=without)) == []
    closed = node(0, wandb={"key": True, "closed": "timed out", "host": "api.wandb.ai"})
    assert bad(exam({"wandb": "auto"}, facts=closed)) == [("warning", "wandb", "n1")]


def test_nodes_that_do_not_share_the_run_folder_or_do_not_answer() -> None:
    assert bad(exam(answered=frozenset({0, 2}))) == [("fail", "shared", "n2")]
    silent = {place: facts(f"n{place + 1}") for place in (0, 2)}
    heard = {place: {"unreachable": {}, "shared": ""} for place in (0, 2)}
    assert bad(exam(facts=silent, reach=heard, answered=frozenset({0, 2}))) == [("fail", "answer", "n2")]


def test_who_does_not_reach_whom_and_who_is_left_out() -> None:
    heard = {place: {"unreachable": {}, "shared": ""} for place in range(3)}
    heard[0] = heard[2] = {"unreachable": {"1": "timed out"}, "shared": ""}
    examined = exam({"ranks_per_node": 2}, reach=heard)
    (found,) = [entry for entry in diagnosis.judge(examined) if entry.state == "fail"]
    assert found.node == "n2" and "not reached from n1 (timed out), n3 (timed out)" in found.got
    assert "ranks 2-3 by ranks 0-1, ranks 4-5" in found.got
    assert examined.reached() == (0, 2)


def test_a_slow_rank_a_dead_one_a_hung_one() -> None:
    ranks = {0: rank(0), 1: rank(1, flops=4e10), 2: rank(2)}
    complete = ((1, 0, 1e9), (2, 0, 1e9))
    ranks[0], ranks[1] = rank(0, pairs_said=complete), rank(1, flops=4e10, pairs_said=((2, 1, 1e9),))
    assert bad(exam(probed=(0, 1, 2), ranks=ranks)) == [("fail", "product", "n2")]
    dead = ranks | {1: rank(1, code=-9, late=True), 2: rank(2)}
    dead[0] = rank(0, pairs_said=((2, 0, 1e9),))
    assert bad(exam(probed=(0, 1, 2), ranks=dead)) == [("fail", "ranks", "n2")]
    assert "rank 1 hung after 'product' and was killed" in {
        found.got for found in diagnosis.judge(exam(probed=(0, 1, 2), ranks=dead))
    }
    broken = dead | {1: {"out": "", "code": 1, "late": False, "last_words": "ImportError: libcudart.so"}}
    (found,) = [entry for entry in diagnosis.judge(exam(probed=(0, 1, 2), ranks=broken)) if entry.state == "fail"]
    assert found.node == "n2" and found.got == "rank 1 ended with code 1: ImportError: libcudart.so"
    nobody = dead | {1: rank(1)}  # all come to their end, and two pairs have not been measured
    assert bad(exam(probed=(0, 1, 2), ranks=nobody)) == [("fail", "pairs", "n1 and n2"), ("fail", "pairs", "n2 and n3")]


def test_a_slow_pair_against_its_like_and_against_its_link() -> None:
    slow = {0: rank(0, pairs_said=((1, 0, 1e9), (2, 0, 1e9))), 1: rank(1, pairs_said=((2, 1, 4e8),)), 2: rank(2)}
    found = [entry for entry in diagnosis.judge(exam(probed=(0, 1, 2), ranks=slow)) if entry.state == "warning"]
    assert [(entry.check, entry.node) for entry in found] == [("pairs", "n2 and n3")]
    assert "0.40 GB/s" in found[0].got and "median of such pairs is 1.00 GB/s" in found[0].wanted
    all_slow = {0: rank(0, pairs_said=((1, 0, 1e8), (2, 0, 1e8))), 1: rank(1, pairs_said=((2, 1, 1e8),)), 2: rank(2)}
    found = [entry for entry in diagnosis.judge(exam(probed=(0, 1, 2), ranks=all_slow)) if entry.state == "warning"]
    assert len(found) == 3 and all("the link gives 1.25 GB/s" in entry.wanted for entry in found)


def test_pairs_are_disjoint_in_each_round() -> None:
    few = pairing.disjoint_rounds([0] * 8)
    assert sorted(pair for members in few for pair in members) == [(a, b) for a in range(8) for b in range(a + 1, 8)]
    many = pairing.disjoint_rounds([place // 4 for place in range(16)])
    planned = {pair for members in many for pair in members}
    assert {(0, 15), (3, 4), (0, 12), (4, 8)} <= planned and len(planned) == 16 + 6
    assert len({pair for members in pairing.disjoint_rounds(list(range(400))) for pair in members}) == 400
    for members in few + many:
        ranks = [rank for pair in members for rank in pair]
        assert len(ranks) == len(set(ranks))


def test_messages_of_several_nodes_survive_being_mixed() -> None:
    unpacker = Unpacker()
    texts = [pack(Message(place, "facts", {"long": "x" * 2000, "node": place})).splitlines() for place in range(2)]
    assert all(len(line) < 1000 for lines in texts for line in lines)
    heard = [unpacker.feed(line) for both in zip(*texts, strict=True) for line in (both[0], "site says hello", both[1])]
    assert [message.value["node"] for message in heard if message is not None] == [0, 1]
    assert unpacker.feed(texts[0][0]) is None and unpacker.feed(texts[0][2]) is None  # its middle was lost
    again = [unpacker.feed(line) for line in texts[0]]
    assert again[-1] == Message(0, "facts", {"long": "x" * 2000, "node": 0})


def test_the_text_begins_with_what_would_fail() -> None:
    found = [Finding("clock", "n1", "ok", "well"), Finding("data", "n2", "fail", "none", "photos", "put them there")]
    lines = to_text(found, "title").splitlines()
    assert lines[1].split() == ["FAIL", "data", "n2:", "none"] and lines[3].strip() == "do: put them there"
    assert failed(found) and json.loads(to_json(found, {"nodes": ["n1"]}))["state"] == "fail"


def test_the_key_is_never_said_and_a_server_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a-secret")
    found = node_facts.wandb(f"http://127.0.0.1:{free_port()}")
    assert found["key"] and found["closed"] == "Connection refused" and "a-secret" not in json.dumps(found)


def test_a_listener_is_known_from_a_stranger() -> None:
    listener = reach.Listener(3, "127.0.0.1")
    closed = free_port()
    found = reach.unreachable(
        {3: ("127.0.0.1", listener.port), 4: ("127.0.0.1", listener.port), 5: ("127.0.0.1", closed), 6: ("", 0)}
    )
    assert set(found) == {4, 5, 6} and "another program" in found[4] and "refused" in found[5]


def test_the_table_of_gpu_links() -> None:
    text = (
        "\tGPU0\tGPU1\tNIC0\tCPU Affinity\nGPU0\t X \tNV18\tPXB\t0-47\nGPU1\tNV18\t X \tPXB\t0-47\nNIC0\tPXB\tPXB\t X\n"
    )
    assert read_topology(text) == [["X", "NV18"], ["NV18", "X"]]


def test_this_machine_alone(launch: Callable[..., Done], image_folder: Path) -> None:
    settings = ["--config", "image_folder", f"data.root={image_folder}", "log.wandb=online", "--short", "--json"]
    done = launch([sys.executable, *DOCTOR, *settings], WANDB_API_KEY="a-secret", WANDB_BASE_URL="http://127.0.0.1:9")
    found = json.loads(done.out)
    fails = {entry["check"]: entry for entry in found["findings"] if entry["state"] == "fail"}
    assert done.code == 1 and set(fails) == {"wandb"} and fails["wandb"]["node"] == os.uname().nodename
    assert "a-secret" not in done.out + done.err
    (image_folder / "train").rename(image_folder / "training")
    done = launch([sys.executable, *DOCTOR, *settings[:3], "--short", "log.wandb=off"])
    assert done.code == 1 and "FAIL     data" in done.out and "train: No such file or directory" in done.out
    assert list(Path.cwd().glob("runs*")) == []  # nothing is left behind


def test_folders_without_an_image_are_no_data_set(tmp_path: Path) -> None:
    (tmp_path / "train" / "cat").mkdir(parents=True)
    found = node_facts.data_problem({"name": "image_folder", "root": str(tmp_path)})
    assert found["problem"] == f"{tmp_path}/train: no class folders with images"


def test_a_wrong_use_is_one_line(launch: Callable[..., Done]) -> None:
    for words, said in ((["--ranks", "0"], "--ranks 0: wanted 1 or more"), (["train.epoch=3"], "did you mean")):
        done = launch([sys.executable, *DOCTOR, *words])
        assert done.code == 2 and said in done.err and done.err.count("\n") == 1, done.err


@pytest.mark.slow
def test_among_ranks_of_torchrun_on_two_machines(launch: Callable[..., Done]) -> None:
    """Two launchers on this machine's loopback, two ranks each; rank 0 alone reports, of all four."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2"]
    command += ["--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    words = ["--config", "digits", "--json", "--timeout-seconds=180"]
    done: dict[int, Done] = {}

    def start(place: int) -> None:
        done[place] = launch([*command, f"--node_rank={place}", *DOCTOR, *words])

    threads = [threading.Thread(target=start, args=(place,)) for place in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=250)
    assert done[1].out == "", done
    found = json.loads(done[0].out.splitlines()[0])
    fails = {entry["check"] for entry in found["findings"] if entry["state"] == "fail"}
    assert fails <= {"product"}, found  # of four ranks on two cores one may be slow
    assert done[0].code == bool(fails) and (fails or done[1].code == 0), done
    name = os.uname().nodename
    assert found["nodes"] == [f"{name}#0", f"{name}#1"] and found["ranks_per_node"] == 2
    products = [entry for entry in found["findings"] if entry["check"] == "product"]
    assert [entry["got"].partition(":")[0] for entry in products] == ["rank 0", "rank 1", "rank 2", "rank 3"]


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_in_time(launch: Callable[..., Done], tmp_path: Path) -> None:
    """Rank 1 stops at its start, as one whose GPU does not answer; torchrun starts the doctor."""
    stops = "import os, signal, sys\n"
    stops += "if os.environ.get('RANK') == '1' and 'probe.py' in ' '.join(sys.orig_argv):\n"
    (tmp_path / "sitecustomize.py").write_text(f"{stops}    os.kill(os.getpid(), signal.SIGSTOP)\n")
    words = [*DOCTOR, "--config", "digits", "--json", "--timeout-seconds=30"]
    done = launch(torchrun(2, *words), PYTHONPATH=str(tmp_path))
    found = json.loads(done.out.splitlines()[0])
    fails = [(entry["check"], entry["got"]) for entry in found["findings"] if entry["state"] == "fail"]
    assert done.code == 1 and found["seconds"] < 60
    assert fails == [("ranks", "rank 1 hung after 'its start' and was killed")]
