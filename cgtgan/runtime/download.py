"""Files from the network: whole or absent, resumed after a break, checked, fetched by one process of several.

Plain HTTP with the standard library, which follows redirects and takes proxies from HTTPS_PROXY, HTTP_PROXY, NO_PROXY.
"""

from __future__ import annotations

import errno
import json
import lzma
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from ssl import SSLError
from urllib.error import HTTPError, URLError
from urllib.request import OpenerDirector, Request, build_opener
from zipfile import BadZipFile, ZipFile, ZipInfo

from cgtgan.errors import InputError, UserError
from cgtgan.runtime.fingerprints import file_sha256
from cgtgan.runtime.sources import Source
from cgtgan.runtime.store import locked
from cgtgan.runtime.tracking import Tracker
from cgtgan.runtime.versions import __version__

TRIES = 4  # attempts in a row that bring no byte
CHUNK = 1 << 20
MB = 10**6
# what zipfile and its decompressors raise for foreign bytes, and an OSError without a number, or for a wrong place
_DAMAGED_ARCHIVE = (BadZipFile, EOFError, RuntimeError, ValueError, zlib.error, lzma.LZMAError)
_BROKEN_CONNECTION = (URLError, TimeoutError, ConnectionError, HTTPException, SSLError)


_FETCHED = ".fetched-"  # begins the name of an archive that is removed once it is unpacked


def _without_prefix(archive: Path) -> str:
    return archive.name.removeprefix(_FETCHED)


@dataclass(frozen=True)
class Fetcher:
    """How files are fetched. mirror: as in `sources`. silence_s: seconds without a byte that break an attempt off."""

    tracker: Tracker
    mirror: str | None = None
    silence_s: float = 30.0
    pause_s: float = 1.0  # before the second attempt; twice as long before each further one

    def fetch(self, source: Source, target: Path, *, copies: int = 1) -> None:
        """Download `source` to `target`, unless it is there. A part of an earlier attempt is continued.

        copies: how often the disk must have room for the file. The file takes its name when it is whole and has the
        published sum. Raises `UserError` with the address and what is wrong: not there, no connection, no room, another
        sum.
        """
        with self._alone(target):
            if not target.is_file():
                _Transfer(self, source, target, copies).run()

    def unpack(
        self,
        source: Source,
        archive: Path,
        place: Callable[[str], Path | None],
        done: Callable[[], bool],
        *,
        copies: int = 1,
    ) -> None:
        """Put members of a zip archive where `place(name)` says; it is called with names without folders.

        The archive is fetched to `archive`, and removed afterwards. One that was there before is used and stays.
        done: whether all is in its place already, asked once no other process is at it. copies: as of `fetch`; 2 where
        everything in the archive is unpacked.
        """
        with self._alone(archive):
            if done():
                return
            if archive.is_file():
                extract(archive, place, self.tracker)
                return
            fetched = archive.with_name(_FETCHED + archive.name)
            self.fetch(source, fetched, copies=copies)
            try:
                extract(fetched, place, self.tracker)
            except InputError:  # a damaged archive is of no use to the next call
                fetched.unlink()
                raise
            fetched.unlink()

    @contextmanager
    def _alone(self, target: Path) -> Iterator[None]:
        with locked(target, lambda: self.tracker.say(f"waiting for another process that fetches {target}")):
            yield


class _Transfer:
    """One file on its way: attempts until it is whole, or until nothing comes any more."""

    def __init__(self, how: Fetcher, source: Source, target: Path, copies: int):
        self.how, self.sha256, self.target, self.copies = how, source.sha256, target, copies
        self.address = source.at(how.mirror)
        self.place = target.with_name(_without_prefix(target))  # where a person would put the file
        self.part = target.with_name(f".{target.name}.part")
        self.record = target.with_name(f".{target.name}.part.json")  # what the part is a part of
        self.opener: OpenerDirector = build_opener()

    def run(self) -> None:
        self.how.tracker.say(f"fetching {self.address}")
        self._until_whole()
        if self.sha256 and (actual := file_sha256(self.part)) != self.sha256:
            self._forget()
            raise InputError(
                f"{self.address}: the file that came has the SHA-256 {actual} and {self.sha256} is published: it was "
                "damaged on the way, or replaced there; nothing is kept, the same command fetches it again"
            )
        with self.part.open("rb") as file:
            os.fsync(file.fileno())
        self.part.replace(self.target)
        self.record.unlink(missing_ok=True)

    def _until_whole(self) -> None:
        """Attempts, while they bring something. Raises `UserError` with the reason of the last one."""
        failures, connected = 0, False
        while True:
            before = self._size()
            try:
                self._receive()
                return
            except HTTPError as error:
                error.close()
                connected = True
                if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{self._size()}":
                    return  # the part is the whole file already
                if error.code == 416:
                    self._forget()
                elif error.code not in (408, 429) and error.code < 500:
                    reason = f"{error.code} {error.reason}"
                    raise UserError(f"{self.address} is answered with {reason}: {self._by_hand()}") from None
                reason = f"answer {error.code} {error.reason}"
            except _BROKEN_CONNECTION as error:
                connected = connected or not isinstance(error, URLError)
                reason = str(getattr(error, "reason", "") or error) or type(error).__name__
            failures = 1 if self._size() > before else failures + 1
            if failures >= TRIES or not connected:  # without any connection no further attempt will help
                kept = f"; {self._size():,} bytes are kept, the same command continues" if self._size() else ""
                raise UserError(f"{self.address} cannot be fetched ({reason}{kept}): {self._by_hand()}")
            self.how.tracker.say(f"{self.place.name}: broken off ({reason}), trying again")
            time.sleep(self.how.pause_s * 2 ** (failures - 1))

    def _by_hand(self) -> str:
        return (
            "check the network and the proxy (HTTPS_PROXY), name a server that has copies (mirror=ADDRESS), or put the "
            f"file at {self.place}"
        )

    def _size(self) -> int:
        return self.part.stat().st_size if self.part.is_file() else 0

    def _forget(self) -> None:
        self.part.unlink(missing_ok=True)
        self.record.unlink(missing_ok=True)

    def _receive(self) -> bool:
        request = Request(self.address, headers={"User-Agent": f"cgtgan/{__version__}"})
        known = self._known_validator()
        if self._size() and (known or self.sha256):
            request.add_header("Range", f"bytes={self._size()}-")
            if known:
                request.add_header("If-Range", known)
        with self.opener.open(request, timeout=self.how.silence_s) as answer:
            head = answer.headers
            if head.get_content_type() == "text/html":
                raise UserError(f"{self.address} is answered with a web page, not with the file: {self._by_hand()}")
            validator = _validator(head)
            if answer.status != 206:  # the server sends the whole file, whatever was asked for
                self._forget()
            elif not head.get("Content-Range", "").startswith(f"bytes {self._size()}-") or known not in (
                None,
                validator,
            ):
                self._forget()
                raise ConnectionError("the file there is not the one that the part here belongs to")
            self.record.write_text(json.dumps({"address": self.address, "validator": validator}), encoding="utf-8")
            length = head.get("Content-Length")
            total = None if length is None else self._size() + int(length)
            self._check_room(0 if length is None else int(length) + (self.copies - 1) * (self._size() + int(length)))
            self._write(answer.read, total)
        if total is not None and self._size() != total:
            raise ConnectionError(f"{self._size():,} of {total:,} bytes came")
        return True

    def _known_validator(self) -> str | None:
        """What identifies the file that the part belongs to; None where nothing does."""
        with suppress(OSError, ValueError, AttributeError):
            record = json.loads(self.record.read_bytes())
            return record["validator"] if record.get("address") == self.address else None
        return None

    def _check_room(self, more: int) -> None:
        free = shutil.disk_usage(self.target.parent).free
        if more > free:
            raise UserError(
                f"{self.place} takes {more / MB:,.0f} MB more and its disk has {free / MB:,.0f} MB free: make room, "
                "or choose another place; what came before is kept"
            )

    def _write(self, read: Callable[[int], bytes], total: int | None) -> None:
        size, label = self._size(), f"{self.place.name}, MB"
        bar = nullcontext(None) if total is None else self.how.tracker.progress(label, total // MB, size // MB)
        with bar as shown, _disk_errors_name(self.part), self.part.open("ab") as file:
            while chunk := read(CHUNK):
                file.write(chunk)
                size += len(chunk)
                if shown is not None:
                    shown.reach(size // MB)


@contextmanager
def _disk_errors_name(path: Path) -> Iterator[None]:
    """What a full disk raises names no file: then this one."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None and not isinstance(error, _BROKEN_CONNECTION):
            error.filename = str(path)
        raise


def _validator(head: Message) -> str | None:
    """The answer's strong ETag, or its time of change: what tells a file from a later one at the same address."""
    tag = head.get("ETag")
    return tag if tag and not tag.startswith("W/") else head.get("Last-Modified")


def _placed(member: ZipInfo, place: Callable[[str], Path | None]) -> Path | None:
    name = PurePosixPath(member.filename.replace("\\", "/")).name
    return None if member.is_dir() or name in ("", "..") or name.startswith(".") else place(name)


def _is_there(member: ZipInfo, target: Path) -> bool:
    return target.is_file() and target.stat().st_size == member.file_size


def extract(archive: Path, place: Callable[[str], Path | None], tracker: Tracker) -> None:
    """Extract the members of a zip archive that `place` gives a path for; those that are there already are left.

    Only the last part of a member's name counts, so none leaves the folder that `place` names. Raises `InputError` for
    a damaged archive, `UserError` where the disk has no room.
    """
    try:
        with ZipFile(archive) as zipped:
            placed = [(member, _placed(member, place)) for member in zipped.infolist()]
            known = [(member, target) for member, target in placed if target is not None]
            if not known:
                raise InputError(f"{archive} holds none of the files that are looked for: it is another archive")
            wanted = [each for each in known if not _is_there(*each)]
            for folder in {target.parent for _, target in wanted}:
                folder.mkdir(parents=True, exist_ok=True)
            need, free = sum(member.file_size for member, _ in wanted), shutil.disk_usage(archive.parent).free
            if need > free:
                raise UserError(
                    f"{archive}: what is in it takes {need / MB:,.0f} MB and the disk has {free / MB:,.0f} MB free: "
                    "make room; the archive is kept"
                )
            with tracker.progress(f"unpacking {_without_prefix(archive)}", len(wanted)) as bar:
                for member, target in wanted:
                    beside = target.with_name(f".{target.name}.part")
                    with _disk_errors_name(beside), zipped.open(member) as packed, beside.open("wb") as file:
                        shutil.copyfileobj(packed, file, CHUNK)
                    beside.replace(target)
                    bar.advance()
    except UserError:
        raise
    except (*_DAMAGED_ARCHIVE, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # the disk
            raise
        raise InputError(
            f"{archive} is no whole zip archive ({error}): run the same command again without it"
        ) from None
