"""Public addresses of weights, data and jars: the one table of them. `stage=download` fetches from here.

`mirror=ADDRESS` names a server that has the same files: https://HOST/PATH is then fetched from ADDRESS/HOST/PATH.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """A file's address and, where its owner publishes it, the SHA-256 of its bytes."""

    address: str
    sha256: str | None = None

    @property
    def file_name(self) -> str:
        return self.address.rpartition("/")[2]

    def at(self, mirror: str | None) -> str:
        """The address on the mirror, or the public one."""
        return f"{mirror.rstrip('/')}/{self.address.partition('://')[2]}" if mirror else self.address


def _clip_archive(sha256: str, name: str) -> Source:
    return Source(f"https://openaipublic.azureedge.net/clip/models/{sha256}/{name}", sha256)


# The names of `clip.available_models()`. Addresses and sums are those in the clip package.
CLIP_ARCHIVES = {
    "RN50": _clip_archive("afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762", "RN50.pt"),
    "RN101": _clip_archive("8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599", "RN101.pt"),
    "RN50x4": _clip_archive("7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd", "RN50x4.pt"),
    "RN50x16": _clip_archive("52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa", "RN50x16.pt"),
    "RN50x64": _clip_archive("be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c", "RN50x64.pt"),
    "ViT-B/32": _clip_archive("40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af", "ViT-B-32.pt"),
    "ViT-B/16": _clip_archive("5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f", "ViT-B-16.pt"),
    "ViT-L/14": _clip_archive("b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836", "ViT-L-14.pt"),
    "ViT-L/14@336px": _clip_archive(
        "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02", "ViT-L-14-336px.pt"
    ),
}

COCO_IMAGES = {
    name: Source(f"http://images.cocodataset.org/zips/{name}.zip")  # the folder of its files has the archive's name
    for name in ("train2014", "val2014")
}
COCO_ANNOTATIONS = Source("http://images.cocodataset.org/annotations/annotations_trainval2014.zip")
KARPATHY = Source("https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip")
CAPTION_FILES = {  # a caption file's name -> the archive that has it
    "dataset_coco.json": KARPATHY,
    "dataset_flickr30k.json": KARPATHY,
    "captions_train2014.json": COCO_ANNOTATIONS,
    "captions_val2014.json": COCO_ANNOTATIONS,
}
GCC = Source("https://storage.googleapis.com/gcc-data/Train/GCC-training.tsv")
SPICE = Source("http://nlp.stanford.edu/software/stanford-corenlp-full-2015-12-09.zip")

# What nobody can fetch without a login or a form: the page to go to.
PAGES = {
    "flickr30k": "https://shannon.cs.illinois.edu/DenotationGraph (on request) or "
    "kaggle.com/datasets/hsankesara/flickr-image-dataset",
    "shutterstock": "https://github.com/fengyang0317/unsupervised_captioning/issues/42",
}
