"""`samecurve report` writes the report and the figures of a run, and compares runs."""

import shutil
import subprocess
import sys
from pathlib import Path

from support.processes import Samecurve


def test_report_of_one_run_is_written_again_with_its_figures(finished: Path, samecurve: Samecurve) -> None:
    content = (finished / "report.html").read_text()
    (finished / "report.html").unlink()
    out, _ = samecurve("report", str(finished))
    assert out.strip() == str(finished / "report.html") and (finished / "report.html").read_text() == content
    names = sorted(path.name for path in (finished / "figures").iterdir())
    stems = ("classes", "confusion", "curves")
    assert names == sorted([f"{stem}.{end}" for stem in stems for end in ("pdf", "png", "svg")] + ["mistakes.png"])
    svg = (finished / "figures" / "confusion.svg").read_text()
    assert (
        "predicted class</text>" in svg and "true class</text>" in svg and f"{finished.name}: test set at step" in svg
    )
    assert (finished / "figures" / "curves.pdf").read_bytes().startswith(b"%PDF-")


def test_report_of_several_runs_is_written_to_their_common_folder(finished: Path, samecurve: Samecurve) -> None:
    out, _ = samecurve("report", finished.name, str(finished), "--root", str(finished.parent))
    assert Path(out.strip()) == finished.parent / "report.html"
    assert "<h1>2 runs</h1>" in (finished.parent / "report.html").read_text()


def test_report_of_a_folder_of_runs_compares_them_and_skips_other_files(
    finished: Path, samecurve: Samecurve, tmp_path: Path
) -> None:
    sweep = tmp_path / "runs" / "rates"
    for name in ("a", "b"):
        shutil.copytree(finished, sweep / name)
    (sweep / "results.json").write_text("{}")
    out, err = samecurve("report", "rates")
    assert out.strip() == str(sweep / "report.html") and "rates is a folder with 2 runs" in err
    out, err = samecurve("report", *(str(path) for path in sorted(sweep.iterdir())))
    assert out.strip() == str(sweep / "report.html") and err.count("is skipped, because it is a file") == 2
    assert "expected folders of runs, found files" in samecurve("report", str(sweep / "results.json"), code=2)[1]
    assert "no run 'nothing' under runs" in samecurve("report", "rates", "nothing", code=2)[1]


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
