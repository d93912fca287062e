"""`samecurve report` writes the report and the figures of a run, and compares runs."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import Samecurve, finished_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run on digits, with report.html and without figures."""
    return finished_run(tmp_path_factory.mktemp("runs"), "train.max_steps=20")


def test_report_of_one_run_is_written_again_with_its_figures(finished: Path, samecurve: Samecurve) -> None:
    content = (finished / "report.html").read_text()
    (finished / "report.html").unlink()
    out, _ = samecurve("report", str(finished))
    assert out.strip() == str(finished / "report.html") and (finished / "report.html").read_text() == content
    names = sorted(path.name for path in (finished / "figures").iterdir())
    assert names == ["classes.png", "confusion.png", "curves.png", "mistakes.png"]


def test_report_of_several_runs_is_written_to_their_common_folder(finished: Path, samecurve: Samecurve) -> None:
    out, _ = samecurve("report", finished.name, str(finished), "--root", str(finished.parent))
    assert Path(out.strip()) == finished.parent / "report.html"
    assert "<h1>2 runs</h1>" in (finished.parent / "report.html").read_text()


def test_report_creates_the_folder_of_out(finished: Path, samecurve: Samecurve, tmp_path: Path) -> None:
    out, _ = samecurve("report", str(finished), "--out", str(tmp_path / "a" / "b.html"))
    assert out.strip() == str(tmp_path / "a" / "b.html") and (tmp_path / "a" / "b.html").is_file()


def test_unwritable_out_is_refused_with_one_line(finished: Path, samecurve: Samecurve, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    _, err = samecurve("report", str(finished), "--out", str(tmp_path / "file" / "x.html"), code=2)
    assert "cannot be written" in err and "--out" in err and err.count("\n") == 1


def test_report_imports_no_torch(finished: Path) -> None:
    code = "import sys; from launch.main import main; main(['report', sys.argv[1]]); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, str(finished)], check=True, timeout=60, stdout=subprocess.DEVNULL)
