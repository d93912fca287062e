"""Where a step's time goes: traces of the steps asked for, shares of waiting in each line, the gradient's norm."""

import gzip
import json
import re
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.processes import SMALL, Ranks

from launch.verify.compare import compare, rows
from trainer.config.load import load_config
from trainer.config.schema import DataSettings, ModelSettings
from trainer.data import digits
from trainer.data.sampler import BatchSampler
from trainer.errors import ConfigError
from trainer.models.lookup import build_model
from trainer.timer import GpuTimer, build_timer
from trainer.tracking import profiler

RUN = [*SMALL, "train.threads_per_rank=1", "log.every_steps=3", "train.max_steps=8"]


def lines(name: str) -> list[dict[str, Any]]:
    """The lines of training metrics."""
    text = (Path("runs") / name / "metrics.jsonl").read_text()
    return [row for row in map(json.loads, text.splitlines()) if row["split"] == "train"]


def traced(name: str, rank: int = 0) -> list[int]:
    """The steps in a rank's trace, each of which has a pass through the network and waits for its batch."""
    with gzip.open(Path("runs") / name / "profile" / f"rank-{rank}.json.gz", "rt") as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    steps = [int(event["name"][5:]) for event in events if re.fullmatch(r"step \d+", event["name"])]
    assert steps == sorted(set(steps))
    for what in ("waiting for data", "aten::addmm"):
        assert len([event for event in events if event["name"] == what]) == len(steps), what
    return steps


@pytest.mark.parametrize(
    ("text", "steps"), [("steps 10-20", (10, 20)), ("10-20", (10, 20)), ("step 7-7", (7, 7)), (" steps 3 - 4 ", (3, 4))]
)
def test_steps_are_read(text: str, steps: tuple[int, int]) -> None:
    assert load_config([], [f"train.profile={text}"]).train.profile_steps == steps


@pytest.mark.parametrize("text", ["", "10", "steps 20-10", "0-3", "steps -1-3", "epochs 1-2", "10-20 steps", "1-2-3"])
def test_what_is_no_steps_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.profile=.*counted from 1, such as 'steps 10-20'$"):
        load_config([], [f"train.profile={text}"])


def test_a_profile_has_the_steps_asked_for_and_changes_no_bit(ranks: Ranks) -> None:
    virtual = [*RUN, "train.virtual_ranks=2"]
    ranks.run(1, *virtual, "run.name=plain")
    text = ranks.run(2, *virtual, "run.name=profiled", "train.profile=steps 3-5")
    assert not compare(Path("runs/plain"), Path("runs/profiled"))
    assert traced("profiled") == traced("profiled", rank=1) == [3, 4, 5]
    assert not Path("runs/plain/profile").exists()
    for said in (text, Path("runs/profiled/logs/rank-0.log").read_text()):
        _, _, table = said.partition("steps 3-5 on rank 0, by the CPU time of each operation")
        names = re.findall(r"│ (\S.*?) +│ +[\d.]+% │ +[\d.]+ │ +[\d.]+ │", table)
        whole = [name for name in names if not name.endswith(":")]  # the others go on in a line of their own
        assert len(names) == 10 and len(set(whole)) == len(whole) and "step" not in names
        assert "aten::convolution_backward" in names
        shares = [float(share) for share in re.findall(r"([\d.]+)% │ +[\d.]+ │ +[\d.]+ │", table)]
        assert shares == sorted(shares, reverse=True) and 50 < sum(shares) <= 100
    assert "ms/step" not in Path("runs/profiled/logs/rank-1.log").read_text()


def test_a_run_that_stops_inside_leaves_what_it_has_and_goes_on_with_the_rest(ranks: Ranks) -> None:
    ranks.run(1, *RUN, "run.name=whole", "train.profile=7-99")
    assert traced("whole") == [7, 8]  # the run has no more
    Path("runs/x").mkdir()
    Path("runs/x/stop").touch()  # it is seen after the first step
    assert "steps 1-1 on rank 0" in ranks.run(1, *RUN, "run.name=x", "train.profile=1-3", code=75)
    assert traced("x") == [1]
    Path("runs/x/stop").touch()
    text = ranks.run(1, *RUN, "run.name=x", "train.profile=1-3", code=75)  # the rest, of which it takes one step
    assert traced("x") == [2] and "steps 2-2 on rank 0" in text
    text = ranks.run(1, *RUN, "run.name=x", "train.profile=1-2")  # all that is over
    assert "profile" not in text and "ms/step" not in text and traced("x") == [2]
    assert not compare(Path("runs/whole"), Path("runs/x"))


def test_a_run_that_fails_inside_leaves_what_it_has(ranks: Ranks) -> None:
    bad = next(step for step in range(23) if 7 in BatchSampler(1433, 64, seed=0).ids(step)) + 1
    failing = ["train.max_steps=23", "train.max_bad_steps=0", "run.name=x", f"train.profile={bad - 2}-{bad + 5}"]
    ranks.run(1, *RUN, *failing, plant="poisoned", code=2)
    assert traced("x") == [bad - 2, bad - 1, bad]


def test_a_trace_that_cannot_be_written_costs_the_trace_and_not_the_run(ranks: Ranks) -> None:
    Path("runs/x").mkdir(parents=True)
    Path("runs/x/profile").touch()
    text = ranks.run(2, *RUN, "run.name=x", "train.profile=2-4")
    logs = [Path(f"runs/x/logs/rank-{rank}.log").read_text() for rank in (0, 1)]
    for said in (text, *logs):
        assert said.count("json.gz cannot be written (File exists); the run goes on without it") == 1
    assert "steps 2-4 on rank 0" in text
    assert "the run has 8 steps, no profile" in ranks.run(1, *RUN, "run.name=y", "train.profile=9-10")


@pytest.mark.parametrize(("most_bytes", "operations"), [(4000, 1), (20_000, 200)], ids=["cut off", "not there"])
def test_a_trace_that_the_profiler_itself_cannot_write_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most_bytes: int, operations: int
) -> None:
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")
    with torch.autograd.profiler.profile(use_kineto=True) as recording:
        for _ in range(operations):
            torch.ones(2).add(1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, before[1]))
    try:
        with pytest.raises(OSError, match=r"torch\.profiler could not write"):
            profiler._pack(recording, tmp_path / "x.json.gz")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_line_tells_how_much_of_the_time_was_waiting(ranks: Ranks) -> None:
    for mode in ("null", "2"):
        run = [*RUN, f"train.virtual_ranks={mode}"]
        for size, plant in ((1, "tiny"), (2, "tiny"), (2, "late"), (1, "slow_data")):
            name = f"{size}-{plant}-{mode}"
            ranks.run(size, *run, f"run.name={name}", plant=plant)
            waited = []
            for line, steps in zip(lines(name), (3, 3, 2), strict=True):
                assert 0 < line["data_wait_share"] < 1 and 0 <= line["communication_share"] < 1
                assert "gpu_memory_bytes" not in line
                seconds = 64 * steps / line["samples_per_second"]
                waited.append((line["data_wait_share"] * seconds, line["communication_share"] * seconds))
            data, communication = zip(*waited, strict=True)
            # All batches come in one block, which is waited for before the first step.
            assert (data[0] >= 2.5) == (plant == "slow_data") and max(data[1:]) < 2.5
            assert min(communication) > 0 if size == 2 else max(communication) == 0
            if plant.startswith("late"):  # rank 0 waits for the gradient of rank 1, which sleeps for 1.2 s in all
                assert sum(communication) > 0.3


def gradient(weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """LeNet's over some digits, by hand: all parts one after the other."""
    net = build_model(ModelSettings(name="lenet"), 10, 1, 32)
    net.load_state_dict(weights)
    train = digits.load(DataSettings(name="digits")).train
    images = (torch.from_numpy(train.images)[ids].permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    torch.nn.functional.cross_entropy(net(images), torch.from_numpy(train.labels)[ids]).backward()
    return torch.cat([weight.grad.flatten() for weight in net.parameters() if weight.grad is not None])


def test_the_norm_is_that_of_the_mean_gradient_before_it_is_clipped(ranks: Ranks) -> None:
    plain = [*RUN, "log.every_steps=1", "train.max_steps=4", "data.augment=[]", "data.normalize=half"]
    plain += ["optim.weight_decay=0.1", "data.global_batch_size=53", "checkpoint.every_steps=1"]
    ranks.run(1, *plain, "run.name=on-1", "checkpoint.keep=9", plant="")
    order = BatchSampler(1433, 53, seed=0)
    for step in (1, 2, 3):
        weights = load_file(Path("runs/on-1/checkpoints") / f"step-{step:08}" / "model.safetensors")
        by_hand = float(gradient(weights, order.ids(step)).norm())
        assert lines("on-1")[step]["grad_norm"] == pytest.approx(by_hand, rel=1e-4)
    ranks.run(2, *plain, "run.name=on-2", plant="")
    ranks.run(1, *plain, "run.name=clipped", "train.clip_grad_norm=0.001", plant="")
    first = lines("on-1")[0]["grad_norm"]
    assert lines("on-2")[0]["grad_norm"] == pytest.approx(first, rel=1e-4)
    assert lines("clipped")[0]["grad_norm"] == pytest.approx(first, rel=1e-6) and first > 0.01
    seldom = [*plain, "log.every_steps=3", "train.clip_grad_norm=0.001", "run.name=seldom"]
    ranks.run(1, *seldom, plant="")  # a line has that of its last step
    assert [row["grad_norm"] for row in lines("seldom")] == [row["grad_norm"] for row in lines("clipped")[2:]]
    for size in (1, 2):
        ranks.run(size, *plain, f"run.name=virtual-{size}", "train.virtual_ranks=3", plant="")
    found = [[row["grad_norm"] for row in lines(f"virtual-{size}")] for size in (1, 2)]
    assert found[0] == found[1] and found[0][0] == pytest.approx(first, rel=1e-4)
    assert rows(Path("runs/virtual-1")) == rows(Path("runs/virtual-2"))


@pytest.mark.parametrize("plant", ["poisoned", "infinite_loss"])
def test_a_step_that_was_skipped_has_no_norm(ranks: Ranks, plant: str) -> None:
    wanted = [step for step in range(23) if 7 in BatchSampler(1433, 64, seed=0).ids(step)]
    for mode in ("null", "2"):
        settings = ["log.every_steps=1", "train.max_steps=23", f"train.virtual_ranks={mode}", f"run.name={mode}"]
        ranks.run(1, *RUN, *settings, plant=plant)
        assert [step for step, line in enumerate(lines(mode)) if line["grad_norm"] is None] == wanted


class Event:
    """A mark among a GPU's work, of which all up to `done` is over."""

    now, done = 0.0, 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Event.now

    def query(self) -> bool:
        return self.at <= Event.done

    def synchronize(self) -> None:
        Event.done = max(Event.done, self.at)

    def elapsed_time(self, other: "Event") -> float:
        """In milliseconds."""
        assert self.query() and other.query()
        return (other.at - self.at) * 1000


def test_a_gpu_is_not_waited_for_before_a_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    watch = build_timer(torch.device("cuda"))
    assert isinstance(watch, GpuTimer)
    for step in range(200):
        watch.begin()
        Event.now += 0.25
        watch.end()
        Event.now += 0.5
        if step == 150:
            assert Event.done == 0 and len(watch._pairs) == 151
            Event.done = Event.now
    assert len(watch._pairs) == 64  # a line that is many steps away does not keep all marks
    assert watch.read() == 50.0 and watch.read() == 0.0
