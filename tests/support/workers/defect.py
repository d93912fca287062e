"""One rank of a run with a defect planted on rank 1, for test_refusals.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from trainer import main
from trainer.data import splits
from trainer.data.splits import load_splits

loads = load_splits


def fails(settings, seed, world):  # type: ignore[no-untyped-def]
    if world.rank == 1:
        raise RuntimeError("planted on rank 1")
    return loads(settings, seed, world)


splits.load_splits = fails
sys.exit(main.main())
