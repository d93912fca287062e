"""A run's first batch and each evaluation in; figures in its folder, and what the trackers show, out. Rank 0 has it."""

from trainer.build import Components
from trainer.config.schema import RunConfig
from trainer.data.splits import TensorSplit
from trainer.inference.evaluation import Predictions
from trainer.report.feature_maps import compute_feature_maps
from trainer.report.first_batch import first_batch_images
from trainer.report.histograms import histograms
from trainer.run.folder import RunFolder
from trainer.tracking.logger import MetricLogger
from trainer.tracking.tracker import EvaluationMedia, Picture


class NullMediaWriter:
    def on_start(self) -> None: ...
    def on_evaluation(self, part: TensorSplit, found: Predictions, step: int) -> None: ...


class MediaWriter(NullMediaWriter):
    """Both raise OSError when a figure cannot be written."""

    def __init__(self, folder: RunFolder, config: RunConfig, parts: Components, metric_logger: MetricLogger) -> None:
        self._folder, self._config, self._components, self._journal = folder, config, parts, metric_logger

    def on_start(self) -> None:
        """Once in a run, after its first line of metrics: what the network is, and what it is fed with."""
        from trainer.report import figures  # late: the first line of training need not wait for it

        parts, place = self._components, self._folder.path / figures.FIGURES_FOLDER
        if (place / "samples.png").exists():
            return
        stored, trained_on = first_batch_images(
            parts.splits.train, parts.batches, parts.augment, parts.about.normalization
        )
        pictures = {"samples": figures.samples(stored.numpy(), trained_on.numpy())}
        image = parts.augment.normalize(parts.splits.train.images[:1].to(parts.augment.device))
        self._journal.log_first_batch(parts.module, image, pictures)
        figures.write(pictures, place)

    def on_evaluation(self, part: TensorSplit, found: Predictions, step: int) -> None:
        """The test set, whose evaluation.json and examples are in the folder."""
        from trainer.report import figures
        from trainer.run.record import read_record

        run = read_record(self._folder.path)
        pictures, maps = figures.run_figures(run), self._feature_maps(part)
        shown = {f"test/{name}": pictures[name] for name in figures.EVALUATION_FIGURES if name in pictures}
        self._journal.log_media(
            EvaluationMedia(step, run, part.labels.cpu(), found, shown | maps, histograms(self._components.module))
        )
        figures.write(pictures | maps, self._folder.path / figures.FIGURES_FOLDER)

    def _feature_maps(self, part: TensorSplit) -> dict[str, Picture]:
        """Of the first image of the test set."""
        from trainer.report import figures

        names, image = self._config.log.feature_maps, part.images[:1]
        if not names:
            return {}
        batch = self._components.augment.normalize(image.to(self._components.augment.device))
        pixels = image[0].permute(1, 2, 0).cpu().numpy()
        found = compute_feature_maps(self._components.module, batch, names)
        return {
            f"feature_maps/{name}": figures.feature_maps(name, pixels, each.numpy()) for name, each in found.items()
        }
