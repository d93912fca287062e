"""Odd site files: on the login node, before sbatch, and in the batch script of a job."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from support.processes import REPOSITORY, Samecurve

from launch.slurm import scripts
from trainer.errors import ConfigError

SCRIPTS = REPOSITORY / "slurm"
GOOD = "export FROM_SITE='a b'\n"
# A site file, and what it must not break: GOOD stands at its end.
HARMLESS = {
    "cd": "cd /",
    "silent": "exec 1>/dev/null 2>/dev/null",
    "closed": "exec 1>&- 2>&-",
    "prints": "echo welcome; echo 7; printf 'x\\0y\\n'",
    "set -eu": "set -euo pipefail; shopt -s nullglob failglob",
    "noisy": "set -xv",
    "trap": "trap 'echo bye; exit 9' EXIT; trap '' USR1 TERM; trap : ERR DEBUG RETURN",
    "alias": "shopt -s expand_aliases; alias python=false exec=false bash=false samecurve=false",
    "functions": "python() { exit 4; }; command() { exit 4; }; env() { exit 4; }; exec() { return 1; }; export -f env",
    "names": "project=1 site=2 samecurve=3 state=4 pipe=5 reader=6 code=7 part=8 problem=9 name=x; readonly site state",
    "arguments": "set -- a b c; shift 2",
    "ifs": "IFS=/; set -f",
    "fails": "false; module load no-such-module",
    "background": "sleep 100 & echo $! >sleeper",
    "subshell": "(while :; do sleep 1; done) & echo $! >sleeper",
    "bash variables": "export BASH_COMPAT=51 BASH_REMATCH BASH_XTRACEFD=2 BASH_VERSION",
    "read": "read answer; cat",
    "return": "f() { return 3; }; f",
    "unset": "unset HOME LANG; export -n TO_HIDE",
    "many lines": 'export LINES_OF_TEXT=$\'one\\ntwo\\n# end\\n\'\nexport QUOTES="it\'s \\"\\$(touch HACKED)\\""',
    "umask": "umask 027; ulimit -S -c 0",
    "python in another folder": "PATH=/usr/local/bin:$PATH",
    "readonly": "readonly FROM_SITE_2=1; export FROM_SITE_2; export SHELLOPTS BASHOPTS",
}
# A site file, and the words of the one line that refuses it.
REFUSED = {
    "exit 0\n": "ended its shell (exit code 0) before its last line",
    "exit 3\n": "ended its shell (exit code 3)",
    "exec true\n": "ended its shell (exit code 0)",
    "set -e\nfalse\n": "ended its shell (exit code 1)",
    "set -u\necho $NOT_SET\n": "ended its shell",
    "(while :; do sleep 1; done) & echo $! >sleeper; exit 0\n": "ended its shell (exit code 0)",
    "kill -KILL $$\n": "ended its shell (exit code 137)",
    "(cd /; exit 3) || exit\n": "ended its shell (exit code 3)",
    "set -n\n": "ended its shell",
    "if true; then\n": "is not valid bash (line 2: syntax error",
    "echo 'open\n": "is not valid bash (line",
    "f() {\n": "is not valid bash",
    "export A=1\r\nexport B=2\r\n": "has Windows line ends",
    "export SAMECURVE_SRUN_ARGS='--x \"'\n": 'SAMECURVE_SRUN_ARGS=--x ": not readable as arguments of srun',
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with the batch scripts; its launch/main.py prints what reaches Python. TO_HIDE is set."""
    shutil.copytree(SCRIPTS, tmp_path / "project" / "slurm", ignore=shutil.ignore_patterns("logs", "site.sh"))
    (tmp_path / "project" / "launch").mkdir()
    (tmp_path / "project" / "launch" / "main.py").write_text(
        "import json, os, sys\nprint(json.dumps([os.getcwd(), sys.argv[1:], dict(os.environ)]))\n"
    )
    monkeypatch.setenv("TO_HIDE", "1")
    return tmp_path / "project"


def run_script(project: Path, script: str = "train.sh", **env: str) -> tuple[int, str]:
    """Runs a batch script as SLURM does, with one file for stdout and stderr. Returns the exit code and that log."""
    log = project / "log"
    with log.open("wb") as file:
        completed = subprocess.run(
            ["bash", str(project / "slurm" / script), "a b", "$(id)"], stdout=file, stderr=file,
            stdin=subprocess.DEVNULL, check=False, timeout=30,
            env=os.environ | {"SAMECURVE_SCRIPTS": str(project / "slurm"), "SLURM_JOB_ID": "7"} | env,
        )  # fmt: skip
    return completed.returncode, log.read_text()


def write_site(project: Path, text: str) -> Path:
    (project / "slurm" / "site.sh").write_text(text)
    return project / "slurm" / "site.sh"


def end_sleeping() -> None:
    if Path("sleeper").exists():
        os.kill(int(Path("sleeper").read_text()), signal.SIGKILL)
        Path("sleeper").unlink()


@pytest.fixture(autouse=True)
def end_sleeper() -> object:
    yield
    end_sleeping()


@pytest.mark.parametrize("name", HARMLESS)
def test_site_file_changes_the_environment_alone(project: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    write_site(project, f"{HARMLESS[name]}\n{GOOD}")
    before = {key: value for key, value in os.environ.items() if key not in ("_", "SHLVL", "PWD", "OLDPWD", "PS1")}
    environment = scripts.site_environment(os.environ, project)
    assert environment["FROM_SITE"] == "a b" and capfd.readouterr().out == ""
    end_sleeping()
    code, log = run_script(project)
    assert code == 0, log
    folder, arguments, job_environment = json.loads(log.splitlines()[-1])
    assert folder == str(Path.cwd()) and arguments == ["batch", "a b", "$(id)"]
    assert log.startswith("samecurve: job 7 starts on ")
    assert job_environment["FROM_SITE"] == "a b" and not list(Path.cwd().rglob("HACKED"))
    gone = {"HOME", "LANG", "TO_HIDE"} & set(before) if name == "unset" else set()
    for result in (environment, job_environment):
        assert set(before) - set(result) == gone
        assert all(result[key] == before[key] for key in set(before) - gone - {"PATH"})
    if name == "many lines":
        assert environment["LINES_OF_TEXT"] == job_environment["LINES_OF_TEXT"] == "one\ntwo\n# end\n"
        assert environment["QUOTES"] == job_environment["QUOTES"] == 'it\'s "$(touch HACKED)"'
    if name == "fails":
        assert "site.sh: line 1: failed with exit code 1: false" in log
        assert "failed with exit code 127: module load no-such-module" in log


@pytest.mark.parametrize("text", REFUSED)
def test_unusable_site_file_is_refused_in_one_line(project: Path, text: str, capfd: pytest.CaptureFixture[str]) -> None:
    write_site(project, text)
    with pytest.raises(ConfigError) as error:
        scripts.site_environment(os.environ, project)
    assert REFUSED[text] in str(error.value) and "\n" not in str(error.value)
    end_sleeping()
    code, log = run_script(project)
    if "SRUN_ARGS" not in text:  # Python finds that one, see test_client.py
        assert code == 2 and REFUSED[text] in log.splitlines()[-1]


def test_settings_without_export_reach_python(project: Path) -> None:
    write_site(project, "SAMECURVE_SRUN_ARGS='--a  \"b c\"'\n")
    assert scripts.site_environment(os.environ, project)["SAMECURVE_SRUN_ARGS"] == '--a  "b c"'
    assert '"SAMECURVE_SRUN_ARGS"' in run_script(project)[1]


def test_missing_site_file_is_refused(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMECURVE_SITE", "site.shh")
    with pytest.raises(ConfigError, match=r"site file .*/site\.shh: no such file.*SAMECURVE_SITE"):
        scripts.site_environment(os.environ, project)
    code, log = run_script(project, SAMECURVE_SITE="site.shh")
    assert code == 2 and "site.shh: no such file" in log
    Path("mine.sh").write_text(GOOD)
    monkeypatch.setenv("SAMECURVE_SITE", "mine.sh")
    environment = scripts.site_environment(os.environ, project)
    assert environment["FROM_SITE"] == "a b" and environment["SAMECURVE_SITE"] == str(Path("mine.sh").absolute())


def test_link_to_a_missing_site_file_is_refused(project: Path) -> None:
    (project / "slurm" / "site.sh").symlink_to("gone.sh")
    with pytest.raises(ConfigError, match=r"site\.sh: no such file, but a link to gone\.sh; correct the link"):
        scripts.site_environment(os.environ, project)
    code, log = run_script(project)
    assert code == 2 and "no such file, but a link to gone.sh" in log


def test_file_of_bash_env_runs_for_the_site_file_and_its_output_is_no_code(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = tmp_path / "start.sh"
    start.write_text("echo touch HACKED; echo 'A=1'; module() { export LOADED=$1; }\n")
    write_site(project, f"module cuda\nexport BASH_MINE=1\n{GOOD}")
    monkeypatch.setenv("BASH_ENV", str(start))
    environment = scripts.site_environment(os.environ, project)
    _, log = run_script(project)
    for result in (environment, json.loads(log.splitlines()[-1])[2]):
        assert result["LOADED"] == "cuda" and result["FROM_SITE"] == "a b" and result["BASH_MINE"] == "1"
        assert result["BASH_ENV"] == str(start) and "A" not in result
    assert not any("touch HACKED" in name for name in environment) and not Path("HACKED").exists()


def test_umask_and_limits_of_the_site_file_stay(project: Path) -> None:
    write_site(project, "umask 027; ulimit -S -n 77\n")
    (project / "launch" / "main.py").write_text(
        "import os, resource\nprint(oct(os.umask(0)), resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n"
    )
    assert run_script(project)[1].splitlines()[-1] == "0o27 77"


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"PATH": "/nowhere:$TOOLS"}, "(neither python nor python3 in PATH)"),
        ({"SAMECURVE_PYTHON": "/no/such/python"}, "(/no/such/python)"),
        ({"SAMECURVE_PYTHON": "no-such-python"}, "(no-such-python)"),
        ({"SAMECURVE_PYTHON": "false"}, "false on {host} does not run, or is older than Python 3.11"),
        ({"SAMECURVE_PYTHON": "/etc/passwd"}, "(/etc/passwd)"),
    ],
)
def test_job_without_python_says_so(project: Path, tmp_path: Path, env: dict[str, str], message: str) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "grep", "env", "awk"):
        (tools / tool).symlink_to(str(shutil.which(tool)))
    env = {name: value.replace("$TOOLS", str(tools)) for name, value in env.items()}
    code, log = run_script(project, **env)
    last = log.splitlines()[-1]
    assert code == 2 and message.format(host=os.uname().nodename) in last
    assert "SAMECURVE_PYTHON" in last


def start_script(project: Path, site: str, wait_for: str) -> "subprocess.Popen[str]":
    """Starts train.sh with a site file and waits until that file has created a file of this name."""
    write_site(project, site)
    process = subprocess.Popen(
        ["bash", str(project / "slurm" / "train.sh")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"SAMECURVE_SCRIPTS": str(project / "slurm"), "SLURM_JOB_ID": "7"},
    )  # fmt: skip
    deadline = time.monotonic() + 20
    while not Path(wait_for).exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def test_warning_while_the_site_file_runs_reaches_python(project: Path) -> None:
    process = start_script(project, "touch here; sleep 1.5\n", "here")
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 0 and '"SAMECURVE_SIGNAL": "USR1"' in out
    assert "SLURM's warning before the time limit came while site file" in out


def test_warning_without_a_site_file_reaches_python(project: Path, tmp_path: Path) -> None:
    python = tmp_path / "python"  # the prologue asks it for its version; the warning comes at that time
    python.write_text(
        f'#!/bin/sh\n[ -e {tmp_path}/asked ] || kill -USR1 $PPID\ntouch {tmp_path}/asked\nexec python3 "$@"\n'
    )
    python.chmod(0o755)
    assert '"SAMECURVE_SIGNAL": "USR1"' in run_script(project, SAMECURVE_PYTHON=str(python))[1]


def test_end_of_the_job_while_the_site_file_runs_is_logged(project: Path) -> None:
    process = start_script(project, "echo $$ >here; exec sleep 30\n", "here")
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    while process.poll() is None:
        assert time.monotonic() - start < 5
        time.sleep(0.05)
    os.kill(int(Path("here").read_text()), signal.SIGKILL)  # on a cluster SLURM ends it
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 143 and "SLURM ends this job while site file" in out


def test_warning_between_site_file_and_python_does_not_end_the_job(project: Path) -> None:
    (project / "launch" / "main.py").write_text(
        "import os, signal; os.kill(os.getpid(), signal.SIGUSR1); print('alive')\n"
    )
    assert run_script(project)[1].endswith("alive\n")


def test_random_combinations_of_odd_lines(project: Path) -> None:
    draw = random.Random(0)
    lines = [text for name, text in HARMLESS.items() if name not in ("background", "subshell", "return")]
    for _ in range(12):
        chosen = draw.sample(lines, 3)
        write_site(project, "\n".join([*chosen, GOOD]))
        code, log = run_script(project)
        assert code == 0 and '"FROM_SITE": "a b"' in log, (chosen, log)
    for _ in range(6):
        chosen = [*draw.sample(lines, 2), draw.choice(["exit 0", "exec true", "exit 7"]), GOOD]
        write_site(project, "\n".join(chosen))
        code, log = run_script(project)
        assert code == 2 and "ended its shell" in log, (chosen, log)


def test_submit_with_odd_site_files_queues_nothing(
    samecurve: Samecurve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text(
        f'#!/bin/sh\ntouch {tmp_path}/called\necho "Welcome to the cluster"\necho "7;c"\necho Bye\n'
    )
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    site = tmp_path / "my site.sh"
    monkeypatch.setenv("SAMECURVE_SITE", str(site))
    for text, message in REFUSED.items():
        if "sleeper" in text:
            continue
        site.write_text(text)
        option = [] if len(text) % 2 else ["--dry-run"]
        out, error = samecurve("submit", "--config", "digits", *option, code=2)
        assert message in error and error.count("\n") == 1 and out == ""
    assert not (tmp_path / "called").exists()
    for number, (name, text) in enumerate(HARMLESS.items()):
        if number % 4 == 0:
            site.write_text(f"{text}\n{GOOD}")
            out, _ = samecurve("submit", "--config", "digits", f"run.name=r{number}")
            assert out.startswith("job 7: "), name
