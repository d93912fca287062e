"""Decides within seconds if W&B runs online or offline. W&B's own retries take minutes, and its login asks the user."""

import http.client
import netrc
import os
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from threading import Thread

from trainer.errors import UserError

_CONNECT_TIMEOUT_SECONDS = 3.0


def decide_mode(requested_mode: str) -> tuple[str, str]:
    """Returns "online" and an empty text, or "offline" and the reason.

    requested_mode: auto, online or offline. Raises UserError if it is online and the key or the network is missing.
    """
    if requested_mode == "offline" or (requested_mode == "auto" and os.environ.get("WANDB_MODE") == "offline"):
        return "offline", "as set"
    import wandb  # lazy import: 1 s

    server = wandb.setup(wandb.Settings(silent=True)).settings.base_url
    problem = "" if _has_key(server) else f"no API key: set WANDB_API_KEY or run `wandb login`, for {server}"
    problem = problem or _connection_problem(server)
    if not problem:
        return "online", ""
    if requested_mode == "online":
        raise UserError(f"log.wandb=online: {problem}; or set log.wandb=offline")
    return "offline", problem


def _has_key(server: str) -> bool:
    """Returns True if the environment or the netrc file, where `wandb login` stores it, has an API key."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    netrc_variable = os.environ.get("NETRC")
    paths = [Path(netrc_variable)] if netrc_variable else [Path.home() / ".netrc", Path.home() / "_netrc"]
    for path in paths:
        try:
            if netrc.netrc(path).authenticators(urllib.parse.urlsplit(server).hostname or ""):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _connection_problem(server: str) -> str:
    """Returns why the server cannot be reached, or an empty text. Any HTTP answer counts as reachable."""
    problems: list[str] = []
    # A thread, because urlopen's timeout limits neither a name lookup nor an answer that never ends.
    request = Thread(target=lambda: problems.append(_request_problem(server)), daemon=True)
    request.start()
    request.join(_CONNECT_TIMEOUT_SECONDS)
    return problems[0] if problems else f"no connection to {server} (no answer in {_CONNECT_TIMEOUT_SECONDS:g} s)"


def _request_problem(server: str) -> str:
    try:
        with urllib.request.urlopen(server, timeout=_CONNECT_TIMEOUT_SECONDS):
            return ""
    except urllib.error.HTTPError:
        return ""
    except (OSError, ValueError, http.client.HTTPException) as error:
        return f"no connection to {server} ({getattr(error, 'reason', error)})"
