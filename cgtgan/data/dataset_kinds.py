"""One record per kind of data set: where its files lie under `dataset.root`, its image ids, where to get it.

A new kind is one record of `KINDS`, its name in `config.DATASET_KINDS`, and one file in conf/dataset/.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from cgtgan.config import SPLITS
from cgtgan.data.annotations import ImageId, as_number
from cgtgan.runtime.sources import COCO_ANNOTATIONS, COCO_IMAGES, KARPATHY, PAGES


@dataclass(frozen=True)
class DatasetKind:
    """Places are relative to `dataset.root`, and are by split (train, val, test) where they differ."""

    listing: str = "annotations"  # what lists a split: annotations | folder | reader (datasets.py)
    images: str = "images"  # the usual `dataset.images`
    image_folders: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # below `dataset.images`
    caption_files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # usual places: the first that exists
    listed_caption_files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # all read, under split lists
    train_list: str | None = None  # names the train images, so that no caption file is opened for them
    id_ends_name: bool = False  # an image's id is the number behind the last '_' of its name; else the whole name
    public_ids: bool = True  # an id names the same picture for everybody; else a picture's size tells two apart
    splits: tuple[str, ...] = SPLITS  # those that it has
    names_files: bool = False  # a picture has the name that the caption file gives it, not the one that its id gives
    has_domains: bool = False  # its caption files name a domain of each image, by which scores are listed too
    drawn: bool = False  # drawn by the program when first needed
    caption_rule: str = "coco"  # how its training captions are cleaned (corpora.RULES), for the supervised bound
    annotations_from: str | None = None  # where to get them
    images_from: str | None = None
    pictures: Mapping[str, int] = field(default_factory=dict)  # in each image folder of the whole data set

    def image_id(self, file_name: str) -> ImageId:
        """COCO_val2014_000000000042.jpg -> 42 where the id ends the name; else the name without folder and ending."""
        stem = _stem(file_name)
        number = as_number(stem.rsplit("_", 1)[-1] if self.id_ends_name else stem)
        return number if isinstance(number, int) else as_number(stem)

    def image_ids(self, file_names: Iterable[str]) -> dict[str, ImageId]:
        """File name -> `image_id`. Where the whole name is the id, 007.jpg and 7.jpg stay apart, as names."""
        ids = {name: self.image_id(name) for name in file_names}
        stems: dict[ImageId, set[str]] = {}
        for name, image_id in ids.items():
            stems.setdefault(image_id, set()).add(_stem(name))
        return {name: i if self.id_ends_name or len(stems[i]) == 1 else _stem(name) for name, i in ids.items()}


def _stem(file_name: str) -> str:
    return file_name.replace("\\", "/").rsplit("/", 1)[-1].rsplit(".", 1)[0]


def _usual_caption_files(karpathy: str | None = None) -> dict[str, tuple[str, ...]]:
    """The released program's caption files, then Karpathy's file, in annotations/ or beside it."""
    places: dict[str, tuple[str, ...]] = {}
    for split in SPLITS:
        released = "train_caption.json" if split == "train" else f"{split}_caption_coco_format.json"
        files = (released, karpathy) if karpathy else (released,)
        places[split] = tuple(place for file in files for place in (f"annotations/{file}", file))
    return places


_VAL2014 = "annotations/captions_val2014.json"  # has 'restval' too, which Karpathy counts as train

KINDS = {
    "demo": DatasetKind(
        image_folders={split: (split,) for split in SPLITS},
        caption_files=_usual_caption_files(),
        train_list="train_images.txt",
        id_ends_name=True,
        drawn=True,
        caption_rule="none",
        annotations_from="the preprocess stage, which draws the demo world",
    ),
    "coco": DatasetKind(
        images=".",
        image_folders={"train": ("train2014", "val2014"), "val": ("val2014",), "test": ("val2014",)},
        caption_files=_usual_caption_files("dataset_coco.json"),
        listed_caption_files={
            "train": ("annotations/captions_train2014.json", _VAL2014),
            "val": (_VAL2014,),
            "test": (_VAL2014,),
        },
        id_ends_name=True,
        annotations_from="https://biglmdiag.blob.core.windows.net/oscar/datasets/coco_caption.zip (or "
        f"dataset_coco.json of {KARPATHY.address}, or captions_{{train,val}}2014.json of {COCO_ANNOTATIONS.address} "
        "with dataset.karpathy)",
        images_from=f"{COCO_IMAGES['train2014'].address} and val2014.zip",
        pictures={"train2014": 82_783, "val2014": 40_504},
    ),
    "flickr30k": DatasetKind(
        images="flickr30k_images",
        image_folders=dict.fromkeys(SPLITS, (".",)),
        caption_files=_usual_caption_files("dataset_flickr30k.json"),
        annotations_from=f"{KARPATHY.address} (its dataset_flickr30k.json, in the same folder, takes this one's place)",
        images_from=PAGES["flickr30k"],
        pictures={".": 31_783},
    ),
    "nocaps": DatasetKind(  # its validation set; the captions of its test set are not public
        image_folders=dict.fromkeys(SPLITS, (".",)),
        caption_files=dict.fromkeys(
            SPLITS, ("annotations/nocaps_val_4500_captions.json", "nocaps_val_4500_captions.json")
        ),
        splits=("val", "test"),
        names_files=True,
        has_domains=True,
        annotations_from="https://nocaps.org/download (nocaps_val_4500_captions.json)",
        images_from="the coco_url of each image in nocaps_val_4500_captions.json (https://nocaps.org/download)",
        pictures={".": 4500},
    ),
    "folder": DatasetKind(listing="folder", public_ids=False),
    "custom": DatasetKind(listing="reader", public_ids=False),
}
