"""How well metrics agree with people: Kendall's tau-c (x 100) of each score with human ratings of captions.

Usage: python benchmarks/human_judgements.py --judgements FILE [--metrics bleu meteor rouge_l cider path.py:name]
       [--images FOLDER --clip path.py:Name | --images FOLDER --clip ViT-B/32 --clip-kind openai]

FILE holds {"references": {image: [sentence]}, "rows": [{"image", "caption", "ratings"}]}. A metric of your own is a
function as docs/extending.md has it; the ids that it gets are the numbers of the pairs. With --images and --clip,
CLIPScore and RefCLIPScore join them, on the pairs whose picture is in FOLDER.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from cgtgan.config import DEFAULT_METRICS, ClipBackboneConfig
from cgtgan.data.image_files import open_image
from cgtgan.errors import MissingFileError, UserError
from cgtgan.evaluation.extra_metrics import clip_metric
from cgtgan.evaluation.human_judgements import METHOD, Judgements, correlations, read_judgements
from cgtgan.models.load_backbone import load_backbone

BATCH = 32  # pictures encoded at once


def clip_correlations(
    judgements: Judgements, folder: Path, config: ClipBackboneConfig
) -> tuple[dict[str, float], dict[str, str]]:
    """`correlations` of CLIPScore on the pairs whose picture is in `folder`; prints how many that are."""
    judged = list(dict.fromkeys(judgements.images))
    names = [name for name in judged if (folder / name).is_file()]
    if not names:
        raise MissingFileError(f"--images={folder} has none of the {len(judged)} judged pictures, such as {judged[0]}")
    part = judgements.of_images(set(names))
    print(f"CLIPScore: {len(names)} of {len(judged)} judged pictures, {len(part.images)} pairs", flush=True)
    backbone = load_backbone(config, torch.device("cpu"))
    batches = [names[i : i + BATCH] for i in range(0, len(names), BATCH)]
    pictures = [backbone.encode_images([open_image(folder / name) for name in batch]) for batch in batches]
    vectors = dict(zip(names, torch.cat(pictures), strict=True))
    captions, references = part.inputs()
    of_pairs = {n: vectors[image] for n, image in enumerate(part.images)}
    metric = clip_metric({METHOD: captions}, references, of_pairs, backbone.encode_texts, f"in {folder}")
    return correlations(part, ("clipscore",), {"clipscore": metric})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judgements", type=Path, required=True)
    parser.add_argument("--metrics", nargs="+", default=list(DEFAULT_METRICS))
    parser.add_argument("--images", type=Path)
    parser.add_argument("--clip", metavar="MODEL", help="clip_backbone.model")
    parser.add_argument("--clip-kind", default="custom", help="clip_backbone.kind (default: custom)")
    args = parser.parse_args()
    if (args.images is None) != (args.clip is None):
        parser.error("--images and --clip belong together: give both or neither")
    judgements = read_judgements(args.judgements)
    print(f"{len(judgements.images)} pairs, {sum(map(len, judgements.ratings))} ratings", flush=True)
    taus, failed = correlations(judgements, args.metrics)
    if args.clip:
        config = ClipBackboneConfig(name="judge", kind=args.clip_kind, model=args.clip)
        of_clip, of_clip_failed = clip_correlations(judgements, args.images, config)
        taus, failed = taus | of_clip, failed | of_clip_failed
    print(f"{'metric':20s}{'tau-c x 100':>12s}")
    for name, tau in taus.items():
        print(f"{name:20s}{100 * tau:12.2f}")
    for name, why in failed.items():
        print(f"{name:20s}{why}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
