"""train: the GAN. One step is METHOD's box, top to bottom: captions, discriminator, rewards, policy gradient."""

from __future__ import annotations

from typing import Any

import torch

from cgtgan.assets.workspace import Workspace
from cgtgan.config import Config
from cgtgan.errors import InputError
from cgtgan.method.batches import stable_seed
from cgtgan.method.reinforce import semantic_weight
from cgtgan.runtime.devices import on_device
from cgtgan.runtime.interrupts import stop_requests, stopped
from cgtgan.runtime.stopwatch import TRAINING_SECONDS, Stopwatch
from cgtgan.runtime.tracking import read_metrics
from cgtgan.training.batches import Batch, Batches, prefetched
from cgtgan.training.checkpoints import Checkpoints, best_validation
from cgtgan.training.discriminator_step import update_discriminator
from cgtgan.training.health import Health, caption_metrics
from cgtgan.training.inputs import TrainingInputs, training_inputs
from cgtgan.training.meters import Clock, Means
from cgtgan.training.parts import TrainingParts, make_training_parts
from cgtgan.training.policy_gradient import (
    DrawnBatch,
    batch_advantages,
    draw,
    of_drawn,
    reference_log_probs,
    reinforce,
    step_tokens,
)
from cgtgan.training.rewards import semantic_rewards
from cgtgan.training.validation import validate
from cgtgan.training.wandb_tables import (
    Examples,
    log_captions,
    log_checkpoint,
    report_finished_run,
    start_run,
    summarize,
    validation_examples,
)  # fmt: skip


def run(cfg: Config) -> float | None:
    """Returns the run's best CIDEr on the validation images, what a search over settings maximises."""
    ws = Workspace(cfg)
    with ws.hold_run():
        train(ws)
        return best_validation(ws)


def train(ws: Workspace) -> None:
    """Train to the last step. Raises `Stopped` where a signal or the time limit comes first."""
    try:
        _train(ws, training_inputs(ws))
    finally:
        ws.close()


def _train(ws: Workspace, inputs: TrainingInputs) -> None:
    checkpoints = Checkpoints(ws)
    if checkpoints.steps_done() >= inputs.steps:
        ws.tracker.say(f"train: done already, {inputs.steps} steps in {ws.run}")
        report_finished_run(ws, inputs, checkpoints.meta())
        return
    examples = validation_examples(ws, inputs.val) if inputs.scored else None
    parts = make_training_parts(ws, inputs.sentences, inputs.steps, inputs.images.header.dim, inputs.precision)
    meta = checkpoints.resume(parts)
    error: BaseException | None = None
    try:
        if parts.devices.first:
            start_run(ws, inputs, meta)
        code = _loop(ws, inputs, parts, checkpoints, meta, examples)
        best = {"step": meta["best_step"], "CIDEr": meta["best"]} if inputs.scored else {"step": inputs.steps}
        log_checkpoint(ws, inputs.made_from, best)
    except BaseException as raised:
        error = raised
        raise
    finally:
        checkpoints.close()
        ws.tracker.finish(error)
    if code:
        raise stopped(code, f"after the last step, {inputs.steps}, in {ws.run}")


def _loop(
    ws: Workspace, inputs: TrainingInputs, parts: TrainingParts, checkpoints: Checkpoints, meta: dict[str, Any],
    examples: Examples | None,
) -> int:  # fmt: skip
    """Steps, validations and checkpoints, from the step after `meta`'s to the last.

    Returns 0, or the exit code for a signal that came in the last step, when there is nothing left to stop.
    """
    t, steps, devices = ws.cfg.train, inputs.steps, parts.devices
    validate_every, watch = inputs.validate_every(t), Stopwatch(meta["seconds"])
    if meta["step"]:
        ws.tracker.say(f"train: going on after step {meta['step']} of {steps} in {ws.run}")
    elif inputs.scored:
        _validate_initial(ws, inputs, parts)
    health = Health(dict(meta["collapses"]))
    batches = Batches(ws.cfg, devices, inputs.images, inputs.targets, inputs.sentences, parts.read.get("train"))
    with ws.tracker.progress("GAN training", steps, meta["step"]) as bar, stop_requests(t.max_minutes) as stop:
        for step, batch in prefetched(batches, meta["step"] + 1, steps):
            logged = step % t.log_every == 0 or step in (1, steps)
            metrics = gan_step(ws.cfg, parts, step, batch, logged=logged)
            meta["step"] = step
            validates = inputs.scored and (step % validate_every == 0 or step == steps)
            if logged:  # where a validation follows, its row has the seconds
                ws.tracker.log(step, metrics | ({} if validates else watch.named(TRAINING_SECONDS)))
                for message in health.update(step, metrics):
                    _warn(ws, step, message)
            improved = False
            if validates:
                improved = _validate(ws, inputs, parts, meta, examples, watch)
            code = stop.code if devices.world == 1 else max(devices.gather([stop.code]))
            if improved or step == steps or code or checkpoints.due(step):
                meta |= {"wandb_id": ws.tracker.wandb_id, "collapses": health.since, "seconds": watch.seconds}
                checkpoints.write(parts, meta)
            if code and step < steps:
                checkpoints.finish()
                raise stopped(code, f"after step {step} of {steps} in {ws.run}")
            validated = f"  val CIDEr {100 * meta['best']:.1f}" if meta["best"] >= 0 else ""
            bar.advance(note=f"cos {metrics['reward/cos']:.1f}  D loss {metrics['train/d_loss']:.2f}{validated}")
        checkpoints.finish()
    return max(devices.gather([stop.signal_code]))


def _validate_initial(ws: Workspace, inputs: TrainingInputs, parts: TrainingParts) -> None:
    """Score the initial generator and log it as step 0, once: the curve begins there. It is no candidate for best."""
    log = ws.run / "metrics.jsonl"
    if parts.devices.from_first(lambda: any(row["step"] == 0 for row in read_metrics(log))):
        return  # by a process that was killed before its first checkpoint
    scores = validate(ws, parts, inputs.val, 0)
    ws.tracker.log(0, {"eval/CIDEr": scores.cider, "eval/epoch": 0.0})


def _validate(
    ws: Workspace, inputs: TrainingInputs, parts: TrainingParts, meta: dict[str, Any], examples: Examples | None,
    watch: Stopwatch,
) -> bool:  # fmt: skip
    """Score the validation images, log it, and note the best in `meta`; returns whether this is the best so far."""
    step = meta["step"]
    scores = validate(ws, parts, inputs.val, step)
    epoch = step * ws.cfg.train.batch_size / len(inputs.images.ids)
    ws.tracker.log(step, {"eval/CIDEr": scores.cider, "eval/epoch": epoch} | watch.named(TRAINING_SECONDS))
    log_captions(ws, parts, examples, scores, step)
    improved = scores.cider > meta["best"]
    if improved:
        meta |= {"best": scores.cider, "best_step": step}
    summarize(ws, meta, scores.cider)
    return improved


def _warn(ws: Workspace, step: int, message: str) -> None:
    if ws.cfg.train.stop_on_collapse:
        raise InputError(
            f"step {step}: {message}. Stopped, as train.stop_on_collapse asks; the last checkpoint is in {ws.run}"
        )
    ws.tracker.say(f"warning, step {step}: {message}")


# ------------------------------------------------------------------------------------------------------------- one step


def gan_step(cfg: Config, parts: TrainingParts, step: int, batch: Batch, *, logged: bool = True) -> dict[str, float]:
    """One optimiser step on this process's share of the batch (CgT-GAN, Algorithm 1; METHOD: GAN training).

    Returns the metrics; `logged`: also those that only a logged row needs. The gradients are sums over captions divided
    by the whole step's number of them, so micro-batches (`train.accumulation`), chunks and processes add up alike.
    """
    t, devices = cfg.train, parts.devices
    clock, means = Clock(devices.device), Means(detailed=logged)
    if t.dropout:  # masks depend on the step and the process: a resumed run draws them again
        torch.manual_seed(stable_seed(cfg.seed, "dropout", step, devices.number))
    w = _semantic_weight(cfg, step)
    micro_batches = batch.split(t.accumulation)
    # the released program sets the new w just before the last micro-batch
    lagging = _semantic_weight(cfg, step - 1) if "accumulation" in t.released and step > 1 else w
    weights = [lagging] * (len(micro_batches) - 1) + [w]
    for optimizer in parts.optimizers.values():
        optimizer.adamw.zero_grad(set_to_none=True)
    parts.last_batch = {"ids": batch.ids, "real": batch.real, "samples": [], "greedy": []}
    drawn = (draw_and_reward(cfg, parts, micro, means, clock) for micro in micro_batches)
    if t.advantage_norm == "batch" or t.loss_norm == "tokens":  # they need the whole step's captions
        everything = list(drawn)
        tokens = step_tokens(parts, everything)
        for work, advantages in zip(everything, batch_advantages(cfg, parts, everything, weights), strict=True):
            reinforce(t, parts, work, advantages, means, tokens)
    else:
        for work, weight in zip(drawn, weights, strict=True):
            reinforce(t, parts, work, batch_advantages(cfg, parts, [work], [weight])[0], means)
            clock.mark("policy gradient")
            if "accumulation" in t.released:  # the released program clips after every micro-batch
                for optimizer in parts.optimizers.values():
                    optimizer.clip(optimizer.norm())
    clock.mark("policy gradient")
    # 5. the updates, if everything is finite
    metrics = _apply_updates(parts, step, means)
    if parts.average is not None and t.ema is not None:
        metrics["train/ema_distance"] = parts.update_average(t.ema)
    clock.mark("optimisers")
    semantic_loss, naturalness_loss = metrics["train/semantic_loss"], metrics["train/naturalness_loss"]
    kl_penalty = t.kl_weight * metrics.get("train/kl_loss", metrics.get("train/kl", 0.0))
    metrics["train/g_loss"] = w * semantic_loss + (1 - w) * naturalness_loss + kl_penalty
    metrics["train/semantic_weight"] = w
    metrics.setdefault("train/d_loss", 0.0)
    if logged:
        texts = (devices.gather(parts.last_batch[kind]) for kind in ("samples", "greedy", "real"))
        metrics |= caption_metrics(*texts)
        metrics |= clock.metrics(batch.total)
    return metrics


def _semantic_weight(cfg: Config, step: int) -> float:
    r = cfg.reward_weights
    return semantic_weight(step, max_weight=r.max_weight, delay_steps=r.delay_steps, ramp_steps=r.ramp_steps)


def draw_and_reward(cfg: Config, parts: TrainingParts, batch: Batch, means: Means, clock: Clock) -> DrawnBatch:
    """The first three parts of a step, on a micro-batch; D's gradient is added."""
    # 1. captions of the generator as it is: K samples and the greedy one per image
    sampled, greedy = draw(cfg, parts, batch)
    samples, greedies = parts.bundle.texts(sampled.token_ids), parts.bundle.texts(greedy.token_ids)
    parts.last_batch["samples"] += samples
    parts.last_batch["greedy"] += greedies
    clock.mark("drawing")
    # 2. how human they sound, by the discriminator as it was before its update; then the gradient of its update
    naturalness = update_discriminator(cfg, parts, batch, samples, greedies, means)
    clock.mark("discriminator")
    # 3. how well they fit the image
    reference = reference_log_probs(cfg, parts, batch, sampled, greedy, detailed=means.detailed)
    owner = on_device(batch.owner(), parts.devices.device)
    texts = [*samples, *greedies]
    known = of_drawn(cfg, parts, batch, sampled, greedy, texts, reference)
    rewards = semantic_rewards(cfg, parts, texts, batch.image[owner], batch.target[owner], known)
    clock.mark("CLIP")
    return DrawnBatch(batch, sampled, greedy, reference, rewards | {"naturalness": naturalness})


def _apply_updates(parts: TrainingParts, step: int, means: Means) -> dict[str, float]:
    """Sum the gradients over the processes, check and clip them, update every weight; returns the metrics so far."""
    norms = {}
    for name, optimizer in parts.optimizers.items():
        parts.devices.sum_gradients(optimizer.parameters)
        norms[name] = optimizer.norm()
    metrics = means.over(parts.devices, norms)
    for name, optimizer in parts.optimizers.items():
        parts.check_finite(name, optimizer, step, metrics)
    for name, optimizer in parts.optimizers.items():
        optimizer.clip(norms[name])
        optimizer.apply(step)
        metrics[f"train/{name[0]}_lr"] = optimizer.learning_rate(step)
    return metrics
