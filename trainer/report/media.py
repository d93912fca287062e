"""Computes images and histograms of the first batch and of evaluations, and passes them to figures and trackers."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.build import Components
from trainer.config.schema import RunConfig
from trainer.data.augment import Augment
from trainer.data.normalization import Normalization
from trainer.data.sampler import BatchSampler
from trainer.data.splits import TensorSplit
from trainer.inference.evaluation import Predictions
from trainer.report.examples import read_examples
from trainer.report.feature_maps import compute_feature_maps
from trainer.run.folder import RunFolder
from trainer.run.record import RunRecord
from trainer.tracking.logger import MetricLogger
from trainer.tracking.tracker import EvaluationMedia, Histogram

_FIRST_BATCH_IMAGES = 36
_HISTOGRAM_BINS = 64
_HISTOGRAM_MAX_VALUES = 1 << 20  # per tensor; larger tensors are sampled evenly


class NullMediaWriter:
    """Writes nothing. ReportWriter uses it if log.figures=false and after a run has stopped."""

    def on_start(self) -> None: ...
    def on_evaluation(self, split: TensorSplit, predictions: Predictions, step: int) -> None: ...


class MediaWriter(NullMediaWriter):
    """Writes the files in figures/ and logs the same images to the trackers. Only rank 0 has one."""

    def __init__(
        self, folder: RunFolder, config: RunConfig, components: Components, metric_logger: MetricLogger
    ) -> None:
        self._folder, self._config = folder, config
        self._components, self._metric_logger = components, metric_logger

    def on_start(self) -> None:
        """Shows the network's graph and the first batch, once per run. Call it after the run's first row.

        Raises OSError if a figure cannot be written.
        """
        from trainer.report import figures  # lazy import: it must not delay the first row

        figures_folder = self._folder.path / figures.FIGURES_FOLDER
        if (figures_folder / f"{figures.FIRST_BATCH_FIGURE}.png").exists():  # written by an earlier session
            return
        components, train = self._components, self._components.splits.train
        normalization = components.model_metadata.normalization
        stored, trained_on = first_batch_images(train, components.batches, components.augment, normalization)
        picture = figures.draw_first_batch(stored.numpy(), trained_on.numpy())
        network_input = components.augment.normalize(train.images[:1].to(components.augment.device))
        shown = {figures.FIRST_BATCH_FIGURE: figures.flatten(picture)}
        self._metric_logger.log_first_batch(components.module, network_input, shown)
        figures.write_figures({figures.FIRST_BATCH_FIGURE: picture}, figures_folder)

    def on_evaluation(self, split: TensorSplit, predictions: Predictions, step: int) -> None:
        """Shows an evaluation of the test set. Call it after evaluation.json and the examples have been written.

        Raises OSError if a figure cannot be written.
        """
        from trainer.report import figures

        record, mistakes = RunRecord(self._folder.path), read_examples(self._folder.path).mistakes
        run_pictures, feature_maps = figures.draw_run_figures(record, mistakes), self._draw_feature_maps(split)
        shown = {f"test/{name}": run_pictures[name] for name in figures.EVALUATION_FIGURES if name in run_pictures}
        shown |= {name: figures.flatten(picture) for name, picture in feature_maps.items()}
        histograms = parameter_histograms(self._components.module)
        labels = split.labels.cpu()
        self._metric_logger.log_media(
            EvaluationMedia(step, record.evaluation, mistakes, labels, predictions, shown, histograms)
        )
        figures.write_figures(run_pictures | feature_maps, self._folder.path / figures.FIGURES_FOLDER)

    def _draw_feature_maps(self, split: TensorSplit) -> dict[str, NDArray[np.uint8]]:
        """Returns one picture, uint8 [H, W, 4], per layer of log.feature_maps, for the split's first image."""
        from trainer.report import figures

        layers, image = self._config.log.feature_maps, split.images[:1]
        if not layers:
            return {}
        network_input = self._components.augment.normalize(image.to(self._components.augment.device))
        pixels = image[0].permute(1, 2, 0).cpu().numpy()
        maps_by_layer = compute_feature_maps(self._components.module, network_input, layers)
        return {
            f"feature_maps/{layer}": figures.draw_feature_maps(layer, pixels, maps.numpy())
            for layer, maps in maps_by_layer.items()
        }


def first_batch_images(
    train: TensorSplit, batches: BatchSampler, augment: Augment, normalization: Normalization
) -> tuple[Tensor, Tensor]:
    """Returns the first images of epoch 0 as stored and as the network gets them, augmented and mixed.

    Both are uint8 [n, H, W, C] on the CPU, with at most 36 images. Augmentation may change H and W.
    """
    ids = batches.sample_ids(0)[:_FIRST_BATCH_IMAGES].to(train.images.device)
    stored = train.images[ids]
    batch = _augmented(train, ids, augment)
    if augment.uses_partners:
        partner_ids = batches.partner_ids(0)[:_FIRST_BATCH_IMAGES].to(ids.device)
        batch, _ = augment.mix(batch, _augmented(train, partner_ids, augment), ids.to(batch.device), epoch=0)
    mean, std = (
        torch.tensor(values, device=batch.device).view(1, -1, 1, 1)
        for values in (normalization.mean, normalization.std)
    )
    trained_on = (255 * (batch * std + mean)).round().clamp(0, 255).to(torch.uint8)
    return stored.permute(0, 2, 3, 1).cpu(), trained_on.permute(0, 2, 3, 1).cpu()


def _augmented(train: TensorSplit, ids: Tensor, augment: Augment) -> Tensor:
    images = train.images[ids].to(augment.device)  # a large data set stays in host memory
    return augment.normalize(augment.transform(images, ids.to(augment.device), epoch=0))


def parameter_histograms(module: nn.Module) -> dict[str, Histogram]:
    """Returns a histogram per parameter, `weights/NAME`, and one per current gradient, `gradients/NAME`.

    Skips tensors without finite values.
    """
    histograms = {}
    for name, parameter in module.named_parameters():
        for kind, values in (("weights", parameter.detach()), ("gradients", parameter.grad)):
            if values is not None and (histogram := _histogram(values)) is not None:
                histograms[f"{kind}/{name}"] = histogram
    return histograms


def _histogram(values: Tensor) -> Histogram | None:
    values = values.flatten()[:: max(1, values.numel() // _HISTOGRAM_MAX_VALUES)].float().cpu()
    values = values[values.isfinite()]
    if not values.numel():
        return None
    low, high = (float(value) for value in values.aminmax())
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts = torch.histc(values, _HISTOGRAM_BINS, low, high).tolist()
    edges = torch.linspace(low, high, _HISTOGRAM_BINS + 1, dtype=torch.float64).tolist()
    return Histogram(counts, edges, float(values.double().sum()), float(values.double().square().sum()))
