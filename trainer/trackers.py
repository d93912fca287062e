"""Scalars in, JSON lines, TensorBoard event files and a W&B run out. Rank 0 has these; the others have Silent."""

import errno
import json
import netrc
import os
import secrets
import shlex
import urllib.parse
import urllib.request
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

from trainer import config as configs
from trainer import starts
from trainer.errors import UserError
from trainer.folder import RunFolder, finite, reason, told
from trainer.settings import RunConfig

_LEAST_BYTES = 1 << 16  # free for TensorBoard, whose thread ends with a traceback when its disk is full
_REACH_SECONDS = 3.0
_INIT_SECONDS = 5.0  # wandb adds about 11 to it
_FINISH_SECONDS = 15.0


class Tracker(Protocol):
    def log(self, split: str, scalars: dict[str, float], step: int) -> None:
        """One row: split is train, validation or test; step is the number of optimizer steps taken."""

    def flush(self) -> None:
        """Before a checkpoint: a run that goes on from there will not write these rows again."""

    def close(self, failed: bool = False) -> None: ...


class Silent:
    """What every rank but the first is given, so that the loop never asks for its rank."""

    def log(self, split: str, scalars: dict[str, float], step: int) -> None: ...
    def flush(self) -> None: ...
    def close(self, failed: bool = False) -> None: ...


class Lines:
    """Takes rows and keeps none: what every rank but the first is given."""

    def write(self, row: dict[str, Any]) -> None: ...
    def flush(self) -> None: ...
    def close(self, failed: bool = False) -> None: ...


class JsonLines(Lines):
    """One object a line, written through at once. What a full disk refuses waits for the next line."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self._path, self._say = path, say
        self._file: FileIO | None = None
        self._waiting = b""
        self._lock = Lock()  # the thread that saves flushes

    def write(self, row: dict[str, Any]) -> None:
        with self._lock:
            was_waiting = bool(self._waiting)
            self._waiting += (json.dumps(finite(row), allow_nan=False) + "\n").encode()
            try:
                self._write_waiting()
            except OSError as error:
                if not was_waiting:
                    self._say(f"{self._path} cannot be written ({reason(error)}); its lines are kept and tried again")

    def flush(self) -> None:
        """All lines so far are on the disk. Raises OSError."""
        with self._lock:
            self._write_waiting()
            if self._file is not None:
                os.fsync(self._file.fileno())

    def close(self, failed: bool = False) -> None:
        with told(str(self._path)), self._lock:
            self._write_waiting()
        if self._file is not None:
            self._file.close()

    def _write_waiting(self) -> None:
        """All that waits, in whole lines."""
        if not self._waiting:
            return
        if self._file is None or os.fstat(self._file.fileno()).st_nlink == 0:  # the first line; removed by somebody
            self._path.parent.mkdir(parents=True, exist_ok=True)
            before, self._file = self._file, FileIO(self._path, "ab")
            if before is not None:
                before.close()
        size = os.fstat(self._file.fileno()).st_size
        if self._file.write(self._waiting) != len(self._waiting):
            self._file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._waiting = b""


class Metrics(JsonLines):
    """metrics.jsonl."""

    def log(self, split: str, scalars: dict[str, float], step: int) -> None:
        self.write({"split": split, "step": step, **scalars})


class TensorBoard:
    """tensorboard/: a scalar `split/name` for each metric."""

    def __init__(self, folder: Path, first_step: int, say: Callable[[str], None]) -> None:
        self._folder, self._say = folder, say
        # A run that begins again, be it from its first step, takes back what its killed forerunner wrote beyond that.
        begun_before = folder.is_dir() and any(folder.iterdir())
        self._writer = self._open(first_step + 1 if begun_before else None)

    def _open(self, purge_step: int | None) -> Any:
        from torch.utils.tensorboard import SummaryWriter  # late: 1 s

        return SummaryWriter(str(self._folder), purge_step=purge_step)

    def log(self, split: str, scalars: dict[str, float], step: int) -> None:
        try:
            if self._writer is None or not self._folder.is_dir():
                self._writer = self._open(None)
            room = os.statvfs(self._folder)
            if room.f_bavail * room.f_frsize < _LEAST_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            for name, value in scalars.items():
                self._writer.add_scalar(f"{split}/{name}", value, step)
        except OSError as error:
            self._lose_writer(error)

    def flush(self) -> None:
        try:
            if self._writer is not None:
                self._writer.flush()
        except OSError as error:
            self._lose_writer(error)

    def _lose_writer(self, error: OSError) -> None:
        """Its own thread is at its end then; at the next row a new one begins."""
        if self._writer is not None:
            self._say(f"{self._folder} cannot be written ({reason(error)}); points are missing until it can")
        self._writer = None

    def close(self, failed: bool = False) -> None:
        if self._writer is not None:
            with told(str(self._folder)):
                self._writer.close()


class WandB:
    """One W&B run for the whole training, however often it is continued: its id lies in the run folder."""

    def __init__(self, config: RunConfig, folder: RunFolder, say: Callable[[str], None]) -> None:
        """Raises UserError when log.wandb=online and that is not possible. Never asks, never waits long."""
        # Else every process, the offline ones too, calls home at its end: 10 s where a firewall swallows packets.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        mode, why = _mode(config.log.wandb)
        import wandb  # late: 1 s

        self._run: Any = None
        self._say = say
        try:
            self._run = self._start(wandb, mode, config, folder)
        except wandb.errors.Error as error:
            why = " ".join(str(error).split())[:160]
            if config.log.wandb == "online":
                raise UserError(
                    f"log.wandb=online: W&B did not start ({why}); "
                    "check the key and the network, or set log.wandb=offline"
                ) from None
            mode = "offline"
            wandb.teardown()  # else it holds that this run is in use already
            self._run = self._start(wandb, mode, config, folder)
        if mode == "online":
            say(f"W&B: online, {self._run.url}")
        else:
            say(f"W&B: offline ({why}); to upload it later: {self._sync_command()}")
        self._run.config.update(starts.last(folder), allow_val_change=True)  # another at each start
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def _start(self, wandb: Any, mode: str, config: RunConfig, folder: RunFolder) -> Any:
        settings = wandb.Settings(
            init_timeout=_INIT_SECONDS,
            finish_timeout=_FINISH_SECONDS,
            finish_timeout_raises=True,
            console="off",
            silent=True,
        )
        return wandb.init(
            project=config.log.project,
            name=config.run.name,
            id=_run_id(folder.path / "wandb" / "run-id"),
            resume="allow" if mode == "online" else None,
            mode=mode,
            dir=str(folder.path),
            group=config.log.group or (str(Path(config.run.name).parent) if "/" in config.run.name else None),
            tags=config.log.tags,
            job_type=config.log.job_type,
            notes=config.log.notes,
            config=_nested(config),
            settings=settings,
        )

    def log(self, split: str, scalars: dict[str, float], step: int) -> None:
        self._run.log({"step": step, **{f"{split}/{name}": value for name, value in scalars.items()}})

    def flush(self) -> None: ...

    def close(self, failed: bool = False) -> None:
        """Waits for the upload, but not for ever."""
        try:
            self._run.finish(exit_code=1 if failed else 0)
        except TimeoutError:
            self._say(
                f"W&B: not all was uploaded within {_FINISH_SECONDS:g} s; for the rest: "
                f"{self._sync_command()} --include-online --yes"
            )

    def _sync_command(self) -> str:
        return shlex.join(["wandb", "sync", str(self._run.settings.sync_dir)])


def build(config: RunConfig, folder: RunFolder, first_step: int, say: Callable[[str], None]) -> list[Tracker]:
    """The trackers that the settings ask for; `say` prints a line for the user."""
    trackers: list[Tracker] = []
    if config.log.wandb != "off" and os.environ.get("WANDB_MODE") != "disabled":
        trackers.append(WandB(config, folder, say))  # first: it alone can refuse
    if config.log.tensorboard:
        trackers.append(TensorBoard(folder.path / "tensorboard", first_step, say))
    return [*trackers, Metrics(folder.metrics, say)]


def _mode(asked: str) -> tuple[str, str]:
    """online or offline, and why. Decides within seconds: W&B's own retries take minutes, and its login asks."""
    if asked == "offline" or (asked == "auto" and os.environ.get("WANDB_MODE") == "offline"):
        return "offline", "as set"
    import wandb

    server = wandb.setup(wandb.Settings(silent=True)).settings.base_url
    problem = "" if _has_key(server) else f"no API key: set WANDB_API_KEY or run `wandb login`, for {server}"
    problem = problem or _unreachable(server)
    if not problem:
        return "online", ""
    if asked == "online":
        raise UserError(f"log.wandb=online: {problem}; or set log.wandb=offline")
    return "offline", problem


def _has_key(server: str) -> bool:
    """A key in the environment, or in the netrc file where `wandb login` puts it."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    named = os.environ.get("NETRC")
    files = [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]
    for path in files:
        try:
            if netrc.netrc(path).authenticators(urllib.parse.urlsplit(server).hostname or ""):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _unreachable(server: str) -> str:
    """Why the server cannot be used now, or nothing; any answer at all will do."""
    try:
        with urllib.request.urlopen(server, timeout=_REACH_SECONDS):
            return ""
    except urllib.error.HTTPError:
        return ""
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return f"no connection to {server} ({reason})"


def _run_id(path: Path) -> str:
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(4))
    return path.read_text().strip()


def _nested(config: RunConfig) -> dict[str, dict[str, Any]]:
    nested: dict[str, dict[str, Any]] = {}
    for name, value in configs.flatten(config).items():
        section, _, key = name.partition(".")
        nested.setdefault(section, {})[key] = value
    return nested
