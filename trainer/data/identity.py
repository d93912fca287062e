"""The identity of a data set: its classes and the order, labels and checksums of its samples, not its place.

A run stores the identity of its data set in each checkpoint and in its run folder, and continues with no other:

    data.json                     classes, and of each split the number of images per class and a SHA-256
    data/train-<SHA-256>.json.gz  text with this SHA-256: the label and CRC-32 of each sample, in order of the sample
                                  ids; for image files also the name under data.root, in form NFC, and the size

Imports no torch.
"""

import gzip
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainer.data.dataset import ArraySplit, checksum_images, list_names
from trainer.errors import DataError
from trainer.run.files import replace_file
from trainer.run.reading import content
from trainer.run.record import unreadable_file
from trainer.text.escape import escape

DATA_FILE = "data.json"
TRAINING_ADVICE = "choose another run.name to train on this one"
_MAX_LISTED_COUNTS = 3


@dataclass(frozen=True, slots=True)
class SplitIdentity:
    """The identity of one split."""

    counts: tuple[int, ...]
    """images of each class"""
    sha256: str
    """empty if the files were listed, not read"""
    samples_json: bytes | None = None
    """the content of its file in data/; without checksums if the files were listed; None if only the hash is known"""

    @property
    def file(self) -> str:
        """Returns the end of the name of the file with samples_json."""
        return f"{self.sha256[:16]}.json.gz"


@dataclass(frozen=True, slots=True)
class DataIdentity:
    """The identity of a data set, or of some of its splits."""

    classes: tuple[str, ...]
    splits: dict[str, SplitIdentity]
    """train, test"""

    def to_json(self) -> dict[str, Any]:
        """Returns the content of data.json."""
        splits = {
            name: {"images": sum(split.counts), "counts": list(split.counts), "sha256": split.sha256}
            for name, split in self.splits.items()
        }
        return {"classes": list(self.classes), "splits": splits}

    def without_samples(self) -> "DataIdentity":
        """Returns the identity without the lists of samples."""
        return replace(self, splits={name: replace(split, samples_json=None) for name, split in self.splits.items()})

    def write(self, folder: Path) -> None:
        """Writes the lists of samples that a run folder lacks. Raises OSError."""
        for name, split in self.splits.items():
            path = folder / "data" / f"{name}-{split.file}"
            if split.samples_json is not None and not path.is_file():
                path.parent.mkdir(exist_ok=True)
                _write(path, gzip.compress(split.samples_json, compresslevel=1, mtime=0))


def _write(path: Path, data: bytes) -> None:
    replace_file(path, lambda partial: partial.write_bytes(data))


def read_identity(description: dict[str, Any], file: Path, folder: Path) -> DataIdentity:
    """Returns the identity from the content of data.json or of a checkpoint, with the lists that a run folder has.

    file: what contains the description. Raises FolderError, with its path, if the description is damaged.
    """
    try:
        content.check(description, content.DATA)
        classes = tuple(description["classes"])
        splits = {name: _parse_split(name, description["splits"][name], len(classes)) for name in ("train", "test")}
    except (ValueError, RecursionError) as error:
        raise unreadable_file(file, error) from None
    return DataIdentity(classes, {name: _with_samples(split, folder / "data", name) for name, split in splits.items()})


def _parse_split(name: str, split: dict[str, Any], num_classes: int) -> SplitIdentity:
    """Raises ValueError unless the split has a count for each class."""
    if len(split["counts"]) != num_classes:
        raise ValueError(f"expected splits.{name}.counts of {num_classes} classes, got {len(split['counts'])}")
    return SplitIdentity(tuple(split["counts"]), split["sha256"])


def _with_samples(split: SplitIdentity, folder: Path, name: str) -> SplitIdentity:
    """Adds the list of samples if its file is there and has the right hash."""
    try:
        samples_json = gzip.decompress((folder / f"{name}-{split.file}").read_bytes())
    except (OSError, EOFError, zlib.error):  # the comparison then says less
        return split
    matches = hashlib.sha256(samples_json).hexdigest() == split.sha256
    return replace(split, samples_json=samples_json) if matches else split


def identify_split(split: ArraySplit, num_classes: int) -> SplitIdentity:
    """Returns the identity of a loaded split."""
    checksums = checksum_images(split.images) if split.checksums is None else split.checksums
    samples: dict[str, Any] = {"labels": split.labels.tolist(), "checksums": checksums.tolist()}
    if split.names:
        samples |= {"names": split.names, "sizes": split.sizes}
    samples_json = _to_json(samples)
    counts = np.bincount(split.labels, minlength=num_classes).tolist()
    return SplitIdentity(tuple(counts), hashlib.sha256(samples_json).hexdigest(), samples_json)


def identify_listed(
    names: Sequence[str], sizes: Sequence[int], labels: Sequence[int], num_classes: int
) -> SplitIdentity:
    """Returns what is known of a split when its files have been listed, but not read."""
    counts = Counter(labels)
    return SplitIdentity(
        tuple(counts[label] for label in range(num_classes)), "", _to_json({"names": names, "sizes": sizes})
    )


def _to_json(samples: dict[str, Any]) -> bytes:
    return json.dumps(samples, separators=(",", ":")).encode()


def check_same_data(
    before: DataIdentity, now: DataIdentity, accept_added_test_images: bool, owner: str, advice: str = TRAINING_ADVICE
) -> str:
    """Compares the splits of `now` with those of `before`, the data set of a run. Returns a line to print, or "".

    accept_added_test_images: as the setting. owner: what was trained on `before`, such as "checkpoint x". advice: what
    the error tells the user to do. Raises DataError, which names the difference, unless both are the same.
    """
    differences = [*_class_differences(before.classes, now.classes)]
    for name in now.splits:
        differences += _split_differences(name, before, now)
    if not differences:
        return ""
    difference, setting = "; ".join(differences), ""
    if _only_adds_test_images(before, now):
        if accept_added_test_images:
            return f"data.accept_added_test_images=true: {difference}"
        setting = ", or set data.accept_added_test_images=true to accept the added images"
    raise DataError(
        f"the data set is not the one that {owner} was trained on: {difference}. Restore it, or {advice}{setting}"
    )


def _class_differences(before: Sequence[str], now: Sequence[str]) -> Iterator[str]:
    missing = [name for name in before if name not in now]
    new = [name for name in now if name not in before]
    if len(missing) == len(new) == 1:
        yield f"class {missing[0]} is now {new[0]}"
    elif missing or new:
        states = ((missing, "missing"), (new, "new"))
        yield " and ".join(f"{_describe_classes(names)} {state}" for names, state in states if names)
    elif tuple(before) != tuple(now):
        label = next(label for label, name in enumerate(before) if now[label] != name)
        yield f"the classes are in another order: class {label} was {before[label]}, now {now[label]}"


def _describe_classes(names: Sequence[str]) -> str:
    return f"class {names[0]} is" if len(names) == 1 else f"classes {list_names(names)} are"


def _split_differences(name: str, before: DataIdentity, now: DataIdentity) -> list[str]:
    """Returns what has changed in a split: the numbers of images, and the first image of each kind of change."""
    old, new = before.splits.get(name), now.splits[name]
    if old is None or old.sha256 == new.sha256:
        return []
    differences = [*_count_differences(name, *(dict(_counts(data, name)) for data in (before, now)))]
    if old.samples_json is not None and new.samples_json is not None:
        samples = json.loads(old.samples_json), json.loads(new.samples_json)
        if all("names" in split_samples for split_samples in samples):
            differences += _file_differences(*map(_contents, samples))
        else:
            differences += _sample_differences(name, *samples)
    if not differences and new.sha256:
        differences = [f"{name} has as many images of each class, but other ones (names, contents, labels or order)"]
    return differences


def _counts(data: DataIdentity, name: str) -> Iterator[tuple[str, int]]:
    """Yields each class and its number of images in a split."""
    return zip(data.classes, data.splits[name].counts, strict=True)


def _count_differences(name: str, old: dict[str, int], new: dict[str, int]) -> Iterator[str]:
    changed = [
        f"{label} {new[label]:,} instead of {count:,}" for label, count in old.items() if new.get(label, count) != count
    ]
    listed = ", ".join(changed[:_MAX_LISTED_COUNTS]) + (", ..." if len(changed) > _MAX_LISTED_COUNTS else "")
    totals = sum(old.values()), sum(new.values())
    if totals[0] != totals[1]:
        yield f"{name} has {totals[1]:,} images instead of {totals[0]:,}{f' ({listed})' if listed else ''}"
    elif listed:
        yield f"{name} has the images {listed}"


class _Content(NamedTuple):
    """What is known of the content of an image file."""

    size_bytes: int
    checksum: int | None
    """None if the file was listed, not read"""

    def differs(self, other: "_Content") -> bool:
        return self.size_bytes != other.size_bytes or (
            None not in (self.checksum, other.checksum) and self.checksum != other.checksum
        )


def _contents(samples: dict[str, Any]) -> dict[str, _Content]:
    """Returns the content of each image file by its name, in order of the sample ids."""
    checksums = samples.get("checksums") or [None] * len(samples["names"])
    return dict(zip(samples["names"], map(_Content, samples["sizes"], checksums), strict=True))


def _file_differences(old: dict[str, _Content], new: dict[str, _Content]) -> Iterator[str]:
    """Yields one phrase for each kind of change, with the first image by name."""
    missing, added = sorted(old.keys() - new), sorted(new.keys() - old)
    added_by_checksum = {new[name].checksum: name for name in reversed(added) if new[name].checksum is not None}
    moved = {name: added_by_checksum[old[name].checksum] for name in missing if old[name].checksum in added_by_checksum}
    changed = sorted(name for name in old.keys() & new if old[name].differs(new[name]))
    yield from _first(moved, lambda name: f"is now {escape(moved[name])}")
    yield from _first([name for name in missing if name not in moved], lambda _: "is missing")
    yield from _first([name for name in added if name not in moved.values()], lambda _: "is new")
    yield from _first(changed, lambda name: f"has other content ({_describe_sizes(old[name], new[name])})")
    if not (missing or added or changed):
        first = next((name for name, other in zip(old, new, strict=True) if name != other), None)
        if first is not None:
            yield f"the images are in another order, from {escape(first)} on"


def _first(names: Collection[str], describe: Callable[[str], str]) -> Iterator[str]:
    for name in list(names)[:1]:
        more = f", and {len(names) - 1:,} more" if len(names) > 1 else ""
        yield f"{escape(name)} {describe(name)}{more}"


def _describe_sizes(old: _Content, new: _Content) -> str:
    if old.size_bytes == new.size_bytes:
        return f"of the same {new.size_bytes:,} bytes"
    return f"{new.size_bytes:,} bytes instead of {old.size_bytes:,}"


def _sample_differences(name: str, old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """Yields the first sample that differs, for images without files of their own."""
    for index, (old_label, label) in enumerate(zip(old["labels"], new["labels"], strict=False)):
        if old_label != label:
            yield f"image {index} of {name} (counted from 0) has label {label} instead of {old_label}"
            return
        if old["checksums"][index] != new["checksums"][index]:
            yield f"image {index} of {name} (counted from 0) has other pixels"
            return


def _only_adds_test_images(before: DataIdentity, now: DataIdentity) -> bool:
    """Returns whether the data sets differ only by test images that `before` lacks."""
    if before.classes != now.classes or "test" not in before.splits or "test" not in now.splits:
        return False
    if "train" in now.splits and _split_differences("train", before, now):
        return False
    all_samples = [data.splits["test"].samples_json for data in (before, now)]
    old, new = (json.loads(samples_json or b"{}") for samples_json in all_samples)
    if "names" not in old or "names" not in new:
        return False
    old_contents, new_contents = _contents(old), _contents(new)
    return len(new_contents) > len(old_contents) and all(
        name in new_contents and not old_content.differs(new_contents[name])
        for name, old_content in old_contents.items()
    )
