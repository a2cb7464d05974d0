"""Variants -> rows of the comparison, one table per test set, and the paired test of each row against the baseline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from cgtgan.errors import InputError
from cgtgan.evaluation.bootstrap import SummedScores, System, SystemScores, paired_bootstrap
from cgtgan.evaluation.counts import SUMMED
from cgtgan.reporting.methods import METHODS, SYSTEMS, method_note, training_note
from cgtgan.reporting.run_folder import Run
from cgtgan.reporting.score_folder import ScoreFolder
from cgtgan.reporting.tables import MethodRow, Origin, RowsBySet, domain_rows
from cgtgan.reporting.variants import Variant, distinguish
from cgtgan.runtime.artifacts import canonical_json, fingerprint

_GAN = ("train.", "reward_weights.", "discriminator.", "precision")
_TEXT = (*_GAN, "aggregation_t.")
_REPLACED = ("train.steps", "train.epochs", "train.batch_size")  # of the supervised bound, by steps of its own
_INITIAL = ("train.use_initialization", "train.dropout")
# method without adversarial training -> settings that its scores do not depend on, and exceptions from these; variants
# that agree in all others share its row
_UNUSED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "init": (_TEXT, _INITIAL),
    "mean_shift": (_TEXT, _INITIAL),
    "projection": (_GAN, _INITIAL),
    "supervised": (_TEXT, ("train.dropout", *_REPLACED)),
    "nearest": ((*_TEXT, "generator.", "initialize."), ()),
    "consensus": ((*_TEXT, "generator.", "initialize."), ()),
    "human": ((*_TEXT, "generator.", "initialize.", "corpus.", "clip_backbone."), ()),
}


@dataclass
class Entry:
    """A row in the making: `runs` holds its run of every seed, `variants` those that share it, by their place."""

    method: str
    decoding: str
    depends: Mapping[str, Any]
    differs: str = ""  # from the runs' usual scores (evaluation/records.py)
    variants: dict[int, Variant] = field(default_factory=dict)
    runs: dict[int, Run] = field(default_factory=dict)
    row: MethodRow = field(default_factory=lambda: MethodRow(""))

    @property
    def first_variant(self) -> int:
        return min(self.variants)

    @property
    def order(self) -> tuple[bool, int, int]:
        is_system = self.method in SYSTEMS
        return not is_system, 0 if is_system else list(METHODS).index(self.method), self.first_variant

    def distance(self, base: Entry) -> tuple[bool, bool, bool]:
        """To a baseline: the nearest one of several is taken."""
        return base is not self, not base.variants.keys() & self.variants.keys(), base.decoding != self.decoding

    @cached_property
    def per_image(self) -> dict[int, dict[Any, dict[str, float]]]:
        """Seed -> image id -> metric -> raw score."""
        return {seed: run.per_image(self.method) for seed, run in self.runs.items()}

    @cached_property
    def counts(self) -> dict[str, np.ndarray]:
        """Metric of summed counts -> (seeds, images in their sorted order, K); one that a seed lacks is left out."""
        by_seed = [self.runs[seed].counts(self.method) for seed in sorted(self.runs)]
        ids = self.sorted_images
        complete = [
            m for m in {m for m, _ in SUMMED.values()} if all(m in by.get(i, {}) for by in by_seed for i in ids)
        ]
        return {m: np.asarray([[by[i][m] for i in ids] for by in by_seed], dtype=np.float64) for m in complete}

    @property
    def sorted_images(self) -> list[Any]:
        return sorted(self.images, key=lambda i: (str(i), isinstance(i, str)))

    @property
    def images(self) -> set[Any]:
        return set().union(*self.per_image.values())


SetKey = tuple[str, str, str]  # dataset, split (of files alone: "", the references in words), their fingerprint
Sets = Mapping[SetKey, Sequence[Entry]]


def entries(variants: Sequence[Variant], notes: list[str]) -> dict[SetKey, list[Entry]]:
    """The named rows of every test set in the table's order; contradictions between runs are added to `notes`."""
    sets: dict[SetKey, dict[tuple[str, ...], Entry]] = {}
    # runs first: captions made elsewhere join the table of their references
    for place, variant in sorted(enumerate(variants), key=lambda pair: isinstance(pair[1].runs[0], ScoreFolder)):
        for run in (record for each in variant.runs for record in each.records()):
            method = run.method
            depends, differs = _depends(run, method, variant.settings), run.differs("projection_t", "supervised")
            kind = str(place) if method in SYSTEMS else canonical_json(depends)
            rows, key = sets.setdefault(_set_key(run, method, sets), {}), (method, kind, run.decoding(method), differs)
            entry = rows.setdefault(key, Entry(method, run.decoding(method), depends, differs))
            entry.variants[place] = variant
            first = entry.runs.setdefault(run.settings["seed"], run)
            if first is not run and first.scores(method)["scores"] != run.scores(method)["scores"]:
                notes.append(
                    f"{METHODS[method].title}, seed {run.settings['seed']}: {run.folder} and {first.folder} have "
                    "other scores, though all settings it depends on are equal; the table has those of the latter"
                )
    return {key: _named(sorted(rows.values(), key=lambda e: e.order)) for key, rows in sets.items()}


def _depends(run: Run, method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    unused, kept = _UNUSED.get(method, ((), ()))
    depends = {k: v for k, v in settings.items() if k in kept or not k.startswith(unused)}
    # settings of the evaluation, not of the run
    made_from = run.scores(method).get("made_from") or {}
    if method == "projection" and (t := made_from.get("projection_t")) is not None:
        return depends | {"aggregation_t.t": t}
    if method == "supervised" and (chosen := made_from.get("supervised")):
        replaced = _REPLACED if "steps" in chosen else ()
        depends = {key: value for key, value in depends.items() if key not in replaced}
        return depends | {f"evaluate.supervised.{key}": value for key, value in chosen.items()}
    return depends


def _set_key(run: Run, method: str, known: Iterable[SetKey]) -> SetKey:
    made_from = run.scores(method).get("made_from") or {}
    if isinstance(run, ScoreFolder):
        same = (key for key in known if key[2] == made_from.get("references"))
        return next(same, ("", run.against, str(made_from.get("references"))))
    data = {k: v for k, v in run.settings.items() if k.startswith("dataset.")}
    return run.settings["dataset.name"], run.split, made_from.get("references") or fingerprint(data)


def _named(rows: list[Entry]) -> list[Entry]:
    for method in {entry.method for entry in rows}:
        same = [entry for entry in rows if entry.method == method]
        for entry, suffix in zip(same, distinguish([entry.depends for entry in same]), strict=True):
            entry.row = _row(entry, METHODS[method].title + (f" ({suffix})" if suffix else ""))
    return rows


def name_methods(sets: Sets, own: Mapping[str, str]) -> None:
    """Give the rows of other methods the names that the user wants for these: method -> name."""
    for entry in (entry for rows in sets.values() for entry in rows if entry.method not in SYSTEMS):
        title = METHODS[entry.method].title
        entry.row = replace(entry.row, name=entry.row.name.replace(title, own.get(entry.method, title), 1))


def _row(entry: Entry, title: str) -> MethodRow:
    by_seed = {seed: run.scores(entry.method)["scores"] for seed, run in sorted(entry.runs.items())}
    metrics = dict.fromkeys(metric for scores in by_seed.values() for metric in scores)
    seeds = {metric: [seed for seed, scores in by_seed.items() if metric in scores] for metric in metrics}
    sharing, known = list(entry.variants.values()), METHODS[entry.method]
    is_system, first = entry.method in SYSTEMS, next(iter(entry.runs.values()))
    experiment = sharing[0].experiment if len({v.experiment for v in sharing}) == 1 else ""
    name = sharing[0].name if is_system else title
    return MethodRow(
        f"{name}, {entry.differs}" if entry.differs else name,
        _note(entry, first.title(entry.method) if is_system else ""),
        {metric: [by_seed[seed][metric] for seed in seeds[metric]] for metric in metrics},
        known.part or ("" if is_system else "untrained"),
        decoding=entry.decoding,
        seeds=seeds,
        origin=Origin(entry.method, experiment, sharing[0].variant if len(sharing) == 1 else ""),
    )


def _note(entry: Entry, title: str) -> str:
    """`title`: of a system, whose row has its variant's name."""
    trainings = [run.training(entry.method) for run in entry.runs.values()]
    settings = next(iter(entry.variants.values())).settings
    if entry.method in SYSTEMS:
        return ", ".join(filter(None, (title, training_note(entry.method, settings, trainings))))
    return method_note(entry.method, settings, trainings)


def tables_of(sets: Sets) -> RowsBySet:
    """The tables, with the paper's row where a variant's setting is the paper's."""
    titles = [f"{dataset}, {split} split" if dataset else split or "captions of files" for dataset, split, _ in sets]
    names = [f"{title}{_images(rows)}" for title, rows in zip(titles, sets.values(), strict=True)]
    tables: dict[str, list[MethodRow]] = {}
    for (key, rows), name in zip(sets.items(), names, strict=True):
        name += f", references {key[2]}" if names.count(name) > 1 else ""
        by_domain = [row for entry in rows for row in _domain_rows(entry)]
        tables[name] = [*(entry.row for entry in rows), *by_domain, *_published(rows)]
    return tables


def _domain_rows(entry: Entry) -> list[MethodRow]:
    """A row per domain (NoCaps), with the scores of all seeds."""
    rows: dict[str, MethodRow] = {}
    for seed, run in sorted(entry.runs.items()):
        for row in domain_rows(entry.row.name, run.scores(entry.method), entry.decoding):
            known = rows.get(row.name, replace(row, scores={}))
            scores = {metric: [*known.scores.get(metric, ()), *values] for metric, values in row.scores.items()}
            seeds = {metric: [*known.seeds.get(metric, ()), seed] for metric in row.scores}
            rows[row.name] = replace(known, scores={**known.scores, **scores}, seeds={**known.seeds, **seeds})
    return list(rows.values())


def _images(rows: Sequence[Entry]) -> str:
    counts = {run.scores(entry.method).get("images") or 0 for entry in rows for run in entry.runs.values()}
    images = " or ".join(f"{n:,}" for n in sorted(counts) if n)
    return f", {images} images" if images else ""


def _published(rows: Sequence[Entry]) -> list[MethodRow]:
    trained = [entry for entry in rows if entry.method == "cgtgan"]
    corpora = {variant.settings["corpus.name"] for entry in trained for variant in entry.variants.values()}
    runs = [run for entry in trained for run in entry.runs.values()]
    published = (run.published(f" · {run.settings['corpus.name']}" if len(corpora) > 1 else "") for run in runs)
    return list({row.name + row.note: row for row in published if row}.values())


# ----------------------------------------------------------------------------------------------------- the paired test


def against_baseline(sets: Sets, wanted: str | None, *, resamples: int, seed: int, notes: list[str]) -> list[str]:
    """Put the differences to the baseline into the entries' rows; returns the names of the baselines.

    The default baseline: the first variant; with one variant, its initialisation. Raises InputError for an unknown one.
    """
    chosen = {key: _baselines(rows, wanted) for key, rows in sets.items()}
    if wanted is not None and not any(chosen.values()):
        every = (entry for rows in sets.values() for entry in rows)
        known = list(dict.fromkeys(entry.row.name if entry.method in SYSTEMS else entry.method for entry in every))
        raise InputError(f"report.baseline={wanted} is none of the rows; it must be one of {', '.join(known[:20])}")
    names = []
    for key, rows in sets.items():
        for base in chosen[key]:
            others = [entry for entry in rows if entry is not base and min(chosen[key], key=entry.distance) is base]
            if others:
                names.append(base.row.name)
                _test(base, others, resamples, seed, notes)
    return list(dict.fromkeys(names))


def _baselines(rows: Sequence[Entry], wanted: str | None) -> list[Entry]:
    """The rows a name stands for: a variant in its decodings, or a method, which may have one row per corpus."""
    trained = [(entry, entry.row.origin) for entry in rows if entry.method in SYSTEMS]
    if wanted is None:
        first = [entry for entry, _ in trained if entry.variants == trained[0][0].variants]
        return first if len(first) < len(trained) else [entry for entry in rows if entry.method == "init"]
    by_row = [entry for entry, _ in trained if wanted == entry.row.name]
    by_variant = [entry for entry, o in trained if wanted in (o.variant, f"{o.experiment}/{o.variant}")]
    by_experiment = [entry for entry, o in trained if wanted == o.experiment]
    named = by_row or by_variant or by_experiment
    if len({entry.first_variant for entry in named}) > 1:
        choice = ", ".join(entry.row.name for entry in named)
        raise InputError(f"report.baseline={wanted} is several rows: name one of {choice}")
    return named or [entry for entry in rows if wanted in (entry.method, entry.row.name)]


def _test(base: Entry, others: Sequence[Entry], resamples: int, seed: int, notes: list[str]) -> None:
    ids = base.sorted_images
    base_scores = {metric: _scored(base, metric, ids) for metric in base.row.scores}
    systems: list[System] = []
    tested: list[tuple[Entry, str]] = []
    for entry in others:
        if any(scores.keys() != set(ids) for e in (base, entry) for scores in e.per_image.values()):
            differ = f"their scored images differ ({len(entry.images ^ base.images):,} are not in both)"
            notes.append(f"{entry.row.name} is not tested against {base.row.name}: {differ}")
            continue
        for metric in entry.row.scores:
            baseline = base_scores.get(metric)
            if baseline and (scores := _scored(entry, metric, ids)):
                systems += [scores, baseline]
                tested.append((entry, metric))
    pairs = [(i, i + 1) for i in range(0, len(systems), 2)]
    drawn = paired_bootstrap(systems, pairs, resamples=resamples, seed=seed) if pairs else []
    for (entry, metric), difference in zip(tested, drawn, strict=True):
        differences = {**entry.row.differences, metric: difference}
        entry.row = replace(entry.row, baseline=base.row.name, differences=differences)


def _scored(entry: Entry, metric: str, ids: Sequence[Any]) -> System | None:
    """What can be resampled: the scores of the images where the corpus score is their mean, or counts that it is
    made of.
    """
    seeds = tuple(sorted(entry.runs))
    if list(seeds) != entry.row.seeds[metric]:
        return None
    if metric in SUMMED:
        family, score = SUMMED[metric]
        summed = SummedScores(entry.counts[family], score, seeds) if family in entry.counts else None
        good = summed is not None and np.allclose(summed.values, entry.row.scores[metric], rtol=1e-6, atol=1e-5)
        return summed if good else None
    rows = [[entry.per_image[seed].get(i, {}).get(metric, np.nan) for i in ids] for seed in seeds]
    scores, whole = np.asarray(rows, dtype=np.float64), np.asarray(entry.row.scores[metric])
    if not np.isfinite(scores).all() or not np.allclose(scores.mean(1), whole, rtol=1e-6, atol=1e-6):
        return None
    return SystemScores(scores, seeds)
