"""What a run shows beside its numbers: figures, TensorBoard's pages by its server, W&B's tables by its reader."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.processes import MAIN, SMALL, Done, Ranks, Samecurve, finished_run, free_port
from torch import nn

from trainer.config.schema import ModelSettings
from trainer.errors import ConfigError
from trainer.models.inspect import check_feature_maps, eval_copy
from trainer.models.lookup import build_model
from trainer.report import figures
from trainer.report.feature_maps import compute_feature_maps
from trainer.report.histograms import histograms
from trainer.run.record import RunRecord, read_record

LEET = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json"]
SHOWN = ["train.max_steps=60", "log.figures=true", "log.tensorboard=true", "log.wandb=offline", "log.artifact=true"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all there is to see."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:  # of this process's own clients too
            patch.delenv(name)
        for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR"):
            patch.setenv(name, str(home))
        return finished_run(tmp_path_factory.mktemp("runs"), *SHOWN, "log.feature_maps=[conv1,fc1]", "log.alerts=true")


def records(place: Path) -> list[dict[str, Any]]:
    """What W&B's own reader finds in the file of an offline run."""
    shown = subprocess.run([*LEET, str(place)], capture_output=True, text=True, timeout=60, check=True)
    return [json.loads(line) for line in shown.stdout.splitlines()]


class Page:
    """TensorBoard's own server, asked as its page asks it."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __call__(self, path: str, data: bytes | None = None, **query: str) -> Any:
        url = f"{self._url}/data/{path}?{urllib.parse.urlencode(query)}"
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.loads(answer.read())


@pytest.fixture(scope="module")
def page(run: Path) -> Iterator[Page]:
    port = free_port()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(run / "tensorboard"), "--load_fast=false"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--reload_interval", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    ask, until = Page(f"http://127.0.0.1:{port}"), time.monotonic() + 150
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            if "hparam/seconds" in ask("plugin/scalars/tags").get(".", {}):  # what a run writes last
                break
        time.sleep(0.2)
    yield ask
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_tensorboard_serves_every_scalar_of_metrics_jsonl(run: Path, page: Page) -> None:
    wanted: dict[str, list[list[float]]] = {}
    for line in read_record(run).lines:
        split, step = line.pop("split"), line.pop("step")
        for name, value in line.items():
            wanted.setdefault(f"{split}/{name}", []).append([step, value])
    tags = page("plugin/scalars/tags")["."]
    assert set(wanted) <= set(tags)
    for tag, points in wanted.items():
        served = page("plugin/scalars/scalars", run=".", tag=tag)
        assert [point[1:] for point in served] == [[step, pytest.approx(value)] for step, value in points], tag


def test_tensorboard_serves_what_there_is_to_see(run: Path, page: Page) -> None:
    images = {"samples", "test/classes", "test/confusion", "test/mistakes", "feature_maps/conv1", "feature_maps/fc1"}
    assert set(page("plugin/images/tags")["."]) == images
    assert set(page("plugin/pr_curves/tags")["."]) >= {"test/zero", "test/nine"}
    kinds = {tag.partition("/")[0] for tag in page("plugin/histograms/tags")["."]}
    assert kinds == {"weights", "gradients"}
    assert page("plugin/graphs/info")["."]["run_graph"] or page("plugin/graphs/info")["."]["conceptual_graph"]
    layout = page("plugin/custom_scalars/layout")
    charts = {chart["title"]: chart["multiline"]["tag"] for chart in layout["category"][0]["chart"]}
    assert charts["loss"] == ["train/loss", "test/loss", "validation/loss"]


def test_tensorboard_has_the_settings_and_the_result_in_one_row(run: Path, page: Page) -> None:
    found = page("plugin/hparams/experiment", data=b"{}")
    settings = {info["name"] for info in found["hparamInfos"]}
    assert {"optim.lr", "data.augment"} <= settings
    states = [f"STATUS_{state}" for state in ("UNKNOWN", "SUCCESS", "FAILURE", "RUNNING")]
    asked = {"startIndex": 0, "sliceSize": 9, "allowedStatuses": states, "colParams": []}
    rows = page("plugin/hparams/session_groups", data=json.dumps(asked).encode())
    (row,) = rows["sessionGroups"]
    values = {value["name"]["tag"]: value["value"] for value in row["metricValues"]}
    summary = json.loads((run / "summary.json").read_text())
    assert values["hparam/test_accuracy"] == pytest.approx(summary["test"]["accuracy"])


def test_a_precision_recall_curve_is_that_of_the_predictions(run: Path, page: Page) -> None:
    curve = page("plugin/pr_curves/pr_curves", run=".", tag="test/zero")["."][-1]
    row = json.loads((run / "summary.json").read_text())["test"]["classes"][0]
    assert curve["recall"][0] == 1.0  # at a threshold of 0 all is taken for it
    middle = len(curve["recall"]) // 2  # at a half hardly anything else than what was predicted
    assert curve["recall"][middle] == pytest.approx(row["recall"], abs=0.1)


def test_wandb_has_each_row_once_with_what_there_is_to_see_in_it(run: Path) -> None:
    (place,) = (run / "wandb").glob("offline-run-*")
    kept = records(place)
    rows = [record["history"]["item"] for record in kept if record.get("type") == "history"]
    lines = read_record(run).lines
    assert [row["step"] for row in rows] == [line["step"] for line in lines]
    for row, line in zip(rows, lines, strict=True):
        split = line["split"]
        assert row[f"{split}/loss"] == line["loss"] and row[f"{split}/accuracy"] == line["accuracy"]
    last = rows[-1]
    assert last["test/classes_table._type"] == "table-file" and last["test/classes_table.nrows"] == 10
    assert last["test/confusion_matrix_table.nrows"] == 100
    assert last["test/classes._type"] == last["test/confusion._type"] == "image-file"
    assert last["test/mistakes.count"] == len(read_record(run).mistakes)
    assert last["feature_maps/conv1._type"] == "image-file" and any("samples._type" in row for row in rows)
    artifacts = [record["artifact"] for record in kept if record.get("type") == "artifact"]
    assert "model" in {artifact["type"] for artifact in artifacts}
    (alert,) = [record["alert"] for record in kept if record.get("type") == "alert"]
    assert "finished" in alert["title"] and "test accuracy" in alert["text"]


def test_figures_are_pictures(run: Path) -> None:
    names = {str(path.relative_to(run / "figures")) for path in (run / "figures").rglob("*.png")}
    maps = {"feature_maps/conv1.png", "feature_maps/fc1.png"}
    assert names == {"classes.png", "confusion.png", "curves.png", "mistakes.png", "samples.png"} | maps
    for name in names:
        picture = np.asarray(Image.open(run / "figures" / name))
        assert picture.shape[0] > 100 and picture.shape[1] > 100 and picture.std() > 5, name
    assert 'alt="samples"' in (run / "report.html").read_text()


def test_the_reports_command_draws_the_figures_again(run: Path, samecurve: Samecurve) -> None:
    before = (run / "figures" / "confusion.png").read_bytes()
    (run / "figures" / "confusion.png").unlink()
    samecurve("report", str(run))
    assert (run / "figures" / "confusion.png").read_bytes() == before


def test_the_samples_are_those_of_the_first_batch(run: Path) -> None:
    """36 images of 28 pixels side by side: the stored half shows the digits as they are."""
    picture = figures.samples(*(np.full((4, 8, 8, 1), value, dtype=np.uint8) for value in (40, 200)))
    half = picture.shape[1] // 2
    assert 40 in picture[:, :half] and 200 not in picture[100:-100, :half, 0]
    assert 200 in picture[:, half:]


def test_a_layers_maps_are_what_it_gives(run: Path) -> None:
    module = build_model(ModelSettings(name="lenet"), 10, 3, 32)
    module.train()
    image = torch.randn(1, 3, 32, 32)
    maps = compute_feature_maps(module, image, ["conv1", "fc1"])
    with torch.no_grad():
        assert torch.equal(maps["conv1"], module.get_submodule("conv1")(image)[0])
    assert maps["fc1"].shape == (120, 1, 1)
    assert module.training and not module.get_submodule("conv1")._forward_hooks


def test_a_layer_that_is_none_is_refused_at_once(launch: Callable[..., Done]) -> None:
    done = launch([sys.executable, MAIN, "--config", "digits", "log.feature_maps=[conv9]", "log.wandb=off"])
    assert (
        done.code == 2
        and "log.feature_maps=['conv9']: the network has no 'conv9'; did you mean 'conv2'?" in done.err
        and done.err.count("\n") == 1
    )
    with pytest.raises(ConfigError, match="is a weight"):
        check_feature_maps(nn.Sequential(nn.Linear(1, 1)), ["0.weight"])


def test_a_shadow_shares_the_numbers_and_nothing_else() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout())
    made = eval_copy(module)
    with torch.no_grad():
        module[0].weight.fill_(7)  # type: ignore[union-attr]
        module[1].running_mean.fill_(3)  # type: ignore[union-attr]
    assert bool((made[0].weight == 7).all()) and bool((made[1].running_mean == 3).all())  # type: ignore[index]
    assert not made.training and module.training and not made[0].weight.requires_grad  # type: ignore[index]


def test_histograms_count_every_finite_value() -> None:
    module = nn.Linear(3, 2)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[0.0, 1, 2], [3, float("nan"), 4]]))
    module.bias.grad = torch.ones(2)
    found = histograms(module)
    assert set(found) == {"weights/weight", "weights/bias", "gradients/bias"}
    assert sum(found["weights/weight"].counts) == 5 and found["weights/weight"].sum == 10
    assert sum(found["gradients/bias"].counts) == 2


def test_what_is_shown_changes_no_bit_of_the_training(ranks: Ranks) -> None:
    same = [*SMALL, "train.max_steps=25"]
    ranks.run(1, *same, "run.name=shown", "log.figures=true", "log.tensorboard=true", 'log.feature_maps=["0"]')
    ranks.run(1, *same, "run.name=bare", "log.report=false")
    weights = [Path(f"runs/{name}/model.safetensors").read_bytes() for name in ("shown", "bare")]
    assert weights[0] == weights[1]


def test_wandb_calls_somebody_when_a_loss_is_not_finite_and_when_the_run_fails(ranks: Ranks) -> None:
    asked = [
        *SMALL,
        "run.name=x",
        "train.max_steps=60",
        "train.max_bad_steps=1",
        "log.wandb=offline",
        "log.alerts=true",
    ]
    ranks.run(1, *asked, plant="poisoned", code=2)
    (place,) = Path("runs/x/wandb").glob("offline-run-*")
    titles = [record["alert"]["title"] for record in records(place) if record.get("type") == "alert"]
    assert titles == ["x: loss or gradient not finite", "x: failed"]


@pytest.mark.filterwarnings("error")
def test_a_class_may_have_any_name(tmp_path: Path) -> None:
    names = ["a$^$b", "猫", "c_{d"]
    classes = [{"name": name, "precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2} for name in names]
    scores = {"classes": classes, "confusion": [[1, 1, 0], [0, 1, 1], [1, 0, 1]]}
    pictures = figures.run_figures(RunRecord(tmp_path, "x", {}, evaluation=scores))
    assert set(pictures) == {"classes", "confusion"}


def test_a_layers_maps_are_not_those_of_the_next_one() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True))
    maps = compute_feature_maps(network, torch.randn(1, 1, 8, 8), ["0", "1"])
    assert maps["0"].min() < 0 <= maps["1"].min()


def test_histograms_of_large_weights_are_of_a_million_of_them() -> None:
    found = histograms(nn.Linear(5000, 1000))["weights/weight"]
    assert (1 << 20) <= sum(found.counts) < (1 << 21)
