"""Runs trainer/main.py with a defect on rank 1, for test_exit.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from trainer import main
from trainer.data import splits

load_splits = splits.load_splits


def load_splits_with_defect(settings, seed, world):  # type: ignore[no-untyped-def]
    if world.rank == 1:
        raise RuntimeError("planted on rank 1")
    return load_splits(settings, seed, world)


splits.load_splits = load_splits_with_defect  # before main() imports trainer.build
sys.exit(main.main())
