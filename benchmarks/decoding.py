"""Times reading CIFAR-10's 60,000 image files: samecurve's first and cached reading against PIL on one thread.

    python benchmarks/decoding.py --images FOLDER

The three take turns; reports medians over the rounds. The files are in the page cache. Writes decoding.json and
decoding.md.
"""

import statistics
import subprocess
import sys
import tempfile

import report

PIL_PROGRAM = """
import sys, time
from pathlib import Path
import numpy as np
from PIL import Image
start = time.perf_counter()
for split in ("train", "test"):
    files = sorted(path for folder in (Path(sys.argv[1]) / split).iterdir() for path in folder.iterdir())
    images = np.empty((len(files), 32, 32, 3), np.uint8)
    for index, path in enumerate(files):
        with Image.open(path) as image:
            images[index] = np.asarray(image.convert("RGB"))
print(time.perf_counter() - start)
"""
SAMECURVE_PROGRAM = """
import sys, time
sys.path.insert(0, sys.argv[3])
from trainer.config.load import load_config
from trainer.data import image_folder
if __name__ == "__main__":
    overrides = ["data.name=image_folder", f"data.root={sys.argv[1]}", f"data.cache_dir={sys.argv[2]}"]
    data = load_config([], overrides).data
    start = time.perf_counter()
    image_folder.load(data)
    print(time.perf_counter() - start)
"""


def main() -> int:
    parser = report.make_parser(__doc__, images="required")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    pil, first, cached = [], [], []
    for _ in range(arguments.rounds + 1):
        pil.append(_seconds(PIL_PROGRAM, str(arguments.images)))
        with tempfile.TemporaryDirectory() as cache:
            words = [str(arguments.images), cache, str(report.REPOSITORY)]
            first.append(_seconds(SAMECURVE_PROGRAM, *words))
            cached.append(_seconds(SAMECURVE_PROGRAM, *words))
    pil, first, cached = pil[1:], first[1:], cached[1:]  # the first round reads from the disk
    ratio = round(statistics.median(theirs / ours for theirs, ours in zip(pil, first, strict=True)), 2)
    result = {
        "ratio": ratio, "goal": 1.9, "cached_seconds": round(statistics.median(cached), 3), "cached_goal": 2.0,
        "pil_seconds": pil, "first_seconds": first,
    }  # fmt: skip
    rows = [
        f"one thread of PIL | {statistics.median(pil):.1f} | 1",
        f"samecurve, first reading | {statistics.median(first):.1f} | {ratio:.2f}",
        f"samecurve, cached | {statistics.median(cached):.2f} | ",
    ]
    text = report.table(" | seconds for all files | speed", rows)
    print(text)
    report.write(arguments.output, "decoding", __doc__, result, text)
    return 0


def _seconds(program: str, *arguments: str) -> float:
    """Runs a Python program in a process. Returns the number that it prints last."""
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1])


if __name__ == "__main__":
    raise SystemExit(main())
