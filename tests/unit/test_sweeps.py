"""Every file of `sweeps/`: its header, its points as Hydra expands them, their run folders, the search by Optuna."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from cgtgan import cli
from cgtgan.config import Config
from cgtgan.errors import MissingFileError, Stopped
from cgtgan.launching.points import numbered
from cgtgan.run_identity import run_folder
from cgtgan.setting_errors import groups

ROOT = Path(__file__).resolve().parents[2]
SWEEPS = sorted(p.stem for p in (ROOT / "sweeps").glob("*.yaml"))
SEARCH = "optuna_reward_weights"
ON_THE_DEMO = ("demo_table", "methods")  # without a line for another experiment
GRIDS = [name for name in SWEEPS if name != SEARCH]
KNOWN: dict[tuple[str, ...], Config] = {}  # overrides but the seed -> their config, composed once for all tests


def head(name: str) -> dict[str, str]:
    """What the comments at the top of a sweep say: Question, Cost, Run, Demo."""
    lines = (ROOT / "sweeps" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    found = (re.match(r"# (\w+): (.+)", line) for line in lines)
    return {match[1]: match[2] for match in found if match}


def command(name: str, line: str) -> list[str]:
    """The overrides of a command that the head shows."""
    words = shlex.split(head(name)[line])
    assert words[:4] == ["python", "run.py", "-m", f"sweep={name}"]
    return words[3:]


@pytest.fixture
def points(composed, typed) -> Callable[..., list[Config]]:
    """The overrides of a multirun -> the typed, checked config of each of its runs, expanded by Hydra's own sweeper."""

    def expand(*overrides: str) -> list[Config]:
        groups = [
            word for word in overrides if word.startswith("sweep=")
        ]  # several values of another are not composed as they stand
        params = composed(*groups, return_hydra_config=True).hydra.sweeper.params or {}
        parsed = OverridesParser.create().parse_overrides(
            [*(f"{key}={value}" for key, value in params.items()), *overrides]
        )
        (batch,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
        found = []
        for job in batch:
            (seed,) = [word for word in job if word.startswith("seed=")] or ["seed=0"]
            rest = tuple(word for word in job if word != seed)
            KNOWN[rest] = KNOWN.get(rest) or typed(*rest)
            found.append(replace(KNOWN[rest], seed=int(seed.removeprefix("seed="))))
            cli.check(found[-1])
        return found

    return expand


# --------------------------------------------------------------------------------------------------------- definitions


def test_the_questions_of_the_paper_have_a_file_each():
    questions = {"temperature", "reward_weights", "discriminator", "num_samples", "initialization", "seeds", "corpora"}
    assert {*questions, "semantic_weight", *ON_THE_DEMO, SEARCH} == set(SWEEPS)
    assert groups()["sweep"] == SWEEPS


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_says_what_it_asks_what_it_costs_and_how_it_is_started(composed, name):
    header = head(name)
    assert list(header) == ["Question", "Cost", "Run", *(["Demo"] if name not in ON_THE_DEMO else [])]
    assert header["Question"].count("?") == 1
    assert re.match(r"\d+ runs\b", header["Cost"])
    assert "easured" in header["Cost"] or name == "demo_table"
    assert len(header["Run"]) < 60
    hydra = composed(*command(name, "Run"), return_hydra_config=True).hydra
    assert hydra.mode.name == "MULTIRUN"
    if name == SEARCH:
        assert hydra.sweeper.n_trials == int(header["Cost"].split()[0])


@pytest.mark.parametrize("line", ["Run", "Demo"])
@pytest.mark.parametrize("name", GRIDS)
def test_every_point_is_valid_and_has_a_run_folder_of_its_own(points, name, line):
    if line not in head(name):
        return
    found = points(*command(name, line))
    count = int(head(name)["Cost"].split()[0])
    on_the_demo = line == "Demo" or name in ON_THE_DEMO
    assert len(found) == (count * 2 // 3 if (name, line) == ("corpora", "Demo") else count)
    assert len({run_folder(cfg) for cfg in found}) == len(found)
    assert {cfg.dataset.kind for cfg in found} == {"demo" if on_the_demo else "coco"}
    seeds = {cfg.seed for cfg in found}
    assert len(seeds) >= 3
    assert len(found) % len(seeds) == 0


def test_what_is_typed_takes_the_place_of_what_the_file_says(points):
    found = points(
        "sweep=temperature", "experiment=demo,demo_clip_cos", "seed=7", "aggregation_t.t=10,20", "train.steps=5"
    )
    assert [(cfg.name, cfg.seed, cfg.aggregation_t.t, cfg.train.steps) for cfg in found] == [
        (name, 7, t, 5) for t in (10, 20) for name in ("demo", "demo_clip_cos")
    ]


def test_what_differs_between_the_points_is_the_question(points):
    def asked(name: str, value: Callable[[Config], Any]) -> list[Any]:
        return [value(cfg) for cfg in points(f"sweep={name}", "experiment=demo", "seed=0")]

    assert asked("temperature", lambda c: c.aggregation_t.t) == [25, 50, 100, 150, 175, 200]
    rewards = asked("reward_weights", lambda c: c.reward_weights.name)
    others = ("consensus", "posterior", "posterior_entropy", "posterior_natural", "semantics_only")
    assert rewards == [option for option in groups()["reward_weights"] if option not in others]
    assert asked("semantic_weight", lambda c: c.reward_weights.max_weight) == [0, 0.25, 0.5, 0.75, 1]
    assert asked("num_samples", lambda c: c.train.num_samples) == [1, 2, 5, 10]
    assert asked("initialization", lambda c: c.train.use_initialization) == [True, False]
    weights = asked(
        "discriminator",
        lambda c: (c.train.use_discriminator, c.reward_weights.max_weight, c.reward_weights.delay_steps),
    )
    assert weights == [(True, 0.5, 1), (False, 1, 0)]
    assert [cfg.corpus.name for cfg in points("sweep=corpora", "seed=0")] == ["coco", "gcc", "shutterstock"]


def test_three_lists_are_eighteen_runs(points):
    lists = ("aggregation_t.t=80,100,120", "reward_weights=clip_agg,clip_cos", "seed=0,1,2")
    folders = {str(run_folder(cfg)) for cfg in points("experiment=coco_coco", *lists)}
    assert len(folders) == 18
    assert "runs/coco_coco/coco_vit_l14_t120_clip_cos_k5/seed=2" in folders


def test_the_sweep_of_the_page_is_one(run_py, tmp_path):
    page = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```yaml\n# sweeps/noise.yaml\n(.*?)```", page, re.DOTALL)
    own = tmp_path / "own" / "sweep"
    own.mkdir(parents=True)
    (own / "noise.yaml").write_text(text)
    folders = []
    stage = lambda cfg: folders.append(run_folder(cfg))  # noqa: E731
    assert run_py("--config-dir", str(own.parent), "-m", "sweep=noise", "experiment=demo", "seed=0", stage=stage) == 0
    assert [f.parent.name.removeprefix("demo_t150_clip_agg_k5") for f in folders] == ["", "_noise0.1", "_noise0.5"]


def test_the_page_names_every_sweep_with_its_number_of_runs():
    page = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"\| `python run.py -m sweep=(\w+)` \| (\d+) \|", page))
    assert rows == {name: head(name)["Cost"].split()[0] for name in SWEEPS}


def test_settings_that_agree_to_six_digits_have_run_folders_of_their_own(typed):
    for field, a, b in (
        ("reward_weights.cos_weight", "0.1234567", "0.12345671"),
        ("reward_weights.max_weight", "0.3", "0.30000000000000004"),
        ("aggregation_t.t", "100", "100.00001"),
        ("initialize.noise_std", "0.5", "0.50000001"),
        ("train.kl_weight", "1e-3", "1.0000001e-3"),
    ):
        assert run_folder(typed("experiment=demo", f"{field}={a}")) != run_folder(
            typed("experiment=demo", f"{field}={b}")
        )
    assert "cos0.3-clip0-max0.5" in str(run_folder(typed("reward_weights.cos_weight=0.3")))


# ------------------------------------------------------------------------------------------------ as run.py starts them


def test_a_signal_ends_the_sweep_and_not_the_run_alone(run_py, capsys):
    done = []

    def stage(cfg: Config) -> None:
        if cfg.seed == 1:
            raise Stopped("received SIGTERM: stopped after step 3", 143)
        if cfg.seed == 2:
            raise Stopped("the time limit is reached: stopped after step 3", 75)
        done.append(cfg.seed)

    with pytest.raises(SystemExit) as ended:
        run_py("-m", "experiment=demo", "seed=0,1,2,3", stage=stage)
    assert (ended.value.code, done) == (143, [0])
    assert run_py("-m", "experiment=demo", "seed=2,3", stage=stage) == 75  # train.max_minutes is of each run
    assert done == [0, 3]
    assert capsys.readouterr().err.endswith("error: 1 failed:\n  experiment=demo seed=2\n")


def search(run_py: Callable[..., int], stage: Callable[[Config], object], *overrides: str) -> int:
    return run_py("-m", f"sweep={SEARCH}", "experiment=demo", *overrides, stage=stage)


def test_a_search_asks_for_the_same_trials_again_and_finds_the_best(run_py, tmp_path, capsys):
    asked: list[Path] = []
    weights: list[tuple[float, ...]] = []

    def stage(cfg: Config) -> float:
        r = cfg.reward_weights
        asked.append(run_folder(cfg))
        weights.append((r.cos_weight, r.clip_weight, r.max_weight))
        return r.max_weight - abs(r.cos_weight - 0.25)

    assert search(run_py, stage, "hydra.sweeper.n_trials=6") == 0
    assert len(asked) == 6
    assert asked[0].parts[:2] == ("runs", "demo")
    assert len(set(asked)) == len(set(weights))
    assert all(0 <= w <= 1 and (16 * w).is_integer() for triple in weights for w in triple)
    (found,) = tmp_path.rglob("optimization_results.yaml")
    best = OmegaConf.load(found)
    assert best.best_value == max(w - abs(cos - 0.25) for cos, _, w in weights)
    assert "Best parameters: {'reward_weights.cos_weight'" in capsys.readouterr().out
    before = list(asked)
    asked.clear()
    assert search(run_py, stage, "hydra.sweeper.n_trials=2", "reward_weights.max_weight=0.5") == 0
    assert {str(folder).split("max")[1][:4] for folder in asked} == {"0.5_"}  # what is typed is not searched
    asked.clear()
    assert search(run_py, stage, "hydra.sweeper.n_trials=4") == 0
    assert asked == before[:4]


def test_a_failed_run_is_a_failed_trial_and_the_search_goes_on(run_py, capsys):
    calls = []

    def stage(cfg: Config) -> float | None:
        calls.append(cfg)
        if len(calls) == 1:
            raise MissingFileError("x is missing")
        return 0.5

    assert search(run_py, stage, "hydra.sweeper.n_trials=3") == 1
    assert len(calls) == 3
    output = capsys.readouterr()
    assert "Best value: 0.5" in output.out
    assert "max_failure_rate" not in output.out  # with which Optuna would raise what a launcher of many jobs hands back
    assert "error: x is missing\n" in output.err
    assert "error: 1 failed:\n  reward_weights.cos_weight=" in output.err


def test_a_search_without_a_score_says_so(run_py, capsys):
    assert search(run_py, lambda cfg: None, "hydra.sweeper.n_trials=2") == 1
    output = "error: no run of the search has a score on the validation images, so there is no best run\n"
    assert capsys.readouterr().err.endswith(output)


def test_a_study_can_be_kept_in_a_database(run_py, tmp_path):
    import optuna

    storage = f"sqlite:///{tmp_path / 'study.db'}"
    for _ in range(2):
        assert search(run_py, lambda cfg: 0.5, "hydra.sweeper.n_trials=1", f"hydra.sweeper.storage={storage}") == 0
    assert len(optuna.load_study(study_name="reward_weights", storage=storage).trials) == 2


@pytest.mark.parametrize(
    ("words", "sweeper", "number"),
    [
        (["-m", "experiment=demo", "seed=0,1,2", "train.steps=choice(1,2)"], {"params": {}}, "2/6"),
        (["-m", "sweep=seeds", "seed=0,1"], {"params": {"seed": "0,1,2,3", "decode": "greedy,beam"}}, "2/4"),
        (["-m", "seed=range(0,3)", "hydra.sweep.dir=a,b"], {"params": None}, "2/3"),
        (["-m", "decode=glob(*)"], {"params": None}, "2"),
        (["sweep=optuna_reward_weights", "seed=0,1"], {"n_trials": 20, "params": {"seed": "range(1,3)"}}, "2/20"),
    ],
)
def test_a_run_of_a_multirun_is_numbered(words: list[str], sweeper: dict[str, Any], number: str) -> None:
    assert numbered(2, sweeper, words) == number
