"""Pieces of one artifact: claimed, kept, shared by processes, taken over from dead ones."""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cgtgan.runtime.shards import POLL_SECONDS, Rank, Shards, read_meta

ROOT = Path(__file__).resolve().parents[2]


def shards(tmp_path: Path, count: int = 5, rank: Rank | None = None) -> Shards:
    path = tmp_path / "a.safetensors"
    return Shards(path, count, 10, path.exists, rank or Rank())


def keep_all(made: list[int], pieces: Shards, claims: Iterator[int]) -> None:
    for i in claims:
        made.append(i)
        pieces.keep(i, {"x": torch.tensor([i])}, {"i": i})


def nothing(_told: int | str) -> None: ...


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Rank()),
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, Rank(1, 4, 1, 2)),
        ({"RANK": "1", "WORLD_SIZE": "4"}, Rank()),
        ({"RANK": "5", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, Rank()),
        (
            {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "0", "SLURM_NTASKS_PER_NODE": "4"},
            Rank(3, 8, 0, 4),
        ),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "3"}, Rank(3, 8, 3, 8)),
        ({"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, Rank()),
    ],
)
def test_the_rank_is_what_the_launcher_says(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: Rank
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv("SLURM_" + name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert Rank.here() == expected


def test_a_rank_begins_with_its_own_pieces_and_goes_on_with_the_others(tmp_path: Path) -> None:
    assert shards(tmp_path, 7, Rank(1, 3)).missing() == [1, 4, 0, 2, 3, 5, 6]
    made: list[int] = []
    pieces = shards(tmp_path, 7, Rank(2, 3))
    pieces.fill(lambda claims: keep_all(made, pieces, claims), nothing, nothing)
    assert made == [2, 5, 0, 1, 3, 4, 6]
    assert pieces.missing() == []
    assert read_meta(pieces.file(4)) == {"i": 4}


def test_what_is_claimed_by_others_is_left_to_them_until_they_fail(tmp_path: Path) -> None:
    one, two = shards(tmp_path), shards(tmp_path)
    claims = one.claimed()
    assert [next(claims), next(claims)] == [0, 1]
    made: list[int] = []
    keep_all(made, two, two.claimed())
    assert made == [2, 3, 4]
    one.keep(0, {"x": torch.tensor([0])}, {})

    def fails(claimed: Iterator[int]) -> None:
        raise OSError(next(claimed))

    one._claims.pop(1).release()
    with pytest.raises(OSError, match="1"):
        one.fill(fails, nothing, nothing)
    two.fill(lambda claimed: keep_all(made, two, claimed), nothing, nothing)
    assert made == [2, 3, 4, 1]


def test_what_others_made_meanwhile_is_not_claimed_one_by_one(tmp_path: Path) -> None:
    """After its own pieces a rank looks into the folder again: it takes no lock of a piece that is there by then."""
    first, second = shards(tmp_path, 6, Rank(0, 2)), shards(tmp_path, 6, Rank(1, 2))

    def make(claims: Iterator[int]) -> None:
        for i in claims:
            second.keep(i, {"x": torch.tensor([i])}, {})
            if i == 5:  # its last; the other rank has made two of its three
                for other in (0, 2):
                    first.file(other).touch()

    second.fill(make, nothing, nothing)
    locks = sorted(file.name for file in second.folder.glob(".*.lock"))
    assert locks == [f".{i:06d}.lock" for i in (1, 3, 4, 5)]


def test_the_seconds_of_waiting_for_others_are_counted_and_said(tmp_path: Path) -> None:
    one, two = shards(tmp_path), shards(tmp_path)
    next(one.claimed())
    made, said = list[int](), list[str]()

    def others_end(text: str) -> None:
        said.append(text)
        if len(said) == 1:
            one.keep(0, {"x": torch.tensor([0])}, {})

    for _ in range(2):  # the second time nothing is missing, and nothing is said
        two.fill(lambda claims: keep_all(made, two, claims), nothing, others_end)
    assert made == [1, 2, 3, 4]
    begins, ends = said
    assert begins == "waiting for other processes that work on 1 pieces"
    waited = re.fullmatch(r"waited ([\d.]+) s for other processes", ends)
    assert waited
    assert POLL_SECONDS <= float(waited[1]) < POLL_SECONDS + 5


def test_nothing_is_made_once_the_artifact_is_there(tmp_path: Path) -> None:
    pieces = shards(tmp_path)
    pieces.path.write_text("made")
    pieces.fill(lambda claims: pytest.fail("nothing is to be made"), nothing, nothing)
    assert list(pieces.claimed()) == []
    pieces.remove()
    assert not pieces.folder.exists()


def test_damaged_and_stale_pieces_are_made_again(tmp_path: Path) -> None:
    pieces = shards(tmp_path)
    keep_all([], pieces, pieces.claimed())
    pieces.file(3).write_bytes(pieces.file(3).read_bytes()[:-3])
    assert read_meta(pieces.file(3)) is None
    pieces.discard(lambda file: read_meta(file) in (None, {"i": 1}))
    assert sorted(pieces.missing()) == [1, 3]


CHILD = """
import sys, time
import torch
from pathlib import Path
from cgtgan.runtime.shards import Rank, Shards
path = Path(sys.argv[1]) / "a.safetensors"
pieces = Shards(path, 40, 10, path.exists, Rank(int(sys.argv[2]), 3))
def make(claims):
    for i in claims:
        time.sleep(0.02)
        with (path.parent / "log").open("a") as log:
            log.write(f"{i}\\n")
        pieces.keep(i, {"x": torch.tensor([i])}, {})
print("ready", flush=True)
pieces.fill(make, lambda n: None, lambda n: None)
"""


def test_processes_share_and_a_killed_one_is_taken_over(tmp_path: Path) -> None:
    """Three processes, one killed in its work: every piece is there, and at most the killed one's was begun twice."""
    children = [
        subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path), str(i)], cwd=ROOT, stdout=subprocess.PIPE)
        for i in range(3)
    ]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
    time.sleep(0.15)
    children[1].kill()
    for child in children:
        child.communicate(timeout=60)
    begun = (tmp_path / "log").read_text().split()
    assert set(map(int, begun)) == set(range(40))
    assert len(begun) <= 41
    assert shards(tmp_path, 40).missing() == []
