"""Claim: on the demo world a human scores a CIDEr of 2.7-3.0 with some 150 words, and a CLIP pair takes under 0.6 ms.

Run: python benchmarks/demo_world.py [--seeds 3]
"""

from __future__ import annotations

import argparse
import statistics
import time

from pycocoevalcap.cider.cider import Cider

from cgtgan.config import DemoWorldConfig
from cgtgan.data.demo_world import DemoWorld


def plain(sentence: str) -> str:
    """Lower case, no punctuation: what the CIDEr tokeniser would leave of a demo sentence."""
    return sentence.lower().replace(".", "").replace(",", "")


def measure(config: DemoWorldConfig) -> dict[str, float]:
    """Human CIDEr, vocabulary sizes, sentence lengths in words, overlaps (shares) and milliseconds a CLIP pair."""
    world = DemoWorld(config)
    references, human = world.references("test"), world.human("test")
    cider, _ = Cider().compute_score(
        {i: [plain(s) for s in sentences] for i, sentences in references.items()},
        {i: [plain(s)] for i, s in human.items()},
    )
    corpus, external = world.corpus(), world.corpus(external=True)
    narrated = [len(s.split()) for kind, s in world.corpus_by_kind(external=True) if kind == "narrated"]
    lengths = [len(s.split()) for s in corpus]
    start = time.process_time()
    pairs = sum(1 for _ in world.clip_pairs(1000))
    per_pair = 1000 * (time.process_time() - start) / pairs
    return {
        "human_cider": float(cider),
        "vocabulary": len({word for s in corpus for word in plain(s).split()}),
        "vocabulary_external": len({word for s in external for word in plain(s).split()}),
        "distinct_corpus": len(set(corpus)) / len(corpus),
        "words_mean": statistics.mean(lengths),
        "words_min": min(lengths),
        "words_max": max(lengths),
        "words_7_to_16": sum(7 <= n <= 16 for n in lengths) / len(lengths),
        "words_narrated_mean": statistics.mean(narrated),
        "words_narrated_max": max(narrated),
        "human_equals_a_reference": sum(human[i] in references[i] for i in human) / len(human),
        "reference_overlap": world.overlap()["reference_share"],
        "scene_overlap": world.overlap()["scene_share"],
        "reference_overlap_external": world.overlap(external=True)["reference_share"],
        "clip_pair_ms": per_pair,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    results = [measure(DemoWorldConfig(seed=seed)) for seed in range(parser.parse_args().seeds)]
    for name in results[0]:
        print(f"{name:28s}" + "".join(f"{result[name]:10.4f}" for result in results))
