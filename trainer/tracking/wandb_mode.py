"""Decides within seconds if W&B runs online or offline. W&B's own retries take minutes, and its login asks the user.

Also checks W&B's variables: its client ends with a traceback if one has a value that it does not expect.
"""

import http.client
import netrc
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from threading import Thread
from typing import Any

from trainer.errors import UserError
from trainer.text.escape import one_line

_CONNECT_TIMEOUT_SECONDS = 3.0
# Values of WANDB_MODE, in any case: those of W&B's client, its older ones, and the words of log.wandb.
_MODES = {
    "": "auto", "auto": "auto", "online": "auto", "run": "auto", "shared": "auto", "offline": "offline",
    "dryrun": "offline", "disabled": "off", "off": "off", "false": "off", "0": "off", "none": "off",
}  # fmt: skip
_TRUE = ("true", "1", "yes", "on")
# The run folder decides these; W&B would refuse some of them together with ours.
_OURS = ("WANDB_DIR", "WANDB_RESUME", "WANDB_RESUME_FROM", "WANDB_FORK_FROM", "WANDB_DISABLED")
_SECRETS = re.compile("KEY|TOKEN|PASS|SECRET|CREDENTIAL|HEADER")


def resolve_mode(setting: str) -> str:
    """Returns auto, online, offline or off: the setting log.wandb, unless WANDB_MODE or WANDB_DISABLED says otherwise.

    Raises UserError for an unknown WANDB_MODE, and if it disables W&B although log.wandb=online.
    """
    if setting == "off":
        return "off"
    variable = os.environ.get("WANDB_MODE", "")
    mode = _MODES.get(variable.strip().lower())
    if mode is None:
        raise UserError(
            f"WANDB_MODE={variable[:20]!r}: expected online, offline or disabled; correct it, or run: unset WANDB_MODE"
        )
    if os.environ.get("WANDB_DISABLED", "").strip().lower() in _TRUE:
        variable, mode = "disabled", "off"
    if mode == "off" and setting == "online":
        raise UserError(
            f"log.wandb=online: WANDB_MODE={variable} forbids it; unset WANDB_MODE and WANDB_DISABLED, or set "
            "log.wandb=off"
        )
    return mode if mode == "off" or setting == "auto" else setting


def decide_mode(requested_mode: str, problem: str) -> tuple[str, str]:
    """Returns "online" and an empty text, or "offline" and the reason.

    requested_mode: auto, online or offline. problem: the result of prepare_variables, which must be called first.
    Raises UserError if the mode is online and the key or the network is missing.
    """
    if requested_mode == "offline":
        return "offline", f"as set; {problem}" if problem else "as set"
    if not problem:
        server = server_url()
        problem = (
            ""
            if has_key(server)
            else f"no API key: set WANDB_API_KEY or run `wandb login`, for {_without_password(server)}"
        )
        problem = problem or connection_problem(server)
    if not problem:
        return "online", ""
    if requested_mode == "online":
        raise UserError(f"log.wandb=online: {problem}; or set log.wandb=offline")
    os.environ["WANDB_MODE"] = "offline"
    return "offline", problem


def prepare_variables(requested_mode: str) -> str:
    """Removes variables that W&B's client does not accept. Returns what was wrong with them; "" if all are good.

    requested_mode: auto, online or offline, which becomes WANDB_MODE. Call it before wandb is imported.
    """
    for name in _OURS:
        os.environ.pop(name, None)
    os.environ["WANDB_MODE"] = "offline" if requested_mode == "offline" else "online"
    os.environ["WANDB_CONSOLE"], os.environ["WANDB_SILENT"] = "off", "true"
    problems = []
    for name in ("WANDB_HTTP_TIMEOUT", "WANDB_FILE_PUSHER_TIMEOUT", "WANDB_INIT_TIMEOUT"):  # read at import
        if not re.fullmatch(r"[0-9]{0,6}(\.[0-9]*)?", os.environ.get(name, "")):
            problems.append(_problem(name, "expected a number of seconds"))
    import wandb  # lazy import: 1 s

    for name, value in sorted(os.environ.items()):
        if not name.startswith("WANDB_"):
            continue
        if not value:
            del os.environ[name]  # W&B takes an empty name or id for a wrong one
            continue
        try:
            wandb.Settings().update_from_env_vars({name: value})
        except (wandb.Error, ValueError, TypeError) as error:
            problems.append(_problem(name, _reason(error)))
    return "; ".join(problems)


def _problem(name: str, reason: str) -> str:
    """Removes a variable and returns what was wrong. Never shows a key or a password."""
    value = os.environ.pop(name)
    shown = name if _SECRETS.search(name) or "@" in value else f"{name}={value[:40]!r}"
    return f"{shown}: {reason}"


def _reason(error: Exception) -> str:
    """Returns the first message of pydantic's error, whose full text shows the value, or of another error."""
    list_errors: Any = getattr(error, "errors", None)
    text = list_errors()[0]["msg"] if callable(list_errors) else str(error)
    return one_line(text)


def server_url() -> str:
    """Returns the URL of the server that W&B's client uses by its settings file and its variables."""
    import wandb  # lazy import: 1 s

    return str(wandb.setup(wandb.Settings(silent=True)).settings.base_url)


def has_key(server: str) -> bool:
    """Returns True if the environment or the netrc file, where `wandb login` stores it, has an API key."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    names = [os.environ.get("NETRC")] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for path in [os.path.expanduser(name) for name in names if name]:  # noqa: PTH111 (Path's raises without a home)
        try:
            if netrc.netrc(path).authenticators(urllib.parse.urlsplit(server).hostname or ""):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def connection_problem(server: str) -> str:
    """Returns why the server cannot be reached, or an empty text. Any HTTP answer counts as reachable.

    Requests go through the proxy that the environment names, as W&B's do.
    """
    problems: list[str] = []
    # A thread, because urlopen's timeout limits neither a name lookup nor an answer that never ends.
    request = Thread(target=lambda: problems.append(_request_problem(server)), daemon=True)
    request.start()
    request.join(_CONNECT_TIMEOUT_SECONDS)
    return (
        problems[0]
        if problems
        else f"no connection to {_without_password(server)} (no answer in {_CONNECT_TIMEOUT_SECONDS:g} s)"
    )


def _request_problem(server: str) -> str:
    try:
        with urllib.request.urlopen(server, timeout=_CONNECT_TIMEOUT_SECONDS):
            return ""
    except urllib.error.HTTPError:
        return ""
    except (OSError, ValueError, http.client.HTTPException) as error:
        return f"no connection to {_without_password(server)} ({getattr(error, 'reason', error)})"


def _without_password(server: str) -> str:
    return re.sub("//[^/]*@", "//", server)
