"""First batch, figures, feature maps and histograms, as TensorBoard's server and W&B's reader show them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.processes import SMALL, Ranks, Samecurve, finished_run, free_port
from torch import nn

from trainer.config.schema import DataSettings
from trainer.data.augment import Augment
from trainer.data.normalization import resolve_normalization
from trainer.data.sampler import BatchSampler
from trainer.data.splits import TensorSplit
from trainer.report.examples import read_examples
from trainer.report.media import first_batch_images, parameter_histograms
from trainer.run.record import RunRecord

WANDB_READER = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json"]
SETTINGS = [
    "train.max_steps=60",
    "log.figures=true",
    "log.tensorboard=true",
    "log.wandb=offline",
    "log.artifact=true",
    "log.alerts=true",
    "log.feature_maps=[conv1,fc1]",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with all trackers, figures and feature maps."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:  # set by W&B clients of this process
            patch.delenv(name)
        for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR"):
            patch.setenv(name, str(home))
        return finished_run(tmp_path_factory.mktemp("runs"), *SETTINGS)


def read_wandb_records(session: Path) -> list[dict[str, Any]]:
    """Reads the file of an offline W&B session with W&B's own reader."""
    done = subprocess.run([*WANDB_READER, str(session)], capture_output=True, text=True, timeout=60, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


class TensorBoardClient:
    """Sends the requests of TensorBoard's web page to its server."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __call__(self, path: str, data: bytes | None = None, **query: str) -> Any:
        url = f"{self._url}/data/{path}?{urllib.parse.urlencode(query)}"
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=10) as response:
            return json.loads(response.read())


@pytest.fixture(scope="module")
def tensorboard(run: Path) -> Iterator[TensorBoardClient]:
    """A TensorBoard server that has read the whole run."""
    port = free_port()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(run / "tensorboard"), "--load_fast=false"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--reload_interval", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    client, deadline = TensorBoardClient(f"http://127.0.0.1:{port}"), time.monotonic() + 150
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if client("plugin/hparams/experiment", data=b"{}").get("hparamInfos"):  # a run writes them last
                break
        time.sleep(0.2)
    yield client
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_tensorboard_serves_every_scalar_of_metrics_jsonl(run: Path, tensorboard: TensorBoardClient) -> None:
    expected: dict[str, list[list[float]]] = {}
    for row in RunRecord(run).rows:
        split, step = row.pop("split"), row.pop("step")
        for name in row.keys() - {"epoch", "samples", "seconds"}:
            value = row[name]
            expected.setdefault(f"{split}/{name}", []).append([step, value])
    assert set(expected) == set(tensorboard("plugin/scalars/tags")["."])
    for tag, points in expected.items():
        served = tensorboard("plugin/scalars/scalars", run=".", tag=tag)
        assert [point[1:] for point in served] == [[step, pytest.approx(value)] for step, value in points], tag


def test_tensorboard_serves_images_curves_histograms_and_graph(tensorboard: TensorBoardClient) -> None:
    names = ("classes", "confusion", "mistakes", "first_batch", "feature_maps/conv1", "feature_maps/fc1")
    images = {f"visual/{name}" for name in names}
    assert set(tensorboard("plugin/images/tags")["."]) == images
    assert set(tensorboard("plugin/pr_curves/tags")["."]) >= {"test/zero", "test/nine"}
    histograms = set(tensorboard("plugin/histograms/tags")["."])
    assert {"weights/fc2.bias", "weights/fc2.bias/gradient"} <= histograms
    assert min(images | histograms | {"test/", "train/", "validation/"}).startswith("test/"), "cards are sorted by tag"
    graphs = tensorboard("plugin/graphs/info")["."]
    assert graphs["run_graph"] or graphs["conceptual_graph"]


def test_tensorboard_layout_puts_the_splits_of_a_metric_in_one_chart(tensorboard: TensorBoardClient) -> None:
    layout = tensorboard("plugin/custom_scalars/layout")
    tags_by_chart = {chart["title"]: chart["multiline"]["tag"] for chart in layout["category"][0]["chart"]}
    assert tags_by_chart["loss"] == ["train/loss", "test/loss", "validation/loss"]


def test_tensorboard_hparams_has_settings_and_result(run: Path, tensorboard: TensorBoardClient) -> None:
    experiment = tensorboard("plugin/hparams/experiment", data=b"{}")
    settings = {info["name"] for info in experiment["hparamInfos"]}
    assert {"optim.lr", "data.augment"} <= settings and len(settings) < 16 and "data.root" not in settings
    states = [f"STATUS_{state}" for state in ("UNKNOWN", "SUCCESS", "FAILURE", "RUNNING")]
    query = {"startIndex": 0, "sliceSize": 9, "allowedStatuses": states, "colParams": []}
    (group,) = tensorboard("plugin/hparams/session_groups", data=json.dumps(query).encode())["sessionGroups"]
    values = {value["name"]["tag"]: value["value"] for value in group["metricValues"]}
    summary = json.loads((run / "summary.json").read_text())
    assert values["test/accuracy"] == pytest.approx(summary["test"]["accuracy"])


def test_tensorboard_precision_recall_curve_matches_summary(run: Path, tensorboard: TensorBoardClient) -> None:
    curve = tensorboard("plugin/pr_curves/pr_curves", run=".", tag="test/zero")["."][-1]
    row = json.loads((run / "summary.json").read_text())["test"]["classes"][0]
    assert curve["recall"][0] == 1.0  # threshold 0: every image counts as this class
    middle = len(curve["recall"]) // 2  # threshold 0.5: nearly the same images as the predicted class
    assert curve["recall"][middle] == pytest.approx(row["recall"], abs=0.1)


def test_wandb_has_each_row_once_with_its_media(run: Path) -> None:
    (session,) = (run / "wandb").glob("offline-run-*")
    records = read_wandb_records(session)
    wandb_rows = [record["history"]["item"] for record in records if record.get("type") == "history"]
    rows = RunRecord(run).rows
    assert [wandb_row["step"] for wandb_row in wandb_rows] == [row["step"] for row in rows]
    for wandb_row, row in zip(wandb_rows, rows, strict=True):
        split = row["split"]
        assert wandb_row[f"{split}/loss"] == row["loss"] and wandb_row[f"{split}/accuracy"] == row["accuracy"]
    last = wandb_rows[-1]
    assert last["test/classes_table._type"] == "table-file" and last["test/classes_table.nrows"] == 10
    assert last["test/confusion_matrix_table.nrows"] == 100
    assert last["test/classes._type"] == last["test/confusion._type"] == "image-file"
    assert last["test/mistakes.count"] == len(read_examples(run).mistakes)
    assert last["feature_maps/conv1._type"] == "image-file"
    assert any("samples._type" in wandb_row for wandb_row in wandb_rows)


def test_wandb_has_the_weights_and_an_alert_at_the_end(run: Path) -> None:
    (session,) = (run / "wandb").glob("offline-run-*")
    records = read_wandb_records(session)
    artifacts = [record["artifact"] for record in records if record.get("type") == "artifact"]
    assert "model" in {artifact["type"] for artifact in artifacts}
    (alert,) = [record["alert"] for record in records if record.get("type") == "alert"]
    assert "finished" in alert["title"] and "test accuracy" in alert["text"]


@pytest.mark.slow
def test_wandb_alerts_on_non_finite_loss_and_on_failure(ranks: Ranks) -> None:
    settings = ["run.name=x", "train.max_steps=60", "train.max_bad_steps=1", "log.wandb=offline", "log.alerts=true"]
    ranks.run(1, *SMALL, *settings, fault="nan_image", code=2)
    (session,) = Path("runs/x/wandb").glob("offline-run-*")
    titles = [record["alert"]["title"] for record in read_wandb_records(session) if record.get("type") == "alert"]
    assert titles == ["x: loss or gradient not finite", "x: failed"]


def test_figures_folder_has_all_figures_and_the_report_embeds_them(run: Path) -> None:
    names = {str(path.relative_to(run / "figures")) for path in (run / "figures").rglob("*.png")}
    feature_maps = {"feature_maps/conv1.png", "feature_maps/fc1.png"}
    assert names == {"classes.png", "confusion.png", "curves.png", "mistakes.png", "samples.png"} | feature_maps
    for name in names:
        picture = np.asarray(Image.open(run / "figures" / name))
        assert picture.shape[0] > 100 and picture.shape[1] > 100 and picture.std() > 5, name
    report = (run / "report.html").read_text()
    assert "<h2>First training batch</h2>" in report and 'alt="samples"' in report
    assert "<h2>Feature maps</h2>" in report and 'alt="conv1"' in report


def test_report_command_draws_equal_figures(run: Path, samecurve: Samecurve) -> None:
    content = (run / "figures" / "confusion.png").read_bytes()
    (run / "figures" / "confusion.png").unlink()
    samecurve("report", str(run))
    assert (run / "figures" / "confusion.png").read_bytes() == content


@pytest.mark.slow
def test_media_do_not_change_the_training(ranks: Ranks) -> None:
    settings = [*SMALL, "train.max_steps=25"]
    ranks.run(1, *settings, "run.name=media", "log.figures=true", "log.tensorboard=true", 'log.feature_maps=["0"]')
    ranks.run(1, *settings, "run.name=bare", "log.report=false")
    weights = [Path(f"runs/{name}/model.safetensors").read_bytes() for name in ("media", "bare")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("names", [[], ["mixup"]])
def test_first_batch_images_undo_the_normalization_and_show_mixing(names: list[str]) -> None:
    pixels = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    train, batches = TensorSplit(pixels, torch.zeros(50, dtype=torch.int64)), BatchSampler(50, 40, seed=1)
    normalization = resolve_normalization("cifar10", pixels)
    augment = Augment(DataSettings(augment=names), normalization, 0, torch.device("cpu"), pixels.shape[1:])
    stored, trained_on = first_batch_images(train, batches, augment, normalization)
    assert torch.equal(stored, pixels[batches.sample_ids(0)[:36]].permute(0, 2, 3, 1))
    assert trained_on.dtype == torch.uint8 and trained_on.shape == stored.shape
    if not names:
        assert torch.equal(trained_on, stored)
        return
    partners = pixels[batches.partner_ids(0)[:36]].permute(0, 2, 3, 1)
    low, high = torch.minimum(stored, partners), torch.maximum(stored, partners)
    assert bool(((low <= trained_on) & (trained_on <= high)).all())
    assert not torch.equal(trained_on, stored) and not torch.equal(trained_on, partners)


def test_histograms_count_every_finite_value() -> None:
    module = nn.Linear(3, 2)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[0.0, 1, 2], [3, float("nan"), 4]]))
    module.bias.grad = torch.ones(2)
    histograms = parameter_histograms(module)
    assert set(histograms) == {"weights/weight", "weights/bias", "gradients/bias"}
    assert sum(histograms["weights/weight"].counts) == 5 and histograms["weights/weight"].sum == 10
    assert histograms["weights/weight"].sum_of_squares == 30
    assert sum(histograms["gradients/bias"].counts) == 2


def test_histogram_of_large_tensor_samples_a_million_values() -> None:
    histogram = parameter_histograms(nn.Linear(5000, 1000))["weights/weight"]
    assert (1 << 20) <= sum(histogram.counts) < (1 << 21)
