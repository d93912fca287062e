"""A run's first batch and each evaluation in; figures in its folder, and what the trackers show, out. Rank 0 has it."""

from trainer import feature_maps, first_batch
from trainer.data import Images
from trainer.evaluation import Predictions
from trainer.figures import Picture
from trainer.folder import RunFolder
from trainer.journal import Journal
from trainer.parts import Parts
from trainer.settings import RunConfig
from trainer.showing import Showing, histograms


class NoVisuals:
    def begins(self) -> None: ...
    def evaluated(self, part: Images, found: Predictions, step: int) -> None: ...


class Visuals(NoVisuals):
    """Both raise OSError when a figure cannot be written."""

    def __init__(self, folder: RunFolder, config: RunConfig, parts: Parts, journal: Journal) -> None:
        self._folder, self._config, self._parts, self._journal = folder, config, parts, journal

    def begins(self) -> None:
        """Once in a run, after its first line of metrics: what the network is, and what it is fed with."""
        from trainer import figures  # late: the first line of training need not wait for it

        parts, place = self._parts, self._folder.path / figures.FOLDER
        if (place / "samples.png").exists():
            return
        stored, trained_on = first_batch.stored_and_trained_on(
            parts.splits.train, parts.batches, parts.augment, parts.about.normalization
        )
        pictures = {"samples": figures.samples(stored.numpy(), trained_on.numpy())}
        image = parts.augment.plain(parts.splits.train.images[:1].to(parts.augment.device))
        self._journal.shows_beginning(parts.module, image, pictures)
        figures.write(pictures, place)

    def evaluated(self, part: Images, found: Predictions, step: int) -> None:
        """The test set, whose evaluation.json and examples are in the folder."""
        from trainer import figures, told

        run = told.read(self._folder.path)
        pictures, maps = figures.of_run(run), self._feature_maps(part)
        shown = {f"test/{name}": pictures[name] for name in figures.OF_AN_EVALUATION if name in pictures}
        self._journal.shows(Showing(step, run, part.labels.cpu(), found, shown | maps, histograms(self._parts.module)))
        figures.write(pictures | maps, self._folder.path / figures.FOLDER)

    def _feature_maps(self, part: Images) -> dict[str, Picture]:
        """Of the first image of the test set."""
        from trainer import figures

        names, image = self._config.log.feature_maps, part.images[:1]
        if not names:
            return {}
        batch = self._parts.augment.plain(image.to(self._parts.augment.device))
        pixels = image[0].permute(1, 2, 0).cpu().numpy()
        found = feature_maps.maps(self._parts.module, batch, names)
        return {
            f"feature_maps/{name}": figures.feature_maps(name, pixels, each.numpy()) for name, each in found.items()
        }
