"""BLEU, METEOR, ROUGE-L and CIDEr of captions against references, as the COCO caption evaluation prints them.

The scores come from pycocoevalcap's own code and jars (Chen et al., 2015, "Microsoft COCO Captions"), driven one by
one: its `COCOEvalCap` always builds SPICE, which downloads 384 MB. A metric that cannot be computed never takes the
others with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cgtgan.config import COCO_METRICS, DEFAULT_METRICS, METRICS, custom_name
from cgtgan.errors import InputError, UserError
from cgtgan.evaluation import java as jvm
from cgtgan.evaluation.coco_files import ImageId, id_list
from cgtgan.evaluation.counts import bleu_counts
from cgtgan.evaluation.java import JavaSettings
from cgtgan.evaluation.own_metrics import Columns, OwnMetric, own_metrics
from cgtgan.evaluation.tokenizer import tokenize

ExtraMetric = Callable[[str, list[Any]], Columns]  # of a method's name and the ids that are scored


@dataclass(frozen=True)
class Scores:
    """What `score_captions` found.

    All scores are fractions as COCO's program prints them; papers print them times 100.

    `corpus` and each entry of `per_image` have the keys BLEU-1..BLEU-4, METEOR, ROUGE-L, CIDEr (SPICE if asked and
    possible), and what further metrics give; BLEU and METEOR of a corpus are not means of the images. `failed`: an
    absent key -> one sentence why. `excluded`: images left out because they have no reference. `tokenizer`: "ptb", or
    "approximate" where the Java tokeniser could not run. `counts`: image -> what its BLEU ("bleu") and METEOR
    ("meteor") are made of, which the corpus scores have the sums of (evaluation/counts.py).
    """

    corpus: dict[str, float]
    per_image: dict[ImageId, dict[str, float]]
    failed: dict[str, str] = field(default_factory=dict)
    excluded: tuple[ImageId, ...] = ()
    tokenizer: str = "ptb"
    counts: dict[ImageId, dict[str, list[int]]] = field(default_factory=dict)


def score_captions(
    captions: Mapping[Any, str],
    references: Mapping[Any, Sequence[str]],
    metrics: Sequence[str] = DEFAULT_METRICS,
    *,
    java: JavaSettings = jvm.DEFAULT_SETTINGS,
) -> Scores:
    """Score one caption per image against that image's references.

    Args:
        captions: image id (int or str) -> caption, any string (empty and very long ones are scored too).
        references: the same ids -> references; an image whose references are missing or blank is excluded and reported.
        metrics: out of "bleu", "meteor", "rouge_l", "cider", "spice", and own metrics by path.py:name or
        package.module:name.
    Returns: `Scores`; images in the order of `references`.
    Raises: InputError for an unknown metric, ids that do not match, values of the wrong type, or nothing left to score.
    """
    return score_many({"captions": captions}, references, metrics, java=java)["captions"]


def score_many(
    methods: Mapping[str, Mapping[Any, str]],
    references: Mapping[Any, Sequence[str]] | None,
    metrics: Sequence[str] = DEFAULT_METRICS,
    *,
    java: JavaSettings = jvm.DEFAULT_SETTINGS,
    extra_metrics: Mapping[str, ExtraMetric] | None = None,
    on_metric: Callable[[], object] = lambda: None,
) -> dict[str, Scores]:
    """`score_captions` of several methods' captions for the same images: the same numbers, but METEOR starts once for
    all.

    references: None: there are none, and only extra metrics and own ones, which get empty lists, can be computed.
    extra_metrics: what `metrics` may name beside pycocoevalcap's: given a method's name and the ids that are scored,
    each returns the corpus values by name, and by name the n values of those that have one per image. `on_metric` is
    called after each metric of each method.
    """
    given = references if references is not None else {i: [] for captions in methods.values() for i in captions}
    extra = {spec: _of_method(metric, methods, given) for spec, metric in own_metrics(metrics).items()}
    extra |= extra_metrics or {}
    families = _check_metrics(metrics, extra)
    if references is None and (need := [family for family in families if family not in extra]):
        raise InputError(f"{', '.join(need)} cannot be computed without references")
    results = {name: _Result.of(captions, references) for name, captions in methods.items()}
    program = jvm.find_java()
    with contextlib.ExitStack() as processes:
        meteor: jvm.MeteorRun | jvm.JavaError | None = None
        if "meteor" in families and results:
            # started first: it loads while texts are split, and works while Python counts n-grams
            meteor = _start_meteor(program, sum(len(result.ids) for result in results.values()), java.scratch)
            if isinstance(meteor, jvm.MeteorRun):
                processes.enter_context(meteor)
        if not extra.keys() >= set(families):
            for result in results.values():
                result.tokenize(program, java)
        if meteor is not None:
            meteor = _feed_meteor(meteor, list(results.values()), java.meteor_timeout_s)
        for name, result in results.items():
            for family in [f for f in families if f != "meteor"]:
                if family in extra:
                    result.record(family, lambda f=family, m=name, r=result: extra[f](m, r.ids))
                elif family == "bleu":
                    result.record("bleu", result.bleu)
                elif family == "spice":
                    result.record("spice", lambda r=result: _spice(program, r.hypotheses, r.references, java.scratch))
                else:
                    result.record(family, lambda f=family, r=result: _python_metric(f, r.hypotheses, r.references))
                on_metric()
        if meteor is not None:
            for n, result in enumerate(results.values()):
                result.record("meteor", lambda n=n, r=result: r.meteor(meteor, n))
                on_metric()
    return {name: result.scores(families) for name, result in results.items()}


def _of_method(
    metric: OwnMetric, methods: Mapping[str, Mapping[Any, str]], references: Mapping[Any, Sequence[str]]
) -> ExtraMetric:
    return lambda method, ids: metric({i: methods[method][i] for i in ids}, references)


@dataclass
class _Result:
    """One method's captions on their way to `Scores`."""

    ids: list[Any]
    excluded: tuple[Any, ...]
    hypotheses: list[str]
    references: list[list[str]]
    problem: str | None = None  # why the Java tokeniser was not used
    columns: dict[str, Columns] = field(default_factory=dict)  # by family
    failed: dict[str, str] = field(default_factory=dict)
    counts: dict[str, list[list[int]]] = field(default_factory=dict)  # by family, of each image

    @classmethod
    def of(cls, captions: Mapping[Any, str], references: Mapping[Any, Sequence[str]] | None) -> _Result:
        if references is None:
            return cls(list(captions), (), list(captions.values()), [[] for _ in captions])
        _check_inputs(captions, references)
        ids = [i for i in references if i in captions and _has_reference(references[i])]
        excluded = tuple(i for i in references if i in captions and not _has_reference(references[i]))
        if not ids:
            raise InputError(
                f"no image is left to score: {len(captions)} captions, {len(excluded)} of them for images without "
                "references; "
                "check that captions and references are of the same split"
            )
        return cls(ids, excluded, [captions[i] for i in ids], [list(references[i]) for i in ids])

    def tokenize(self, program: str | None, java: JavaSettings) -> None:
        self.hypotheses, self.references, self.problem = tokenize(program, self.hypotheses, self.references, java)

    def record(self, family: str, compute: Callable[[], Columns]) -> None:
        try:
            self.columns[family] = compute()
        except (jvm.JavaError, UserError) as error:
            self._failed(family, str(error))
        except Exception as error:  # a scorer's bug on one odd caption must not lose the other metrics
            why = f"{family} was not computed: {type(error).__name__}: {error}"
            self._failed(family, why)

    def bleu(self) -> Columns:
        from pycocoevalcap.bleu.bleu_scorer import BleuScorer

        scorer = BleuScorer(n=4)
        for hypothesis, references in zip(self.hypotheses, self.references, strict=True):
            scorer += (hypothesis, references)
        totals, columns = scorer.compute_score(option="closest", verbose=0)
        made_of = ((c["testlen"], c["reflen"], c["correct"], c["guess"]) for c in scorer.ctest)
        self.counts["bleu"] = [bleu_counts(*each) for each in made_of]
        return _columns("bleu", totals, columns)

    def meteor(self, run: jvm.MeteorRun | jvm.JavaError, method: int) -> Columns:
        if isinstance(run, jvm.JavaError):
            raise run
        total, column, self.counts["meteor"] = run.result()[method]
        return _columns("meteor", [total], [column])

    def _failed(self, family: str, why: str) -> None:
        names = METRICS[family] if family in COCO_METRICS else (custom_name(family),)
        self.failed.update(dict.fromkeys(names, why))

    def scores(self, families: Sequence[str]) -> Scores:
        computed = [self.columns[family] for family in families if family in self.columns]
        each = {name: column for _, columns in computed for name, column in columns.items()}
        return Scores(
            corpus={name: score for corpus, _ in computed for name, score in corpus.items()},
            per_image={i: {name: column[row] for name, column in each.items()} for row, i in enumerate(self.ids)},
            failed=self.failed,
            excluded=self.excluded,
            tokenizer="ptb" if self.problem is None else "approximate",
            counts={i: {f: rows[row] for f, rows in self.counts.items()} for row, i in enumerate(self.ids)},
        )


def _start_meteor(java: str | None, captions: int, scratch: Path | None) -> jvm.MeteorRun | jvm.JavaError:
    if java is None:
        return jvm.JavaError(jvm.NO_JAVA)
    try:
        return jvm.MeteorRun(java, captions, scratch=scratch)
    except jvm.JavaError as error:
        return error
    except OSError as error:
        return jvm.JavaError(f"METEOR's Java program could not be started: {error}")


def _feed_meteor(
    meteor: jvm.MeteorRun | jvm.JavaError, results: Sequence[_Result], timeout_s: float | None
) -> jvm.MeteorRun | jvm.JavaError:
    if problem := next((r.problem for r in results if r.problem is not None), None):
        return jvm.JavaError(f"METEOR was not computed: {problem}")
    if isinstance(meteor, jvm.JavaError):
        return meteor
    limit = 60 + 0.1 * sum(len(r.ids) for r in results) if timeout_s is None else timeout_s
    meteor.score([(r.hypotheses, r.references) for r in results], timeout_s=limit)
    return meteor


def _check_metrics(metrics: Sequence[str], extra: Collection[str]) -> list[str]:
    known = [*COCO_METRICS, *extra]
    unknown = [metrics] if isinstance(metrics, str) else [m for m in metrics if m not in known]
    if unknown or not metrics:
        raise InputError(f"metrics={metrics!r} is not accepted: give a list out of {', '.join(known)}")
    return list(dict.fromkeys(metrics))


def _has_reference(references: Sequence[str] | None) -> bool:
    return any(text.strip() for text in references or ())


def _check_inputs(captions: Mapping[Any, str], references: Mapping[Any, Sequence[str]]) -> None:
    for image, caption in captions.items():
        if not isinstance(caption, str):
            raise InputError(f"the caption of image {image!r} is {caption!r}, not a string: give one caption per image")
    for image, texts in references.items():
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts or ()):
            raise InputError(f"the references of image {image!r} are not a list of strings: give a list, even of one")
    unknown = [i for i in captions if i not in references]
    if unknown:
        as_text = {str(i) for i in references}
        kinds = (
            f"{type(unknown[0]).__name__} in the captions and {type(next(iter(references), '')).__name__} in "
            "the references"
        )
        fix = (
            f"the ids are {kinds}: make them one type"
            if str(unknown[0]) in as_text
            else "score captions of the split the references belong to"
        )
        raise InputError(f"{id_list(unknown)} a caption but no entry among the references: {fix}")
    silent = [i for i, texts in references.items() if i not in captions and _has_reference(texts)]
    if silent:
        raise InputError(
            f"{id_list(silent)} references but no caption: caption them, or leave them out of the references"
        )


def _python_metric(family: str, hypotheses: list[str], references: list[list[str]]) -> Columns:
    gts, res = dict(enumerate(references)), {i: [text] for i, text in enumerate(hypotheses)}
    if family == "rouge_l":
        from pycocoevalcap.rouge.rouge import Rouge as Scorer
    else:
        from pycocoevalcap.cider.cider import Cider as Scorer
    total, column = Scorer().compute_score(gts, res)
    return _columns(family, [total], [column])


def _columns(family: str, totals: Iterable[Any], columns: Iterable[Iterable[Any]]) -> Columns:
    names = METRICS[family]
    corpus = {name: float(total) for name, total in zip(names, totals, strict=True)}
    return corpus, {name: [float(x) for x in column] for name, column in zip(names, columns, strict=True)}


def _spice(java: str | None, hypotheses: list[str], references: list[list[str]], scratch: Path | None) -> Columns:
    missing = jvm.missing_spice_jars()
    if missing is not None or java is None:
        raise jvm.JavaError(missing or f"SPICE needs Java: {jvm.HOW_TO_INSTALL}")
    total, column = jvm.spice(java, hypotheses, references, timeout_s=600 + 2.0 * len(hypotheses), scratch=scratch)
    return _columns("spice", [total], [column])
