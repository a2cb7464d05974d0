"""What the corpus sentences nearest to an image agree on: for the reward, for pairs to train on, as a baseline."""

from __future__ import annotations

import torch
from torch import Tensor

from cgtgan.assets.corpus import corpus_sentences, sentence_embeddings
from cgtgan.assets.images import image_embeddings
from cgtgan.assets.workspace import Workspace
from cgtgan.method.aggregation import nearest_texts
from cgtgan.method.consensus import AGREED, DOCUMENTS, SENTENCES_PER_DOCUMENT, SentenceTable, consensus_sentences


def nearest_rows(ws: Workspace, split: str, k: int) -> Tensor:
    """(N, k) int64 on the CPU: rows of the k sentences nearest to each image of the split; k is cut to the corpus."""
    images, sentences = image_embeddings(ws, split).vectors, sentence_embeddings(ws).vectors
    return nearest_texts(images, sentences, k, device=ws.device).cpu()


def documents(ws: Workspace) -> Tensor:
    """(N, 5) int64: the sentences nearest to each training image, of 10,000 at most: CIDEr's documents."""
    return nearest_rows(ws, "train", SENTENCES_PER_DOCUMENT)[:DOCUMENTS]


def sentence_table(ws: Workspace) -> SentenceTable:
    """The corpus as `SentenceTable`."""
    return ws.once("sentence table", lambda: SentenceTable.of(corpus_sentences(ws)[0], documents(ws).numpy()))


def most_agreed(ws: Workspace, split: str) -> Tensor:
    """(N, 5) int64: the sentences that agree most with those nearest to each image of the split, the best first."""
    return ws.once(("most agreed", split), lambda: _most_agreed(ws, split))


def _most_agreed(ws: Workspace, split: str) -> Tensor:
    table = sentence_table(ws)
    images, sentences = image_embeddings(ws, split).vectors, sentence_embeddings(ws).vectors
    blocks = []
    with ws.tracker.progress("sentences that agree", len(images)) as bar:
        for block in images.split(256):
            blocks.append(consensus_sentences(block, sentences, table, AGREED, ws.device))
            bar.advance(len(block))
    return torch.cat(blocks)
