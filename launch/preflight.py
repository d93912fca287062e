"""Checks a run before it starts or waits in a queue: all that its ranks would find in their first minute.

Needs torch, so its first call takes some seconds. forecast.check_run is the part that does not.
"""

import dataclasses
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from launch import forecast
from launch.forecast import RankLayout
from trainer.config.plugins import DATASETS, load_plugin
from trainer.config.schema import ModelSettings, RunConfig
from trainer.config.validate import check_pretrained_file
from trainer.errors import UserError
from trainer.run.folder import RunFolder

if TYPE_CHECKING:
    from trainer.run.checkpoint import Progress


def check_runs(configs: Iterable[RunConfig], layout: RankLayout) -> None:
    """Checks several runs as check_run does. Runs that differ only in seed or folder share the check of the network."""
    from trainer.data.image_counts import check_files  # lazy import: 0.1 s

    checked: list[RunConfig] = []
    for config in configs:
        forecast.check_run(config, layout)
        model = _check_start(config)
        check_files(config.data)
        alike = dataclasses.replace(
            config, model=model, run=dataclasses.replace(config.run, name="", root="", seed=0, resume="")
        )
        if alike not in checked:
            checked.append(alike)
            _check_network(config, model, layout.world_size)


def check_run(config: RunConfig, layout: RankLayout) -> None:
    """Raises the UserError that the ranks of this run would raise before their first step, if it can be known here.

    Builds the network without weights. Decodes no image, downloads nothing and creates no file.
    """
    check_runs([config], layout)


def _check_start(config: RunConfig) -> ModelSettings:
    """Checks the checkpoint from which the run would start, or for a new run the file of pretrained weights.

    Returns the settings of the network to build: without pretrained weights if a checkpoint has the weights.
    """
    from trainer.run.resume import find_start  # lazy import: torch

    start, pretrained = find_start(config, RunFolder(config.folder)), config.model.pretrained
    if start is not None:
        _check_data(config, *start)
        return dataclasses.replace(config.model, pretrained=None)
    if pretrained and pretrained != "hub":
        check_pretrained_file(config.model, Path(pretrained).expanduser())
    return config.model


def _check_data(config: RunConfig, path: Path, progress: "Progress") -> None:
    """Raises DataError if the image files are not those of the checkpoint from which the run would start."""
    from trainer.data.identity import check_same_data, read_identity  # lazy import: 0.1 s

    data_set = load_plugin(DATASETS, config.data.name)
    if progress.data and hasattr(data_set, "identify_files"):  # an older version recorded no data set
        check_same_data(
            read_identity(progress.data, path / "progress.json", path.resolve().parent.parent),
            data_set.identify_files(config.data),
            config.data.accept_added_test_images,
            f"checkpoint {path}",
        )


def _check_network(config: RunConfig, model: ModelSettings, world_size: int) -> None:
    """Raises the UserError of the ranks.

    Tensors of the meta device have a shape and no memory. Not all operations support it: after an error, the
    CPU decides.
    """
    try:
        _build_network(config, model, world_size, "meta")
    except (UserError, NotImplementedError):
        _build_network(config, model, world_size, "cpu")


def _build_network(config: RunConfig, model: ModelSettings, world_size: int, device: str) -> None:
    import torch  # lazy import: 2 s

    from trainer.data.image_counts import count_per_class, count_training_images, image_channels
    from trainer.data.sampler import BatchSampler
    from trainer.models.fit import apply_pretrained_preprocessing, build_fitting_model
    from trainer.optim.optimizers import parameter_groups

    config, _ = apply_pretrained_preprocessing(config)
    channels, side, data = image_channels(config.data), config.data.side_pixels, config.data
    if channels is None:
        return
    num_images = count_training_images(data)
    batches = BatchSampler(num_images, data.global_batch_size, config.run.seed, data.shuffle, data.drop_last)
    with torch.device(device), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter", UserWarning)
        module = build_fitting_model(
            model, config, world_size, len(count_per_class(data)), (channels, side, side), batches.sizes
        )
        parameter_groups(module, config.optim)
