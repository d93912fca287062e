"""Checks a run before it starts or waits in a queue: all that its ranks would find in their first minute.

Needs torch, so its first call takes some seconds. forecast.check_run is the part that does not.
"""

import dataclasses
import warnings
from collections.abc import Iterable

from launch import forecast
from launch.forecast import RankLayout
from trainer.config.schema import ModelSettings, RunConfig
from trainer.errors import UserError
from trainer.run.folder import RunFolder
from trainer.run.record import RunRecord


def check_runs(configs: Iterable[RunConfig], layout: RankLayout) -> None:
    """Checks several runs as check_run does. Runs that differ only in seed or folder share the check of the network."""
    from trainer.data.image_counts import check_files  # lazy import: 0.1 s

    checked: list[RunConfig] = []
    for config in configs:
        forecast.check_run(config, layout)
        check_files(config.data)
        _check_resume(config)
        alike = dataclasses.replace(config, run=dataclasses.replace(config.run, name="", root="", seed=0))
        if alike not in checked:
            checked.append(alike)
            _check_network(config, _model_to_build(config), layout.world_size)


def check_run(config: RunConfig, layout: RankLayout) -> None:
    """Raises the UserError that the ranks of this run would raise before their first step, if it can be known here.

    Builds the network without weights. Decodes no image, downloads nothing and creates no file.
    """
    check_runs([config], layout)


def _check_resume(config: RunConfig) -> None:
    if config.run.resume in ("auto", "never"):
        return
    from trainer.run.resume import check_resume_path  # lazy import: torch

    check_resume_path(config, RunFolder(config.folder))


def _model_to_build(config: RunConfig) -> ModelSettings:
    """Returns the network's settings; a run that continues takes its weights from a checkpoint."""
    is_new = config.run.resume in ("auto", "never") and not RunRecord(config.folder).status
    return config.model if is_new else dataclasses.replace(config.model, pretrained=None)


def _check_network(config: RunConfig, model: ModelSettings, world_size: int) -> None:
    """Raises the UserError of the ranks. Tensors of the meta device have a shape and no memory; not all operations know
    it, so that the CPU has the last word."""
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
