"""train: the GAN. One step is METHOD's box, top to bottom: captions, discriminator, rewards, policy gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cgtgan.assets.aggregated import aggregated_embeddings
from cgtgan.assets.checkpoints import init_checkpoint
from cgtgan.assets.corpus import corpus_sentences
from cgtgan.assets.generators import total_steps
from cgtgan.assets.images import dataset_split, image_embeddings
from cgtgan.assets.workspace import Workspace
from cgtgan.config import Config, scientific_settings
from cgtgan.data.corpora import embedded_text
from cgtgan.errors import InputError
from cgtgan.method.batches import stable_seed
from cgtgan.method.reinforce import advantages, kl_to_reference, policy_gradient_loss, semantic_weight
from cgtgan.method.rewards import SemanticReward, semantic_reward
from cgtgan.models.discriminator import discriminator_loss
from cgtgan.models.generator import CaptionGenerator, Captions
from cgtgan.runtime.artifacts import file_fingerprint, fingerprint
from cgtgan.runtime.devices import Devices, best_precision
from cgtgan.runtime.interrupts import StopRequest, stop_requests, stopped
from cgtgan.runtime.wandb_run import under_agent
from cgtgan.training.batches import Batch, Batches
from cgtgan.training.checkpoints import Checkpoints, best_validation
from cgtgan.training.health import Health, caption_metrics
from cgtgan.training.meters import Clock, Means
from cgtgan.training.parts import Players, make_players
from cgtgan.training.validation import validate
from cgtgan.training.wandb_tables import log_captions, log_checkpoint, run_config, run_settings, validation_examples


def run(cfg: Config) -> float | None:
    """Returns the run's best CIDEr on the validation images, what a search over settings makes as large as it can."""
    ws = Workspace(cfg)
    with ws.hold_run():
        train(ws)
        return best_validation(ws)


def train(ws: Workspace) -> None:
    cfg, t = ws.cfg, ws.cfg.train
    ws.check_same_run("settings", scientific_settings(cfg))
    sentences, _, corpus = corpus_sentences(ws)
    images, targets = image_embeddings(ws, "train"), aggregated_embeddings(ws, "train")
    precision = best_precision(t.precision, ws.device)
    inputs = {"images": images.header.fingerprint, "aggregated": targets.header.fingerprint, "precision": precision}
    if t.init_from:
        inputs["init_from"] = file_fingerprint(init_checkpoint(ws) / "generator.safetensors")
    ws.check_same_run("inputs", inputs)
    inputs["sentences"] = fingerprint(corpus)
    val = image_embeddings(ws, "val")
    scored = bool(
        dataset_split(ws, "val").references
    )  # without references nothing can be validated, and `best` is the last
    if not scored:
        ws.tracker.say(
            "train: the val images have no references, so nothing is validated; checkpoints/best is the last step"
        )
    if ws.rank.world > t.batch_size // t.accumulation:
        raise InputError(
            f"train.batch_size={t.batch_size} in {t.accumulation} parts is less than an image for each of {ws.rank.world} processes: "
            "raise it, or start fewer"
        )
    steps = total_steps(t, len(images.ids))
    validate_every = t.validate_every or math.ceil(len(images.ids) / t.batch_size)
    checkpoints = Checkpoints(ws)
    if checkpoints.steps_done() >= steps:
        ws.tracker.say(f"train: done already, {steps} steps in {ws.run}")
        if under_agent() and not ws.rank.number:  # which waits for a result
            _start_run(ws, checkpoints.meta(), inputs, steps)
            _summarize(ws, checkpoints.meta())
            ws.tracker.finish()
        return
    examples = validation_examples(ws, val) if scored else None

    players = make_players(ws, sentences, steps, images.header.dim, precision)
    devices = players.devices
    meta = checkpoints.resume(players)
    if meta["step"]:
        ws.tracker.say(f"train: going on after step {meta['step']} of {steps} in {ws.run}")
    health = Health(meta["health"])
    batches = Batches(cfg, devices, images, targets, sentences)
    error: BaseException | None = None
    try:
        if devices.first:
            _start_run(ws, meta, inputs, steps)
        with ws.tracker.progress("GAN training", steps, meta["step"]) as bar, stop_requests(t.max_minutes) as stop:
            for step, batch in _prefetched(batches, meta["step"] + 1, steps):
                logged = step % t.log_every == 0 or step in (1, steps)
                metrics = gan_step(cfg, players, step, batch, logged=logged)
                meta["step"] = step
                if logged:
                    ws.tracker.log(step, metrics)
                    for collapse in health.look(metrics):
                        _say_collapse(ws, step, collapse)
                improved = False
                if scored and (step % validate_every == 0 or step == steps):
                    found = validate(ws, players, val, step)
                    ws.tracker.log(
                        step, {"eval/CIDEr": found.cider, "eval/epoch": step * t.batch_size / len(images.ids)}
                    )
                    log_captions(ws, players, examples, found, step)
                    improved = found.cider > meta["best"]
                    meta |= {"best": found.cider, "best_step": step} if improved else {}
                    _summarize(ws, meta, found.cider)
                code = _asked_to_stop(stop, devices)
                if improved or step == steps or code or checkpoints.due(step):
                    meta |= {"wandb_id": ws.tracker.wandb_id, "health": health.rows}
                    checkpoints.write(players, meta, best=improved or not scored)
                if code and step < steps:
                    checkpoints.finish()
                    raise stopped(code, f"after step {step} of {steps} in {ws.run}")
                validated = f"  val CIDEr {100 * meta['best']:.1f}" if meta["best"] >= 0 else ""
                bar.advance(note=f"cos {metrics['reward/cos']:.1f}  D loss {metrics['train/d_loss']:.2f}{validated}")
        checkpoints.finish()
        log_checkpoint(ws, inputs, {"step": meta["best_step"], "CIDEr": meta["best"]} if scored else {"step": steps})
    except BaseException as raised:
        error = raised
        raise
    finally:
        checkpoints.close()
        ws.tracker.finish(error)
        devices.close()


def gan_step(cfg: Config, players: Players, step: int, batch: Batch, *, logged: bool = True) -> dict[str, float]:
    """One optimiser step (CgT-GAN, Algorithm 1; METHOD: GAN training) on this process's share of the batch; returns the metrics.

    The gradients are sums over captions divided by the whole step's number of them, so parts (`train.accumulation`), chunks and processes
    add up to the same step. `logged`: also what only a logged row needs.
    """
    t, devices = cfg.train, players.devices
    clock, means = Clock(devices.device), Means()
    if t.dropout:  # masks hang on the step and the process: a resumed run draws them again
        torch.manual_seed(stable_seed(cfg.seed, "dropout", step, devices.number))
    weights = cfg.reward_weights
    ramp = {"max_weight": weights.max_weight, "delay_steps": weights.delay_steps, "ramp_steps": weights.ramp_steps}
    w = semantic_weight(step, **ramp)
    parts = batch.parts(t.accumulation)
    sampled_texts: list[str] = []
    greedy_texts: list[str] = []
    for optimizer in players.optimizers.values():
        optimizer.adamw.zero_grad(set_to_none=True)
    for number, part in enumerate(parts, start=1):
        # 1. captions of the generator as it is: K samples and the greedy one
        with devices.autocast():
            sampled, greedy = _draw(players.bundle.model, part.image, part.seeds, dropout=t.dropout)
        samples, greedies = players.bundle.texts(sampled.token_ids), players.bundle.texts(greedy.token_ids)
        clock.mark("drawing")

        # 2. how human they sound, by the discriminator as it was before its update; then the gradient of its update
        naturalness = _judge(players, part.real, samples, greedies, batch.total, means, t.dropout)
        clock.mark("discriminator")

        # 3. how well they fit the image
        fit = _fit(cfg, players, part, [*samples, *greedies])
        clock.mark("CLIP")

        # 4. policy gradient, each reward against its own baseline
        before = (
            semantic_weight(step - 1, **ramp)
            if step > 1 and "accumulation" in t.released and number < len(parts)
            else w
        )
        _reinforce(cfg, players, part, sampled, fit, naturalness, before, batch.total, means, logged=logged)
        clock.mark("policy gradient")
        if "accumulation" in t.released:  # METHOD, slip 11
            for optimizer in players.optimizers.values():
                optimizer.clip(optimizer.norm())
        sampled_texts += samples
        greedy_texts += greedies
    players.last = {"ids": batch.ids, "real": batch.real, "samples": sampled_texts, "greedy": greedy_texts}

    # 5. the updates, if everything is finite
    norms = {}
    for name, optimizer in players.optimizers.items():
        devices.sum_gradients(optimizer.parameters)
        norms[name] = optimizer.norm()
    metrics = means.over(devices, norms)
    for name, optimizer in players.optimizers.items():
        players.check_finite(name, optimizer, step, metrics)
    for name, optimizer in players.optimizers.items():
        optimizer.clip(norms[name])
        optimizer.apply(step)
        metrics[f"train/{name[0]}_lr"] = optimizer.learning_rate(step)
    clock.mark("optimisers")
    g_loss = (
        w * metrics["train/semantic_loss"]
        + (1 - w) * metrics["train/naturalness_loss"]
        + t.kl_weight * metrics.get("train/kl", 0.0)
    )
    metrics |= {"train/semantic_weight": w, "train/g_loss": g_loss}
    metrics.setdefault("train/d_loss", 0.0)
    if logged:
        metrics |= caption_metrics(devices.gather(sampled_texts), devices.gather(greedy_texts))
        metrics |= clock.metrics(batch.total)
    return metrics


def _draw(
    generator: CaptionGenerator, image: Tensor, seeds: list[list[int]], *, dropout: bool
) -> tuple[Captions, Captions]:
    if not dropout:
        return generator.eval().sample_and_greedy(image, seeds, log_probs=False)
    sampled = generator.train().sample_with_graph(image, seeds)
    return sampled, generator.eval().greedy(image, log_probs=False)


def _judge(
    players: Players, real: list[str], sampled: list[str], greedy: list[str], total: int, means: Means, dropout: bool
) -> Tensor:
    """Naturalness reward (B*K + B,) of samples and greedy captions; adds the gradient of D's update on real and sampled sentences.

    `total` is the number of images of the whole step. Without dropout one pass serves both, and what occurs twice is judged once.
    """
    discriminator, devices = players.discriminator, players.devices
    if discriminator is None:
        return torch.zeros(len(sampled) + len(greedy), device=devices.device)
    sentences = total * len(sampled) // max(1, len(greedy))  # of each kind in the whole step
    naturalness = None
    if dropout:
        with devices.autocast():
            naturalness = discriminator.eval().score([*sampled, *greedy])
        fakes, counts = sampled, [1] * len(sampled)
    else:
        fakes = list(dict.fromkeys(sampled))
        times = dict.fromkeys(fakes, 0)
        for text in sampled:
            times[text] += 1
        counts = list(times.values())
    labels = torch.tensor([1.0] * len(real) + [0.0] * len(fakes), device=devices.device)
    weights = torch.tensor([1.0] * len(real) + [float(c) for c in counts], device=devices.device) / (2 * sentences)

    def share(logits: Tensor, rows: Tensor) -> Tensor:
        return (F.binary_cross_entropy_with_logits(logits, labels[rows], reduction="none") * weights[rows]).sum()

    discriminator.train(dropout)
    with devices.autocast():
        logits = discriminator.accumulate_gradient([*real, *fakes], share, players.d_chunk)
        discriminator.eval()
        if naturalness is None:
            place = {text: i for i, text in enumerate(fakes)}
            others = [text for text in dict.fromkeys(greedy) if text not in place]
            judged = torch.cat([logits[len(real) :], discriminator.score(others)]) if others else logits[len(real) :]
            place |= {text: len(place) + i for i, text in enumerate(others)}
            naturalness = judged[torch.tensor([place[text] for text in (*sampled, *greedy)], device=devices.device)]
    repeated = torch.tensor(counts, device=devices.device)
    real_logits, fake_logits = logits[: len(real)], logits[len(real) :].repeat_interleave(repeated)
    means.add("train/d_loss", discriminator_loss(real_logits, fake_logits)[None].expand(len(real)))
    means.add("train/d_accuracy_real", real_logits > 0)
    means.add("train/d_accuracy_generated", fake_logits <= 0)
    means.add("train/d_accuracy", torch.cat([real_logits > 0, fake_logits <= 0]))
    means.add("reward/real_logit", real_logits)
    return naturalness


def _fit(cfg: Config, players: Players, part: Batch, texts: list[str]) -> SemanticReward:
    """Semantic reward (B*K + B,) of samples, then greedy captions; identical texts are embedded once."""
    batch, samples = len(part.seeds), len(part.seeds[0])
    device = players.devices.device
    owner = torch.cat([torch.arange(batch).repeat_interleave(samples), torch.arange(batch)]).to(device)
    with players.devices.autocast():
        embedded = players.backbone.encode_texts([embedded_text(text) for text in texts], players.clip_batch).to(device)
    target = (
        F.normalize(part.target, dim=-1) if "l1_target" in cfg.train.released else part.target
    )  # METHOD, slip 13: cos is the same
    weights, scale = cfg.reward_weights, cfg.train.reward_scale or players.backbone.logit_scale
    return semantic_reward(
        embedded,
        target[owner],
        part.image[owner],
        cos_weight=weights.cos_weight,
        clip_weight=weights.clip_weight,
        logit_scale=scale,
    )


def _reinforce(
    cfg: Config, players: Players, part: Batch, sampled: Captions, fit: SemanticReward, naturalness: Tensor, w: float, total: int,
    means: Means, *, logged: bool,
) -> None:  # fmt: skip
    """Add G's gradient of w*semantic + (1-w)*naturalness (+ the leash) over this part's captions."""
    t, generator, devices = cfg.train, players.bundle.model, players.devices
    batch, samples = len(part.seeds), len(part.seeds[0])
    semantic, natural = (_advantage(r, batch, samples, t.baseline) for r in (fit.total, naturalness))
    advantage = (w * semantic + (1 - w) * natural).flatten()
    drawn = sampled.drawn.flatten(0, 1)
    reference = torch.empty(0)
    if players.reference is not None and (t.kl_weight or logged):
        with torch.no_grad(), devices.autocast():
            reference = players.reference.token_log_probs(part.image, sampled.drawn)[0].flatten(0, 1)

    def share(token_log_probs: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        log_probs = token_log_probs.sum(-1) / mask.sum(-1)
        loss = policy_gradient_loss(advantage[rows], log_probs) * len(rows)
        if t.kl_weight:
            loss = loss + t.kl_weight * kl_to_reference(token_log_probs, reference[rows], mask).sum()
        return loss / (total * samples)

    mask = generator.up_to_stop(drawn)
    if t.dropout:
        token_log_probs = _released_gradient(sampled, advantage, total * samples, mask)
    else:
        with devices.autocast():
            token_log_probs = generator.eval().accumulate_gradient(part.image, drawn, share, players.g_chunk)
    log_probs = token_log_probs.sum(-1) / mask.sum(-1)
    means.add("train/semantic_loss", -semantic.flatten() * log_probs)
    means.add("train/naturalness_loss", -natural.flatten() * log_probs)
    means.add("train/caption_tokens", mask.sum(-1))
    means.add("caption/finished", (drawn == generator.stop_token_id).any(-1))
    if len(reference) and not t.dropout:
        means.add("train/kl", kl_to_reference(token_log_probs, reference, mask))
    for name, reward in {**fit._asdict(), "naturalness": naturalness}.items():
        name = "semantic" if name == "total" else name
        advantage_ = _advantage(reward, batch, samples, t.baseline)
        means.add(f"reward/{name}", reward[: batch * samples])
        means.add(f"reward/{name}_greedy", reward[batch * samples :])
        means.add(f"advantage/{name}", advantage_)
        means.add(f"advantage/{name}_abs", advantage_.abs())


def _released_gradient(sampled: Captions, advantage: Tensor, captions: int, mask: Tensor) -> Tensor:
    """The gradient through the pass that drew (METHOD, slip 8); the mean log-prob stands for each token's."""
    log_probs = sampled.log_probs.flatten()
    (policy_gradient_loss(advantage, log_probs) * len(log_probs) / captions).backward()
    return log_probs.detach()[:, None] * mask


def _advantage(rewards: Tensor, batch: int, samples: int, baseline: str) -> Tensor:
    """(B*K + B,) rewards, samples then greedy -> (B, K)"""
    of_samples = rewards[: batch * samples].view(batch, samples)
    return advantages(of_samples, rewards[batch * samples :] if baseline == "greedy" else None)


# ------------------------------------------------------------------------------------------------- around the step


def _prefetched(batches: Batches, first: int, last: int) -> Iterator[tuple[int, Batch]]:
    """Steps and their batches; the next one is put together while a step works."""
    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(batches.batch, first)
        for step in range(first, last + 1):
            batch = coming.result()
            if step < last:
                coming = ahead.submit(batches.batch, step + 1)
            yield step, batch


def _asked_to_stop(stop: StopRequest, devices: Devices) -> int:
    """The exit code with which to stop now, 0 to go on: what any of the processes was told."""
    if devices.world == 1:
        return stop.code
    return max(devices.gather([stop.code]))


def _say_collapse(ws: Workspace, step: int, collapse: str) -> None:
    if ws.cfg.train.stop_on_collapse:
        raise InputError(
            f"step {step}: {collapse}. Stopped, as train.stop_on_collapse asks; the last checkpoint is in {ws.run}"
        )
    ws.tracker.say(f"warning, step {step}: {collapse}")


def _start_run(ws: Workspace, meta: Mapping[str, Any], inputs: Mapping[str, Any], steps: int) -> None:
    config = run_config(ws.cfg, inputs) | {"total_steps": steps}
    ws.tracker.start_run(
        ws.run, run_settings(ws.cfg), config=config, job_type=ws.cfg.stage, step=meta["step"], wandb_id=meta["wandb_id"]
    )


def _summarize(ws: Workspace, meta: Mapping[str, Any], last: float | None = None) -> None:
    if meta["best_step"]:
        ws.tracker.summarize({"eval/best_CIDEr": meta["best"], "eval/best_step": meta["best_step"]})
    if last is not None:
        ws.tracker.summarize({"eval/last_CIDEr": last})
