"""Predicting and loading again: what training saw is what a run's network sees later, whatever the images come as."""

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
from support.images import paint
from support.processes import MAIN, SMALL, Samecurve, finished_run

from trainer.config.schema import DataSettings
from trainer.data import digits
from trainer.errors import DataError, FolderError
from trainer.inference import predict
from trainer.inference.predict import Predictor, expand_paths, load_predictor
from trainer.inference.saved_model import find_weights, load_model

# A picture that the network is this sure of is known in other guises too.
SURE = 0.9


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("runs"), "train.epochs=8")


@pytest.fixture(scope="module")
def images() -> NDArray[np.uint8]:
    return digits.load(DataSettings(name="digits", image_size=32)).test.images


def test_all_test_images_are_counted_as_the_run_has_counted_them(run: Path, images: NDArray[np.uint8]) -> None:
    test, predictor = digits.load(DataSettings(name="digits", image_size=32)).test, load_predictor(run)
    found = predictor.predict(list(images), top=1)
    named = [predictor.classes.index(one.top[0].name) for one in found]
    confusion = np.zeros((10, 10), int)
    np.add.at(confusion, (test.labels, named), 1)
    assert confusion.tolist() == json.loads((run / "summary.json").read_text())["test"]["confusion"]


def test_the_probabilities_of_all_classes_are_one_and_fall(run: Path, images: NDArray[np.uint8]) -> None:
    (one,) = load_predictor(run).predict(images[0], top=99)
    values = [guess.probability for guess in one.top]
    assert len(values) == 10 and abs(sum(values) - 1) < 1e-9 and values == sorted(values, reverse=True)


def test_more_images_than_go_at_once(run: Path, images: NDArray[np.uint8]) -> None:
    network = load_model(run)
    together = Predictor(network).predict(list(images[:7]))
    some = Predictor(network, images_at_once=3).predict(list(images[:7]))
    assert [one.image for one in some] == [one.image for one in together]
    for one, other in zip(some, together, strict=True):
        assert [guess.name for guess in one.top] == [guess.name for guess in other.top]
        assert np.allclose([guess.probability for guess in one.top], [guess.probability for guess in other.top])


def turned(picture: Image.Image, path: Path) -> None:
    exif = picture.getexif()
    exif[0x0112] = 6  # to be turned right by a quarter
    picture.rotate(90).save(path, exif=exif, quality=95)


# To be turned right by a quarter, and bytes where a number should be: Pillow cannot write such a block anew.
DAMAGED_EXIF = b"Exif\0\0MM\0*\0\0\0\x08\0\x02" + b"\x01\x12\0\x03\0\0\0\x01\0\x06\0\0"
DAMAGED_EXIF += b"\xa0\x05\0\x01\0\0\0\x01\0\0\0\0" + b"\0" * 4

KINDS: dict[str, Callable[[Image.Image, Path], None]] = {
    "larger.png": lambda picture, path: picture.resize((200, 200)).save(path),
    "wide.bmp": lambda picture, path: wide(picture).save(path),
    "colour.jpg": lambda picture, path: picture.convert("RGB").save(path, quality=95),
    "alpha.png": lambda picture, path: opaque(picture).save(path),
    "cmyk.jpg": lambda picture, path: picture.convert("CMYK").save(path, quality=95),
    "palette.gif": lambda picture, path: picture.convert("P").save(path),
    "turned.jpg": turned,
    "damaged_exif.jpg": lambda picture, path: picture.rotate(90).save(path, quality=95, exif=DAMAGED_EXIF),
    "deep.png": lambda picture, path: Image.fromarray(np.asarray(picture).astype(np.uint16) * 257).save(path),
    "lossless.webp": lambda picture, path: picture.convert("RGB").save(path, lossless=True),
    "one_bit.tiff": lambda picture, path: picture.point(lambda value: 255 * (value > 100)).convert("1").save(path),
}


def wide(picture: Image.Image) -> Image.Image:
    made = Image.new("L", (320, 160), 0)
    made.paste(picture.resize((160, 160)), (80, 0))
    return made


def opaque(picture: Image.Image) -> Image.Image:
    made = picture.convert("RGBA")
    made.putalpha(255)
    return made


@pytest.mark.parametrize("name", KINDS)
def test_a_picture_is_known_whatever_it_comes_as(
    run: Path, images: NDArray[np.uint8], tmp_path: Path, name: str
) -> None:
    predictor = load_predictor(run)
    sure = [
        one for one in zip(images, predictor.predict(list(images)), strict=True) if one[1].top[0].probability > SURE
    ]
    right = 0
    for pixels, before in sure[:20]:
        KINDS[name](Image.fromarray(pixels.squeeze(2)), tmp_path / name)
        (after,) = predictor.predict(tmp_path / name)
        right += after.top[0].name == before.top[0].name
    assert right >= 18, f"{right} of 20 {name} were known"


def test_one_pixel_and_colours_are_no_trouble(run: Path) -> None:
    one, other = load_predictor(run).predict([Image.new("RGB", (1, 1), "red"), np.zeros((3, 700, 3), np.uint8)])
    assert len(one.top) == len(other.top) == 5


class TestUnreadable:
    def spoil(self, folder: Path) -> None:
        paint(folder / "a" / "good.png", seed=1)
        paint(folder / "a" / "cut.png", seed=2)
        path = folder / "a" / "cut.png"
        path.write_bytes(path.read_bytes()[:-60])
        (folder / "b.jpg").write_text("no image")
        (folder / "notes.txt").write_text("not asked for")
        (folder / "c.jfif").write_text("nor this one")

    def test_one_among_others_is_told_and_the_others_are_predicted(
        self, run: Path, tmp_path: Path, samecurve: Samecurve
    ) -> None:
        folder = tmp_path / "given"
        self.spoil(folder)
        out, err = samecurve("predict", str(run), str(folder), "--json", "--top", "2", code=2)
        cut, good, text, other = json.loads(out)
        assert [Path(one["image"]).name for one in (cut, good, text, other)] == [
            "cut.png",
            "good.png",
            "b.jpg",
            "c.jfif",
        ]
        assert cut["error"] and text["error"] and len(good["top"]) == 2
        assert err == "samecurve: 3 of 4 images could not be read; all others are predicted\n"
        out, _ = samecurve("predict", str(run), str(folder), "--csv", code=2)
        rows = list(csv.DictReader(out.splitlines()))
        assert [row["rank"] for row in rows] == ["", "1", "2", "3", "", ""] and rows[0]["error"] and rows[1]["class"]
        out, _ = samecurve("predict", "x", str(folder / "a" / "good.png"), "--root", str(run.parent))
        assert out.startswith(f"{folder / 'a' / 'good.png'}: ") and out.count("%") == 3

    def test_whatever_a_decoder_raises_is_told_of_its_image_alone(
        self, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def raises(*_: object) -> None:
            raise NotImplementedError("a kind of compression")

        paint(tmp_path / "good.png", seed=1)
        paint(tmp_path / "bad.png", seed=2)
        fit = predict.fit
        monkeypatch.setattr(predict, "fit", lambda at, *size: raises() if "bad" in at.filename else fit(at, *size))
        bad, good = load_predictor(run).each([tmp_path / "bad.png", tmp_path / "good.png"])
        assert bad.problem == "NotImplementedError: a kind of compression" and good.top

    def test_a_link_to_nothing_in_a_folder_and_pixels_without_a_range(self, run: Path, tmp_path: Path) -> None:
        folder = tmp_path / "given"
        paint(folder / "good.png", seed=1)
        (folder / "link.png").symlink_to("nowhere.png")
        Image.fromarray(np.ones((8, 8), np.float32)).save(folder / "fractions.tiff")
        predictor = load_predictor(run)
        fractions, good, link = predictor.each(expand_paths([folder]))
        assert "fractions" in fractions.problem and "No such file" in link.problem and good.top

    def test_in_python_it_is_an_error(self, run: Path, tmp_path: Path) -> None:
        self.spoil(tmp_path / "given")
        with pytest.raises(DataError, match=r"cut\.png: "):
            load_predictor(run).predict(tmp_path / "given")

    def test_nothing_there(self, run: Path, tmp_path: Path, samecurve: Samecurve) -> None:
        (tmp_path / "empty").mkdir()
        for given, wanted in (("nowhere.png", "no image nowhere.png"), ("empty", "no image files in folder empty")):
            _, err = samecurve("predict", str(run), given, code=2)
            assert wanted in err and err.count("\n") == 1


class TestWhichWeights:
    def logits(self, run: Path, which: str, images: NDArray[np.uint8]) -> torch.Tensor:
        network = load_model(run, which)
        return network.logits(torch.from_numpy(images[:50]).permute(0, 3, 1, 2))

    def test_of_a_run_of_a_step_of_a_folder_of_a_file(self, run: Path, images: NDArray[np.uint8]) -> None:
        final, latest = self.logits(run, "final", images), self.logits(run, "latest", images)
        assert torch.equal(final, latest) and torch.equal(final, self.logits(run, "auto", images))
        steps = sorted(int(place.name.removeprefix("step-")) for place in (run / "checkpoints").iterdir())
        earlier = self.logits(run, str(steps[0]), images)
        assert len(steps) == 2 and not torch.equal(final, earlier)
        place = run / "checkpoints" / f"step-{steps[0]:08}"
        assert torch.equal(earlier, self.logits(place, "auto", images))
        assert torch.equal(final, self.logits(run / "model.safetensors", "auto", images))

    def test_of_a_run_that_is_not_finished(self, run: Path, images: NDArray[np.uint8], tmp_path: Path) -> None:
        shutil.copytree(run, tmp_path / "begun")
        (tmp_path / "begun" / "model.safetensors").unlink()
        assert torch.equal(self.logits(tmp_path / "begun", "auto", images), self.logits(run, "final", images))
        shutil.rmtree(tmp_path / "begun" / "checkpoints")
        with pytest.raises(FolderError, match="no final weights, and checkpoints of steps none"):
            load_model(tmp_path / "begun")

    def test_final_ones_that_are_older_than_a_checkpoint_are_not_taken(self, run: Path, tmp_path: Path) -> None:
        longer = shutil.copytree(run, tmp_path / "longer")
        summary = json.loads((longer / "summary.json").read_text())
        (longer / "summary.json").write_text(json.dumps(summary | {"steps": 23}))
        assert find_weights(longer).parent.parent.name == "checkpoints"
        assert find_weights(longer, "final") == longer / "model.safetensors"

    def test_a_gpu_that_is_not_there_and_a_choice_where_there_is_none(self, run: Path) -> None:
        with pytest.raises(FolderError, match="no such GPU"):
            load_predictor(run, device="cuda:99")
        with pytest.raises(FolderError, match="leave that out"):
            load_model(run / "model.safetensors", "best")

    @pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x02junk", b"PK\x03\x04junk"])
    def test_files_that_are_no_weights(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "x.pt").write_bytes(content)
        with pytest.raises(FolderError):
            load_model(tmp_path / "x.pt")
        torch.save({"state_dict": [1], "samecurve": "{}"}, tmp_path / "y.pt")
        with pytest.raises(FolderError):
            load_model(tmp_path / "y.pt")

    def test_one_that_is_not_there(self, run: Path) -> None:
        for which in ("7", "other"):
            with pytest.raises(FolderError, match=rf"no weights '{which}': there are final weights, and checkpoints"):
                load_model(run, which)

    def test_the_best_is_that_of_the_held_out_part(self, tmp_path: Path) -> None:
        command = [sys.executable, MAIN, *SMALL, "train.epochs=4", "data.validation_fraction=0.2", "optim.lr=0.3"]
        command += [f"run.root={tmp_path}", "run.name=held", "checkpoint.keep=1"]
        subprocess.run(command, check=True, timeout=120, stdout=subprocess.DEVNULL)
        best = json.loads((tmp_path / "held" / "summary.json").read_text())["best"]
        assert find_weights(tmp_path / "held", "best").parent.name == f"step-{best['step']:08}"

    def test_a_damaged_checkpoint_and_a_foreign_file(self, run: Path, tmp_path: Path) -> None:
        place = shutil.copytree(next((run / "checkpoints").iterdir()), tmp_path / "step-00000023")
        with pytest.raises(FolderError, match="choose another one"):
            load_model(place)
        (tmp_path / "junk.safetensors").write_bytes(b"junk")
        with pytest.raises(FolderError, match="cannot be read"):
            load_model(tmp_path / "junk.safetensors")
        from safetensors.torch import save_file

        save_file({"weight": torch.zeros(1)}, tmp_path / "foreign.safetensors")
        with pytest.raises(FolderError, match="does not say of which network"):
            load_model(tmp_path / "foreign.safetensors")
        metadata = load_model(run).about.metadata()
        save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors", metadata)
        with pytest.raises(FolderError, match="does not hold the weights of its lenet"):
            load_model(tmp_path / "other.safetensors")
