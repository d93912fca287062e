"""Turns an examination into findings: one function per check, listed at the end. Measures and starts nothing."""

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from launch.doctor.examination import Examination
from launch.doctor.judge import speeds
from launch.doctor.judge.findings import Finding

_MUST_BE_EQUAL = ("torch", "torchvision", "accelerate")  # different versions of other packages only give a warning
_SKEW_WARNING_SECONDS, _SKEW_FAIL_SECONDS = 2.0, 60.0
_GIB = 1 << 30
_RUN_FOLDER_WARNING_BYTES, _RUN_FOLDER_FAIL_BYTES = 5 * _GIB, _GIB // 4
_TEMP_WARNING_BYTES = _GIB // 4
_SHM_WARNING_BYTES, _SHM_FAIL_BYTES = _GIB, _GIB // 16
_MIN_LIMITS = {"nofile": 4096, "nproc": 4096}
_ULIMIT_FLAGS = {"nofile": "-n", "nproc": "-u", "memlock": "-l"}


def judge(exam: Examination) -> list[Finding]:
    """Returns the findings of every check on every node; a failure skips no other check."""
    findings: list[Finding] = []
    for check in _CHECKS:
        findings += check(exam)
    return findings


def _answers(exam: Examination) -> Iterator[Finding]:
    for node in exam.nodes:
        if node not in exam.facts:
            fix = "read its error messages above; try `srun --nodelist=NODE hostname`, and start Python there"
            expected = f"an answer within {exam.request['seconds']} s"
            yield Finding("answer", exam.name(node), "fail", "no answer", expected, fix)
        elif node not in exam.reach:
            got, fix = "reported its facts, then no answer", "check the node's load and its file systems"
            yield Finding("answer", exam.name(node), "fail", got, "a list of unreachable nodes", fix)
        else:
            yield Finding("answer", exam.name(node), "ok", "all requests answered")


def _settings(exam: Examination) -> Iterator[Finding]:
    problem = exam.request["settings"]
    yield Finding("settings", "", "fail" if problem else "ok", problem or "the global batch fits the ranks")


def _launcher(exam: Examination) -> Iterator[Finding]:
    """Reports variables of a launcher that `samecurve train` removes, and that stop `python trainer/main.py`."""
    if problem := exam.request["launcher"]:
        fix = "remove them for python trainer/main.py and accelerate launch; samecurve train ignores them"
        yield Finding("launcher", "", "warning", problem, "no variables of another launcher", fix)
    else:
        yield Finding("launcher", "", "ok", "no variables of another launcher")


def _own_name(exam: Examination) -> Iterator[Finding]:
    """Reports a node that does not know its own name. `samecurve train` needs no name on one machine."""
    for node, facts in exam.facts.items():
        if problem := facts["own_name_problem"]:
            fix = "add the name to /etc/hosts: torchrun --standalone would wait 300 s for it"
            yield Finding("own name", exam.name(node), "warning", problem, "the node's own name can be resolved", fix)
        else:
            yield Finding("own name", exam.name(node), "ok", "resolved")


def _versions(exam: Examination) -> Iterator[Finding]:
    common = _most_common([facts["versions"] for facts in exam.facts.values()])
    for node, facts in exam.facts.items():
        name = exam.name(node)
        problems = [*_package_problems(name, facts["versions"], common), *_torch_problems(exam, name, facts)]
        yield from problems
        if not problems:
            versions = ", ".join(f"{package} {facts['versions'][package]}" for package in ("python", "torch"))
            yield Finding("versions", name, "ok", versions)


def _package_problems(name: str, versions: Mapping[str, str | None], common: Mapping[str, str]) -> Iterator[Finding]:
    """Compares a node's packages with those of most nodes."""
    for package, version in versions.items():
        if version is None:
            fix = f"install it in the environment that {name} uses: pip install {package}"
            yield Finding("versions", name, "fail", f"{package} is not installed", common[package] or "any", fix)
        elif version != common[package]:
            is_other_python = package == "python" and _minor(version) != _minor(common[package])
            state = "fail" if package in _MUST_BE_EQUAL or is_other_python else "warning"
            expected = f"{common[package]}, as on the other nodes"
            fix = "use one environment on all nodes: ranks with other versions fail or compute other bits"
            yield Finding("versions", name, state, f"{package} {version}", expected, fix)


def _torch_problems(exam: Examination, name: str, facts: Mapping[str, Any]) -> Iterator[Finding]:
    """Compares torch with torchvision and with the node's GPUs."""
    torch, required = facts["versions"]["torch"] or "", facts["torchvision_requires"]
    if required and torch and torch.partition("+")[0] != required:
        got = f"torch {torch} with torchvision {facts['versions']['torchvision']}"
        yield Finding("versions", name, "fail", got, f"torch {required}", "install both from the same package index")
    if facts["gpus"] and torch.endswith("+cpu") and exam.request["device"] != "cpu":
        got, fix = f"torch {torch} and {facts['gpus']} GPUs", "install a torch built for CUDA, or set train.device=cpu"
        yield Finding("versions", name, "fail", got, "torch with CUDA", fix)


def _most_common(versions: list[Mapping[str, Any]]) -> dict[str, str]:
    """Returns the most common version of each package; among equally common ones, that of the first node."""
    packages = versions[0] if versions else {}
    counts = {name: Counter(node[name] for node in versions if node[name]).most_common(1) for name in packages}
    return {name: most_common[0][0] if most_common else "" for name, most_common in counts.items()}


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


def _gpus(exam: Examination) -> Iterator[Finding]:
    expected = exam.request["gpus_per_node"]
    for node, facts in exam.facts.items():
        visible = facts["gpus"]
        if visible < expected:
            got = f"{visible} GPUs visible ({facts['gpus_installed']} installed)"
            fix = "check that the driver is loaded (nvidia-smi), and that CUDA_VISIBLE_DEVICES lists existing GPUs"
            yield Finding("gpus", exam.name(node), "fail", got, f"{expected}", fix)
        else:
            yield Finding("gpus", exam.name(node), "ok", f"{visible}" if visible else "none, none requested")


def _reach(exam: Examination) -> Iterator[Finding]:
    """Reports each node that others cannot reach. A node that cannot find the first one stops every run."""
    for node, facts in exam.facts.items():
        if facts["head_problem"]:
            fix = "repair its name resolution (/etc/hosts, DNS) or its routes: all ranks meet on the first node"
            yield Finding("reach", exam.name(node), "fail", facts["head_problem"], "a route to the first node", fix)
    ranks_per_node = exam.request["ranks_per_node"]
    for node in exam.reach:
        problems = {
            peer: reply["unreachable"][str(node)]
            for peer, reply in exam.reach.items()
            if str(node) in reply["unreachable"]
        }
        if problems:
            peers = ", ".join(f"{exam.name(peer)} ({problem})" for peer, problem in problems.items())
            ranks = ", ".join(_rank_names(peer, ranks_per_node) for peer in problems)
            got = f"not reached from {peers}; {_rank_names(node, ranks_per_node)} by {ranks}"
            fix = "check the firewalls and routes between them, or leave one out with --exclude"
            yield Finding("reach", exam.name(node), "fail", got, "a TCP connection to any port", fix)
        elif len(exam.names) > 1:
            yield Finding("reach", exam.name(node), "ok", "reached from all nodes")


def _rank_names(node: int, ranks_per_node: int) -> str:
    first = node * ranks_per_node
    return f"rank {first}" if ranks_per_node == 1 else f"ranks {first}-{first + ranks_per_node - 1}"


def _data(exam: Examination) -> Iterator[Finding]:
    data = exam.request["data"]
    expected = f"{data['name']} under data.root={data['root']}"
    fix = "put the data set there on every node, or set data.root to a folder that all nodes share"
    for node, facts in exam.facts.items():
        check, name = facts["data"], exam.name(node)
        if not check["problem"]:
            yield Finding("data", name, "ok", check["summary"])
        elif "server" not in check:
            yield Finding("data", name, "fail", check["problem"], expected, fix)
        elif check["server_problem"]:
            got = f"{check['problem']}; cannot download it from {check['server']}: {check['server_problem']}"
            yield Finding("data", name, "fail", got, expected, fix)
        else:
            yield Finding("data", name, "warning", f"{check['problem']}; the run will download it", expected)


_LEASE_NOTE = (
    "nothing: runs are locked by lease files instead; after a run was killed on one machine, another machine waits a "
    "minute before it continues the run"
)


def _run_folder(exam: Examination) -> Iterator[Finding]:
    fix = "make it writable for you on this node (is it read-only or full? a quota?), or set run.root to another folder"
    for node, facts in exam.facts.items():
        if problem := facts["write_problem"]:
            yield Finding("run folder", exam.name(node), "fail", problem, "a new file can be created there", fix)
        elif problem := facts["lock_problem"]:
            got = f"writable, but flock does not work there ({problem})"
            yield Finding("run folder", exam.name(node), "warning", got, "flock works", _LEASE_NOTE)
        else:
            yield Finding("run folder", exam.name(node), "ok", "writable")


def _shared(exam: Examination) -> Iterator[Finding]:
    """Skips a node that cannot write at all: `_run_folder` reports it."""
    if len(exam.names) == 1:
        return
    fix = "set run.root to a folder on a file system that all nodes share: all of them read the checkpoints"
    expected = f"run.root={exam.request['run_root']} is the same folder on all nodes"
    if exam.shared_problem:
        yield Finding("shared", "", "warning", f"not checked: {exam.shared_problem}", expected)
        return
    for node, reply in exam.reach.items():
        if node in exam.answered and reply["has_own_flock"]:
            got = "the same folder, but this node does not see the flock of the first node"
            yield Finding("shared", exam.name(node), "warning", got, "all nodes share their flocks", _LEASE_NOTE)
        elif node in exam.answered:
            yield Finding("shared", exam.name(node), "ok", "the same folder")
        elif not exam.facts[node]["write_problem"]:
            got = reply["shared_problem"] or "the first node does not see its file"
            yield Finding("shared", exam.name(node), "fail", got, expected, fix)


def _clock(exam: Examination) -> Iterator[Finding]:
    """Compares each clock with the median: a reply may arrive late, so that one node's clock alone proves nothing.

    Where that median is more than a minute from the clock of SLURM's controller, the controller's clock counts.
    """
    offsets = {node: facts["clock"] - facts["received_at"] for node, facts in exam.facts.items()}
    right, whose = statistics.median(offsets.values()) if offsets else 0.0, "the other nodes"
    if (ahead := exam.request["clock_offset"]) is not None and abs(right + ahead) >= _SKEW_FAIL_SECONDS:
        right, whose = -ahead, "SLURM's controller"
    for node, offset in offsets.items():
        skew = offset - right
        if abs(skew) < _SKEW_WARNING_SECONDS:
            yield Finding("clock", exam.name(node), "ok", f"within {_SKEW_WARNING_SECONDS:g} s")
        else:
            state = "warning" if abs(skew) < _SKEW_FAIL_SECONDS else "fail"
            got = f"{abs(skew):.1f} s {'ahead' if skew > 0 else 'behind'}"
            expected = f"within {_SKEW_WARNING_SECONDS:g} s of {whose}"
            yield Finding("clock", exam.name(node), state, got, expected, "start chrony or ntpd on it")


def _disk(exam: Examination) -> Iterator[Finding]:
    for node, facts in exam.facts.items():
        for label, space in facts["disk"].items():
            if space is None:
                continue
            is_run_folder = label == "run folder"
            free, required = space["free"], _RUN_FOLDER_WARNING_BYTES if is_run_folder else _TEMP_WARNING_BYTES
            got = f"{label} {_format_bytes(free)} free"
            if free >= required:
                yield Finding("disk", exam.name(node), "ok", got)
            else:
                state = "fail" if is_run_folder and free < _RUN_FOLDER_FAIL_BYTES else "warning"
                expected = f"{_format_bytes(required)} in {space['path']}"
                fix = "free some space, or set run.root (for temp: TMPDIR) to another file system"
                yield Finding("disk", exam.name(node), state, got, expected, fix)


def _shm(exam: Examination) -> Iterator[Finding]:
    """DataLoader workers and NCCL pass data through /dev/shm; a container has 64 MiB of it by default."""
    for node, facts in exam.facts.items():
        if facts["shm"] is None:
            continue
        free = facts["shm"]["free"]
        is_needed = exam.request["workers"] > 0 or exam.request["gpus_per_node"] > 1
        got = f"{_format_bytes(free)} free"
        if free >= _SHM_WARNING_BYTES or not is_needed:
            yield Finding("shm", exam.name(node), "ok", got)
        else:
            state = "fail" if free < _SHM_FAIL_BYTES else "warning"
            expected = f"{_format_bytes(_SHM_WARNING_BYTES)} for data.workers and GPUs"
            fix = "give the container more (docker run --shm-size=8g), or set data.workers=0"
            yield Finding("shm", exam.name(node), state, got, expected, fix)


def _limits(exam: Examination) -> Iterator[Finding]:
    for node, facts in exam.facts.items():
        limits = facts["limits"]
        required = {name: minimum for name, minimum in _MIN_LIMITS.items() if 0 <= limits[name] < minimum}
        if exam.request["gpus_per_node"] and len(exam.names) > 1 and limits["memlock"] >= 0:
            required["memlock"] = -1  # InfiniBand pins memory
        for name, minimum in required.items():
            expected = f"{minimum} or more" if minimum > 0 else "unlimited, for InfiniBand"
            value = minimum if minimum > 0 else "unlimited"
            fix = f"run ulimit {_ULIMIT_FLAGS[name]} {value} before training, or set it in limits.conf"
            yield Finding("limits", exam.name(node), "warning", f"{name} {limits[name]}", expected, fix)
        if not required:
            yield Finding("limits", exam.name(node), "ok", "high enough")


def _wandb(exam: Examination) -> Iterator[Finding]:
    """Only rank 0 connects to W&B, and log.wandb=auto continues offline without it."""
    mode, facts = exam.request["wandb"], exam.facts.get(0)
    if problem := exam.request["wandb_problem"]:
        yield Finding("wandb", "", "fail", problem)
        return
    if facts is None or facts["wandb"] is None:
        yield Finding("wandb", "", "ok", f"not needed: {mode}")
        return
    access, name = facts["wandb"], exam.name(0)
    problems = [] if access["has_key"] else ["no API key"]
    problems += [access["problem"]] if access["problem"] else []
    got = ", ".join(problems)
    if not problems:
        yield Finding("wandb", name, "ok", f"API key found, {access['server']} reached")
    elif mode == "online":
        fix = "set WANDB_API_KEY or run `wandb login`; without a network set log.wandb=offline"
        yield Finding("wandb", name, "fail", got, "access, as log.wandb=online requires it", fix)
    elif access["has_key"]:
        fix = "upload it later with `wandb sync`"
        yield Finding("wandb", name, "warning", f"{got}: the run will be offline", "", fix)
    else:
        yield Finding("wandb", name, "ok", f"{got}: the run will be offline, as log.wandb=auto allows")


def _format_bytes(size: int) -> str:
    return f"{size / _GIB:.1f} GiB" if size >= _GIB else f"{size / (1 << 20):.0f} MiB"


# To add a check, write it above and list it here (CONTRIBUTING.md).
_CHECKS = (
    _answers, _settings, _launcher, _versions, _gpus, _own_name, _reach, _data, _run_folder, _shared, _clock, _disk,
    _shm, _limits, _wandb, speeds.judge,
)  # fmt: skip
