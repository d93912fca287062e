"""Tests the choice between W&B online and offline."""

from pathlib import Path

import pytest

from trainer.errors import UserError
from trainer.tracking import wandb_mode

KEY = "k" * 40


def decide_mode(setting: str) -> tuple[str, str]:
    """Decides as WandbTracker does."""
    requested_mode = wandb_mode.resolve_mode(setting)
    return wandb_mode.decide_mode(requested_mode, wandb_mode.prepare_variables(requested_mode))


@pytest.fixture(autouse=True)
def unreachable_server(monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    wandb.teardown()  # wandb reads its environment variables once a process
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the discard port refuses connections at once


def test_auto_without_key_is_offline() -> None:
    mode, reason = decide_mode("auto")
    assert mode == "offline" and "WANDB_API_KEY" in reason


def test_auto_without_network_is_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    mode, reason = decide_mode("auto")
    assert mode == "offline" and "no connection to http://127.0.0.1:9" in reason and KEY not in reason


def test_key_in_netrc_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login user password {KEY}\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert "no connection" in decide_mode("auto")[1]


def test_online_without_key_is_refused() -> None:
    with pytest.raises(UserError, match=r"log\.wandb=online: no API key.*log\.wandb=offline"):
        decide_mode("online")


def test_wandb_mode_variable_makes_auto_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert decide_mode("auto") == ("offline", "as set")
