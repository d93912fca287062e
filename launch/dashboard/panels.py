"""The names of metrics in, titled panels in sections out: none of them twice, and none left out."""

from collections.abc import Iterable
from dataclasses import dataclass

# Each section, and the metrics in it, by what follows the split in their name.
SECTIONS: dict[str, tuple[str, ...]] = {
    "What it learns": ("accuracy", "tta_accuracy", "loss"),
    "How fast": ("samples_per_second", "data_wait_share", "communication_share", "gpu_memory_bytes"),
    "Learning rate and gradient": ("lr", "grad_norm"),
    "Classes and mistakes": (),
    "More": (),
    "How far": ("epoch", "samples", "seconds"),
}
FIRST = "What it learns"
_MEDIA, _REST, _LAST = "Classes and mistakes", "More", "How far"
# A media file's `_type` in the summary of a W&B run, and the panel that shows it.
KINDS = {"table-file": "table", "image-file": "image", "images": "image", "images/separated": "image"}
_SPLITS = ("test", "validation", "train")
_WORDS = {
    "tta_accuracy": "accuracy with test-time augmentation",
    "samples_per_second": "images a second",
    "data_wait_share": "share of time waiting for data",
    "communication_share": "share of time in communication",
    "gpu_memory_bytes": "GPU memory in bytes",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
}


@dataclass(frozen=True, slots=True)
class Panel:
    key: str
    """as W&B has it: split/name"""
    title: str
    kind: str = "line"
    """line, image or table"""


@dataclass(frozen=True, slots=True)
class Section:
    title: str
    panels: tuple[Panel, ...]

    @property
    def is_open(self) -> bool:
        """Whether it is of use at first sight."""
        return self.title != _LAST


def arrange(metrics: Iterable[str], media: dict[str, str]) -> list[Section]:
    """One panel for each metric, and for each of the media, whose kinds are given by name. No section is empty."""
    panels = [Panel(key, _title(key)) for key in metrics]
    panels += [Panel(key, _title(key), kind) for key, kind in media.items()]
    by_section: dict[str, list[Panel]] = {title: [] for title in SECTIONS}
    for panel in sorted(panels, key=_order):
        by_section[_section(panel)].append(panel)
    return [Section(title, tuple(found)) for title, found in by_section.items() if found]


def _section(panel: Panel) -> str:
    name = panel.key.partition("/")[2]
    named = (title for title, names in SECTIONS.items() if name in names)
    return _MEDIA if panel.kind != "line" else next(named, _REST)


def _order(panel: Panel) -> tuple[int, int, str]:
    """As SECTIONS lists them; of one metric the split that counts most comes first."""
    split, _, name = panel.key.partition("/")
    names = [name for listed in SECTIONS.values() for name in listed]
    return (
        names.index(name) if name in names else len(names),
        _SPLITS.index(split) if split in _SPLITS else len(_SPLITS),
        panel.key,
    )


def _title(key: str) -> str:
    split, _, name = key.partition("/")
    words = _WORDS.get(name, name.replace("_", " "))
    return f"{words}, {split}" if name else key
