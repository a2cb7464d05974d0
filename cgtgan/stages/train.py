"""train: the GAN. One step is METHOD's box, top to bottom: captions, discriminator, rewards, policy gradient."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cgtgan.artifacts import Embeddings, file_fingerprint, write_json
from cgtgan.config import Config, as_dict, scientific_settings
from cgtgan.data.corpora import embedded_text
from cgtgan.errors import InputError
from cgtgan.evaluation.metrics import save_results, score_captions
from cgtgan.method.batches import EpochOrder, sampling_uniforms, stable_seed
from cgtgan.method.checkpoint import Optimizer, load_state, read_meta, save_state, write_checkpoint
from cgtgan.method.reinforce import advantages, kl_to_reference, policy_gradient_loss, semantic_weight
from cgtgan.method.rewards import SemanticReward, semantic_reward
from cgtgan.models.clip_backbone import ClipBackbone, DemoBackbone
from cgtgan.models.discriminator import Discriminator, discriminator_loss, make_discriminator
from cgtgan.models.generator import CaptionGenerator, Captions, GeneratorBundle
from cgtgan.stages.aggregate import aggregated_embeddings
from cgtgan.stages.backbone import open_backbone, save_demo_clip
from cgtgan.stages.decoding import caption_embeddings
from cgtgan.stages.initialize import init_checkpoint, initial_generator, total_steps
from cgtgan.stages.preprocess import corpus_sentences, image_embeddings
from cgtgan.stages.workspace import Workspace


def run(cfg: Config) -> None:
    ws = Workspace(cfg)
    with ws.hold_run():
        train(ws)


@dataclass
class Players:
    """Everything a step changes, or asks."""

    bundle: GeneratorBundle
    reference: CaptionGenerator | None  # the initial generator, where a KL leash holds
    discriminator: Discriminator | None
    backbone: ClipBackbone
    g_optimizer: Optimizer
    d_optimizer: Optimizer | None

    @property
    def modules(self) -> Mapping[str, torch.nn.Module]:
        return {"generator": self.bundle.model} | ({"discriminator": self.discriminator} if self.discriminator is not None else {})

    @property
    def optimizers(self) -> Mapping[str, Optimizer]:
        return {"generator": self.g_optimizer} | ({"discriminator": self.d_optimizer} if self.d_optimizer is not None else {})


def train(ws: Workspace) -> None:
    cfg, t = ws.cfg, ws.cfg.train
    ws.check_same_run("settings", scientific_settings(cfg))
    sentences, _, _ = corpus_sentences(ws)
    images, targets = image_embeddings(ws, "train"), aggregated_embeddings(ws, "train")
    inputs = {"images": images.header.fingerprint, "aggregated": targets.header.fingerprint}
    if t.init_from:
        inputs["init_from"] = file_fingerprint(init_checkpoint(ws) / "generator.safetensors")
    ws.check_same_run("inputs", inputs)
    val = image_embeddings(ws, "val")
    scored = bool(ws.split("val").references)  # without references nothing can be validated, and `best` is the last
    if not scored:
        ws.tracker.say("train: the val images have no references, so nothing is validated; checkpoints/best is the last step")
    steps = total_steps(t, len(images.ids))
    validate_every = t.validate_every or math.ceil(len(images.ids) / t.batch_size)
    checkpoints = ws.run / "checkpoints"
    state = checkpoints / "last" / "training.safetensors"
    meta = read_meta(state) if state.is_file() else {"step": 0, "best": -1.0, "best_step": 0, "wandb_id": None}
    if meta["step"] >= steps:
        ws.tracker.say(f"train: done already, {steps} steps in {ws.run}")
        return

    players = _players(ws, sentences, steps, images.header.dim)
    if meta["step"]:
        load_state(state, players.modules, players.optimizers)
        ws.tracker.say(f"train: going on after step {meta['step']} of {steps} in {ws.run}")
    _start_run(ws, meta, steps)
    image_order, text_order = EpochOrder(len(images.ids), cfg.seed, "images"), EpochOrder(len(sentences), cfg.seed, "real")
    failed = True
    try:
        with ws.tracker.progress("GAN training", steps, meta["step"]) as bar:
            for step in range(meta["step"] + 1, steps + 1):
                rows = image_order.batch(step, t.batch_size)
                uniforms = sampling_uniforms(cfg.seed, step, [images.ids[i] for i in rows], t.num_samples, cfg.generator.max_length)
                real = [sentences[i] for i in text_order.batch(step, t.batch_size * t.num_samples)]
                index = torch.from_numpy(rows)
                image, target = images.vectors[index].float(), targets.vectors[index].float()
                started = time.perf_counter()
                metrics = gan_step(cfg, players, step, image.to(ws.device), target.to(ws.device), uniforms.to(ws.device), real)
                metrics["train/seconds"] = time.perf_counter() - started
                if step % t.log_every == 0 or step in (1, steps):
                    ws.tracker.log(step, metrics)
                if scored and (step % validate_every == 0 or step == steps):
                    cider = _validate(ws, players.bundle, val, step)
                    ws.tracker.log(step, {"eval/CIDEr": cider})
                    improved = cider > meta["best"]
                    meta |= {"best": cider, "best_step": step} if improved else {}
                else:
                    improved = False
                if improved or step == steps or step % t.checkpoint_every == 0:
                    meta |= {"step": step, "wandb_id": ws.tracker.wandb_id}
                    _checkpoint(ws, players, checkpoints, step, meta, best=improved or not scored)
                validated = f"  val CIDEr {100 * meta['best']:.1f}" if meta["best"] >= 0 else ""
                bar.advance(note=f"cos {metrics['reward/cos']:.1f}  D loss {metrics['train/d_loss']:.2f}{validated}")
        ws.tracker.summarize({"eval/best_CIDEr": meta["best"], "eval/best_step": meta["best_step"]})
        failed = False
    finally:
        ws.tracker.finish(failed)


def gan_step(
    cfg: Config, players: Players, step: int, image: Tensor, target: Tensor, uniforms: Tensor, real: list[str]
) -> dict[str, float]:
    """One optimiser step (CgT-GAN, Algorithm 1; METHOD: GAN training). image, target (B, D), uniforms (B, K, L), B*K real sentences."""
    t, weights = cfg.train, cfg.reward_weights
    generator = players.bundle.model
    batch, samples = uniforms.shape[:2]
    scale = t.reward_scale or players.backbone.logit_scale

    # 1. captions of the generator as it is: K samples and the greedy one
    sampled, greedy = _draw(generator, image, uniforms, dropout=t.dropout)
    sample_texts, greedy_texts = players.bundle.texts(sampled.token_ids), players.bundle.texts(greedy.token_ids)

    # 2. how human they sound, by the discriminator as it was before its update; then its update
    naturalness, d_metrics = _judge(players, step, real, sample_texts, greedy_texts, t.dropout)

    # 3. how well they fit the image
    texts = [embedded_text(text) for text in (*sample_texts, *greedy_texts)]
    owner = torch.cat([torch.arange(batch).repeat_interleave(samples), torch.arange(batch)]).to(image.device)
    embedded = players.backbone.encode_texts(texts).to(image.device)
    fit = semantic_reward(
        embedded, target[owner], image[owner], cos_weight=weights.cos_weight, clip_weight=weights.clip_weight, logit_scale=scale
    )

    # 4. policy gradient, each reward against its own baseline
    w = semantic_weight(step, max_weight=weights.max_weight, delay_steps=weights.delay_steps, ramp_steps=weights.ramp_steps)
    generator.train(t.dropout)
    token_log_probs, mask = generator.token_log_probs(image, sampled.drawn)
    log_probs = token_log_probs.sum(-1) / mask.sum(-1)
    semantic_loss = policy_gradient_loss(_advantage(fit.total, batch, samples, t.baseline), log_probs)
    natural_loss = policy_gradient_loss(_advantage(naturalness, batch, samples, t.baseline), log_probs)
    loss = w * semantic_loss + (1 - w) * natural_loss
    kl = torch.zeros(())
    if players.reference is not None:
        with torch.no_grad():
            reference_log_probs, _ = players.reference.token_log_probs(image, sampled.drawn)
        kl = kl_to_reference(token_log_probs, reference_log_probs, mask)
        loss = loss + t.kl_weight * kl
    norm = players.g_optimizer.step(loss, step)
    generator.eval()
    return d_metrics | _reward_metrics(fit, naturalness, batch * samples) | {
        "train/g_loss": loss.item(),
        "train/semantic_loss": semantic_loss.item(),
        "train/naturalness_loss": natural_loss.item(),
        "train/semantic_weight": w,
        "train/g_grad_norm": norm,
        "train/kl": kl.item(),
        "train/caption_tokens": mask.sum(-1).float().mean().item(),
    }  # fmt: skip


def _draw(generator: CaptionGenerator, image: Tensor, uniforms: Tensor, *, dropout: bool) -> tuple[Captions, Captions]:
    if not dropout:
        return generator.eval().sample_and_greedy(image, uniforms)
    sampled = generator.train().sample(image, uniforms.shape[1], uniforms=uniforms)
    return sampled, generator.eval().greedy(image)


def _judge(
    players: Players, step: int, real: list[str], sampled: list[str], greedy: list[str], dropout: bool
) -> tuple[Tensor, dict[str, float]]:
    """Naturalness reward (B*K + B,) of samples and greedy captions, and one update of the discriminator on real and sampled."""
    discriminator, optimizer = players.discriminator, players.d_optimizer
    if discriminator is None or optimizer is None:
        return torch.zeros(len(sampled) + len(greedy), device=next(players.bundle.model.parameters()).device), {"train/d_loss": 0.0}
    with torch.no_grad():
        naturalness = discriminator.eval().score([*sampled, *greedy])
    logits = discriminator.train(dropout)(*discriminator.tokenize([*real, *sampled]))
    real_logits, fake_logits = logits[: len(real)], logits[len(real) :]
    loss = discriminator_loss(real_logits, fake_logits)
    norm = optimizer.step(loss, step)
    discriminator.eval()
    return naturalness, {
        "train/d_loss": loss.item(),
        "train/d_grad_norm": norm,
        "train/d_accuracy": torch.cat([real_logits > 0, fake_logits <= 0]).float().mean().item(),
        "reward/real_logit": real_logits.mean().item(),
    }


def _advantage(rewards: Tensor, batch: int, samples: int, baseline: str) -> Tensor:
    """(B*K + B,) rewards, samples then greedy -> (B, K)"""
    of_samples = rewards[: batch * samples].view(batch, samples)
    return advantages(of_samples, rewards[batch * samples :] if baseline == "greedy" else None)


def _reward_metrics(fit: SemanticReward, naturalness: Tensor, samples: int) -> dict[str, float]:
    """Raw means over the samples, and the greedy captions' total."""
    return {
        "reward/semantic": fit.total[:samples].mean().item(),
        "reward/cos": fit.cos[:samples].mean().item(),
        "reward/l1": fit.l1[:samples].mean().item(),
        "reward/clip": fit.clip[:samples].mean().item(),
        "reward/naturalness": naturalness[:samples].mean().item(),
        "reward/semantic_greedy": fit.total[samples:].mean().item(),
        "reward/naturalness_greedy": naturalness[samples:].mean().item(),
    }


# ------------------------------------------------------------------------------------------------- around the step


def _players(ws: Workspace, sentences: list[str], steps: int, dim: int) -> Players:
    cfg, t = ws.cfg, ws.cfg.train
    bundle = initial_generator(ws)
    bundle.model.to(ws.device).eval()
    if (bundle.clip_dim, bundle.config.max_length) != (dim, cfg.generator.max_length):
        raise InputError(
            f"train.init_from={t.init_from} reads {bundle.clip_dim} numbers and writes {bundle.config.max_length} tokens; the "
            f"images have {dim} and generator.max_length={cfg.generator.max_length}: use the backbone and the length it was made with"
        )
    reference = None
    if t.kl_weight:
        reference = initial_generator(ws).model.to(ws.device).eval().requires_grad_(False)
    discriminator, d_optimizer = None, None
    if t.use_discriminator:
        seed = stable_seed(cfg.seed, "discriminator")
        discriminator = make_discriminator(cfg.discriminator, sentences, cfg.generator.max_length, seed).to(ws.device)
        d_optimizer = Optimizer(discriminator, t.discriminator_optimizer, steps)
    g_optimizer = Optimizer(bundle.model, t.generator_optimizer, steps)
    return Players(bundle, reference, discriminator, open_backbone(ws), g_optimizer, d_optimizer)


def _start_run(ws: Workspace, meta: Mapping[str, Any], steps: int) -> None:
    ws.tracker.start_run(
        ws.run,
        ws.cfg.wandb,
        config=as_dict(ws.cfg) | {"total_steps": steps},
        job_type="train",
        step=meta["step"],
        wandb_id=meta["wandb_id"],
    )


def _validate(ws: Workspace, bundle: GeneratorBundle, val: Embeddings, step: int) -> float:
    captions = caption_embeddings(bundle, val.vectors, ws.cfg.decode, ws.device, greedy=True)
    by_id = dict(zip(val.ids, captions, strict=True))
    save_results(ws.run / "validation" / f"step_{step:06d}.json", by_id)
    references = {i: ws.split("val").references[i] for i in by_id}
    return score_captions(by_id, references, ("cider",)).corpus["CIDEr"]


def _checkpoint(ws: Workspace, players: Players, folder: Path, step: int, meta: Mapping[str, Any], *, best: bool) -> None:
    def write(path: Path) -> None:
        players.bundle.save(path)
        save_state(path / "training.safetensors", players.modules, players.optimizers, meta)
        describe_checkpoint(ws, path, players.backbone, step)

    # `best` first: killed between the two, the run goes on from the older `last` and comes to the same `best` again
    write_checkpoint(folder, step, write, ["best", "last"] if best else ["last"])


def describe_checkpoint(ws: Workspace, path: Path, backbone: ClipBackbone, step: int) -> None:
    """What `caption` needs to know: the backbone (the demo's own is small and comes along) and the decoding."""
    if isinstance(backbone, DemoBackbone):
        save_demo_clip(path / "clip", backbone.model)
    description = {"step": step, "clip_backbone": as_dict(ws.cfg.clip_backbone), "decode": as_dict(ws.cfg.decode)}
    write_json(path / "checkpoint.json", description)
