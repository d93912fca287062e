"""log.wandb in, online or offline out, and why. Decides within seconds: W&B's own retries take minutes, and its login
asks."""

import http.client
import netrc
import os
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from threading import Thread

from trainer.errors import UserError

_REACH_SECONDS = 3.0


def decide_mode(asked: str) -> tuple[str, str]:
    """asked: auto, online or offline. Raises UserError when online is asked for and cannot be."""
    if asked == "offline" or (asked == "auto" and os.environ.get("WANDB_MODE") == "offline"):
        return "offline", "as set"
    import wandb  # late: 1 s

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
    found: list[str] = []
    # A thread: a name that is looked up in vain, or an answer that never ends, knows no timeout.
    probe = Thread(target=lambda: found.append(_problem(server)), daemon=True)
    probe.start()
    probe.join(_REACH_SECONDS)
    return found[0] if found else f"no connection to {server} (no answer in {_REACH_SECONDS:g} s)"


def _problem(server: str) -> str:
    try:
        with urllib.request.urlopen(server, timeout=_REACH_SECONDS):
            return ""
    except urllib.error.HTTPError:
        return ""
    except (OSError, ValueError, http.client.HTTPException) as error:
        return f"no connection to {server} ({getattr(error, 'reason', error)})"
