"""Tests W&B's variables with odd values: the real client must never end a run with a traceback or show a key."""

import os
import random
from pathlib import Path

import pytest
from support.local_wandb import MISSING, Server, read_summary

from trainer.config.load import load_config
from trainer.errors import UserError
from trainer.run.folder import RunFolder
from trainer.tracking import wandb_mode
from trainer.tracking.tracker import Tracker
from trainer.tracking.trackers import build_trackers, wandb_run_id
from trainer.tracking.wandb_mode import prepare_variables, resolve_mode

pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of wandb's imports
VARIABLES = (
    "WANDB_MODE", "WANDB_BASE_URL", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_DIR", "WANDB_RUN_ID", "WANDB_RESUME",
    "WANDB_TAGS", "WANDB_NAME", "WANDB_SILENT", "WANDB_CONSOLE", "WANDB_DISABLED", "WANDB_API_KEY", "WANDB_NOTES",
    "WANDB_JOB_TYPE", "WANDB_RUN_GROUP", "WANDB_HTTP_TIMEOUT", "WANDB_INIT_TIMEOUT", "WANDB_QUIET", "WANDB_HOST",
    "WANDB_SWEEP_ID", "WANDB_RESUME_FROM", "WANDB_FORK_FROM", "WANDB_START_METHOD", "WANDB_IGNORE_GLOBS",
    "WANDB_SAVE_CODE", "WANDB_DISABLE_GIT", "WANDB_CONFIG_PATHS", "WANDB_REINIT", "WANDB_UNKNOWN",
)  # fmt: skip
VALUES = ("", " ", "off", "DISABLED", "dryrun", "ONLINE", "garbage", "host", "http://127.0.0.1:9", "a/b", "a,b", "true",
          "-1", "x" * 300, "ü\u202e", "/no/such/folder", "1?_step=2", "user:p4ssw0rd@host")  # fmt: skip
KEY = "0123456789abcdef" * 3


@pytest.fixture(autouse=True)
def unreachable_server(monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    wandb.teardown()  # wandb reads its environment variables once a process
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the discard port refuses connections at once


@pytest.mark.parametrize(
    ("setting", "variable", "mode"),
    [
        ("auto", "", "auto"), ("auto", "online", "auto"), ("auto", "ONLINE", "auto"), ("auto", "offline", "offline"),
        ("auto", "dryrun", "offline"), ("auto", "off", "off"), ("auto", "disabled", "off"), ("offline", "off", "off"),
        ("offline", "online", "offline"), ("online", "offline", "online"), ("off", "garbage", "off"),
    ],
)  # fmt: skip
def test_mode_variable_counts_in_any_spelling(
    setting: str, variable: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", variable)
    assert resolve_mode(setting) == mode


def test_unknown_mode_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "garbage\x1b[2J")
    with pytest.raises(UserError, match="expected online, offline or disabled") as raised:
        resolve_mode("auto")
    assert str(raised.value).isprintable()


def test_disabled_variable_forbids_online_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_DISABLED", "true")
    assert resolve_mode("auto") == "off"
    with pytest.raises(UserError, match=r"log\.wandb=online"):
        resolve_mode("online")


def test_wrong_variables_are_removed_and_named_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "host")
    monkeypatch.setenv("WANDB_API_KEY", f"{KEY} ")
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "soon")
    problem = prepare_variables("auto")
    assert "WANDB_BASE_URL='host': " in problem and "WANDB_API_KEY: " in problem and KEY not in problem
    assert "WANDB_HTTP_TIMEOUT='soon': expected a number" in problem
    assert not {"WANDB_BASE_URL", "WANDB_API_KEY", "WANDB_HTTP_TIMEOUT"} & os.environ.keys()


def test_password_of_a_server_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://user:p4ssw0rd@127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    mode, reason = wandb_mode.decide_mode("auto", prepare_variables("auto"))
    assert mode == "offline" and "127.0.0.1:9" in reason and "p4ssw0rd" not in reason


def build(folder: Path, *settings: str) -> tuple[list[Tracker], list[str]]:
    """Builds the trackers as a session does; returns them and the lines for the user."""
    config, run_folder, lines = (
        load_config([], ["run.name=x", "log.tensorboard=false", *settings]),
        RunFolder(folder),
        [],
    )
    folder.mkdir()
    run_id = wandb_run_id(config, run_folder, "")
    return build_trackers(config, run_folder, 0, run_id, lines.append), lines


def test_random_values_give_a_run_or_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    built = 0
    for seed in range(200):
        generator = random.Random(seed)
        with pytest.MonkeyPatch.context() as patch:
            for name in generator.sample(VARIABLES, generator.randint(1, 5)):
                patch.setenv(name, generator.choice(VALUES))
            context = {name: value for name, value in os.environ.items() if name.startswith("WANDB_")}
            try:
                mode = resolve_mode("auto")
                if mode == "off":
                    continue
                problem = prepare_variables(mode)
                wandb.Settings().update_from_env_vars(dict(os.environ))
                assert "p4ssw0rd" not in problem and problem.isprintable(), context
                built += 1
            except UserError as error:
                assert str(error).isprintable(), context
            finally:
                for name in [name for name in os.environ if name.startswith("WANDB_") and name not in context]:
                    del os.environ[name]
    assert built > 100


@pytest.mark.slow
@pytest.mark.parametrize(
    "variables",
    [
        {"WANDB_BASE_URL": "host"},
        {"WANDB_RESUME": "garbage", "WANDB_RUN_ID": "from-outside", "WANDB_DIR": "/no/such/folder"},
        {"WANDB_CONSOLE": "garbage", "WANDB_SILENT": "perhaps", "WANDB_PROJECT": "", "WANDB_ENTITY": ""},
        {"WANDB_PROJECT": "a/b", "WANDB_TAGS": "a,b", "WANDB_NAME": "shown"},
    ],
)
def test_odd_variables_log_an_offline_run(
    variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    trackers, lines = build(tmp_path / "x")
    for tracker in trackers:
        tracker.log("train", {"loss": 0.5, "samples": 8.0}, 1)
        tracker.close()
    (line,) = lines
    assert line.startswith("W&B: offline (")
    (session,) = (tmp_path / "x" / "wandb").glob("offline-run-*")
    summary = read_summary(session)
    assert summary["run_id"] == (tmp_path / "x" / "wandb" / "run-id").read_text()
    if "WANDB_RUN_ID" in variables:
        assert summary["run_id"] == "from-outside"
    if "WANDB_NAME" in variables:
        assert summary["name"] == "shown" and summary["tags"] == ["a", "b"]


def test_unusable_run_id_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "a/b")
    with pytest.raises(UserError, match="WANDB_RUN_ID: expected up to 64"):
        build(tmp_path / "x")


class TestSweepTrial:
    """The variables that `wandb agent` sets for a trial."""

    @pytest.fixture(autouse=True)
    def trial(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in {"WANDB_SWEEP_ID": "s1", "WANDB_RUN_ID": "t1", "WANDB_PROJECT": "mine"}.items():
            monkeypatch.setenv(name, value)

    def test_trial_has_a_run_name_of_its_own(self) -> None:
        assert load_config([], []).run.name == "cifar10-sweep-s1/t1"
        assert load_config([], ["run.name=x"]).run.name == "x"

    def test_trial_starts_beside_the_run_of_the_same_config(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        root = f"run.root={tmp_path}"
        trial = load_config([], [root])
        monkeypatch.delenv("WANDB_SWEEP_ID")
        plain = load_config([], [root])
        for config in (plain, trial, plain):
            folder = RunFolder(config.folder)
            assert not folder.try_acquire(config)
            folder.write_settings(config, {})
            folder.write_status("running", 0)
            folder.release()

    def test_project_of_the_sweep_counts_unless_set(self) -> None:
        assert load_config([], []).log.project == "mine"
        assert load_config([], ["log.project=other"]).log.project == "other"

    def test_id_of_the_trial_is_the_id_of_the_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        config, folder = load_config([], ["run.name=x"]), RunFolder(tmp_path)
        assert wandb_run_id(config, folder, "abcd1234") == "t1"
        monkeypatch.setenv("WANDB_RUN_ID", "t2")
        assert wandb_run_id(config, folder, "abcd1234") == "t2", "W&B accepts no other id"
        monkeypatch.delenv("WANDB_SWEEP_ID")
        assert wandb_run_id(config, folder, "abcd1234") == "t2", "the run folder has precedence"


@pytest.mark.skipif(bool(MISSING), reason=MISSING)
@pytest.mark.slow
def test_artifact_query_that_fails_does_not_fail_the_tracker(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trackers, lines = build(tmp_path / "x", "log.artifact=true", "log.figures=false", "log.wandb=online")
    (tmp_path / "weights.safetensors").write_bytes(b"weights")
    server.inject_fault(match="graphql", body={"errors": [{"message": "internal"}]}, status=200)
    summary = {"steps": 1, "seconds": 1.0, "test": {"accuracy": 1.0, "loss": 0.0, "classes": [], "confusion": []}}
    for tracker in trackers:
        tracker.log("train", {"loss": 0.5, "samples": 8.0}, 1)
        tracker.log_summary({}, summary, tmp_path / "weights.safetensors")
    server.inject_fault()
    for tracker in trackers:
        tracker.close()
    assert any("left out" in line for line in lines), lines
