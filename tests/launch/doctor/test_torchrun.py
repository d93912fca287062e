"""The doctor's rendezvous among the machines of a torchrun start."""

import pytest

from launch.doctor import torchrun

FOUR_RANKS = {"RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1"}


def read_rendezvous(monkeypatch: pytest.MonkeyPatch, **env: str) -> torchrun.Rendezvous:
    for name, value in (FOUR_RANKS | {"MASTER_PORT": "29500"} | env).items():
        monkeypatch.setenv(name, value)
    return torchrun.read_rendezvous()


def test_rendezvous_is_computed_from_torchrun_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    rendezvous = read_rendezvous(monkeypatch)
    assert (rendezvous.num_nodes, rendezvous.node, rendezvous.ranks_per_node) == (2, 1, 2)
    assert rendezvous.address == "10.0.0.1" and rendezvous.ports == tuple(range(29532, 29540))
    assert read_rendezvous(monkeypatch, RANK="0", LOCAL_RANK="0").token == rendezvous.token  # the same on all machines
    assert torchrun.is_first()
    assert read_rendezvous(monkeypatch, TORCHELASTIC_RUN_ID="other").token != rendezvous.token


def test_rendezvous_ports_stay_in_the_valid_range(monkeypatch: pytest.MonkeyPatch) -> None:
    ports = read_rendezvous(monkeypatch, MASTER_PORT="65535").ports
    assert all(1024 <= port < 65536 for port in ports) and len(set(ports)) == 8


def test_machine_that_cannot_reach_rank_0_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read_rendezvous(monkeypatch, RANK="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
    assert torchrun.serve(0.2) == 1
    assert "(node 1) cannot reach rank 0 at 127.0.0.1:29532 (Connection refused); check" in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert torchrun.serve(0.2) == 0  # only the first process of a machine serves it
