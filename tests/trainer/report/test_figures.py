"""Figures drawn with matplotlib."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.report import figures
from trainer.run.record import RunRecord


def test_first_batch_figure_shows_stored_images_left_and_training_input_right() -> None:
    stored, trained_on = (np.full((4, 8, 8, 1), value, dtype=np.uint8) for value in (40, 200))
    picture = figures.draw_first_batch(stored, trained_on)
    center = picture.shape[1] // 2
    assert 40 in picture[:, :center] and 200 not in picture[100:-100, :center, 0]
    assert 200 in picture[:, center:]
    assert picture[0, 0, 3] == 0 and tuple(figures.flatten(picture)[0, 0]) == (255, 255, 255), (
        "no white page in the dark"
    )


def test_feature_maps_are_scaled_to_their_own_range() -> None:
    maps = np.zeros((2, 4, 4), dtype=np.float32)
    maps[0, 0, 0], maps[1, 0, 0] = 0.001, 1000
    picture = figures.draw_feature_maps("conv1", np.zeros((4, 4, 1), dtype=np.uint8), maps)
    yellow = (picture[..., :3] == (253, 231, 36)).all(axis=2)  # viridis at 1
    columns = yellow.any(axis=0).nonzero()[0]
    assert np.diff(columns).max() > 50  # one yellow pixel in each map


@pytest.mark.filterwarnings("error")
def test_class_names_may_contain_dollar_signs_and_any_script(tmp_path: Path) -> None:
    names = ["a$^$b", "猫", "c_{d"]
    record = RunRecord(tmp_path)
    record.evaluation = {
        "classes": [{"name": name, "precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2} for name in names],
        "confusion": [[1, 1, 0], [0, 1, 1], [1, 0, 1]],
    }
    assert set(figures.draw_run_figures(record, [])) == {"classes", "confusion"}


def test_confusion_figure_has_true_classes_as_rows() -> None:
    picture = figures._render(figures._draw_confusion(["a", "b"], [[0, 9], [0, 9]]))
    height, width = picture.shape[:2]
    is_blue, is_orange = ((picture[..., :3] == color).all(axis=2) for color in ((42, 121, 214), (222, 94, 30)))
    assert is_orange[: height // 2, width // 2 :].any() and is_blue[height // 2 :, width // 2 :].any()
    assert not (is_blue | is_orange)[:, : width // 2].any()


def test_figures_are_written_in_subfolders(tmp_path: Path) -> None:
    picture = np.full((3, 5, 3), 7, dtype=np.uint8)
    figures.write_figures({"feature_maps/conv1": picture}, tmp_path)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "feature_maps" / "conv1.png")), picture)
    assert [path.name for path in (tmp_path / "feature_maps").iterdir()] == ["conv1.png"]
