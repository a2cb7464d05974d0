"""Variants -> rows of the comparison, a table for every test set, and the paired test of each row against the baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from cgtgan.errors import InputError
from cgtgan.evaluation.bootstrap import Difference, Scored, paired_bootstrap
from cgtgan.reporting.export import ComparedRow, TestSet
from cgtgan.reporting.methods import METHODS
from cgtgan.reporting.one_run import Run, published
from cgtgan.reporting.published import DECODING
from cgtgan.reporting.variants import Variant, distinguish
from cgtgan.runtime.artifacts import canonical_json, fingerprint

SUMMED = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR")  # of summed counts: no mean of the images' scores
_GAN = ("train.", "reward_weights.", "discriminator.", "precision")
_TEXT = (*_GAN, "aggregation_t.")
_INITIAL = ("train.use_initialization", "train.dropout")
# What a method without adversarial training does not hang on, and what it does all the same; variants that agree in it share its row.
_UNUSED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "init": (_TEXT, _INITIAL),
    "mean_shift": (_TEXT, _INITIAL),
    "projection": (_GAN, _INITIAL),
    "supervised": (_TEXT, ("train.dropout", "train.steps", "train.epochs", "train.batch_size")),
    "nearest": ((*_TEXT, "generator.", "initialize."), ()),
    "human": ((*_TEXT, "generator.", "initialize.", "corpus.", "clip_backbone."), ()),
}


@dataclass
class Entry:
    """A row in the making: `runs` holds its run of every seed, `variants` the places of those that share it."""

    method: str
    decoding: str
    depends: Mapping[str, Any]
    variants: set[int] = field(default_factory=set)
    runs: dict[int, Run] = field(default_factory=dict)
    name: str = ""
    row: ComparedRow = field(default_factory=lambda: ComparedRow("", "", {}))

    @cached_property
    def per_image(self) -> dict[int, dict[Any, dict[str, float]]]:
        """Seed -> image id -> metric -> raw score."""
        return {seed: run.per_image(self.method) for seed, run in self.runs.items()}

    @property
    def images(self) -> set[Any]:
        return set().union(*self.per_image.values())


SetKey = tuple[str, str, str]  # dataset, split, fingerprint of the references


def entries(variants: Sequence[Variant], notes: list[str]) -> dict[SetKey, list[Entry]]:
    """The rows of every test set in the table's order, named; what had to be decided goes to `notes`."""
    found: dict[SetKey, dict[tuple[str, str, str], Entry]] = {}
    for place, variant in enumerate(variants):
        for run in variant.runs:
            for method in run.scored:
                depends = _depends(method, variant.settings)
                own_t = (run.scores(method).get("made_from") or {}).get(
                    "projection_t"
                )  # a setting of the evaluation, not of the run
                if method == "projection" and own_t not in (None, depends.get("aggregation_t.t")):
                    depends["aggregation_t.t"] = own_t
                kind = str(place) if method == "cgtgan" else canonical_json(depends)
                rows = found.setdefault(_set_key(run, method), {})
                entry = rows.setdefault(
                    (method, kind, run.decoding(method)), Entry(method, run.decoding(method), depends)
                )
                entry.variants.add(place)
                first = entry.runs.setdefault(run.settings["seed"], run)
                if first is not run and first.scores(method)["scores"] != run.scores(method)["scores"]:
                    notes.append(
                        f"{METHODS[method].title}, seed {run.settings['seed']}: {run.folder} and {first.folder} have other scores though "
                        "every setting that it hangs on is the same; those of the latter are shown"
                    )
    ordered = {}
    for key, rows in found.items():
        ordered[key] = sorted(
            rows.values(),
            key=lambda e: (
                e.method != "cgtgan",
                METHODS[e.method].bound,
                list(METHODS).index(e.method),
                min(e.variants),
            ),
        )
        for method in {entry.method for entry in ordered[key]}:
            same = [entry for entry in ordered[key] if entry.method == method]
            suffixes = distinguish([entry.depends for entry in same])
            for entry, suffix in zip(same, suffixes, strict=True):
                title = METHODS[method].title
                entry.name = (
                    variants[min(entry.variants)].name
                    if method == "cgtgan"
                    else f"{title} ({suffix})"
                    if suffix
                    else title
                )
                entry.row = _row(entry, variants)
    return ordered


def _depends(method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    unused, kept = _UNUSED.get(method, ((), ()))
    return {k: v for k, v in settings.items() if k in kept or not k.startswith(unused)}


def _set_key(run: Run, method: str) -> SetKey:
    made_from = run.scores(method).get("made_from") or {}
    data = {k: v for k, v in run.settings.items() if k.startswith("dataset.")}
    return run.settings["dataset.name"], run.split, made_from.get("references") or fingerprint(data)


def _row(entry: Entry, variants: Sequence[Variant]) -> ComparedRow:
    values: dict[str, dict[int, float]] = {}
    for seed, run in sorted(entry.runs.items()):
        for metric, value in run.scores(entry.method)["scores"].items():
            values.setdefault(metric, {})[seed] = value
    own = [variants[i] for i in sorted(entry.variants)]
    known, first = METHODS[entry.method], next(iter(entry.runs.values()))
    return ComparedRow(
        entry.name,
        entry.method,
        values,
        experiment=own[0].experiment if len({v.experiment for v in own}) == 1 else "",
        variant=own[0].variant if len(own) == 1 else "",
        note=first.title("cgtgan") if entry.method == "cgtgan" else known.note,
        decoding=entry.decoding,
        bound=known.bound,
    )


def tables_of(found: Mapping[SetKey, Sequence[Entry]], variants: Sequence[Variant]) -> list[TestSet]:
    """The tables, with the paper's row where a variant's setting is the paper's."""
    titles = [f"{dataset}, {split} split" for dataset, split, _ in found]
    sets = []
    for (key, made), title in zip(found.items(), titles, strict=True):
        images = sorted({run.scores(entry.method).get("images") or 0 for entry in made for run in entry.runs.values()})
        name = f"{title}, {' or '.join(f'{n:,}' for n in images if n)} images" if any(images) else title
        name += f", references {key[2]}" if titles.count(title) > 1 else ""
        paper: dict[str, ComparedRow] = {}
        own = [entry for entry in made if entry.method == "cgtgan"]
        corpora = {variants[i].settings["corpus.name"] for entry in own for i in entry.variants}
        for entry in own:
            for run in entry.runs.values():
                if row := published(run, f" · {run.settings['corpus.name']}" if len(corpora) > 1 else ""):
                    values = {m: {0: s[0]} for m, s in row.scores.items()}
                    paper[row.name + row.note] = ComparedRow(
                        row.name, "published", values, note=row.note, decoding=DECODING
                    )
        sets.append(TestSet(name, [*(entry.row for entry in made), *paper.values()]))
    return sets


# --------------------------------------------------------------------------------------------------------- the paired test


def against_baseline(
    found: Mapping[SetKey, Sequence[Entry]], wanted: str | None, *, resamples: int, seed: int, notes: list[str]
) -> list[str]:
    """Put the differences to the baseline into the entries' rows; returns the names of the baselines.

    The default baseline: the first variant, or with one variant alone the initialisation. Raises InputError when `wanted` is unknown.
    """
    chosen = {key: _baselines(made, wanted) for key, made in found.items()}
    if wanted is not None and not any(chosen.values()):
        every = (entry for made in found.values() for entry in made)
        known = list(dict.fromkeys(entry.name if entry.method == "cgtgan" else entry.method for entry in every))
        raise InputError(f"report.baseline={wanted} is none of the rows; it must be one of {', '.join(known[:20])}")
    names = []
    for key, made in found.items():
        pairs: dict[int, list[Entry]] = {}
        bases = chosen[key]
        for entry in made if bases else ():
            base = min(
                bases, key=lambda b: (b is not entry, not b.variants & entry.variants, b.decoding != entry.decoding)
            )
            if base is not entry:
                pairs.setdefault(bases.index(base), []).append(entry)
        for place, others in pairs.items():
            names.append(bases[place].name)
            _test(bases[place], others, resamples, seed, notes)
    return list(dict.fromkeys(names))


def _baselines(made: Sequence[Entry], wanted: str | None) -> list[Entry]:
    """Rows that the name stands for: a variant in its decodings, or a method, which may have a row for each of several corpora."""
    own = [entry for entry in made if entry.method == "cgtgan"]
    if wanted is None:
        several = len({min(entry.variants) for entry in own}) > 1
        return [e for e in own if e.variants == own[0].variants] if several else [e for e in made if e.method == "init"]
    for names in (
        lambda e: (e.name,),
        lambda e: (e.row.variant, f"{e.row.experiment}/{e.row.variant}"),
        lambda e: (e.row.experiment,),
    ):
        named = [entry for entry in own if wanted in names(entry)]
        if len({min(entry.variants) for entry in named}) > 1:
            raise InputError(
                f"report.baseline={wanted} is several rows: name one of {', '.join(e.name for e in named)}"
            )
        if named:
            return named
    return [entry for entry in made if wanted in (entry.method, entry.name)]


def _test(base: Entry, others: Sequence[Entry], resamples: int, seed: int, notes: list[str]) -> None:
    ids = sorted(base.images, key=lambda i: (str(i), isinstance(i, str)))
    systems: list[Scored] = []
    pairs, places = [], []
    columns: dict[tuple[int, str], int | None] = {}

    def system(entry: Entry, metric: str) -> int | None:
        if (id(entry), metric) not in columns:
            made = _scored(entry, metric, ids)
            columns[id(entry), metric] = None if made is None else len(systems)
            systems.extend([] if made is None else [made])
        return columns[id(entry), metric]

    for entry in others:
        if any(scores.keys() != set(ids) for own in (base, entry) for scores in own.per_image.values()):
            differ = len(entry.images ^ base.images)
            notes.append(
                f"{entry.name} is not tested against {base.name}: their scored images differ ({differ:,} are not in both)"
            )
            continue
        for metric in entry.row.values:
            a, b = (system(own, metric) if metric in own.row.values else None for own in (entry, base))
            if a is not None and b is not None:
                pairs.append((a, b))
                places.append((entry, metric))
    differences: dict[int, dict[str, Difference]] = {}
    drawn = paired_bootstrap(systems, pairs, resamples=resamples, seed=seed) if pairs else []
    for (entry, metric), difference in zip(places, drawn, strict=True):
        differences.setdefault(id(entry), {})[metric] = difference
    for entry in others:
        if id(entry) in differences:
            entry.row = replace(entry.row, baseline=base.name, differences=differences[id(entry)])


def _scored(entry: Entry, metric: str, ids: Sequence[Any]) -> Scored | None:
    """The scores (seeds, images), where the metric's value of the whole is the mean of its images: only that can be resampled."""
    seeds = tuple(sorted(entry.runs))
    if metric in SUMMED or any(seed not in entry.row.values[metric] for seed in seeds):
        return None
    scores = np.asarray(
        [[entry.per_image[seed][i].get(metric, np.nan) for i in ids] for seed in seeds], dtype=np.float64
    )
    whole = np.asarray([entry.row.values[metric][seed] for seed in seeds])
    if not np.isfinite(scores).all() or not np.allclose(scores.mean(1), whole, rtol=1e-6, atol=1e-6):
        return None
    return Scored(scores, seeds)
