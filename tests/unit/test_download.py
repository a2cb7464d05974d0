"""The downloader against a server on this machine: broken off, resumed, refused, damaged, slow, full, shared."""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from rich.console import Console

from cgtgan.errors import InputError, UserError
from cgtgan.runtime.download import Fetcher, extract
from cgtgan.runtime.sources import CLIP_ARCHIVES, COCO_IMAGES, Source
from cgtgan.runtime.tracking import Tracker
from tests.file_server import FileServer, Served, archive_of

ROOT = Path(__file__).resolve().parents[2]
CONTENT = bytes(range(256)) * 12_000  # 3 MB
SUM = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server() -> Iterator[FileServer]:
    server = FileServer()
    yield server
    server.close()


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def fetcher(console: Console) -> Fetcher:
    return Fetcher(Tracker(console), silence_s=0.3, pause_s=0.001)


def text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def left(folder: Path) -> set[str]:
    """Names in the folder without locks."""
    return {p.name for p in folder.iterdir() if p.suffix != ".lock"}


def test_a_file_arrives_whole_with_progress_and_is_not_fetched_twice(server, fetcher, console, tmp_path) -> None:
    server.files["/a.bin"] = Served(CONTENT)
    target = tmp_path / "new" / "a.bin"
    for _ in range(2):
        fetcher.fetch(Source(f"{server.url}/a.bin", SUM), target)
    assert target.read_bytes() == CONTENT
    assert server.requests == [("/a.bin", None)]
    assert left(target.parent) == {"a.bin"}
    assert "a.bin, MB 3/3" in text(console)


def test_what_breaks_off_is_continued_in_the_same_call(server, fetcher, console, tmp_path) -> None:
    server.files["/a.bin"] = Served(CONTENT, breaks=[1_000_000, 500_000])
    fetcher.fetch(Source(f"{server.url}/a.bin", SUM), tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert [asked for _, asked in server.requests] == [None, "bytes=1000000-", "bytes=1500000-"]
    assert "a.bin: broken off (1,000,000 of 3,072,000 bytes came), trying again" in text(console)


def test_what_was_given_up_is_continued_by_the_next_call(server, fetcher, tmp_path) -> None:
    served = server.files["/a.bin"] = Served(CONTENT, breaks=[1_000_000, 0, 0, 0, 0])
    source, target = Source(f"{server.url}/a.bin"), tmp_path / "a.bin"
    with pytest.raises(UserError, match=r"1,000,000 bytes are kept, the same command continues"):
        fetcher.fetch(source, target)
    assert not target.exists()
    served.breaks.clear()
    fetcher.fetch(source, target)
    assert target.read_bytes() == CONTENT
    assert server.requests[-1] == ("/a.bin", "bytes=1000000-")


def test_a_file_that_changed_meanwhile_is_fetched_anew(server, fetcher, tmp_path) -> None:
    """By its ETag; without one, and without a published sum, nothing tells whether a part still fits."""
    for tagged in (True, False):
        server.files["/a.bin"] = Served(b"old" * 1000, tagged=tagged, breaks=[1000, 0, 0, 0, 0])
        target = tmp_path / f"{tagged}.bin"
        with pytest.raises(UserError):
            fetcher.fetch(Source(f"{server.url}/a.bin"), target)
        server.files["/a.bin"] = Served(b"new" * 1000, tagged=tagged)
        fetcher.fetch(Source(f"{server.url}/a.bin"), target)
        assert target.read_bytes() == b"new" * 1000


def test_a_server_without_ranges_begins_again(server, fetcher, tmp_path) -> None:
    server.files["/a.bin"] = Served(CONTENT, ranges=False, breaks=[1_000_000])
    fetcher.fetch(Source(f"{server.url}/a.bin", SUM), tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert server.requests[-1] == ("/a.bin", "bytes=1000000-")


def test_a_part_that_is_whole_already_or_too_long_is_dealt_with(server, fetcher, tmp_path) -> None:
    server.files["/a.bin"] = Served(CONTENT)
    for part in (CONTENT, CONTENT + b"more"):
        (tmp_path / ".a.bin.part").write_bytes(part)
        fetcher.fetch(Source(f"{server.url}/a.bin", SUM), tmp_path / "a.bin")
        assert (tmp_path / "a.bin").read_bytes() == CONTENT
        assert left(tmp_path) == {"a.bin"}
        (tmp_path / "a.bin").unlink()
    assert [asked for _, asked in server.requests] == ["bytes=3072000-", "bytes=3072004-", None]


def test_a_wrong_sum_keeps_nothing(server, fetcher, tmp_path) -> None:
    server.files["/a.bin"] = Served(b"another file")
    with pytest.raises(InputError, match=rf"has the SHA-256 {hashlib.sha256(b'another file').hexdigest()} and {SUM}"):
        fetcher.fetch(Source(f"{server.url}/a.bin", SUM), tmp_path / "a.bin")
    assert left(tmp_path) == set()


def test_what_no_attempt_will_change_is_said_after_one(server, fetcher, tmp_path) -> None:
    server.files["/page"] = Served(b"<html>log in</html>", kind="text/html; charset=utf-8")
    for path, sentence in (
        ("/none", "is answered with 404 Not Found: check"),
        ("/page", "is answered with a web page"),
    ):
        with pytest.raises(UserError, match=rf"{path} {sentence}.*put the file at {tmp_path / 'a.bin'}"):
            fetcher.fetch(Source(server.url + path), tmp_path / "a.bin")
    assert len(server.requests) == 2
    server.close()
    with pytest.raises(UserError, match=r"cannot be fetched \(\[Errno \d+\] Connection refused\): check the network"):
        fetcher.fetch(Source(f"{server.url}/a.bin"), tmp_path / "a.bin")


def test_an_overloaded_or_silent_server_is_asked_again(server, fetcher, console, tmp_path) -> None:
    server.files["/a.bin"] = Served(CONTENT, status=[503, 429], hangs=1)
    fetcher.fetch(Source(f"{server.url}/a.bin", SUM), tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    for reason in ("answer 503 Service Unavailable", "answer 429 Too Many Requests", "timed out"):
        assert f"broken off ({reason}), trying again" in text(console)
    server.files["/b.bin"] = Served(CONTENT, status=[500] * 9)
    with pytest.raises(UserError, match=r"cannot be fetched \(answer 500 Internal Server Error\)"):
        fetcher.fetch(Source(f"{server.url}/b.bin", SUM), tmp_path / "b.bin")
    assert [path for path, _ in server.requests].count("/b.bin") == 4


def test_redirects_are_followed_and_a_mirror_takes_the_place_of_the_public_server(server, console, tmp_path) -> None:
    source = COCO_IMAGES["val2014"]
    server.files["/images.cocodataset.org/zips/val2014.zip"] = Served(b"", redirect=f"{server.url}/elsewhere")
    server.files["/elsewhere"] = Served(b"pictures")
    Fetcher(Tracker(console), mirror=f"{server.url}/").fetch(source, tmp_path / "val2014.zip")
    assert (tmp_path / "val2014.zip").read_bytes() == b"pictures"


def test_the_proxy_of_the_environment_is_asked(server, fetcher, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.delenv("no_proxy", raising=False)
    server.files["http://images.invalid/a.bin"] = Served(CONTENT)
    fetcher.fetch(Source("http://images.invalid/a.bin", SUM), tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_disk_without_room_is_said_before_a_byte_is_written(server, fetcher, tmp_path) -> None:
    server.files["/a.bin"] = Served(CONTENT, length=10**18)
    with pytest.raises(UserError, match=r"a\.bin takes 1,000,000,000,000 MB more and its disk has [\d,]+ MB free"):
        fetcher.fetch(Source(f"{server.url}/a.bin"), tmp_path / "a.bin")
    assert not (tmp_path / ".a.bin.part").exists()


def test_an_archive_must_leave_room_for_what_is_in_it(server, fetcher, tmp_path) -> None:
    free = shutil.disk_usage(tmp_path).free
    server.files["/a.zip"] = Served(b"", length=free * 3 // 4)
    with pytest.raises(UserError, match=r"a\.zip takes .* MB more and its disk has"):
        fetcher.unpack(Source(f"{server.url}/a.zip"), tmp_path / "a.zip", lambda name: None, lambda: False, copies=2)


FETCH = """
import resource, sys
from pathlib import Path
from cgtgan.runtime.download import Fetcher
from cgtgan.runtime.sources import Source
from cgtgan.runtime.tracking import Tracker

address, target, limit = sys.argv[1:]
if limit:  # stands for a full disk: no file may be larger
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
try:
    Fetcher(Tracker()).fetch(Source(address), Path(target))
except OSError as error:
    print(error.strerror, error.filename)
"""


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", FETCH, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_a_disk_that_gets_full_is_an_oserror_naming_the_file_and_the_rest_follows(server, fetcher, tmp_path) -> None:
    server.files["/a.bin"] = Served(CONTENT)
    part, target = tmp_path / ".a.bin.part", tmp_path / "a.bin"
    assert f"File too large {part}\n" in start(f"{server.url}/a.bin", target, 2_000_000).communicate()[0]
    kept = part.stat().st_size
    assert 0 < kept <= 2_000_000
    fetcher.fetch(Source(f"{server.url}/a.bin"), target)
    assert target.read_bytes() == CONTENT
    assert server.requests[-1] == ("/a.bin", f"bytes={kept}-")


def test_two_processes_fetch_once(server, tmp_path) -> None:
    server.files["/a.bin"] = Served(CONTENT)
    both = [start(f"{server.url}/a.bin", tmp_path / "a.bin", "") for _ in range(2)]
    output = [process.communicate(timeout=60)[0] for process in both]
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert len(server.requests) == 1
    assert sum("fetching" in text for text in output) == 1


# ------------------------------------------------------------------------------------------------------------- archives


MEMBERS = {
    "val2014/COCO_val2014_000000000042.jpg": b"picture",
    "val2014/": b"",
    "__MACOSX/val2014/._COCO_val2014_000000000042.jpg": b"not a picture",
    "../../outside.jpg": b"outside",
    "/etc/absolute.jpg": b"absolute",
    "..\\windows.jpg": b"windows",
    "val2014/readme.txt": b"text",
}


def test_members_are_placed_by_their_last_name_alone(server, fetcher, tmp_path) -> None:
    server.files["/val2014.zip"] = Served(archive_of(MEMBERS))
    folder = tmp_path / "root" / "val2014"

    def place(name: str) -> Path | None:
        return folder / name if name.endswith(".jpg") else None

    source = Source(f"{server.url}/val2014.zip")
    done = [False]
    for _ in range(2):
        fetcher.unpack(source, tmp_path / "root" / "val2014.zip", place, lambda: done[0])
        done[0] = True
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        "COCO_val2014_000000000042.jpg": b"picture",
        "outside.jpg": b"outside",
        "absolute.jpg": b"absolute",
        "windows.jpg": b"windows",
    }
    assert left(tmp_path) == {"root"}
    assert left(tmp_path / "root") == {"val2014"}
    assert len(server.requests) == 1


def test_an_archive_that_cannot_be_fetched_may_be_put_beside(server, fetcher, tmp_path) -> None:
    with pytest.raises(UserError, match=rf"404 Not Found.*or put the file at {tmp_path}/a\.zip$"):
        fetcher.unpack(Source(f"{server.url}/a.zip"), tmp_path / "a.zip", lambda name: None, lambda: False)


def test_an_archive_that_was_there_is_used_and_stays(server, fetcher, tmp_path) -> None:
    (tmp_path / "a.zip").write_bytes(archive_of({"a.txt": b"new", "b.txt": b"b"}))
    (tmp_path / "b.txt").write_bytes(b"b")
    before = (tmp_path / "b.txt").stat().st_ino
    fetcher.unpack(Source(f"{server.url}/a.zip"), tmp_path / "a.zip", lambda name: tmp_path / name, lambda: False)
    assert left(tmp_path) == {"a.zip", "a.txt", "b.txt"}
    assert (tmp_path / "b.txt").stat().st_ino == before  # it was there: an interrupted unpacking continues
    assert server.requests == []


@pytest.mark.parametrize("damage", ["cut", "bit", "other"])
def test_a_damaged_archive_is_named_and_leaves_no_half_file(damage: str, server, fetcher, tmp_path) -> None:
    content = bytearray(archive_of({"a.txt": b"x" * 1000}))
    content[200] ^= 1 if damage == "bit" else 0
    (tmp_path / "a.zip").write_bytes({"cut": content[:500], "bit": content, "other": b"no archive"}[damage])
    with pytest.raises(InputError, match=r"a\.zip is no whole zip archive \(.*\): run the same command again"):
        extract(tmp_path / "a.zip", lambda name: tmp_path / name, fetcher.tracker)
    assert not (tmp_path / "a.txt").exists()
    (tmp_path / "a.zip").rename(tmp_path / "there.zip")
    server.files["/a.zip"] = Served((tmp_path / "there.zip").read_bytes())
    with pytest.raises(InputError):
        fetcher.unpack(Source(f"{server.url}/a.zip"), tmp_path / "a.zip", lambda name: tmp_path / name, lambda: False)
    assert left(tmp_path) <= {"there.zip", ".a.txt.part"}  # a damaged archive that was fetched is not kept


@pytest.mark.parametrize("packing", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_any_damage_of_an_archive_is_a_sentence(packing: int, fetcher, tmp_path) -> None:
    content = archive_of({f"{n}.txt": b"hello world " * 50 for n in range(3)}, packing)
    for seed in range(100):
        chance, damaged = random.Random(seed), bytearray(content)
        for _ in range(chance.randint(1, 4)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        (tmp_path / "a.zip").write_bytes(damaged)
        with suppress(InputError):  # or the damage is in what nobody reads
            extract(tmp_path / "a.zip", lambda name: tmp_path / "out" / "one", fetcher.tracker)


def test_an_archive_without_the_wanted_file_is_another_one(fetcher, tmp_path) -> None:
    (tmp_path / "a.zip").write_bytes(archive_of({"a.txt": b"a"}))
    with pytest.raises(InputError, match=r"^\S+a\.zip holds none of the files that are looked for"):
        extract(tmp_path / "a.zip", lambda name: None, fetcher.tracker)


# ------------------------------------------------------------------------------------------------------------ the table


def test_the_clip_archives_are_those_of_the_clip_package() -> None:
    from cgtgan.models.clip_inputs import clip_module

    source = (Path(clip_module("model").__file__).parent / "clip.py").read_text(encoding="utf-8")
    names = source[source.index("_MODELS = {") + 10 : source.index("}", source.index("_MODELS = {")) + 1]
    models = json.loads(names.replace(",\n}", "}"))
    assert {name: archive.address for name, archive in CLIP_ARCHIVES.items()} == models
    assert all(archive.sha256 == archive.address.split("/")[-2] for archive in CLIP_ARCHIVES.values())
