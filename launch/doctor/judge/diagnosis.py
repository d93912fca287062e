"""What was measured in, findings out. A pure function: nothing is asked, read or started here."""

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from launch.doctor.examination import Examination
from launch.doctor.judge import speeds
from launch.doctor.judge.findings import Finding

_MUST_BE_SAME = ("torch", "torchvision", "accelerate")  # of others a difference is a warning
_SKEW_WARNING_SECONDS, _SKEW_FAIL_SECONDS = 2.0, 60.0
_GIB = 1 << 30
_ROOM_WARNING, _ROOM_FAIL = 5 * _GIB, _GIB // 4
_TEMP_WARNING = _GIB // 4
_SHM_WARNING, _SHM_FAIL = _GIB, _GIB // 16
_LIMITS = {"nofile": 4096, "nproc": 4096}
_LIMIT_FLAGS = {"nofile": "-n", "nproc": "-u", "memlock": "-l"}


def judge(exam: Examination) -> list[Finding]:
    """Every check of every node; none is left out because another failed."""
    found: list[Finding] = []
    for check in (_answers, _settings, _versions, _gpus, _reach, _data, _run_folder, _shared):
        found += check(exam)
    for check in (_clock, _disk, _shm, _limits, _wandb):
        found += check(exam)
    return [*found, *speeds.judge(exam)]


def _answers(exam: Examination) -> Iterator[Finding]:
    for node in exam.places:
        if node not in exam.facts:
            do = "see its own words above; try `srun --nodelist=NODE hostname`, and whether Python starts there"
            yield Finding("answer", exam.name(node), "fail", "no answer", f"one within {exam.asked['seconds']} s", do)
        elif node not in exam.reach:
            do = "it was there and then silent: look at the node's load and at its file systems"
            yield Finding("answer", exam.name(node), "fail", "silent when asked whom it reaches", "an answer", do)
        else:
            yield Finding("answer", exam.name(node), "ok", "here")


def _settings(exam: Examination) -> Iterator[Finding]:
    problem = exam.asked["settings"]
    yield Finding("settings", "", "fail" if problem else "ok", problem or "fit the ranks")


def _versions(exam: Examination) -> Iterator[Finding]:
    usual = _usual([facts["versions"] for facts in exam.facts.values()])
    for node, facts in exam.facts.items():
        own, name, well = facts["versions"], exam.name(node), True
        for package, version in own.items():
            if version is None:
                well = False
                do = f"install it in the environment that {name} uses: pip install {package}"
                yield Finding("versions", name, "fail", f"{package} is not installed", usual[package] or "any", do)
            elif version != usual[package]:
                well = False
                fails = package in _MUST_BE_SAME or (package == "python" and _minor(version) != _minor(usual[package]))
                wanted = f"{usual[package]}, as on the other nodes"
                do = "use one environment for all nodes: ranks of other versions fail, or give other bits"
                got = f"{package} {version}"
                yield Finding("versions", name, "fail" if fails else "warning", got, wanted, do)
        built_for, torch = facts["torchvision_wants"], own["torch"] or ""
        if built_for and torch and torch.partition("+")[0] != built_for:
            well = False
            got, do = f"torch {torch} with torchvision {own['torchvision']}", "install both from one place"
            yield Finding("versions", name, "fail", got, f"torch {built_for}", do)
        if facts["gpus"] and torch.endswith("+cpu") and exam.asked["device"] != "cpu":
            well = False
            do = "install a torch built for CUDA, or set train.device=cpu"
            yield Finding("versions", name, "fail", f"torch {torch} and {facts['gpus']} GPUs", "torch with CUDA", do)
        if well:
            yield Finding("versions", name, "ok", ", ".join(f"{key} {own[key]}" for key in ("python", "torch")))


def _usual(all_versions: list[Mapping[str, Any]]) -> dict[str, str]:
    """What most nodes have; of two as frequent, what the first one has."""
    packages = all_versions[0] if all_versions else {}
    counted = {name: Counter(own[name] for own in all_versions if own[name]).most_common(1) for name in packages}
    return {name: most[0][0] if most else "" for name, most in counted.items()}


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


def _gpus(exam: Examination) -> Iterator[Finding]:
    wanted = exam.asked["gpus_per_node"]
    for node, facts in exam.facts.items():
        seen = facts["gpus"]
        if seen < wanted:
            got = f"{seen} GPUs seen ({facts['gpus_installed']} installed)"
            do = "is its driver loaded (nvidia-smi)? does CUDA_VISIBLE_DEVICES name GPUs that are there?"
            yield Finding("gpus", exam.name(node), "fail", got, f"{wanted}", do)
        else:
            yield Finding("gpus", exam.name(node), "ok", f"{seen}" if seen else "none, none asked for")


def _reach(exam: Examination) -> Iterator[Finding]:
    """By the node that is not reached. Where the first node's name is unknown nothing can begin."""
    for node, facts in exam.facts.items():
        if facts["head_problem"]:
            do = "mend its name resolution (/etc/hosts, DNS) or its routes: all ranks meet at the first node"
            yield Finding("reach", exam.name(node), "fail", facts["head_problem"], "a way to the first node", do)
    per_node = exam.asked["ranks_per_node"]
    for node in exam.reach:
        failed = {other: found["unreachable"].get(str(node)) for other, found in exam.reach.items()}
        from_whom = [other for other, problem in failed.items() if problem]
        if from_whom:
            names = ", ".join(f"{exam.name(other)} ({failed[other]})" for other in from_whom)
            ranks = ", ".join(_ranks(other, per_node) for other in from_whom)
            got = f"not reached from {names}; {_ranks(node, per_node)} by {ranks}"
            do = "look at firewalls and routes between them, or leave one out with --exclude"
            yield Finding("reach", exam.name(node), "fail", got, "a TCP connection to any port", do)
        elif len(exam.names) > 1:
            yield Finding("reach", exam.name(node), "ok", "reached from all")


def _ranks(node: int, per_node: int) -> str:
    first = node * per_node
    return f"rank {first}" if per_node == 1 else f"ranks {first}-{first + per_node - 1}"


def _data(exam: Examination) -> Iterator[Finding]:
    asked = exam.asked["data"]
    wanted = f"{asked['name']} under data.root={asked['root']}"
    do = "put the data set there on every node, or set data.root to a folder that all nodes share"
    for node, facts in exam.facts.items():
        data, name = facts["data"], exam.name(node)
        if not data["problem"]:
            yield Finding("data", name, "ok", data["found"])
        elif "server" not in data:
            yield Finding("data", name, "fail", data["problem"], wanted, do)
        elif data["closed"]:
            got = f"{data['problem']}; no way to download it: {data['server']}: {data['closed']}"
            yield Finding("data", name, "fail", got, wanted, do)
        else:
            yield Finding("data", name, "warning", f"{data['problem']}; it will be downloaded", wanted)


def _run_folder(exam: Examination) -> Iterator[Finding]:
    do = "make it writable for you on this node (mounted read-only? full? quota?), or set run.root to another folder"
    for node, facts in exam.facts.items():
        state = "fail" if facts["writable"] else "ok"
        got = facts["writable"] or "writable"
        yield Finding("run folder", exam.name(node), state, got, *(("a file made there", do) if state != "ok" else ()))


def _shared(exam: Examination) -> Iterator[Finding]:
    """A node that cannot write at all has been told of already."""
    if len(exam.names) == 1:
        return
    do = "set run.root to a folder on a file system that all nodes share: checkpoints are read by all of them"
    wanted = f"run.root={exam.asked['run_root']} is the same folder on all nodes"
    if exam.token_problem:
        yield Finding("shared", "", "warning", f"not looked at: {exam.token_problem}", wanted)
        return
    for node, found in exam.reach.items():
        if node in exam.answered:
            yield Finding("shared", exam.name(node), "ok", "the same folder")
        elif not exam.facts[node]["writable"]:
            got = found["shared"] or "its file is not seen on the first node"
            yield Finding("shared", exam.name(node), "fail", got, wanted, do)


def _clock(exam: Examination) -> Iterator[Finding]:
    """Against the middle of all: an answer may take a moment, but no node is early by it."""
    behind = {node: facts["clock"] - facts["heard_at"] for node, facts in exam.facts.items()}
    middle = statistics.median(behind.values()) if behind else 0.0
    for node, seconds in behind.items():
        skew = seconds - middle
        state = "ok" if abs(skew) < _SKEW_WARNING_SECONDS else "warning" if abs(skew) < _SKEW_FAIL_SECONDS else "fail"
        got = f"{abs(skew):.1f} s {'ahead' if skew > 0 else 'behind'}"
        if state == "ok":
            got = f"within {_SKEW_WARNING_SECONDS:g} s"
        wanted, do = (f"within {_SKEW_WARNING_SECONDS:g} s of the others", "start chrony or ntpd on it")
        yield Finding("clock", exam.name(node), state, got, *((wanted, do) if state != "ok" else ()))


def _disk(exam: Examination) -> Iterator[Finding]:
    for node, facts in exam.facts.items():
        for what, room in facts["room"].items():
            if room is None:
                continue
            free, few = room["free"], _ROOM_WARNING if what == "run folder" else _TEMP_WARNING
            state = "ok" if free >= few else "warning"
            if what == "run folder" and free < _ROOM_FAIL:
                state = "fail"
            got = f"{what} {_size(free)} free"
            wanted = "" if state == "ok" else f"{_size(few)} in {room['path']}"
            do = "" if state == "ok" else "make room, or set run.root (TMPDIR for temp) to another file system"
            yield Finding("disk", exam.name(node), state, got, wanted, do)


def _shm(exam: Examination) -> Iterator[Finding]:
    """DataLoader's workers and NCCL hand over by it; containers have 64 MiB unless told otherwise."""
    for node, facts in exam.facts.items():
        if facts["shm"] is None:
            continue
        free = facts["shm"]["free"]
        needed = exam.asked["workers"] > 0 or exam.asked["gpus_per_node"] > 1
        state = "ok" if free >= _SHM_WARNING or not needed else "fail" if free < _SHM_FAIL else "warning"
        wanted = "" if state == "ok" else f"{_size(_SHM_WARNING)} for data.workers and GPUs"
        do = "" if state == "ok" else "give the container more (docker run --shm-size=8g), or set data.workers=0"
        yield Finding("shm", exam.name(node), state, f"{_size(free)} free", wanted, do)


def _limits(exam: Examination) -> Iterator[Finding]:
    for node, facts in exam.facts.items():
        low = {name: least for name, least in _LIMITS.items() if 0 <= facts["limits"][name] < least}
        if exam.asked["gpus_per_node"] and len(exam.names) > 1 and facts["limits"]["memlock"] >= 0:
            low["memlock"] = -1  # InfiniBand pins memory
        for name, least in low.items():
            wanted = f"{least} or more" if least > 0 else "unlimited, for InfiniBand"
            do = f"ulimit {_LIMIT_FLAGS[name]} {least if least > 0 else 'unlimited'} before the start, or limits.conf"
            yield Finding("limits", exam.name(node), "warning", f"{name} {facts['limits'][name]}", wanted, do)
        if not low:
            yield Finding("limits", exam.name(node), "ok", "enough")


def _wandb(exam: Examination) -> Iterator[Finding]:
    """Rank 0 alone speaks with it. `auto` goes without."""
    mode, facts = exam.asked["wandb"], exam.facts.get(0)
    if facts is None or facts["wandb"] is None:
        yield Finding("wandb", "", "ok", f"not needed: {mode}")
        return
    found, name = facts["wandb"], exam.name(0)
    problems = [] if found["key"] else ["no key"]
    problems += [f"{found['host']} is not reached ({found['closed']})"] if found["closed"] else []
    got = ", ".join(problems) or f"a key, and {found['host']} is reached"
    if not problems:
        yield Finding("wandb", name, "ok", got)
    elif mode == "online":
        do = "set WANDB_API_KEY or run `wandb login`; without a network set log.wandb=offline"
        yield Finding("wandb", name, "fail", got, "log.wandb=online", do)
    elif found["key"]:
        yield Finding("wandb", name, "warning", f"{got}: the run will be offline", "", "`wandb sync` uploads it later")
    else:
        yield Finding("wandb", name, "ok", f"{got}: the run will be offline, as log.wandb=auto does")


def _size(size: int) -> str:
    return f"{size / _GIB:.1f} GiB" if size >= _GIB else f"{size / (1 << 20):.0f} MiB"
