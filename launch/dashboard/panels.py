"""Arranges metrics and media in titled panels and sections. Each key has exactly one panel."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from trainer.tracking.wandb_media import PanelKind

RESULTS = "Accuracy and loss"
_MEDIA, _OTHER, _PROGRESS = "Classes and mistakes", "Other", "Progress"
# Metrics of each section, by their names without the split.
SECTIONS: dict[str, tuple[str, ...]] = {
    RESULTS: ("accuracy", "tta_accuracy", "loss"),
    "Speed": ("samples_per_second", "data_wait_share", "communication_share", "gpu_memory_bytes"),
    "Learning rate and gradient": ("lr", "grad_norm"),
    _MEDIA: (),
    _OTHER: (),
    _PROGRESS: ("epoch", "samples", "seconds"),
}
_SPLITS = ("test", "validation", "train")  # in the order of the panels of one metric
_METRIC_TITLES = {
    "tta_accuracy": "accuracy with test-time augmentation",
    "samples_per_second": "images per second",
    "data_wait_share": "share of time waiting for data",
    "communication_share": "share of time in communication",
    "gpu_memory_bytes": "GPU memory in bytes",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
}


@dataclass(frozen=True, slots=True)
class Panel:
    """A panel for one key of a W&B run."""

    key: str
    """key in W&B: split/name"""
    title: str
    kind: Literal["line"] | PanelKind = "line"


@dataclass(frozen=True, slots=True)
class Section:
    """A titled group of panels."""

    title: str
    panels: tuple[Panel, ...]

    @property
    def is_open(self) -> bool:
        """False if the workspace shows only the title of the section until the user opens it."""
        return self.title != _PROGRESS


def arrange_panels(metrics: Iterable[str], media: dict[str, PanelKind]) -> list[Section]:
    """Returns the sections that are not empty, with one panel for each metric and each media key.

    metrics: keys of numbers. media: keys of images and tables, with the panel kind of each.
    """
    panels = [Panel(key, _title(key)) for key in metrics]
    panels += [Panel(key, _title(key), kind) for key, kind in media.items()]
    panels_by_section: dict[str, list[Panel]] = {title: [] for title in SECTIONS}
    for panel in sorted(panels, key=_sort_key):
        panels_by_section[_section_title(panel)].append(panel)
    return [Section(title, tuple(section)) for title, section in panels_by_section.items() if section]


def _section_title(panel: Panel) -> str:
    if panel.kind != "line":
        return _MEDIA
    name = panel.key.partition("/")[2]
    return next((title for title, names in SECTIONS.items() if name in names), _OTHER)


def _sort_key(panel: Panel) -> tuple[int, int, str]:
    """Sorts by metric in the order of SECTIONS, then by split."""
    split, _, name = panel.key.partition("/")
    names = [name for section_names in SECTIONS.values() for name in section_names]
    return (
        names.index(name) if name in names else len(names),
        _SPLITS.index(split) if split in _SPLITS else len(_SPLITS),
        panel.key,
    )


def _title(key: str) -> str:
    split, _, name = key.partition("/")
    title = _METRIC_TITLES.get(name, name.replace("_", " "))
    return f"{title}, {split}" if name else key
