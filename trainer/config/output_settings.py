"""Defines the settings of the output of a run: evaluation, checkpoints and logs. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from trainer.config.setting import setting


@dataclass(frozen=True)
class EvalSettings:
    """The evaluation."""

    every_epochs: int = setting(
        1, "epochs between evaluations; 0: only at the end", minimum=0, maximum=10**9, may_change=True
    )
    batch_size: int = setting(
        250, "samples in one forward pass; it does not change the result", minimum=1, maximum=2**20, may_change=True
    )
    tta: Literal["none", "mirror", "mirror_and_shift"] = setting(
        "none",
        "test-time augmentation: weighted mean over 2 or 6 views, reported in addition to the plain accuracy",
    )


@dataclass(frozen=True)
class CheckpointSettings:
    """When checkpoints are written and how many are kept."""

    every_steps: int = setting(
        0, "steps between checkpoints; 0: use every_epochs only", minimum=0, maximum=10**9, may_change=True
    )
    every_epochs: int = setting(
        1, "epochs between checkpoints; 0: use every_steps only", minimum=0, maximum=10**9, may_change=True
    )
    keep: int = setting(
        2,
        "number of newest checkpoints to keep; the best one is kept in addition",
        minimum=1,
        maximum=10**6,
        may_change=True,
    )


@dataclass(frozen=True)
class LogSettings:
    """Metrics, trackers, the report and the figures."""

    every_steps: int = setting(50, "steps between rows of training metrics", minimum=1, maximum=10**9, may_change=True)
    tensorboard: bool = setting(True, "write TensorBoard event files", may_change=True)
    wandb: Literal["auto", "online", "offline", "off"] = setting(
        "auto",
        "W&B mode; auto: online if there is an API key and a network, else offline, with the command for the upload",
        may_change=True,
    )
    project: str = setting("samecurve", "W&B: project; the default is WANDB_PROJECT if that is set", may_change=True)
    group: str | None = setting(
        None, "W&B: group of runs; null: the folder part of a run.name such as sweep/a", may_change=True
    )
    tags: list[str] = setting([], "W&B: tags of the run", example="baseline, long", may_change=True)
    job_type: str = setting("train", "W&B: job type of the run within its group", may_change=True)
    notes: str | None = setting(None, "W&B: notes on the run", may_change=True)
    alerts: bool = setting(
        False, "W&B: send an alert when a loss is not finite, when the run fails and when it finishes", may_change=True
    )
    artifact: bool = setting(False, "W&B: upload the final weights as an artifact", may_change=True)
    report: bool = setting(
        True, "write report.html at the end, and after evaluations in up to 2 % of the run time", may_change=True
    )
    figures: bool = setting(
        True,
        "write figures to figures/NAME.png, TensorBoard and W&B at the first and last evaluation, and at others in up "
        "to 2 % of the run time",
        may_change=True,
    )
    feature_maps: list[str] = setting(
        [], "layers whose feature maps of a test image are among the figures, such as [conv1, pool1]", may_change=True
    )
