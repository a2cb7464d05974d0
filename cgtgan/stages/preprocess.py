"""preprocess: images, annotations and raw corpus -> image embeddings, clean sentences, sentence embeddings."""

from __future__ import annotations

from cgtgan.assets.corpus import corpus_sentences, demo_overlap, sentence_embeddings
from cgtgan.assets.images import dataset_split, image_embeddings
from cgtgan.assets.workspace import Workspace
from cgtgan.config import SPLITS, Config
from cgtgan.data.corpora import CleanedCorpus


def run(cfg: Config) -> None:
    ws = Workspace(cfg)
    preprocess(ws)


def preprocess(ws: Workspace) -> None:
    # inputs first: a missing file is said before an hour of encoding, not after
    for name in SPLITS:
        dataset_split(ws, name)
    sentences, counts, _ = corpus_sentences(ws)
    ws.tracker.say(f"corpus: {CleanedCorpus(sentences, counts).summary()}")
    _say_overlap(ws)
    for name in SPLITS:
        embeddings = image_embeddings(ws, name)
        ws.tracker.say(f"{name}: {len(embeddings.ids):,} image embeddings of {embeddings.header.dim} numbers")
    sentence_embeddings(ws)


def _say_overlap(ws: Workspace) -> None:
    if overlap := demo_overlap(ws):
        ws.tracker.say(
            f"overlap: {overlap['references_in_corpus']} of {overlap['references']} test references stand in the "
            f"corpus word for word ({overlap['scenes_in_corpus']} of {overlap['scenes']} test images have one)"
        )
