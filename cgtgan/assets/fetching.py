"""What brings each missing input: functions that a `Fetcher` is given to, one per kind of file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from cgtgan.data.annotated_images import picture_names
from cgtgan.data.image_files import IMAGE_SUFFIXES
from cgtgan.evaluation.java import SPICE_JARS, missing_spice_jars, package_folder
from cgtgan.runtime.download import Fetcher
from cgtgan.runtime.sources import CAPTION_FILES, GCC, SPICE, Source

Fetch = Callable[[Fetcher], None]


def fetch_clip(archive: Source, target: Path) -> Fetch:
    """OpenAI's archive, in clip's own cache."""
    return lambda fetcher: fetcher.fetch(archive, target)


def fetch_gcc(target: Path) -> Fetch:
    """The list of Conceptual Captions."""
    return lambda fetcher: fetcher.fetch(GCC, target)


def fetch_captions(target: Path) -> Fetch:
    """A caption file of `CAPTION_FILES`, out of its archive."""
    source = CAPTION_FILES[target.name]

    def place(name: str) -> Path | None:
        return target if name == target.name else None

    return lambda fetcher: fetcher.unpack(source, target.parent / source.file_name, place, target.is_file)


def fetch_images(archives: Mapping[Source, Path], pictures: Mapping[str, int]) -> Fetch:
    """COCO's archives of pictures, each into its folder; pictures: how many there are of each folder's name."""

    def fetch(fetcher: Fetcher) -> None:
        for source, folder in archives.items():

            def place(name: str, folder: Path = folder) -> Path | None:
                return folder / name if Path(name).suffix.lower() in IMAGE_SUFFIXES else None

            def done(folder: Path = folder) -> bool:
                return len(picture_names(folder)) >= pictures[folder.name]

            fetcher.unpack(source, folder.parent / source.file_name, place, done, copies=2)

    return fetch


def fetch_spice(fetcher: Fetcher) -> None:
    """SPICE's two jars, into the installed package, where its program looks for them."""
    library = package_folder("spice") / "lib"

    def place(name: str) -> Path | None:
        return library / name if name in SPICE_JARS else None

    fetcher.unpack(SPICE, library / SPICE.file_name, place, lambda: missing_spice_jars() is None)
