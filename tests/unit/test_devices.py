"""Which device a process works on."""

from __future__ import annotations

import pytest
import torch

from cgtgan.assets.workspace import Workspace
from cgtgan.config import Config
from cgtgan.errors import InputError
from cgtgan.models.clip_backbone import DemoBackbone
from cgtgan.runtime.devices import Devices, best_precision
from cgtgan.runtime.shards import Rank
from cgtgan.training.meters import Clock
from tests.tiny_gan import one_step, tiny_parts

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="left out: needs a GPU")


def workspace(device: str, rank: Rank | None = None) -> Workspace:
    ws = Workspace(Config(device=device))
    ws.rank = rank or Rank()
    return ws


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """A machine whose driver answers with two cards; returns the devices that were made current."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


@pytest.mark.parametrize(
    ("device", "rank", "wanted"),
    [
        ("cuda:1", Rank(), "cuda:1"),
        ("cuda", Rank(), "cuda:0"),
        ("auto", Rank(3, 4, 1, 2), "cuda:1"),
        ("cuda", Rank(1, 2, 1, 2), "cuda:1"),
    ],
)
def test_the_device_that_is_named_becomes_the_current_one(
    two_cards: list[torch.device], device: str, rank: Rank, wanted: str
) -> None:
    assert workspace(device, rank).device == torch.device(wanted)
    assert two_cards == [torch.device(wanted)]


@pytest.mark.parametrize(
    ("device", "rank", "sentence"),
    [
        ("cuda:2", Rank(), "device=cuda:2: torch sees 2 CUDA devices here, cuda:0 to cuda:1"),
        ("cuda:1", Rank(0, 2, 0, 2), "device=cuda:1 is one device for 2 processes of this machine: set device=cuda"),
    ],
)
def test_a_device_that_cannot_be_is_refused(
    two_cards: list[torch.device], device: str, rank: Rank, sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        workspace(device, rank).device  # noqa: B018
    assert two_cards == []


@pytest.mark.parametrize("has", [True, False])
def test_native_is_bf16_where_the_cpu_multiplies_in_it(monkeypatch: pytest.MonkeyPatch, has: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has})
    cpu = torch.device("cpu")
    wanted = {"auto": "float32", "native": "bf16" if has else "float32", "bf16": "bf16", "float32": "float32"}
    assert {name: best_precision(name, cpu) for name in wanted} == wanted


def test_without_a_card_nothing_is_made_current() -> None:
    assert workspace("cpu").device == torch.device("cpu")
    clock = Clock(workspace("cpu").device)
    clock.mark("work")
    assert clock.metrics(1)["train/seconds"] >= 0


@NO_GPU
def test_on_the_last_card_everything_of_a_step_happens_there() -> None:
    number = torch.cuda.device_count() - 1
    device = workspace(f"cuda:{number}").device
    assert torch.cuda.current_device() == number
    assert torch.zeros(1, device="cuda").device == device
    cfg, parts = tiny_parts(kl_weight=0.1)
    assert parts.reference is not None
    assert isinstance(parts.backbone, DemoBackbone)
    for module in (*parts.modules.values(), parts.reference):
        module.to(device)
    parts.backbone, parts.devices = DemoBackbone(parts.backbone.model, device), Devices(device)
    torch.cuda.reset_peak_memory_stats(device)
    assert one_step(cfg, parts, 1)["train/g_grad_norm"] > 0
    assert torch.cuda.max_memory_allocated(device) > 0
    assert all(torch.cuda.memory_allocated(other) == 0 for other in range(number))
    clock = Clock(device)
    torch.ones(2000, 2000, device=device).matmul(torch.ones(2000, 2000, device=device))
    clock.mark("product")
    assert clock.metrics(1)["train/seconds"] > 0
