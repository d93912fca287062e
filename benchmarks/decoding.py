"""The first reading of CIFAR-10's 60,000 image files against a loop over them with PIL on one thread; then the cached.

    python benchmarks/decoding.py --images FOLDER

By turns, medians of the rounds; the files are in the page cache. Writes decoding.json and decoding.md.
"""

import statistics
import subprocess
import sys
import tempfile

import report

PIL = """
import sys, time
from pathlib import Path
import numpy as np
from PIL import Image
began = time.perf_counter()
for split in ("train", "test"):
    files = sorted(path for folder in (Path(sys.argv[1]) / split).iterdir() for path in folder.iterdir())
    images = np.empty((len(files), 32, 32, 3), np.uint8)
    for index, path in enumerate(files):
        with Image.open(path) as image:
            images[index] = np.asarray(image.convert("RGB"))
print(time.perf_counter() - began)
"""
OWN = """
import sys, time
sys.path.insert(0, sys.argv[3])
from trainer import config
from trainer.datasets import image_folder
data = config.load([], ["data.name=image_folder", f"data.root={sys.argv[1]}", f"data.cache_dir={sys.argv[2]}"]).data
began = time.perf_counter()
found = image_folder.load(data)
print(time.perf_counter() - began)
"""


def main() -> int:
    parser = report.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    pil, first, cached = [], [], []
    for _ in range(arguments.rounds + 1):
        pil.append(_seconds(PIL, str(arguments.images)))
        with tempfile.TemporaryDirectory() as cache:
            own = [str(arguments.images), cache, str(report.REPOSITORY)]
            first.append(_seconds(OWN, *own))
            cached.append(_seconds(OWN, *own))
    pil, first, cached = pil[1:], first[1:], cached[1:]  # the first round reads the disk
    ratio = round(statistics.median(theirs / own for theirs, own in zip(pil, first, strict=True)), 2)
    result = {
        "ratio": ratio, "goal": 1.9, "cached_seconds": round(statistics.median(cached), 3), "cached_goal": 2.0,
        "pil_seconds": pil, "first_seconds": first,
    }  # fmt: skip
    rows = [
        f"one thread of PIL | {statistics.median(pil):.1f} | 1",
        f"samecurve, first reading | {statistics.median(first):.1f} | {ratio:.2f}",
        f"samecurve, cached | {statistics.median(cached):.2f} | ",
    ]
    text = report.table(" | seconds for the whole folder | speed", rows)
    print(text)
    report.write(arguments.output, "decoding", __doc__, result, text)
    return 0


def _seconds(program: str, *arguments: str) -> float:
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


if __name__ == "__main__":
    raise SystemExit(main())
