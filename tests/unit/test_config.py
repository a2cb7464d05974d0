"""Every YAML composes and is valid; every wrong setting is answered by one sentence, before torch is imported."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from cgtgan.checks import accepted_values
from cgtgan.cli import STAGE_HELP, help_text, report_failure
from cgtgan.config import STAGES, Config, OptimizerConfig
from cgtgan.errors import ConfigError, MissingFileError
from cgtgan.run_identity import REWARD_PRESETS, run_folder, scientific_settings
from cgtgan.setting_errors import groups

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
YAMLS = sorted(p.relative_to(CONF).with_suffix("").as_posix() for p in CONF.rglob("*.yaml"))
SWEEPS = sorted(p.stem for p in (ROOT / "sweeps").glob("*.yaml"))
GROUPS = [
    name for name in YAMLS if "/" in name and not name.startswith(("ablation/", "experiment/", "hydra/", "sweep/"))
]
EXPERIMENTS = [name.removeprefix("experiment/") for name in YAMLS if name.startswith("experiment/")]
# What an option needs in addition.
NEEDS = {
    "dataset/demo": ["experiment=demo"],
    "dataset/folder": ["dataset.root=photos"],
    "dataset/coco_sample": ["dataset.root=photos"],
    "clip_backbone/custom": ["clip_backbone.model=my_encoder.py:Encoder"],
    "dataset/nocaps": ["stage=evaluate"],
    "dataset/custom": ["dataset.reader=my_data.py:read"],
    "corpus/demo": ["experiment=demo"],
    "corpus/demo_external": ["experiment=demo"],
    "corpus/text_file": ["corpus.path=sentences.txt"],
    "clip_backbone/demo": ["experiment=demo"],
    "experiment/coco_sample": ["dataset.root=photos"],
    "dataset/flickr8k": ["dataset.root=photos"],
    "experiment/flickr8k": ["dataset.root=photos"],
    "experiment/flickr8k_published": ["dataset.root=photos"],
}


def command_line(*arguments: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(path or "")}
    command = [sys.executable, str(ROOT / "run.py"), *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60, check=False)


def children_cpu_s() -> float:
    """CPU seconds of all programs started so far: unlike the clock, independent of what else the machine does."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.fixture
def no_torch(tmp_path) -> Path:
    """A folder for PYTHONPATH where `torch` and its friends cannot be imported."""
    folder = tmp_path / "no_torch"
    folder.mkdir()
    for name in ("torch", "transformers", "numpy", "wandb"):
        (folder / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')\n")
    return folder


# ----------------------------------------------------------------------------------------------------------- every YAML


@pytest.mark.parametrize("name", GROUPS)
def test_every_option_of_every_group_is_valid_and_named_as_its_file(typed, name):
    group, option = name.split("/")
    part = getattr(typed(f"{group}={option}", *NEEDS.get(name, [])), group)
    named = {"aggregation_t": f"t{getattr(part, 't', 0) or 0:g}", "wandb": getattr(part, "mode", "")}.get(group)
    assert (named or part.name) == option


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_valid_and_named_as_its_file(typed, name):
    assert typed(f"experiment={name}", *NEEDS.get(f"experiment/{name}", [])).name == name


def test_reward_options_are_the_presets_that_run_folders_leave_out(typed):
    def weights(option: str) -> tuple[float, float, float]:
        r = typed(f"reward_weights={option}").reward_weights
        return r.cos_weight, r.clip_weight, r.max_weight

    assert {option: weights(option) for option in groups()["reward_weights"]} == REWARD_PRESETS


def test_no_yaml_is_left_out():
    sorts = {f"{group}/{option}" for group in ("ablation", "experiment") for option in groups()[group]}
    rest = set(YAMLS) - set(GROUPS) - sorts
    assert rest == {"config", "hydra/launcher/slurm", "hydra/launcher/submitit_local"}
    assert groups()["sweep"] == SWEEPS


def test_sweeps_is_a_real_folder_and_nothing_in_the_repository_is_a_symbolic_link():
    assert (ROOT / "sweeps").is_dir()
    assert not (ROOT / "sweeps").is_symlink()
    assert not (CONF / "sweep").exists()
    listed = subprocess.run(["git", "ls-files", "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "sweeps/temperature.yaml" in listed
    assert not [line for line in listed.splitlines() if line.startswith("120000")]


def test_a_sweep_composes_from_another_folder(tmp_path):
    done = command_line("sweep=temperature", "--cfg", "job", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert OmegaConf.create(done.stdout).name == "coco_coco"
    hydra_part = OmegaConf.create(command_line("sweep=temperature", "--cfg", "hydra", cwd=tmp_path).stdout).hydra
    assert hydra_part.sweeper.params["aggregation_t.t"] == "25,50,100,150,175,200"
    refused = command_line("sweep=temprature", "--cfg", "job", cwd=tmp_path)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == (
        "error: sweep=temprature is not accepted (did you mean temperature?): it must be one of "
        + ", ".join(SWEEPS)
        + "\n"
    )


def test_slurm_launcher_has_resources_a_limit_and_requeues(composed):
    launcher = composed("hydra/launcher=slurm", return_hydra_config=True).hydra.launcher
    assert launcher._target_.endswith("SlurmLauncher")
    assert launcher.max_num_timeout > 0
    assert launcher.signal_delay_s + 30 < launcher.timeout_min * 60


def test_plain_defaults_are_the_papers_coco_row(typed):
    plain, row = typed(), typed("experiment=coco_coco")
    differing = {k for k, v in scientific_settings(row).items() if scientific_settings(plain)[k] != v}
    assert differing == {"name"}
    t, r = row.train, row.reward_weights
    assert (row.aggregation_t.t, t.epochs, t.batch_size, t.num_samples, t.baseline) == (100, 50, 128, 5, "greedy")
    assert (r.cos_weight, r.clip_weight, r.max_weight, r.delay_steps, r.ramp_steps) == (0.5, 0, 0.5, 150, 2350)
    assert t.generator_optimizer == OptimizerConfig(1e-5, warmup_steps=150, weight_decay=0.05, eps=1e-8, grad_clip=1)
    assert t.discriminator_optimizer.warmup_steps == 0
    assert (row.initialize.optimizer.lr, row.initialize.optimizer.warmup_steps, row.initialize.batch_size) == (
        2e-5,
        5000,
        16,
    )


def test_demo_recipe_and_its_deltas(typed):
    demo = typed("experiment=demo")
    assert (demo.aggregation_t.t, demo.train.steps, demo.train.batch_size, demo.train.num_samples) == (150, 300, 24, 5)
    assert (demo.initialize.optimizer.lr, demo.initialize.batch_size, demo.initialize.steps) == (1e-3, 64, 1200)
    assert (demo.train.generator_optimizer.lr, demo.train.generator_optimizer.final_lr_ratio) == (1e-4, 0.1)
    assert (demo.train.discriminator_optimizer.lr, demo.train.reward_scale) == (5e-4, 20)
    own = {
        "demo_external": {"corpus.name", "corpus.kind"},
        "demo_clip_cos": {"reward_weights.name", "reward_weights.clip_weight"},
        "demo_no_naturalness": {"reward_weights.name", "reward_weights.max_weight", "reward_weights.delay_steps"},
        "demo_no_semantics": {"reward_weights.name", "reward_weights.max_weight"},
    }
    for name, expected in own.items():
        delta = scientific_settings(typed(f"experiment={name}"))
        assert {k for k, v in scientific_settings(demo).items() if delta[k] != v} == expected | {"name"}


def test_drawings_and_photographs_have_one_recipe(typed):
    """demo_consensus says that its settings are those of flickr8k (docs/photographs.md, "The same settings")."""
    drawings, photographs = (
        scientific_settings(typed(f"experiment={name}", "dataset.root=photos"))
        for name in ("demo_consensus", "flickr8k")
    )
    recipe = {k for k in drawings if k.startswith(("initialize.", "train.", "reward_weights.", "gap.", "prompt."))}
    differ = {k for k in recipe | {"generator.normalize_prefix"} if drawings[k] != photographs[k]}
    # the first is CLIP's own scale on both; the second is of the discriminator, which is not trained
    assert differ <= {"train.reward_scale", "train.discriminator_optimizer.lr"}
    assert drawings["train.reward_scale"] == 100


def test_coco_sample_finds_its_files_from_the_root_alone(typed, shared):
    cfg = typed("experiment=coco_sample", f"dataset.root={shared / 'data' / 'coco'}")
    root = Path(cfg.dataset.root)
    assert (root / (cfg.dataset.images or "")).is_dir()
    assert (root / (cfg.dataset.references or "")).is_file()
    assert Path(cfg.corpus.path or "").is_file()
    assert Path(cfg.clip_backbone.tokenizer or "").is_file()
    for folder in (cfg.generator.tokenizer, cfg.discriminator.tokenizer):
        assert (Path(folder) / "vocab.json").is_file()
    assert "meaningless" in (cfg.report.warning or "")


@pytest.mark.parametrize(
    ("row", "trained"), [("coco_to_flickr30k", "coco_coco"), ("flickr30k_to_coco", "flickr30k_flickr30k")]
)
def test_cross_rows_score_the_run_folder_of_the_other_row(typed, row, trained):
    cfg = typed(f"experiment={row}", "seed=3", "runs_dir=elsewhere")
    assert cfg.stage == "evaluate"
    assert Path(cfg.checkpoint or "") == run_folder(typed(f"experiment={trained}", "seed=3", "runs_dir=elsewhere"))
    assert cfg.dataset.name == row.split("_to_")[1]


# ------------------------------------------------------------------------------------------------------- wrong settings

SENTENCES = {
    # unknown: near misses by spelling, by the missing part, of a group, of an option
    "reward_weights=posterior reward_weights.terms={clarity:1}": (
        "reward_weights.terms takes a new name with a plus: +reward_weights.terms.NAME=VALUE, and one that it has "
        "without"
    ),
    "train.num_sample=3": "no setting train.num_sample; did you mean train.num_samples?",
    "trian.num_samples=3": "no setting trian.num_samples; did you mean train.num_samples?",
    "num_samples=3": "no setting num_samples; did you mean train.num_samples?",
    "num_sample=3": "no setting num_sample; did you mean train.num_samples?",
    "experment=demo": "no setting experment; did you mean experiment?",
    "+train.num_sample=3": "no setting train.num_sample; did you mean train.num_samples?",
    "++sed=3": "no setting sed; did you mean seed?",
    "decode.foo=1": (
        "no setting decode.foo; decode has name, beam_size, length_penalty, temperature, best_of, batch_size, "
    ),
    "qqq=1": "no setting qqq; `python run.py --help` lists the groups, `--cfg job` every setting",
    "train.steps.more=3": "no setting train.steps.more; train.steps is one value",
    "~train.steps": "~train.steps cannot be taken away: give it a value, or null where null is accepted",
    "reward_weights=clip_ag": (
        "reward_weights=clip_ag is not accepted (did you mean clip_agg?): it must be one of clip_agg, "
    ),
    "experiment=dmo": "experiment=dmo is not accepted (did you mean demo?): it must be one of coco_coco",
    "sweep=x": "sweep=x is not accepted: it must be one of corpora, demo_table, discriminator, ",
    "-m sweep=temprature": "sweep=temprature is not accepted (did you mean temperature?)",
    "-m experiment=demo,demo_xx": "experiment=demo_xx is not accepted (did you mean demo?)",
    "-m sweep=temperature reward_weights=clip_agg,clip_co": (
        "reward_weights=clip_co is not accepted (did you mean clip_cos?)"
    ),
    "-m sweep=temperature aggregation_t.tt=1,2": "no setting aggregation_t.tt; did you mean aggregation_t.t?",
    "ablation=no_disc": (
        "ablation=no_disc is not accepted (did you mean no_discriminator?): it must be one of no_discriminator, none"
    ),
    "aggregation_t=100": "one of t100, t150, t175; any other temperature is aggregation_t.t=NUMBER",
    "decode=null": "decode=null is not accepted: it must be one of beam, best_of_n, greedy, sample",
    "hydra/launcher=slrm": "hydra/launcher=slrm is not accepted (did you mean slurm?)",
    # Hydra's own
    "hydra/lancher=slurm": "no setting hydra/lancher; did you mean hydra/launcher?",
    "hydra/qqq=x": "no setting hydra/qqq; hydra/ has launcher, sweeper, job_logging, ",
    "hydra/sweeper=optun": "hydra/sweeper=optun is not accepted (did you mean optuna?)",
    "-m seed=0,1 hydra.launcher.partitoin=x": (
        "no setting hydra.launcher.partitoin: hydra/launcher=basic has none; choose another first, "
    ),
    "sweep=optuna_reward_weights hydra.sweeper.n_trial=3": (
        "no setting hydra.sweeper.n_trial; did you mean hydra.sweeper.n_trials?"
    ),
    "hydra.swep.dir=x": "no setting hydra.swep; did you mean hydra.sweep or hydra.sweeper?",
    "hydra.sweeper.partition=x": "no setting hydra.sweeper.partition; hydra.sweeper has max_batch_size, params",
    "+hydra.verbos=true": "no setting hydra.verbos; did you mean hydra.verbose?",
    # wrong type
    "seed=abc": "seed=abc is not accepted: it must be a whole number (0 to 2**31-1)",
    "seed=null": "seed=null is not accepted: it must be a whole number (0 to 2**31-1)",
    "train.steps=1.5": "train.steps=1.5 is not accepted: it must be a whole number or null (1 or more)",
    "train.generator_optimizer.lr=fast": "lr=fast is not accepted: it must be a number (a number above 0)",
    "train.use_discriminator=maybe": "train.use_discriminator=maybe is not accepted: it must be true or false",
    "evaluate.baselines=init": "evaluate.baselines=init is not accepted: it must be a list such as [a,b]",
    "train=5": "train=5 is not accepted: it must be settings given by their paths (train.steps, ",
    "aggregation_t.t=1,2": "aggregation_t.t=1,2 has several values: add -m to run each",
    "dataset.root=${nope}": "dataset.root: Interpolation key 'nope' not found",
    # not FIELD=VALUE
    "demo": "demo cannot be read: write FIELD=VALUE",
    "name=a=b": "name=a=b cannot be read: write FIELD=VALUE",
    "--experiment=demo": "no option --experiment; settings have no dashes: experiment=demo",
    "--seed": "no option --seed; settings have no dashes: seed=...",
}
WRONG_VALUES = {  # noticed after composition, whatever started the run
    # out of range
    "stage=trian": "stage=trian is not accepted: it must be one of preprocess, aggregate",
    "seed=-1": "seed=-1 is not accepted: it must be 0 to 2**31-1",
    "aggregation_t.t=0": "aggregation_t.t=0 is not accepted: it must be a number above 0",
    "aggregation_t.t=nan": "aggregation_t.t=nan is not a finite number",
    "reward_weights.cos_weight=2": "reward_weights.cos_weight=2.0 is not accepted: it must be between 0 and 1",
    "initialize.optimizer.lr=-1": "initialize.optimizer.lr=-1.0 is not accepted: it must be a number above 0",
    "decode.beam_size=0": "decode.beam_size=0 is not accepted: it must be 1 or more",
    "decode.best_of=0": "decode.best_of=0 is not accepted: it must be 1 or more",
    "decode.precision=fp8": "decode.precision=fp8 is not accepted: it must be one of auto, native, float32, bf16",
    "decode.cache=fixed": "decode.cache=fixed is not accepted: it must be one of growing, static, compiled",
    "stage=serve decode.cache=compiled": "decode.cache=compiled and stage=serve contradict each other",
    "caption.num=0": "caption.num=0 is not accepted: it must be 1 or more",
    "caption.format=xml": "caption.format=xml is not accepted: it must be one of json, csv",
    "generator.vocab_size=10": "generator.vocab_size=10 is not accepted: it must be 260 or more",
    "dataset.world.image_size=4": "dataset.world.image_size=4 is not accepted: it must be 32 to 512",
    "device=gpu": "device=gpu is not accepted: it must be auto, cpu, cuda or cuda:N",
    "wandb.mode=on": "wandb.mode=on is not accepted: it must be one of offline, online, disabled",
    # contradictions
    "stage=caption": "stage=caption needs images=FOLDER",
    "corpus=demo": "corpus.kind=demo and dataset.kind=coco contradict each other",
    "clip_backbone=demo": "clip_backbone.kind=demo and dataset.kind=coco contradict each other",
    "dataset=folder": "dataset.root is empty",
    "dataset=custom": "dataset.reader='' is not accepted: dataset.kind=custom needs path.py:name",
    "dataset=custom dataset.reader=my_data.py": "dataset.reader='my_data.py' is not accepted",
    "dataset.reader=my_data.py:read": "dataset.reader=my_data.py:read and dataset.kind=coco contradict each other",
    "dataset=nocaps": "dataset.kind=nocaps and stage=pipeline contradict each other: NoCaps has nothing to train on",
    "dataset.caption_column=txt": "dataset.caption_column=txt, dataset.image_column=None and dataset.kind=coco",
    "dataset=folder dataset.root=x dataset.caption_column=txt dataset.references=r.json": (
        "dataset.caption_column=txt and dataset.references=r.json contradict each other"
    ),
    "dataset.kind=mine": (
        "dataset.kind=mine is not accepted: it must be one of demo, coco, flickr30k, nocaps, folder, custom"
    ),
    "experiment=demo clip_backbone.demo.group=48": (
        "clip_backbone.demo.batch_size=128 is no multiple of clip_backbone.demo.group=48"
    ),
    "experiment=demo clip_backbone.demo.group=64 clip_backbone.demo.pairs=100": "pairs=100 is no multiple of",
    "prompt.kind=nouns": "prompt.kind=nouns is not accepted: it must be one of none, entity, retrieval",
    "prompt=entity prompt.tokens=0": "prompt.tokens=0 is not accepted: it must be 1 or more",
    "gap=projection aggregation_t.t=[50,100] stage=aggregate": "gap=projection needs one temperature: set gap.t",
    "train.dropout=true train.loss_norm=tokens": "train.dropout=true and train.loss_norm=tokens contradict each other",
    "train.dropout=true discriminator.loss=pairwise": "train.dropout=true and discriminator.loss=pairwise contradict",
    "train.advantage_norm=group train.num_samples=1": "train.advantage_norm=group and train.num_samples=1 contradict",
    "discriminator.loss=pairwise discriminator.label_smoothing=0.1": "pairs have no labels",
    "train.released=[accumulation] train.advantage_norm=batch": "need the whole step's captions",
    "train.ema=1": "train.ema=1.0 is not accepted: it must be 0 to 1, without 1",
    "corpus=text_file": "corpus.path is null",
    "corpus.column=caption": "corpus.column=caption and corpus.kind=coco contradict each other",
    "generator.width=100": "generator.width=100 and generator.heads=12 contradict each other",
    "discriminator.heads=7": "discriminator.width=768 and discriminator.heads=7 contradict each other",
    "generator=gpt2_transformer generator.mapper_heads=5": (
        "generator.width=768 and generator.mapper_heads=5 contradict each other"
    ),
    "train.baseline=leave_one_out train.num_samples=1": "leave_one_out and train.num_samples=1 contradict each other",
    "train.use_discriminator=false": (
        "train.use_discriminator=false and reward_weights.max_weight=0.5, reward_weights.delay_steps=150, "
    ),
    "dataset=folder dataset.root=x dataset.val_fraction=0.5 dataset.test_fraction=0.5": "they leave no training image",
    "generator.language_model=scratch": (
        "generator.language_model=scratch and generator.tokenizer=pretrained contradict each other"
    ),
    "discriminator.encoder=scratch": (
        "discriminator.encoder=scratch and discriminator.tokenizer=pretrained contradict each other"
    ),
    "evaluate.metrics=[blue]": "evaluate.metrics has 'blue', which is not accepted: one of bleu, meteor",
    "evaluate.baselines=[inits]": "evaluate.baselines has 'inits', which is not accepted: one of init, ",
    "evaluate.baselines=[human]": "evaluate.baselines has 'human' and dataset.kind=coco",
    "variant=a/b": "variant='a/b' is not accepted: it must be the name of one folder",
    "name=..": "name='..' is not accepted: it must be the name of one folder",
}


@pytest.mark.parametrize("overrides", SENTENCES)
def test_a_wrong_setting_is_answered_in_one_sentence(run_py, capsys, overrides):
    assert run_py(*overrides.split(" "), stage=pytest.fail) == 2
    output = capsys.readouterr().err
    assert output.startswith("error: ")
    assert SENTENCES[overrides] in output
    assert output.count("\n") == 1


@pytest.mark.parametrize("overrides", WRONG_VALUES)
def test_values_out_of_range_and_contradictions_name_the_fields(typed, overrides):
    with pytest.raises(ConfigError, match=re.escape(WRONG_VALUES[overrides])) as raised:
        typed(*overrides.split(" "))
    assert "\n" not in str(raised.value)


def test_every_range_has_its_words():
    for path in ("train.steps", "train.generator_optimizer.lr", "initialize.optimizer.grad_clip", "decode.name"):
        assert accepted_values(path)
    assert accepted_values("clip_backbone.demo.lr") == "a number above 0"
    assert accepted_values("train.use_discriminator") is None


def test_a_wrong_key_in_a_yaml_of_ones_own_names_the_file(run_py, capsys, tmp_path):
    folder = tmp_path / "mine" / "experiment"
    folder.mkdir(parents=True)
    (folder / "own.yaml").write_text("# @package _global_\ntrain:\n  stps: 3\n")
    assert run_py("--config-dir", str(folder.parent), "experiment=own") == 2
    assert capsys.readouterr().err == "error: experiment/own.yaml: no setting train.stps; did you mean train.steps?\n"


# --------------------------------------------------------------------------------------- how a run ends, and exit codes


def test_a_user_error_of_a_stage_is_a_sentence_and_exit_1(run_py, capsys):
    def stage(cfg: Config) -> None:
        raise MissingFileError("data/x.json does not exist")

    assert run_py("experiment=demo", stage=stage) == 1
    assert capsys.readouterr().err == "error: data/x.json does not exist\n"
    assert run_py(stage=stage) == 1
    assert "experiment=demo` needs no download" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(run_py, capsys):
    def stage(cfg: Config) -> None:
        raise ZeroDivisionError("ours")

    assert run_py("experiment=demo", stage=stage) == 1
    assert "Traceback" in capsys.readouterr().err


def test_interrupt_says_how_to_go_on(run_py, capsys):
    def stage(cfg: Config) -> None:
        raise KeyboardInterrupt

    assert run_py("experiment=demo", stage=stage) == 130
    assert "the same command continues where it stopped" in capsys.readouterr().err


def test_one_failed_job_does_not_take_the_others(run_py, capsys):
    done = []

    def stage(cfg: Config) -> None:
        if cfg.seed == 1:
            raise MissingFileError("x is missing")
        if cfg.seed == 2:
            raise ZeroDivisionError
        done.append(cfg.seed)

    assert run_py("-m", "experiment=demo", "seed=0,1,2,-1,3", stage=stage) == 2
    output = capsys.readouterr().err
    assert done == [0, 3]
    assert output.count("error: x is missing\n") == 1
    assert output.count("Traceback") == 1
    assert "seed=-1 is not accepted" in output
    assert output.endswith(
        "error: 3 failed:\n  experiment=demo seed=1\n  experiment=demo seed=2\n  experiment=demo seed=-1\n"
    )


@pytest.mark.parametrize("multirun", [["-m"], []])
def test_a_sweep_of_the_folder_runs_all_its_jobs(run_py, multirun):
    folders = []
    assert run_py(*multirun, "sweep=demo_table", "seed=7", stage=lambda cfg: folders.append(run_folder(cfg))) == 0
    assert len(set(folders)) == 5


def test_the_run_folder_is_the_same_single_or_swept_and_hydra_writes_nothing_else(run_py, tmp_path):
    single, swept = [], []
    run_py("experiment=demo", "reward_weights=clip_cos", "seed=1", stage=lambda cfg: single.append(run_folder(cfg)))
    assert list(tmp_path.iterdir()) == []
    run_py(
        "-m",
        "experiment=demo",
        "reward_weights=clip_agg,clip_cos",
        "seed=0,1",
        stage=lambda cfg: swept.append(run_folder(cfg)),
    )
    assert swept[3:] == single
    assert str(single[0]).startswith("runs/demo/demo_t150_clip_cos_")
    assert single[0].name == "seed=1"
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["multirun.yaml"]


def test_scientific_settings_leave_out_what_changes_no_number(typed):
    usual = scientific_settings(typed("experiment=demo"))
    elsewhere = [
        "device=cpu",
        "threads=1",
        "runs_dir=x",
        "artifacts_dir=y",
        "wandb=disabled",
        "decode=beam",
        "train.log_every=1",
    ]
    assert scientific_settings(typed("experiment=demo", "stage=train", *elsewhere)) == usual
    for change in ("train.steps=3", "seed=1", "aggregation_t.t=10", "generator.width=64", "initialize.optimizer.lr=1"):
        assert scientific_settings(typed("experiment=demo", change)) != usual


# ------------------------------------------------------------------------------------------------ the real command line


def test_help_is_one_true_screenful_without_hydra_or_torch(tmp_path, no_torch):
    (no_torch / "hydra.py").write_text("raise SystemExit('hydra was imported')\n")
    before = children_cpu_s()
    done = command_line("--help", cwd=tmp_path, path=no_torch)
    assert children_cpu_s() - before < 2
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) <= 48
    assert max(map(len, lines)) <= 100
    assert list(STAGE_HELP) == list(STAGES)
    words = done.stdout.replace("*", "").split()
    for word in [*STAGES, *(part for name in YAMLS if "/" in name for part in name.rsplit("/", 1)), *SWEEPS]:
        assert word in words
    assert "coco*" in done.stdout.split()


@pytest.mark.parametrize(
    ("argv0", "name"),
    [("run.py", "python run.py"), ("/x/cgtgan/__main__.py", "python -m cgtgan"), ("/x/bin/cgtgan", "cgtgan")],
)
def test_help_and_errors_name_the_program_as_it_was_called(monkeypatch, capsys, argv0, name):
    monkeypatch.setattr("sys.argv", [argv0])
    assert f"\n{name} [experiment=NAME]" in help_text()
    assert f"  {name} experiment=demo " in help_text()
    report_failure(ConfigError("x is wrong"), [])
    assert f"`{name} experiment=demo` needs no download; `{name} --help`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train.num_sample=3"], 2, "error: no setting train.num_sample; did you mean train.num_samples?\n"),
        (["seed=abc"], 2, "error: seed=abc is not accepted: it must be a whole number (0 to 2**31-1)\n"),
        (["experiment=demo", "seed=-1"], 2, "error: seed=-1 is not accepted: it must be 0 to 2**31-1\n"),
        (["-m", "seed=0,abc"], 2, "error: seed=abc is not accepted: it must be a whole number (0 to 2**31-1)\n"),
        (["corpus=demo"], 2, "the demo's corpus only fits dataset=demo\n"),
    ],
)
def test_a_wrong_setting_ends_before_torch_within_two_seconds(tmp_path, no_torch, arguments, code, message):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = command_line(*arguments, cwd=tmp_path, path=no_torch)
    after = resource.getrusage(
        resource.RUSAGE_CHILDREN
    )  # of the processor: the time on the clock depends on the machine's load
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    assert done.returncode == code
    assert done.stderr.endswith(message)
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_cfg_and_info_keep_working(tmp_path, no_torch):
    def shown(*arguments: str) -> str:
        done = command_line(*arguments, cwd=tmp_path, path=no_torch)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    assert OmegaConf.create(shown("--cfg", "job", "experiment=demo")).train.steps == 300
    swept = OmegaConf.create(shown("--cfg", "all", "sweep=temperature"))
    assert (swept.name, swept.hydra.sweeper.params["aggregation_t.t"]) == ("coco_coco", "25,50,100,150,175,200")
    assert "BasicLauncher" in shown("--cfg", "hydra")
    assert "Hydra (" in shown("--hydra-help")
    assert "cgtgan_schema" in shown("--info", "defaults")
    assert "Config search path" in shown("--info", "config")
    assert "Installed Hydra Plugins" in shown("--info", "all")


COMPLETE = """
eval "$(python run.py -sc install=bash)"
complete -p python | grep -q hydra_bash_completion || exit 3
COMP_LINE="$1" COMP_POINT=${#1}
words=($1)
COMP_CWORD=$((${#words[@]} - 1))
hydra_bash_completion
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(
    ("typed_so_far", "choices"),
    [
        ("experiment=demo_t", ["experiment=demo_tiny"]),
        ("-m sweep=te", ["sweep=temperature"]),
        ("reward_weights=", [f"reward_weights={name}" for name in REWARD_PRESETS]),
        ("sweep=", [f"sweep={name}" for name in SWEEPS]),
        ("experiment=demo train.num", ["train.num_samples="]),
    ],
)
def test_bash_completes_groups_options_and_fields(no_torch, typed_so_far, choices):
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(no_torch)}
    command = ["bash", "-c", COMPLETE, "bash", f"python run.py {typed_so_far}"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == choices


def test_a_search_whose_extra_is_missing_says_what_to_install(tmp_path):
    plugins = tmp_path / "bare" / "hydra_plugins"
    plugins.mkdir(parents=True)
    (plugins / "__init__.py").touch()  # hides the installed plugins
    shutil.copy(ROOT / "hydra_plugins/cgtgan_sweeps.py", plugins)
    done = command_line("-m", "sweep=optuna_reward_weights", cwd=tmp_path, path=plugins.parent)
    assert done.returncode == 2
    assert (
        done.stderr
        == "error: hydra/sweeper=optuna needs the extra `optuna`, which is not installed: pip install -e '.[optuna]'\n"
    )


@pytest.mark.parametrize("launcher", ["slurm", "submitit_local"])
def test_a_launcher_whose_extra_is_missing_says_what_to_install(tmp_path, launcher):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "submitit.py").write_text("raise ImportError")  # in the way of the installed one
    done = command_line("-m", f"hydra/launcher={launcher}", "seed=0,1", cwd=tmp_path, path=bare)
    assert done.returncode == 2
    assert (
        done.stderr
        == "error: hydra/launcher needs the extra `slurm`, which is not installed: pip install -e '.[slurm]'\n"
    )


def test_multirun_may_be_asked_for_anywhere(run_py):
    seeds = []
    assert run_py("seed=1,2", "-m", "experiment=demo", stage=lambda cfg: seeds.append(cfg.seed)) == 0
    assert seeds == [1, 2]


def test_slurm_without_slurm_is_a_sentence(run_py, capsys, monkeypatch, tmp_path):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))  # also where SLURM is installed
    assert run_py("-m", "hydra/launcher=slurm", "experiment=demo", "seed=0,1") == 2
    assert "hydra/launcher=slurm finds no `srun`" in capsys.readouterr().err
