"""Scores by domain: NoCaps says of each image how near it is to COCO, and every domain is scored alone, as papers do.

So the document frequencies of CIDEr are those of the domain's references (Agrawal et al., ICCV 2019: in-domain,
near-domain and out-of-domain).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cgtgan.assets.splits import data_root
from cgtgan.assets.workspace import Workspace
from cgtgan.config import COCO_METRICS
from cgtgan.data.annotated_images import domain_file
from cgtgan.data.annotations import ImageId, domains_in_file
from cgtgan.data.caption_tables import read_captions
from cgtgan.data.dataset_kinds import KINDS
from cgtgan.evaluation.metrics import JavaSettings, score_many


def domains_of(ws: Workspace) -> dict[str, list[ImageId]]:
    """Domain -> its images, of the references that captions are scored against; empty where they name no domain."""
    return ws.once("domains", lambda: _domains(ws))


def _domains(ws: Workspace) -> dict[str, list[ImageId]]:
    config, given = ws.cfg.dataset, ws.cfg.evaluate.references
    if given is not None:
        content = read_captions(Path(given).expanduser(), "evaluate.references")
    elif KINDS[config.kind].has_domains:
        path, field = domain_file(config, ws.cfg.evaluate.split, data_root(ws))
        content = read_captions(path, field)
    else:
        return {}
    images: dict[str, list[ImageId]] = {}
    for image_id, domain in domains_in_file(content).items():
        images.setdefault(domain, []).append(image_id)
    return dict(sorted(images.items()))


def domain_scores(
    captions: Mapping[str, Mapping[Any, str]],
    references: Mapping[Any, Sequence[str]],
    domains: Mapping[str, Sequence[ImageId]],
    metrics: Sequence[str],
    *,
    java: JavaSettings,
    on_metric: Callable[[], object],
) -> dict[str, dict[str, dict[str, Any]]]:
    """Method -> domain -> {"images": number, "scores": by name}, of COCO's metrics among `metrics`."""
    wanted = [metric for metric in metrics if metric in COCO_METRICS]
    scores: dict[str, dict[str, dict[str, Any]]] = {method: {} for method in captions}
    for domain, images in domains.items() if wanted else ():
        ids = [i for i in images if references.get(i) and all(i in texts for texts in captions.values())]
        if not ids:
            continue
        of_domain = {method: {i: texts[i] for i in ids} for method, texts in captions.items()}
        found = score_many(of_domain, {i: references[i] for i in ids}, wanted, java=java, on_metric=on_metric)
        for method, result in found.items():
            scores[method][domain] = {"images": len(ids), "scores": result.corpus}
    return scores


def merged_domains(record: Mapping[str, Any], new: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What scores.json holds under `domains`, with new scores added; empty without domains."""
    earlier = record.get("domains") or {}
    merged: dict[str, Any] = {}
    for domain in {**earlier, **new}:
        parts = [part[domain] for part in (earlier, new) if domain in part]
        merged[domain] = {
            **parts[-1],
            "scores": {name: value for part in parts for name, value in part["scores"].items()},
        }
    return merged
