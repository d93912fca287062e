"""Lists the keys of images and tables that are logged to W&B, and creates these tables. No torch.

`samecurve dashboard` chooses the panel for a key by panel_kind, so every media key must be listed here.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from trainer.tracking.example import Example

PanelKind = Literal["image", "table"]

FIRST_BATCH_KEY = "samples"
MISTAKES_KEY = "test/mistakes"
CLASS_TABLE_KEY = "test/classes_table"
CONFUSION_MATRIX_KEY = "test/confusion_matrix"
_CONFUSION_DATA_KEY = f"{CONFUSION_MATRIX_KEY}_table"  # W&B stores the data of its chart as a table with this name
_FEATURE_MAPS_PREFIX = "feature_maps/"
_PANEL_KINDS: dict[str, PanelKind] = {
    FIRST_BATCH_KEY: "image",
    "test/classes": "image",
    "test/confusion": "image",
    MISTAKES_KEY: "image",
    CLASS_TABLE_KEY: "table",
    _CONFUSION_DATA_KEY: "table",
}
_MAX_MATRIX_CLASSES = 50  # W&B's confusion matrix draws one cell for each pair of classes


def panel_kind(key: str) -> PanelKind | None:
    """Returns which panel shows a key of a W&B run; None for a metric or an unknown key."""
    return "image" if key.startswith(_FEATURE_MAPS_PREFIX) else _PANEL_KINDS.get(key)


def mistake_images(wandb: Any, mistakes: Sequence[Example]) -> dict[str, Any]:
    """Returns the most confident mistakes as one list of W&B images with captions; empty without mistakes.

    wandb: the imported package.
    """
    images = [
        wandb.Image(
            example.image(), caption=f"predicted {example.predicted} {example.probability:.0%}, true {example.label}"
        )
        for example in mistakes
    ]
    return {MISTAKES_KEY: images} if images else {}


def tables_of_test_set(wandb: Any, test: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a W&B table of the test classes and, if there are not too many classes, a confusion matrix chart.

    test: the test set in summary.json.
    """
    classes = test["classes"]
    rows = [[row[key] for key in ("name", "precision", "recall", "f1", "support")] for row in classes]
    tables = {CLASS_TABLE_KEY: wandb.Table(["class", "precision", "recall", "f1", "images"], rows)}
    if len(classes) <= _MAX_MATRIX_CLASSES:
        counts = np.array(test["confusion"])
        # W&B counts pairs of labels itself, so each cell is repeated as often as it was counted.
        labels, predictions = (np.repeat(index.ravel(), counts.ravel()).tolist() for index in np.indices(counts.shape))
        tables[CONFUSION_MATRIX_KEY] = wandb.plot.confusion_matrix(
            y_true=labels,
            preds=predictions,
            class_names=[row["name"] for row in classes],
            title="confusion matrix of the test set",
        )
    return tables
