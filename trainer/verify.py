"""Forwards `python -m trainer.verify ranks|resume`, the former command, to `samecurve verify`."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    command = str(Path(__file__).resolve().parents[1] / "launch" / "main.py")
    os.execv(sys.executable, [sys.executable, command, "verify", *sys.argv[1:]])
