"""Health of GAN training: what the captions of a step look like, and its known ways to collapse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cgtgan.evaluation.diversity import distinct


def most_frequent(captions: Sequence[str]) -> float:
    """Share of the captions that are the most frequent one; 1 means one caption for everything."""
    return Counter(captions).most_common(1)[0][1] / len(captions) if captions else 0.0


def caption_metrics(sampled: Sequence[str], greedy: Sequence[str]) -> dict[str, float]:
    """Distinct-1 and distinct-2, the share of repeated samples, and the share of the most frequent greedy caption."""
    words = [caption.split() for caption in sampled]
    return {
        "caption/distinct_1": distinct(words, 1),
        "caption/distinct_2": distinct(words, 2),
        "caption/identical": 1 - len(set(sampled)) / len(sampled) if sampled else 0.0,
        "caption/greedy_most_frequent": most_frequent(greedy),
    }


@dataclass(frozen=True)
class Collapse:
    """One way to collapse: `metric` is above or below a bound for `rows` logged rows in a row."""

    metric: str
    above: float | None
    below: float | None
    rows: int
    message: str

    def seen(self, metrics: Mapping[str, float]) -> bool:
        value = metrics.get(self.metric)
        if value is None:
            return False
        return (self.above is not None and value > self.above) or (self.below is not None and value < self.below)


COLLAPSES = {
    "one caption": Collapse(
        "caption/greedy_most_frequent", 0.5, None, 10,
        "most images of a batch get the same caption: start from a better initialisation (initialize.steps), lower "
        "train.generator_optimizer.lr or hold the generator with train.kl_weight",
    ),
    "no end": Collapse(
        "caption/finished", None, 0.1, 10,
        "captions do not end in a full stop: lower reward_weights.max_weight, initialise longer "
        "(initialize.steps) or raise generator.max_length",
    ),
    "discriminator saturated": Collapse(
        "train/d_accuracy", 0.999, None, 30,
        "the discriminator is saturated: it tells every caption from every sentence, so its reward is no guide: lower "
        "train.discriminator_optimizer.lr, or hold the generator near the corpus with train.kl_weight",
    ),
}  # fmt: skip


@dataclass
class Health:
    """Counts the logged rows on which a collapse is seen; `rows` is stored in checkpoints."""

    rows: dict[str, int] = field(default_factory=dict)

    def update(self, metrics: Mapping[str, float]) -> list[str]:
        """The messages that are due: each collapse once, when it has lasted for its number of rows."""
        messages = []
        for name, collapse in COLLAPSES.items():
            self.rows[name] = self.rows.get(name, 0) + 1 if collapse.seen(metrics) else 0
            if self.rows[name] == collapse.rows:
                value = f"{collapse.metric} {metrics[collapse.metric]:.3g}"
                messages.append(f"{collapse.message} ({value} for {collapse.rows} logged steps)")
        return messages
