"""What cannot work, under real launchers: one line from rank 0, nobody left hanging."""

from collections.abc import Callable
from pathlib import Path

from support.processes import ACCELERATE, MAIN, REPOSITORY, SMALL, Done, torchrun


def test_accelerates_cpu_flag_that_starts_one_process_is_refused(launch: Callable[..., Done]) -> None:
    done = launch([*ACCELERATE, "--cpu", "--num_processes", "2", MAIN, *SMALL])
    assert done.code != 0
    (line,) = [line for line in done.err.splitlines() if line.startswith("samecurve: ")]
    assert "asked for several processes" in line and "multi_cpu.yaml" in line
    assert not Path("runs").exists()


def test_a_mistake_under_two_ranks_is_one_line_and_nobody_hangs(
    launch: Callable[..., Done], image_folder: Path
) -> None:
    (image_folder / "train" / "cat" / "0.png").write_bytes(b"broken")  # rank 0 alone sees it: it decodes first
    folder = ["data.name=image_folder", f"data.root={image_folder}", "data.global_batch_size=4", "run.root=runs"]
    for settings, wanted in ((["train.epoch=3"], "did you mean 'train.epochs'"), (folder, "corrupt image")):
        done = launch(torchrun(2, MAIN, *SMALL, *settings), timeout_seconds=150)
        assert done.code != 0
        lines = [line for line in done.err.splitlines() if line.startswith("samecurve: ")]
        assert len(lines) == 1 and wanted in lines[0], done.err
        assert "Traceback" not in done.err.split("torch/distributed")[0]
        assert "exitcode  : 2" in done.err  # of the rank, as torchrun reports it; its own is 1
    assert not list(Path("runs").glob("*/config.yaml"))


def test_a_defect_on_one_rank_ends_all_and_shows_its_traceback(launch: Callable[..., Done]) -> None:
    done = launch(
        torchrun(2, str(REPOSITORY / "tests" / "support" / "workers" / "defect.py"), *SMALL), timeout_seconds=150
    )
    assert done.code != 0
    report = done.err[done.err.rindex("Failures:") :]  # which of the two it saw first is chance
    assert "RuntimeError: planted on rank 1" in report  # torchrun's own report holds it, and not only the screen
