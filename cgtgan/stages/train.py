"""train: the GAN. One step is METHOD's box, top to bottom: captions, discriminator, rewards, policy gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cgtgan.assets.workspace import Workspace
from cgtgan.config import Config, TrainConfig
from cgtgan.errors import InputError
from cgtgan.method.batches import stable_seed
from cgtgan.method.reinforce import advantages, kl_to_reference, policy_gradient_loss, semantic_weight
from cgtgan.models.generator import CaptionGenerator, Captions
from cgtgan.runtime.interrupts import stop_requests, stopped
from cgtgan.training.batches import Batch, Batches, prefetched
from cgtgan.training.checkpoints import Checkpoints, best_validation
from cgtgan.training.discriminator_step import update_discriminator
from cgtgan.training.health import Health, caption_metrics
from cgtgan.training.inputs import TrainingInputs, training_inputs
from cgtgan.training.meters import Clock, Means
from cgtgan.training.parts import TrainingParts, make_training_parts
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
    validate_every = inputs.validate_every(t)
    if meta["step"]:
        ws.tracker.say(f"train: going on after step {meta['step']} of {steps} in {ws.run}")
    health = Health(meta["health"])
    batches = Batches(ws.cfg, devices, inputs.images, inputs.targets, inputs.sentences)
    with ws.tracker.progress("GAN training", steps, meta["step"]) as bar, stop_requests(t.max_minutes) as stop:
        for step, batch in prefetched(batches, meta["step"] + 1, steps):
            logged = step % t.log_every == 0 or step in (1, steps)
            metrics = gan_step(ws.cfg, parts, step, batch, logged=logged)
            meta["step"] = step
            if logged:
                ws.tracker.log(step, metrics)
                for message in health.update(metrics):
                    _warn(ws, step, message)
            improved = False
            if inputs.scored and (step % validate_every == 0 or step == steps):
                improved = _validate(ws, inputs, parts, meta, examples)
            code = stop.code if devices.world == 1 else max(devices.gather([stop.code]))
            if improved or step == steps or code or checkpoints.due(step):
                meta |= {"wandb_id": ws.tracker.wandb_id, "health": health.rows}
                checkpoints.write(parts, meta)
            if code and step < steps:
                checkpoints.finish()
                raise stopped(code, f"after step {step} of {steps} in {ws.run}")
            validated = f"  val CIDEr {100 * meta['best']:.1f}" if meta["best"] >= 0 else ""
            bar.advance(note=f"cos {metrics['reward/cos']:.1f}  D loss {metrics['train/d_loss']:.2f}{validated}")
        checkpoints.finish()
    return max(devices.gather([stop.signal_code]))


def _validate(
    ws: Workspace, inputs: TrainingInputs, parts: TrainingParts, meta: dict[str, Any], examples: Examples | None
) -> bool:
    """Score the validation images, log it, and note the best in `meta`; returns whether this is the best so far."""
    step = meta["step"]
    scores = validate(ws, parts, inputs.val, step)
    epoch = step * ws.cfg.train.batch_size / len(inputs.images.ids)
    ws.tracker.log(step, {"eval/CIDEr": scores.cider, "eval/epoch": epoch})
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
    sampled_texts: list[str] = []
    greedy_texts: list[str] = []
    for optimizer in parts.optimizers.values():
        optimizer.adamw.zero_grad(set_to_none=True)
    for number, micro in enumerate(micro_batches, start=1):
        # 1. captions of the generator as it is: K samples and the greedy one per image
        with devices.autocast():
            sampled, greedy = _draw(parts.bundle.model, micro, t)
        samples, greedies = parts.bundle.texts(sampled.token_ids), parts.bundle.texts(greedy.token_ids)
        clock.mark("drawing")

        # 2. how human they sound, by the discriminator as it was before its update; then the gradient of its update
        naturalness = update_discriminator(parts, micro, samples, greedies, means, dropout=t.dropout)
        clock.mark("discriminator")

        # 3. how well they fit the image
        owner = micro.owner().to(devices.device)
        rewards = semantic_rewards(cfg, parts, [*samples, *greedies], micro.image[owner], micro.target[owner])
        clock.mark("CLIP")

        # 4. policy gradient, each reward against its own baseline
        is_last = number == len(micro_batches)
        # the released program sets the new w just before the last micro-batch
        lags = "accumulation" in t.released and not is_last and step > 1
        weight = _semantic_weight(cfg, step - 1) if lags else w
        reinforce(t, parts, micro, sampled, rewards | {"naturalness": naturalness}, weight, means)
        clock.mark("policy gradient")
        if "accumulation" in t.released:  # the released program clips after every micro-batch
            for optimizer in parts.optimizers.values():
                optimizer.clip(optimizer.norm())
        sampled_texts += samples
        greedy_texts += greedies
    parts.last_batch = {"ids": batch.ids, "real": batch.real, "samples": sampled_texts, "greedy": greedy_texts}

    # 5. the updates, if everything is finite
    metrics = _apply_updates(parts, step, means)
    clock.mark("optimisers")
    semantic_loss, naturalness_loss = metrics["train/semantic_loss"], metrics["train/naturalness_loss"]
    kl_penalty = t.kl_weight * metrics.get("train/kl_loss", metrics.get("train/kl", 0.0))
    metrics["train/g_loss"] = w * semantic_loss + (1 - w) * naturalness_loss + kl_penalty
    metrics["train/semantic_weight"] = w
    metrics.setdefault("train/d_loss", 0.0)
    if logged:
        metrics |= caption_metrics(devices.gather(sampled_texts), devices.gather(greedy_texts))
        metrics |= clock.metrics(batch.total)
    return metrics


def _semantic_weight(cfg: Config, step: int) -> float:
    r = cfg.reward_weights
    return semantic_weight(step, max_weight=r.max_weight, delay_steps=r.delay_steps, ramp_steps=r.ramp_steps)


def _draw(generator: CaptionGenerator, batch: Batch, t: TrainConfig) -> tuple[Captions, Captions]:
    if not t.dropout:
        log_probs = bool(t.kl_weight) and t.kl == "k1_reward"
        return generator.eval().sample_and_greedy(batch.image, batch.seeds, log_probs=log_probs)
    sampled = generator.train().sample_with_graph(batch.image, batch.seeds)
    return sampled, generator.eval().greedy(batch.image, log_probs=False)


def reinforce(
    t: TrainConfig, parts: TrainingParts, batch: Batch, sampled: Captions, rewards: dict[str, Tensor], w: float,
    means: Means,
) -> None:  # fmt: skip
    """Add G's gradient of w*semantic + (1-w)*naturalness, and of the KL penalty, over this micro-batch's captions.

    `rewards`: name -> (B*K + B,), of the samples, then of the greedy captions. `accumulate_gradient` calls `chunk_loss`
    and its backward pass for as many captions at a time as memory holds.
    """
    generator, devices = parts.bundle.model, parts.devices
    advantage_of = {name: _advantages(reward, batch, t.baseline) for name, reward in rewards.items()}
    semantic, natural = advantage_of["semantic"], advantage_of["naturalness"]
    advantage = (w * semantic + (1 - w) * natural).flatten()
    drawn = sampled.drawn.flatten(0, 1)
    mask = generator.up_to_stop(drawn)
    num_captions = batch.total * batch.samples  # of the whole step, over all micro-batches and processes
    reference = torch.empty(0)
    if parts.reference is not None and (t.kl_weight or means.detailed):
        with torch.no_grad(), devices.autocast():
            reference = parts.reference.token_log_probs(batch.image, sampled.drawn)[0].flatten(0, 1)

    kl_is_loss, kl_advantage = bool(t.kl_weight) and t.kl != "k1_reward", torch.empty(0)
    if t.kl_weight and not kl_is_loss:
        k1 = sampled.log_probs - (reference.sum(-1) / mask.sum(-1)).view_as(sampled.log_probs)
        kl_advantage = (advantages(-k1) if batch.samples > 1 else -k1).flatten()
        advantage = advantage + t.kl_weight * kl_advantage

    def chunk_loss(token_log_probs: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        log_probs = token_log_probs.sum(-1) / mask.sum(-1)
        loss = policy_gradient_loss(advantage[rows], log_probs) * len(rows)
        if kl_is_loss:
            loss = loss + t.kl_weight * kl_to_reference(token_log_probs, reference[rows], mask, t.kl).sum()
        return loss / num_captions

    if t.dropout:
        token_log_probs = _released_gradient(sampled, advantage, num_captions, mask)
    else:
        with devices.autocast():
            token_log_probs = generator.eval().accumulate_gradient(batch.image, drawn, chunk_loss, parts.g_chunk)
    log_probs = token_log_probs.sum(-1) / mask.sum(-1)
    means.add("train/semantic_loss", -semantic.flatten() * log_probs)
    means.add("train/naturalness_loss", -natural.flatten() * log_probs)
    means.add("train/caption_tokens", mask.sum(-1))
    means.add("caption/finished", (drawn == generator.stop_token_id).any(-1))
    if len(reference) and not t.dropout:
        means.add("train/kl", kl_to_reference(token_log_probs, reference, mask))  # k3 is the estimate to look at
        if t.kl_weight and t.kl != "k3":
            penalty = (
                kl_to_reference(token_log_probs, reference, mask, t.kl) if kl_is_loss else -kl_advantage * log_probs
            )
            means.add("train/kl_loss", penalty)
    means.add_rewards(rewards, advantage_of)


def _released_gradient(sampled: Captions, advantage: Tensor, num_captions: int, mask: Tensor) -> Tensor:
    """The gradient through the pass that drew, with dropout (released program); each token has the mean log-prob."""
    log_probs = sampled.log_probs.flatten()
    (policy_gradient_loss(advantage, log_probs) * len(log_probs) / num_captions).backward()
    return log_probs.detach()[:, None] * mask


def _advantages(rewards: Tensor, batch: Batch, baseline: str) -> Tensor:
    """(B*K + B,) rewards, samples then greedy -> (B, K)"""
    of_samples, of_greedy = rewards[: -len(batch.seeds)], rewards[-len(batch.seeds) :]
    return advantages(of_samples.view(len(batch.seeds), -1), of_greedy if baseline == "greedy" else None)


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
