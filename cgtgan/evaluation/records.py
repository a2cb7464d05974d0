"""Score records: one folder for captions of one method, checkpoint, decoding, images and references.

The run's usual record of a method is `<method>/`; another one is `<method>@<what differs>-<fingerprint>/` beside it.
Metrics are added to a record, and no score is replaced by less.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cgtgan.config import COCO_METRICS, METRICS, DecodeConfig, as_dict, custom_name
from cgtgan.evaluation.metrics import Scores
from cgtgan.runtime.artifacts import fingerprint, read_json

MARK = "@"  # between the method and what differs
TOKEN_SCORES = [name for metric in COCO_METRICS for name in METRICS[metric]]  # they depend on the tokeniser
_DECODE_FIELDS = {
    "greedy": (),
    "beam": ("beam_size", "length_penalty"),
    "sample": ("temperature",),
    "best_of_n": ("best_of", "temperature"),
}
_MADE_OF = {
    "cgtgan": ("images", "references", "decode", "checkpoint"),
    "nearest": ("images", "references", "sentences"),
    "consensus": ("images", "references", "sentences"),
    "human": ("images", "references"),
    "projection": ("images", "references", "decode", "sentences", "projection_t"),
    "supervised": ("images", "references", "decode", "sentences", "supervised"),
}
_OF_A_BASELINE = ("images", "references", "decode", "sentences")
WITHOUT_GENERATOR = ("nearest", "consensus", "human")


# ------------------------------------------------------------------------------------------------------------ identity


def method_of(record: str) -> str:
    """The method of a record's folder."""
    return record.partition(MARK)[0]


def identity(method: str, made_from: Any) -> dict[str, Any]:
    """The part of `made_from` in scores.json that the captions and their references are, for this method."""
    given = made_from if isinstance(made_from, dict) else {}
    if "captions" in given:  # made elsewhere
        return {key: given.get(key) for key in ("captions", "references")}
    values = {key: given.get(key) for key in _MADE_OF.get(method, _OF_A_BASELINE)}
    return values | ({"decode": decoding_identity(given.get("decode"))} if "decode" in values else {})


def decoding_identity(decode: Any) -> Any:
    """The fields that the captions of this decoding depend on; the number of images in a batch is none of them."""
    if not isinstance(decode, dict):
        return decode
    given = as_dict(DecodeConfig()) | decode
    fields = ("name", *_DECODE_FIELDS.get(str(given["name"]), ()), "precision")
    return {field: given[field] for field in fields}


def differences(
    method: str, record: Mapping[str, Any], usual: Mapping[str, Any], skip: Sequence[str] = ()
) -> dict[str, str]:
    """What a scores.json's captions are made of that `usual`'s are not: part of the identity -> a short text."""
    made, others = (identity(method, each.get("made_from")) for each in (record, usual))
    return {key: _text(key, made[key], record) for key in made if key not in skip and made[key] != others.get(key)}


def _text(key: str, value: Any, record: Mapping[str, Any]) -> str:
    if key == "checkpoint":
        return f"checkpoint {record.get('checkpoint') or str(value)[:6]}"
    if key == "decode" and isinstance(value, dict):
        return " ".join(str(part) for part in value.values() if part != "auto")
    if key == "projection_t":
        return "t of the corpus' own" if value is None else f"t={value:g}"
    if key == "supervised":
        return "trained as long as the run" if value is None else " ".join(f"{k}={v}" for k, v in value.items())
    return f"{'corpus' if key == 'sentences' else key} {str(value)[:6]}"


# -------------------------------------------------------------------------------------------------------------- places


def records_of(folder: Path, method: str) -> list[Path]:
    """The folders with scores of a method, the usual one first."""
    beside = sorted(folder.glob(f"{method}{MARK}*")) if folder.is_dir() else []
    return [place for place in (folder / method, *beside) if (place / "scores.json").is_file()]


def find_record(folder: Path, method: str, made_from: Mapping[str, Any]) -> Path | None:
    """The folder with scores of these captions against these references."""
    wanted = identity(method, made_from)
    places = records_of(folder, method)
    return next((p for p in places if identity(method, read_json(p / "scores.json").get("made_from")) == wanted), None)


def settle_record(
    folder: Path, method: str, record: Mapping[str, Any], usual: Sequence[Mapping[str, Any]], *, foreign: bool
) -> Path:
    """The folder for a record, moved there where it exists. A usual one has the method's name, whichever came first.

    record, usual: as in scores.json, `made_from` and what names it; `usual` is empty where any may be. foreign: the
    captions are of another run's checkpoint, so they never take the method's name.
    """
    plain, there = folder / method, find_record(folder, method, record["made_from"])
    if there == plain:
        return plain
    named = read_json(plain / "scores.json") if (plain / "scores.json").is_file() else None

    def is_usual(each: Mapping[str, Any]) -> bool:
        return any(not differences(method, each, one) for one in usual)

    beside = foreign if named is None else is_usual(named) or not is_usual(record)
    if beside:
        without = {"made_from": {**record["made_from"], "checkpoint": None}}  # nothing to compare with: its checkpoint
        return there or folder / _marked(method, record, named or next(iter(usual), without))
    if named is not None:
        plain.rename(_free(folder / _marked(method, named, record)))
    if there is not None:
        if plain.exists():  # without scores: of a killed process
            plain.rename(_free(folder / f"unfinished_{method}"))
        there.rename(plain)
    return plain


def _marked(method: str, record: Mapping[str, Any], usual: Mapping[str, Any]) -> str:
    what = "+".join(differences(method, record, usual).values())
    readable = re.sub(r"[^\w.=+]+", "-", what)[:80].strip("-")
    return f"{method}{MARK}{readable}-{fingerprint(identity(method, record.get('made_from')))[:6]}"


def _free(place: Path) -> Path:
    """`place`, or with a number where something is there already."""
    number, free = 1, place
    while free.exists():
        number += 1
        free = place.with_name(f"{place.name}-{number}")
    return free


# -------------------------------------------------------------------------------------------------------------- scores


def approximate_scores(record: Mapping[str, Any]) -> set[str]:
    """The scores whose texts were split without the Java tokeniser."""
    if record.get("tokenizer") != "approximate":
        return set()
    return set(record.get("approximate") or [name for name in record.get("scores", {}) if name in TOKEN_SCORES])


def missing_metrics(
    record: Mapping[str, Any], metrics: Sequence[str], made_from: Mapping[str, Any], *, samples: int
) -> list[str]:
    """The metrics that a record lacks, has of other inputs, or has without the Java tokeniser though Java is there now.

    samples: captions per image that self-CIDEr is asked of; 0 for none.
    """
    missing = [metric for metric in metrics if not _is_there(metric, record, made_from, samples)]
    if made_from.get("java"):
        approximate = approximate_scores(record)
        missing += [m for m in COCO_METRICS if m not in missing and approximate.intersection(METRICS[m])]
    return list(dict.fromkeys(missing))


def _is_there(metric: str, record: Mapping[str, Any], made_from: Mapping[str, Any], samples: int) -> bool:
    scores, earlier = record.get("scores") or {}, record.get("made_from") or {}
    if metric not in METRICS:
        name = custom_name(metric)
        files = [(each.get("own_metrics") or {}).get(name) for each in (earlier, made_from)]
        return name in scores and files[0] == files[1]
    if metric == "diversity":
        corpus = made_from.get("novel_against")
        counted = corpus is None or corpus == earlier.get("novel_against")
        sampled = not samples or (
            "Self-CIDEr" in scores
            and (earlier.get("self_cider_samples") or 0) >= samples
            and _temperature(earlier) == _temperature(made_from)
        )
        return "Distinct-1" in scores and counted and sampled
    if metric in ("meteor", "spice") and not made_from.get("java"):
        return all(name in scores or name in (record.get("failed") or {}) for name in METRICS[metric])
    with_references = metric != "clipscore" or made_from.get("references")
    return all(name in scores for name in (METRICS[metric] if with_references else METRICS[metric][:1]))


def _temperature(made_from: Mapping[str, Any]) -> Any:
    """At which the samples for self-CIDEr are drawn, whatever the decoding is."""
    decode = made_from.get("decode")
    return decode.get("temperature") if isinstance(decode, dict) else None


def merged_scores(
    record: Mapping[str, Any], per_image: Mapping[Any, Mapping[str, float]], result: Scores
) -> tuple[dict[str, Any], dict[Any, dict[str, float]]]:
    """scores.json without its `made_from`, and per_image.json, with the scores of `result` added.

    An earlier score stays where the new one failed, or where only the earlier one is of the Java tokeniser.
    """
    earlier, approximate = dict(record.get("scores") or {}), approximate_scores(record)
    kept: set[str] = set()
    if result.tokenizer == "approximate":
        kept = {name for name in earlier if name in TOKEN_SCORES and name not in approximate}
    new = {name: value for name, value in result.corpus.items() if name not in kept}
    scores = earlier | new
    if earlier:
        order = [name for names in METRICS.values() for name in names]
        scores = dict(sorted(scores.items(), key=lambda s: order.index(s[0]) if s[0] in order else len(order)))
    failed = {**(record.get("failed") or {}), **result.failed}
    failed = {key: why for key, why in failed.items() if not any(name in scores for name in METRICS.get(key, (key,)))}
    approximate -= new.keys()
    if result.tokenizer == "approximate":
        approximate |= {name for name in new if name in TOKEN_SCORES}
    unsplit = not any(name in TOKEN_SCORES for name in scores)
    summary = {
        "scores": scores,
        "failed": failed,
        "excluded": list(result.excluded),
        "tokenizer": "approximate" if approximate or (unsplit and result.tokenizer == "approximate") else "ptb",
        "images": len(result.per_image),
    }
    if any(name in TOKEN_SCORES and name not in approximate for name in scores) and approximate:
        summary["approximate"] = [name for name in scores if name in approximate]
    rows = {
        i: {**per_image.get(i, {}), **{name: value for name, value in row.items() if name not in kept}}
        for i, row in result.per_image.items()
    }
    return summary, rows


def merged_counts(
    scores: Mapping[str, float], earlier: Mapping[Any, Mapping[str, list[int]]], result: Scores
) -> dict[Any, dict[str, list[int]]]:
    """counts.json of a record with `scores`, to which those of `result` were added: of each metric the counts that its
    score is made of.
    """
    new = {
        family for family in ("bleu", "meteor") if all(scores.get(n) == result.corpus.get(n) for n in METRICS[family])
    }
    return {
        i: {f: row for f, row in earlier.get(i, {}).items() if f not in new} | {f: row[f] for f in new & row.keys()}
        for i, row in result.counts.items()
    }


def merged_inputs(record: Mapping[str, Any], made_from: Mapping[str, Any], result: Scores) -> dict[str, Any]:
    """`made_from` of a record to which `result` was added: what the earlier scores were made from stays."""
    earlier = record.get("made_from") or {}
    both = {**earlier, **made_from}
    if not earlier:
        return both
    if both.get("sentences") is None:
        both["sentences"] = earlier.get("sentences")
    both["java"] = bool(both.get("java") or earlier.get("java"))
    names = (*(earlier.get("metrics") or []), *(made_from.get("metrics") or []))
    both["metrics"] = list(dict.fromkeys(names))
    if "Distinct-1" not in result.corpus:
        both["novel_against"] = earlier.get("novel_against")
    if "Self-CIDEr" not in result.corpus:
        both |= {key: earlier[key] for key in ("decode", "self_cider_samples") if key in earlier}
    both.pop("own_metrics", None)
    new = {k: v for k, v in (made_from.get("own_metrics") or {}).items() if k in result.corpus}
    if files := {**(earlier.get("own_metrics") or {}), **new}:
        both["own_metrics"] = files
    return both
