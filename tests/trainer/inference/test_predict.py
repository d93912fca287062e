"""Prediction gives a network the same pixels as training did, whatever the image's format, size and mode."""

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from support.images import write_image
from support.processes import MAIN, SMALL, Samecurve, finished_run

from trainer.config.schema import DataSettings
from trainer.data import digits
from trainer.data.images import decode
from trainer.errors import DataError, FolderError
from trainer.inference.predict import Predictor, expand_paths, load_predictor
from trainer.inference.saved_model import find_weights, load_model

# An image that the network classifies with this probability keeps its class in another format.
CONFIDENT = 0.9


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("runs"), "train.epochs=8")


@pytest.fixture(scope="module")
def images() -> NDArray[np.uint8]:
    """The test images of the digits, uint8 [N, 32, 32, 1]."""
    return digits.load(DataSettings(name="digits", image_size=32)).test.images


def test_predictions_of_test_images_equal_confusion_matrix_of_summary(run: Path, images: NDArray[np.uint8]) -> None:
    test, predictor = digits.load(DataSettings(name="digits", image_size=32)).test, load_predictor(run)
    predictions = predictor.predict(list(images), top=1)
    predicted = [predictor.classes.index(prediction.top[0].name) for prediction in predictions]
    confusion = np.zeros((10, 10), int)
    np.add.at(confusion, (test.labels, predicted), 1)
    assert confusion.tolist() == json.loads((run / "summary.json").read_text())["test"]["confusion"]


def test_probabilities_of_all_classes_sum_to_one_and_are_sorted(run: Path, images: NDArray[np.uint8]) -> None:
    (prediction,) = load_predictor(run).predict(images[0], top=99)
    values = [entry.probability for entry in prediction.top]
    assert len(values) == 10 and abs(sum(values) - 1) < 1e-9 and values == sorted(values, reverse=True)


def test_predictions_do_not_depend_on_batch_size(run: Path, images: NDArray[np.uint8]) -> None:
    model = load_model(run)
    expected = Predictor(model).predict(list(images[:7]))
    predictions = Predictor(model, batch_size=3).predict(list(images[:7]))
    assert [prediction.image for prediction in predictions] == [f"image {number}" for number in range(7)]
    for prediction, same in zip(predictions, expected, strict=True):
        assert [entry.name for entry in prediction.top] == [entry.name for entry in same.top]
        assert np.allclose([entry.probability for entry in prediction.top], [entry.probability for entry in same.top])


def save_rotated(image: Image.Image, path: Path) -> None:
    exif = image.getexif()
    exif[0x0112] = 6  # orientation: rotate right by a quarter to view
    image.rotate(90).save(path, exif=exif, quality=95)


# Orientation 6 (rotate right by a quarter), and bytes where a number should be: Pillow cannot write such a block.
DAMAGED_EXIF = b"Exif\0\0MM\0*\0\0\0\x08\0\x02" + b"\x01\x12\0\x03\0\0\0\x01\0\x06\0\0"
DAMAGED_EXIF += b"\xa0\x05\0\x01\0\0\0\x01\0\0\0\0" + b"\0" * 4

SAVERS: dict[str, Callable[[Image.Image, Path], None]] = {
    "larger.png": lambda image, path: image.resize((200, 200)).save(path),
    "wide.bmp": lambda image, path: add_black_sides(image).save(path),
    "rgb.jpg": lambda image, path: image.convert("RGB").save(path, quality=95),
    "alpha.png": lambda image, path: add_alpha(image).save(path),
    "cmyk.jpg": lambda image, path: image.convert("CMYK").save(path, quality=95),
    "palette.gif": lambda image, path: image.convert("P").save(path),
    "rotated.jpg": save_rotated,
    "damaged_exif.jpg": lambda image, path: image.rotate(90).save(path, quality=95, exif=DAMAGED_EXIF),
    "16_bit.png": lambda image, path: Image.fromarray(np.asarray(image).astype(np.uint16) * 257).save(path),
    "lossless.webp": lambda image, path: image.convert("RGB").save(path, lossless=True),
    "1_bit.tiff": lambda image, path: image.point(lambda value: 255 * (value > 100)).convert("1").save(path),
}


def add_black_sides(image: Image.Image) -> Image.Image:
    wide = Image.new("L", (320, 160), 0)
    wide.paste(image.resize((160, 160)), (80, 0))
    return wide


def add_alpha(image: Image.Image) -> Image.Image:
    with_alpha = image.convert("RGBA")
    with_alpha.putalpha(255)
    return with_alpha


@pytest.mark.parametrize("name", SAVERS)
def test_image_keeps_its_class_in_other_formats(
    run: Path, images: NDArray[np.uint8], tmp_path: Path, name: str
) -> None:
    predictor = load_predictor(run)
    confident = [
        (pixels, prediction)
        for pixels, prediction in zip(images, predictor.predict(list(images)), strict=True)
        if prediction.top[0].probability > CONFIDENT
    ]
    num_equal = 0
    for pixels, expected in confident[:20]:
        SAVERS[name](Image.fromarray(pixels.squeeze(2)), tmp_path / name)
        (prediction,) = predictor.predict(tmp_path / name)
        num_equal += prediction.top[0].name == expected.top[0].name
    assert num_equal >= 18, f"{num_equal} of 20 images keep their class as {name}"


def test_single_pixel_and_extreme_aspect_ratio_are_predicted(run: Path) -> None:
    predictions = load_predictor(run).predict([Image.new("RGB", (1, 1), "red"), np.zeros((3, 700, 3), np.uint8)])
    assert [len(prediction.top) for prediction in predictions] == [5, 5]


class TestUnreadableImages:
    def write_images(self, folder: Path) -> None:
        """Writes one readable image, three unreadable ones, and a file that is not an image."""
        write_image(folder / "a" / "good.png", seed=1)
        write_image(folder / "a" / "cut.png", seed=2)
        path = folder / "a" / "cut.png"
        path.write_bytes(path.read_bytes()[:-60])
        (folder / "b.jpg").write_text("not an image")
        (folder / "c.jfif").write_text("not an image")
        (folder / "notes.txt").write_text("notes")

    def test_command_reports_them_and_predicts_the_others(
        self, run: Path, tmp_path: Path, samecurve: Samecurve
    ) -> None:
        folder = tmp_path / "images"
        self.write_images(folder)
        out, err = samecurve("predict", str(run), str(folder), "--json", "--top", "2", code=2)
        predictions = json.loads(out)
        names = [Path(prediction["image"]).name for prediction in predictions]
        assert names == ["cut.png", "good.png", "b.jpg", "c.jfif"]
        assert ["error" in prediction for prediction in predictions] == [True, False, True, True]
        assert len(predictions[1]["top"]) == 2
        skipped, error = err.splitlines()
        assert skipped == "note: skipped 1 file that is not an image (1 .txt)"
        assert error.startswith("samecurve: 3 of 4 images could not be read; ")
        out, _ = samecurve("predict", str(run), str(folder), "--csv", code=2)
        rows = list(csv.DictReader(out.splitlines()))
        assert [row["rank"] for row in rows] == ["", "1", "2", "3", "", ""] and rows[0]["error"] and rows[1]["class"]
        out, _ = samecurve("predict", "x", str(folder / "a" / "good.png"), "--root", str(run.parent))
        assert out.startswith(f"{folder / 'a' / 'good.png'}: ") and out.count("%") == 3

    def test_any_exception_of_a_decoder_is_an_error_of_its_image_only(
        self, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rotate_upright = decode._rotate_upright

        def rotate_or_raise(image: Image.Image) -> Image.Image:
            if image.size == (9, 9):
                raise NotImplementedError("compression 7")
            return rotate_upright(image)

        write_image(tmp_path / "good.png", seed=1)
        write_image(tmp_path / "bad.png", seed=2, size=(9, 9))
        monkeypatch.setattr(decode, "_rotate_upright", rotate_or_raise)
        bad, good = load_predictor(run).predict_each([tmp_path / "bad.png", tmp_path / "good.png"])
        assert bad.error == "NotImplementedError: compression 7" and good.top

    def test_dangling_link_and_floating_point_image(self, run: Path, tmp_path: Path) -> None:
        folder = tmp_path / "images"
        write_image(folder / "good.png", seed=1)
        (folder / "link.png").symlink_to("nowhere.png")
        Image.fromarray(np.ones((8, 8), np.float32)).save(folder / "float.tiff")
        floating, good, link = load_predictor(run).predict_each(expand_paths([folder]))
        assert floating.error and "No such file" in link.error and good.top

    def test_hidden_files_and_folders_are_skipped_as_in_training(
        self, run: Path, tmp_path: Path, samecurve: Samecurve
    ) -> None:
        for name in ("a.png", "sub/b.jfif", "._a.png", ".ipynb_checkpoints/a.png", "__MACOSX/a.png"):
            write_image(tmp_path / "images" / "source.png", seed=1)
            path = tmp_path / "images" / name
            path.parent.mkdir(exist_ok=True)
            (tmp_path / "images" / "source.png").rename(path)
        (tmp_path / "more").mkdir()
        write_image(tmp_path / "more" / "c.png", seed=1)
        (tmp_path / "images" / "link").symlink_to(tmp_path / "more")
        out, err = samecurve("predict", str(run), str(tmp_path / "images"))
        assert [line.partition(":")[0].rpartition("images/")[2] for line in out.splitlines()] == [
            "a.png", "link/c.png", "sub/b.jfif",
        ]  # fmt: skip
        assert err == "note: skipped 3 files that are not images (3 hidden)\n"
        out, _ = samecurve("predict", str(run), str(tmp_path / "images" / "._a.png"))  # named by the user
        assert "%" in out

    def test_predict_raises_data_error(self, run: Path, tmp_path: Path) -> None:
        self.write_images(tmp_path / "images")
        with pytest.raises(DataError, match=r"cut\.png cannot be read"):
            load_predictor(run).predict(tmp_path / "images")

    @pytest.mark.parametrize(
        ("path", "message"),
        [("missing.png", "image missing.png does not exist"), ("empty", "folder empty has no image files")],
    )
    def test_missing_image_and_empty_folder_are_refused(
        self, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, samecurve: Samecurve, path: str, message: str
    ) -> None:
        (tmp_path / "empty").mkdir()
        monkeypatch.chdir(tmp_path)
        _, err = samecurve("predict", str(run), path, code=2)
        assert message in err and err.count("\n") == 1

    def test_top_below_one_is_refused(self, run: Path, samecurve: Samecurve) -> None:
        _, err = samecurve("predict", str(run), "x.png", "--top", "0", code=2)
        assert "--top must be at least 1, got 0" in err and err.count("\n") == 1


class TestChoiceOfWeights:
    def logits(self, run: Path, weights: str, images: NDArray[np.uint8]) -> torch.Tensor:
        model = load_model(run, weights)
        return model.logits(torch.from_numpy(images[:50]).permute(0, 3, 1, 2))

    def test_run_step_checkpoint_folder_and_file(self, run: Path, images: NDArray[np.uint8]) -> None:
        final, latest = self.logits(run, "final", images), self.logits(run, "latest", images)
        assert torch.equal(final, latest) and torch.equal(final, self.logits(run, "auto", images))
        steps = sorted(int(folder.name.removeprefix("step-")) for folder in (run / "checkpoints").iterdir())
        earlier = self.logits(run, str(steps[0]), images)
        assert len(steps) == 2 and not torch.equal(final, earlier)
        folder = run / "checkpoints" / f"step-{steps[0]:08}"
        assert torch.equal(earlier, self.logits(folder, "auto", images))
        assert torch.equal(final, self.logits(run / "model.safetensors", "auto", images))

    def test_unfinished_run_has_its_latest_checkpoint(
        self, run: Path, images: NDArray[np.uint8], tmp_path: Path
    ) -> None:
        unfinished = shutil.copytree(run, tmp_path / "unfinished")
        (unfinished / "model.safetensors").unlink()
        assert torch.equal(self.logits(unfinished, "auto", images), self.logits(run, "final", images))
        shutil.rmtree(unfinished / "checkpoints")
        with pytest.raises(FolderError, match="no final weights, and checkpoints of steps none"):
            load_model(unfinished)

    def test_checkpoint_newer_than_final_weights_is_used(self, run: Path, tmp_path: Path) -> None:
        continued = shutil.copytree(run, tmp_path / "continued")
        summary = json.loads((continued / "summary.json").read_text())
        (continued / "summary.json").write_text(json.dumps(summary | {"steps": 23}))
        assert find_weights(continued).parent.parent.name == "checkpoints"
        assert find_weights(continued, "final") == continued / "model.safetensors"

    def test_missing_gpu_is_refused(self, run: Path) -> None:
        with pytest.raises(FolderError, match="device cuda:99 does not exist"):
            load_predictor(run, device="cuda:99")

    def test_choice_of_weights_in_a_file_is_refused(self, run: Path) -> None:
        with pytest.raises(FolderError, match="leave the choice out"):
            load_model(run / "model.safetensors", "best")

    @pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x02junk", b"PK\x03\x04junk"])
    def test_file_of_another_format_is_refused(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "x.pt").write_bytes(content)
        with pytest.raises(FolderError):
            load_model(tmp_path / "x.pt")

    def test_state_dict_without_tensors_is_refused(self, tmp_path: Path) -> None:
        torch.save({"state_dict": [1], "samecurve": "{}"}, tmp_path / "x.pt")
        with pytest.raises(FolderError):
            load_model(tmp_path / "x.pt")

    @pytest.mark.parametrize("weights", ["7", "other"])
    def test_weights_that_do_not_exist_are_refused(self, run: Path, weights: str) -> None:
        with pytest.raises(FolderError, match=rf"no weights '{weights}': there are final weights, and checkpoints"):
            load_model(run, weights)

    @pytest.mark.slow
    def test_best_weights_have_highest_validation_accuracy(self, tmp_path: Path) -> None:
        command = [sys.executable, MAIN, *SMALL, "train.epochs=4", "data.validation_fraction=0.2", "optim.lr=0.3"]
        command += [f"run.root={tmp_path}", "run.name=x", "checkpoint.keep=1"]
        subprocess.run(command, check=True, timeout=120, stdout=subprocess.DEVNULL)
        best = json.loads((tmp_path / "x" / "summary.json").read_text())["best"]
        assert find_weights(tmp_path / "x", "best").parent.name == f"step-{best['step']:08}"

    def test_damaged_checkpoint_is_refused(self, run: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(next((run / "checkpoints").iterdir()), tmp_path / "step-00000023")
        with pytest.raises(FolderError, match="choose another checkpoint"):
            load_model(folder)

    def test_file_without_safetensors_or_metadata_or_matching_weights_is_refused(
        self, run: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "junk.safetensors").write_bytes(b"junk")
        with pytest.raises(FolderError, match="cannot be read"):
            load_model(tmp_path / "junk.safetensors")
        save_file({"weight": torch.zeros(1)}, tmp_path / "foreign.safetensors")
        with pytest.raises(FolderError, match="has no metadata"):
            load_model(tmp_path / "foreign.safetensors")
        metadata = load_model(run).metadata.to_file_metadata()
        save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors", metadata)
        with pytest.raises(FolderError, match="does not contain the weights of its network lenet"):
            load_model(tmp_path / "other.safetensors")
