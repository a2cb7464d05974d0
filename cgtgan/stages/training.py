"""What GAN training stands on: who takes part, what a step reads, where its state is kept. The step itself is in `train.py`."""

from __future__ import annotations

import math
import resource
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model
from torch import Tensor

from cgtgan.artifacts import Embeddings, file_fingerprint, read_json, write_json
from cgtgan.config import Config, as_dict
from cgtgan.errors import InputError, UserError
from cgtgan.evaluation.metrics import save_results, score_captions
from cgtgan.method.batches import EpochOrder, sampling_seeds, stable_seed
from cgtgan.method.checkpoint import Background, load_state, read_meta, save_state, state_tensors, write_checkpoint
from cgtgan.method.devices import Devices, keep_freed_memory, tokens_that_fit
from cgtgan.method.optimizer import Optimizer
from cgtgan.models.attention import use_float32_attention
from cgtgan.models.clip_backbone import ClipBackbone, DemoBackbone
from cgtgan.models.discriminator import Discriminator, make_discriminator
from cgtgan.models.generator import CaptionGenerator
from cgtgan.models.generator_bundle import GeneratorBundle
from cgtgan.stages.backbone import open_backbone, save_demo_clip
from cgtgan.stages.decoding import caption_embeddings
from cgtgan.stages.initialize import initial_generator
from cgtgan.stages.workspace import Workspace


@dataclass
class Players:
    """Everything a step changes, or asks."""

    bundle: GeneratorBundle
    reference: CaptionGenerator | None  # the initial generator, for the KL leash and for watching the distance to it
    discriminator: Discriminator | None
    backbone: ClipBackbone
    g_optimizer: Optimizer
    d_optimizer: Optimizer | None
    devices: Devices = field(default_factory=Devices)
    g_chunk: int = 2**20  # positions whose states may be kept at once for a backward pass
    d_chunk: int = 2**20
    run: Path = Path()
    last: dict[str, Any] = field(default_factory=dict)  # captions and sentences of the step, should it go wrong

    @property
    def modules(self) -> Mapping[str, torch.nn.Module]:
        return {"generator": self.bundle.model} | ({"discriminator": self.discriminator} if self.discriminator is not None else {})

    @property
    def optimizers(self) -> Mapping[str, Optimizer]:
        return {"generator": self.g_optimizer} | ({"discriminator": self.d_optimizer} if self.d_optimizer is not None else {})

    @property
    def clip_batch(self) -> int:
        """Captions that go through CLIP together; few on a CPU, where a batch of like lengths saves more than a large one."""
        return 256 if self.devices.device.type == "cuda" else 32

    def check_finite(self, name: str, optimizer: Optimizer, step: int, metrics: Mapping[str, float]) -> None:
        """Raise `InputError` before an update whose losses or gradient are not finite; the step's captions and sentences are saved."""
        losses = {"generator": ("semantic_loss", "naturalness_loss", "kl"), "discriminator": ("d_loss",)}[name]
        watched = {f"train/{x}": metrics[f"train/{x}"] for x in losses if f"train/{x}" in metrics}
        watched[f"{name}'s gradient norm"] = metrics[f"train/{name[0]}_grad_norm"]
        if all(map(math.isfinite, watched.values())):
            return
        file = self.run / f"not_finite_step_{step:06d}_process_{self.devices.number}.json"
        write_json(file, {"step": step, "metrics": {k: str(v) for k, v in metrics.items()}, **self.last})
        try:
            optimizer.check(step, watched)
        except InputError as error:
            raise InputError(f"{error} (train.{name}_optimizer.lr). No weight was changed; the step's batch is in {file}") from None


def make_players(ws: Workspace, sentences: Sequence[str], steps: int, dim: int, precision: str) -> Players:
    cfg, t = ws.cfg, ws.cfg.train
    if ws.device.type == "cpu":
        keep_freed_memory()
    bundle = initial_generator(ws)
    bundle.model.to(ws.device).eval()
    if (bundle.clip_dim, bundle.config.max_length) != (dim, cfg.generator.max_length):
        raise InputError(
            f"train.init_from={t.init_from} reads {bundle.clip_dim} numbers and writes {bundle.config.max_length} tokens; the "
            f"images have {dim} and generator.max_length={cfg.generator.max_length}: use the backbone and the length it was made with"
        )
    if t.gradient_checkpointing:
        bundle.model.enable_gradient_checkpointing()
    reference = None
    if t.kl_weight or t.watch_kl:
        reference = initial_generator(ws).model.to(ws.device).eval().requires_grad_(False)
    discriminator, d_optimizer, d_chunk = None, None, 1
    if t.use_discriminator:
        seed = stable_seed(cfg.seed, "discriminator")
        discriminator = make_discriminator(cfg.discriminator, sentences, cfg.generator.max_length, seed).to(ws.device)
        d_optimizer = Optimizer(discriminator, t.discriminator_optimizer, steps)
        encoder = discriminator.text_encoder.config
        d_chunk = tokens_that_fit(encoder.num_hidden_layers, encoder.hidden_size, 0, t.memory_gb, ws.device)
    if precision == "bf16" and ws.device.type == "cpu":
        use_float32_attention(bundle.model.gpt, *([discriminator.text_encoder] if discriminator is not None else []))
    g_optimizer = Optimizer(bundle.model, t.generator_optimizer, steps)
    lm = bundle.model.gpt.config
    layers = 1 if t.gradient_checkpointing else lm.num_hidden_layers
    g_chunk = tokens_that_fit(layers, lm.hidden_size, lm.vocab_size, t.memory_gb, ws.device)
    backbone = open_backbone(ws)
    devices = Devices(ws.device, precision, ws.rank)  # last: the first process may have been making an initial generator for hours
    return Players(bundle, reference, discriminator, backbone, g_optimizer, d_optimizer, devices, g_chunk, d_chunk, ws.run)


# ------------------------------------------------------------------------------------------------------------ batches


@dataclass(frozen=True)
class Batch:
    """What a step reads, this process's share: image, target (B, D), K seeds an image, B*K corpus sentences; `total` images in all."""

    ids: list[Any]
    image: Tensor
    target: Tensor
    seeds: list[list[int]]
    real: list[str]
    total: int

    def parts(self, count: int) -> list[Batch]:
        """The batch in `count` consecutive parts of equal size but for one image; an empty part is left out."""
        if count == 1:
            return [self]
        samples = len(self.real) // max(1, len(self.ids))
        cuts = [len(self.ids) * i // count for i in range(count + 1)]
        return [
            Batch(self.ids[a:b], self.image[a:b], self.target[a:b], self.seeds[a:b], self.real[a * samples : b * samples], self.total)
            for a, b in pairwise(cuts)
            if b > a
        ]


class Batches:
    """The batch of each step: a function of (seed, step), whatever the number of processes."""

    def __init__(self, cfg: Config, devices: Devices, images: Embeddings, targets: Embeddings, sentences: Sequence[str]):
        self.cfg, self.devices = cfg, devices
        self.images, self.targets, self.sentences = images, targets, sentences
        self.image_order = EpochOrder(len(images.ids), cfg.seed, "images")
        self.text_order = EpochOrder(len(sentences), cfg.seed, "real")

    def batch(self, step: int) -> Batch:
        t, device = self.cfg.train, self.devices.device
        rows = self.image_order.batch(step, t.batch_size)
        if "text_order" in t.released:  # METHOD, slip 4: an image's sentences are those at its own place, each epoch
            real = [(t.num_samples * int(row) + k) % len(self.sentences) for row in rows for k in range(t.num_samples)]
        else:
            real = self.text_order.batch(step, t.batch_size * t.num_samples).tolist()
        places = self.devices.share(range(t.batch_size))
        own = rows[places[0] : places[-1] + 1]
        index = torch.from_numpy(own)
        ids = [self.images.ids[i] for i in own]
        seeds = sampling_seeds(self.cfg.seed, step, ids, t.num_samples)
        sentences = [self.sentences[i] for i in real[places[0] * t.num_samples : (places[-1] + 1) * t.num_samples]]
        image, target = self.images.vectors[index].float(), self.targets.vectors[index].float()
        return Batch(ids, image.to(device), target.to(device), seeds, sentences, t.batch_size)


# ------------------------------------------------------------------------------------------------------------ metrics


class Means:
    """Means over everything that was added, over all parts and processes; on the device until `over` asks for them once a step."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[Tensor, int]] = {}

    def add(self, name: str, values: Tensor) -> None:
        total, count = self.sums.get(name, (torch.zeros((), device=values.device), 0))
        self.sums[name] = (total + values.detach().float().sum(), count + values.numel())

    def over(self, devices: Devices, norms: Mapping[str, Tensor]) -> dict[str, float]:
        """Every mean, and the gradient norms, which every process has alike; the one wait for the device in a step."""
        names = sorted(self.sums)
        sums = torch.stack([self.sums[name][0] for name in names])
        counts = torch.tensor([self.sums[name][1] for name in names], dtype=torch.float32, device=sums.device)
        means = torch.stack([sums, counts]) if devices.world == 1 else devices.sum(torch.stack([sums, counts]))
        found = torch.cat([means[0] / means[1], *(norm[None] for norm in norms.values())]).tolist()
        return dict(zip([*names, *(f"train/{name[0]}_grad_norm" for name in norms)], found, strict=True))


class Clock:
    """Where the time of a step goes. On a GPU by events of its own queue, read when the row is logged."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.device = device
        self.marks: list[tuple[str, Any]] = []
        self.mark("")

    def mark(self, name: str) -> None:
        """What happened since the last mark was `name`."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((name, event))
        else:
            self.marks.append((name, time.perf_counter()))

    def metrics(self, images: int) -> dict[str, float]:
        if self.cuda:
            torch.cuda.synchronize(self.device)
        spent: dict[str, float] = {}
        for (_, before), (name, after) in pairwise(self.marks):
            seconds = before.elapsed_time(after) / 1000 if self.cuda else after - before
            spent[name] = spent.get(name, 0.0) + seconds
        total = sum(spent.values())
        peak = torch.cuda.max_memory_allocated(self.device) if self.cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        shares = {f"time/{name.replace(' ', '_')}": seconds / total for name, seconds in spent.items()}
        return {"train/seconds": total, "train/images_per_second": images / total, "memory/peak_gb": peak / 1e9, **shares}


@dataclass(frozen=True)
class Validation:
    """CIDEr and captions of the validation images; `per_image` CIDEr in the first process alone."""

    cider: float
    captions: dict[Any, str]
    per_image: dict[Any, float]


def validate(ws: Workspace, players: Players, val: Embeddings, step: int) -> Validation:
    """Score greedy captions of the validation images and write them; each process captions its share, each image once."""
    devices = players.devices
    rows = devices.share(range(len(val.ids)))
    vectors = val.vectors[rows[0] : rows[-1] + 1] if rows else val.vectors[:0]
    with devices.autocast():
        captions = caption_embeddings(players.bundle, vectors, ws.cfg.decode, ws.device, greedy=True)
    by_id = dict(zip(val.ids, devices.gather(captions), strict=True))
    per_image: dict[Any, float] = {}

    def score() -> float:
        save_results(ws.run / "validation" / f"step_{step:06d}.json", by_id)
        references = {i: ws.split("val").references[i] for i in by_id}
        scores = score_captions(by_id, references, ("cider",))
        per_image.update({i: columns["CIDEr"] for i, columns in scores.per_image.items()})
        return scores.corpus["CIDEr"]

    return Validation(devices.from_first(score), by_id, per_image)


# -------------------------------------------------------------------------------------------------------- checkpoints


class Checkpoints:
    """`checkpoints/` of a run: whole folders `step_<n>` with a list of their files' fingerprints, written while training goes on."""

    def __init__(self, ws: Workspace):
        self.ws, self.folder = ws, ws.run / "checkpoints"
        self.writer = Background()
        self.written = time.monotonic()
        self.found = self._newest()

    def _newest(self) -> Path | None:
        """The newest whole folder; damaged ones are named, and set aside."""
        damaged = None
        for folder in sorted(self.folder.glob("step_*"), reverse=True):
            try:
                for name, wanted in read_json(folder / "checkpoint.json").get("files", {}).items():
                    if file_fingerprint(folder / name) != wanted:
                        raise InputError(f"{folder / name} is not as it was written")
                read_meta(folder / "training.safetensors")
            except (UserError, OSError) as error:
                damaged = folder
                if self.ws.rank.number == 0 and folder.exists():
                    aside = folder.with_name(f"damaged_{folder.name}")
                    shutil.rmtree(aside, ignore_errors=True)
                    folder.rename(aside)
                    self.ws.tracker.say(f"damaged checkpoint, set aside as damaged_{folder.name}: {error}")
                continue
            return folder
        if damaged is not None:
            raise InputError(f"{self.folder} has no whole checkpoint any more: remove it, and training starts again from its first step")
        return None

    def steps_done(self) -> int:
        return 0 if self.found is None else int(self.found.name.removeprefix("step_"))

    def meta(self) -> dict[str, Any]:
        """What the newest checkpoint says of the run."""
        return read_meta(self.folder / "last" / "training.safetensors")

    def resume(self, players: Players) -> dict[str, Any]:
        """Put everything back as the newest checkpoint has it; returns what it says of the run."""
        found = players.devices.from_first(lambda: self.found)
        fresh = {"step": 0, "best": -1.0, "best_step": 0, "wandb_id": None, "health": {}}
        if found is None:
            return fresh
        load_model(players.bundle.model, str(found / "generator.safetensors"))
        modules = {name: module for name, module in players.modules.items() if name != "generator"}
        return fresh | load_state(found / "training.safetensors", modules, players.optimizers)

    def due(self, step: int) -> bool:
        t = self.ws.cfg.train
        late = t.checkpoint_minutes is not None and time.monotonic() - self.written > 60 * t.checkpoint_minutes
        return step % t.checkpoint_every == 0 or late

    def write(self, players: Players, meta: Mapping[str, Any], *, best: bool) -> None:
        """Copy the state now, write it while the next steps go on. `best` first: killed between the two links, the run goes on from the
        newest folder and comes to the same `best` again."""
        self.written = time.monotonic()
        if not players.devices.first:
            return
        self.writer.wait()  # one at a time: a second copy of the state is enough
        bundle, meta = players.bundle.copy(), dict(meta)
        modules = {name: module for name, module in players.modules.items() if name != "generator"}
        tensors = state_tensors(modules, players.optimizers)

        def write(path: Path) -> None:
            bundle.save(path)
            save_state(path / "training.safetensors", tensors, meta)
            describe_checkpoint(self.ws, path, players.backbone, meta["step"])

        links = ["best", "last"] if best else ["last"]
        self.writer.start(lambda: write_checkpoint(self.folder, meta["step"], write, links))

    def finish(self) -> None:
        """Wait until everything is on disk; raises what went wrong there."""
        self.writer.wait()

    def close(self) -> None:
        self.writer.join()


def best_validation(ws: Workspace) -> float | None:
    """The run's best CIDEr (a fraction) on the validation images; None where nothing was validated, and in all processes but the first."""
    if ws.rank.number:
        return None
    best = read_meta(ws.run / "checkpoints" / "last" / "training.safetensors")["best"]
    return None if best < 0 else float(best)


def describe_checkpoint(ws: Workspace, path: Path, backbone: ClipBackbone, step: int) -> None:
    """What `caption` needs to know: the backbone (the demo's own is small and comes along), the decoding, and what the files should be."""
    if isinstance(backbone, DemoBackbone):
        save_demo_clip(path / "clip", backbone.model)
    files = {str(file.relative_to(path)): file_fingerprint(file) for file in sorted(path.rglob("*")) if file.is_file()}
    description = {"step": step, "clip_backbone": as_dict(ws.cfg.clip_backbone), "decode": as_dict(ws.cfg.decode), "files": files}
    write_json(path / "checkpoint.json", description)
