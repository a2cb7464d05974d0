"""Variants -> rows of the comparison, one table per test set, and the paired test of each row against the baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from cgtgan.config import METRICS
from cgtgan.errors import InputError
from cgtgan.evaluation.bootstrap import Difference, SystemScores, paired_bootstrap
from cgtgan.reporting.methods import METHODS
from cgtgan.reporting.run_folder import Run
from cgtgan.reporting.tables import ComparedRow, TestSet
from cgtgan.reporting.variants import Variant, distinguish
from cgtgan.runtime.artifacts import canonical_json, fingerprint

SUMMED = (*METRICS["bleu"], *METRICS["meteor"])  # of summed counts: no mean of the images' scores
_GAN = ("train.", "reward_weights.", "discriminator.", "precision")
_TEXT = (*_GAN, "aggregation_t.")
_INITIAL = ("train.use_initialization", "train.dropout")
# method without adversarial training -> settings that its scores do not depend on, and exceptions from these; variants
# that agree in all others share its row
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
    row: ComparedRow = field(default_factory=lambda: ComparedRow(""))

    @property
    def first_variant(self) -> int:
        return min(self.variants)

    @property
    def order(self) -> tuple[bool, bool, int, int]:
        known = METHODS[self.method]
        return self.method != "cgtgan", known.bound, list(METHODS).index(self.method), self.first_variant

    @cached_property
    def per_image(self) -> dict[int, dict[Any, dict[str, float]]]:
        """Seed -> image id -> metric -> raw score."""
        return {seed: run.per_image(self.method) for seed, run in self.runs.items()}

    @property
    def images(self) -> set[Any]:
        return set().union(*self.per_image.values())


SetKey = tuple[str, str, str]  # dataset, split, fingerprint of the references
Sets = Mapping[SetKey, Sequence[Entry]]


def entries(variants: Sequence[Variant], notes: list[str]) -> dict[SetKey, list[Entry]]:
    """The named rows of every test set in the table's order; contradictions between runs are added to `notes`."""
    sets: dict[SetKey, dict[tuple[str, str, str], Entry]] = {}
    for place, variant in enumerate(variants):
        for run in variant.runs:
            for method in run.scored:
                depends = _depends(run, method, variant.settings)
                kind = str(place) if method == "cgtgan" else canonical_json(depends)
                rows, key = sets.setdefault(_set_key(run, method), {}), (method, kind, run.decoding(method))
                entry = rows.setdefault(key, Entry(method, run.decoding(method), depends))
                entry.variants.add(place)
                first = entry.runs.setdefault(run.settings["seed"], run)
                if first is not run and first.scores(method)["scores"] != run.scores(method)["scores"]:
                    notes.append(
                        f"{METHODS[method].title}, seed {run.settings['seed']}: {run.folder} and {first.folder} have "
                        "other scores, though all settings it depends on are equal; the table has those of the latter"
                    )
    return {key: _named(sorted(rows.values(), key=lambda e: e.order), variants) for key, rows in sets.items()}


def _depends(run: Run, method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    unused, kept = _UNUSED.get(method, ((), ()))
    depends = {k: v for k, v in settings.items() if k in kept or not k.startswith(unused)}
    # the projection's temperature is a setting of the evaluation, not of the run
    t = (run.scores(method).get("made_from") or {}).get("projection_t") if method == "projection" else None
    return depends if t is None else depends | {"aggregation_t.t": t}


def _set_key(run: Run, method: str) -> SetKey:
    made_from = run.scores(method).get("made_from") or {}
    data = {k: v for k, v in run.settings.items() if k.startswith("dataset.")}
    return run.settings["dataset.name"], run.split, made_from.get("references") or fingerprint(data)


def _named(rows: list[Entry], variants: Sequence[Variant]) -> list[Entry]:
    for method in {entry.method for entry in rows}:
        same = [entry for entry in rows if entry.method == method]
        for entry, suffix in zip(same, distinguish([entry.depends for entry in same]), strict=True):
            title = METHODS[method].title + (f" ({suffix})" if suffix else "")
            entry.row = _row(entry, variants, title)
    return rows


def _row(entry: Entry, variants: Sequence[Variant], title: str) -> ComparedRow:
    by_seed = {seed: run.scores(entry.method)["scores"] for seed, run in sorted(entry.runs.items())}
    metrics = dict.fromkeys(metric for scores in by_seed.values() for metric in scores)
    seeds = {metric: [seed for seed, scores in by_seed.items() if metric in scores] for metric in metrics}
    sharing, known = [variants[i] for i in sorted(entry.variants)], METHODS[entry.method]
    trained, first = entry.method == "cgtgan", next(iter(entry.runs.values()))
    return ComparedRow(
        sharing[0].name if trained else title,
        first.title("cgtgan") if trained else known.note,
        {metric: [by_seed[seed][metric] for seed in seeds[metric]] for metric in metrics},
        bound=known.bound,
        untrained=not trained,
        decoding=entry.decoding,
        method=entry.method,
        seeds=seeds,
        experiment=sharing[0].experiment if len({v.experiment for v in sharing}) == 1 else "",
        variant=sharing[0].variant if len(sharing) == 1 else "",
    )


def tables_of(sets: Sets, variants: Sequence[Variant]) -> list[TestSet]:
    """The tables, with the paper's row where a variant's setting is the paper's."""
    titles = [f"{dataset}, {split} split" for dataset, split, _ in sets]
    tables = []
    for (key, rows), title in zip(sets.items(), titles, strict=True):
        counts = {run.scores(entry.method).get("images") or 0 for entry in rows for run in entry.runs.values()}
        images = " or ".join(f"{n:,}" for n in sorted(counts) if n)
        name = f"{title}, {images} images" if images else title
        name += f", references {key[2]}" if titles.count(title) > 1 else ""
        tables.append(TestSet(name, [*(entry.row for entry in rows), *_published(rows, variants)]))
    return tables


def _published(rows: Sequence[Entry], variants: Sequence[Variant]) -> list[ComparedRow]:
    trained = [entry for entry in rows if entry.method == "cgtgan"]
    corpora = {variants[i].settings["corpus.name"] for entry in trained for i in entry.variants}
    rows_by_name: dict[str, ComparedRow] = {}
    for run in (run for entry in trained for run in entry.runs.values()):
        if row := run.published(f" · {run.settings['corpus.name']}" if len(corpora) > 1 else ""):
            rows_by_name[row.name + row.note] = ComparedRow(**vars(row), method="published")
    return list(rows_by_name.values())


# ----------------------------------------------------------------------------------------------------- the paired test


def against_baseline(sets: Sets, wanted: str | None, *, resamples: int, seed: int, notes: list[str]) -> list[str]:
    """Put the differences to the baseline into the entries' rows; returns the names of the baselines.

    The default baseline: the first variant; with one variant, its initialisation. Raises InputError for an unknown one.
    """
    chosen = {key: _baselines(rows, wanted) for key, rows in sets.items()}
    if wanted is not None and not any(chosen.values()):
        every = (entry for rows in sets.values() for entry in rows)
        known = list(dict.fromkeys(entry.row.name if entry.method == "cgtgan" else entry.method for entry in every))
        raise InputError(f"report.baseline={wanted} is none of the rows; it must be one of {', '.join(known[:20])}")
    names = []
    for key, rows in sets.items():
        bases, compared = chosen[key], {}
        for entry in rows if bases else ():
            base = min(
                bases, key=lambda b: (b is not entry, not b.variants & entry.variants, b.decoding != entry.decoding)
            )
            if base is not entry:
                compared.setdefault(bases.index(base), []).append(entry)
        for place, others in compared.items():
            names.append(bases[place].row.name)
            _test(bases[place], others, resamples, seed, notes)
    return list(dict.fromkeys(names))


def _baselines(rows: Sequence[Entry], wanted: str | None) -> list[Entry]:
    """The rows a name stands for: a variant in its decodings, or a method, which may have one row per corpus."""
    trained = [entry for entry in rows if entry.method == "cgtgan"]
    if wanted is None:
        if len({entry.first_variant for entry in trained}) > 1:
            return [entry for entry in trained if entry.variants == trained[0].variants]
        return [entry for entry in rows if entry.method == "init"]
    for names in (
        lambda row: (row.name,),
        lambda row: (row.variant, f"{row.experiment}/{row.variant}"),
        lambda row: (row.experiment,),
    ):
        named = [entry for entry in trained if wanted in names(entry.row)]
        if len({entry.first_variant for entry in named}) > 1:
            choice = ", ".join(entry.row.name for entry in named)
            raise InputError(f"report.baseline={wanted} is several rows: name one of {choice}")
        if named:
            return named
    return [entry for entry in rows if wanted in (entry.method, entry.row.name)]


def _test(base: Entry, others: Sequence[Entry], resamples: int, seed: int, notes: list[str]) -> None:
    ids = sorted(base.images, key=lambda i: (str(i), isinstance(i, str)))
    systems: list[SystemScores] = []
    numbers: dict[tuple[int, str], int | None] = {}  # (entry, metric) -> its place in `systems`

    def number(entry: Entry, metric: str) -> int | None:
        key = id(entry), metric
        if key not in numbers:
            scored = _scored(entry, metric, ids)
            numbers[key] = None if scored is None else len(systems)
            systems.extend([] if scored is None else [scored])
        return numbers[key]

    pairs, tested = [], []
    for entry in others:
        if any(scores.keys() != set(ids) for e in (base, entry) for scores in e.per_image.values()):
            differ = f"their scored images differ ({len(entry.images ^ base.images):,} are not in both)"
            notes.append(f"{entry.row.name} is not tested against {base.row.name}: {differ}")
            continue
        for metric in entry.row.scores:
            a, b = (number(e, metric) if metric in e.row.scores else None for e in (entry, base))
            if a is not None and b is not None:
                pairs.append((a, b))
                tested.append((entry, metric))
    differences: dict[int, dict[str, Difference]] = {}
    drawn = paired_bootstrap(systems, pairs, resamples=resamples, seed=seed) if pairs else []
    for (entry, metric), difference in zip(tested, drawn, strict=True):
        differences.setdefault(id(entry), {})[metric] = difference
    for entry in others:
        if id(entry) in differences:
            entry.row = replace(entry.row, baseline=base.row.name, differences=differences[id(entry)])


def _scored(entry: Entry, metric: str, ids: Sequence[Any]) -> SystemScores | None:
    """Scores (seeds, images) where the corpus score is the mean over images: only such a score can be resampled."""
    seeds = tuple(sorted(entry.runs))
    if metric in SUMMED or list(seeds) != entry.row.seeds[metric]:
        return None
    rows = [[entry.per_image[seed][i].get(metric, np.nan) for i in ids] for seed in seeds]
    scores, whole = np.asarray(rows, dtype=np.float64), np.asarray(entry.row.scores[metric])
    if not np.isfinite(scores).all() or not np.allclose(scores.mean(1), whole, rtol=1e-6, atol=1e-6):
        return None
    return SystemScores(scores, seeds)
