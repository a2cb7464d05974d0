"""AdamW (docs/method.md, item 40), and the variant of the released program (slip 12 there)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cgtgan.config import OptimizerConfig
from cgtgan.errors import InputError
from cgtgan.method.reinforce import learning_rate_factor


class ReleasedAdamW(torch.optim.Optimizer):
    """AdamW of transformers before 4.30: epsilon outside the bias correction, decay after the update.

    The released program trains with it (docs/method.md, slip 12).
    """

    def __init__(self, params: Any, lr: float, eps: float, betas: tuple[float, float] = (0.9, 0.999)):
        super().__init__(params, {"lr": lr, "eps": eps, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state |= {
                        "step": torch.zeros(()),
                        "exp_avg": torch.zeros_like(p),
                        "exp_avg_sq": torch.zeros_like(p),
                    }
                state["step"] += 1
                state["exp_avg"].mul_(beta1).add_(p.grad, alpha=1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                taken = state["step"].item()
                size = group["lr"] * math.sqrt(1 - beta2**taken) / (1 - beta1**taken)
                p.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["eps"]), value=-size)
                if group["weight_decay"]:
                    p.add_(p, alpha=-group["lr"] * group["weight_decay"])


class Optimizer:
    """AdamW with its learning-rate schedule and gradient clipping. Only matrices decay, no biases and no norms."""

    def __init__(self, module: nn.Module, config: OptimizerConfig, total_steps: int):
        self.config, self.total_steps = config, total_steps
        self.names, self.parameters = [], []
        for name, p in module.named_parameters():
            if p.requires_grad:
                self.names.append(name)
                self.parameters.append(p)
        decays = [self._decays(name, p) for name, p in zip(self.names, self.parameters, strict=True)]
        groups: list[dict[str, Any]] = []
        for wanted, decay in ((True, config.weight_decay), (False, 0.0)):
            members = [p for p, decayed in zip(self.parameters, decays, strict=True) if decayed is wanted]
            if members:
                groups.append({"params": members, "weight_decay": decay})
        if config.released_adamw:
            self.adamw: torch.optim.Optimizer = ReleasedAdamW(groups, lr=config.lr, eps=config.eps)
        else:
            self.adamw = torch.optim.AdamW(groups, lr=config.lr, eps=config.eps, fused=True)

    def _decays(self, name: str, p: Tensor) -> bool:
        if self.config.released_decay:  # its name filter knows no `ln_1` and no `norm1`
            return "bias" not in name and "LayerNorm.weight" not in name
        return p.dim() >= 2

    def step(self, loss: Tensor, step: int) -> float:
        """One update at optimiser step `step`, counted from 1; returns the gradient norm before clipping.

        A loss or gradient that is not finite raises `InputError` before any weight changes.
        """
        self.adamw.zero_grad(set_to_none=True)
        loss.backward()
        return self.finish_step(loss.item(), step)

    def finish_step(self, loss: float, step: int) -> float:
        """`step` from the gradients there are."""
        norm = self.norm()
        length = float(norm)
        self.check(step, {"loss": loss, "gradient norm": length})
        self.clip(norm)
        self.apply(step)
        return length

    def norm(self) -> Tensor:
        """The norm of all gradients there are, a scalar."""
        return torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])

    def clip(self, norm: Tensor) -> None:
        """Scale the gradients, whose norm is `norm`, down to the limit."""
        if self.config.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.grad_clip, norm)

    def check(self, step: int, values: dict[str, float]) -> None:
        """Raise `InputError` naming the first of `values`, and the first weight's gradient, that is not finite."""
        for what, value in values.items():
            if not math.isfinite(value):
                weight = self.first_not_finite()
                where = f", first in the gradient of {weight}" if weight else ""
                raise InputError(
                    f"the {what} at step {step} is {value}{where} (learning rate {self.config.lr:g}): training "
                    "diverged, lower the rate"
                )

    def first_not_finite(self) -> str | None:
        """The name of the first weight with a gradient that is not finite."""
        for name, p in zip(self.names, self.parameters, strict=True):
            if p.grad is not None and not bool(torch.isfinite(p.grad).all()):
                return name
        return None

    def learning_rate(self, step: int) -> float:
        c = self.config
        return c.lr * learning_rate_factor(
            step, warmup_steps=c.warmup_steps, total_steps=self.total_steps, final_ratio=c.final_lr_ratio
        )

    def apply(self, step: int) -> None:
        """The update itself, from the gradients there are."""
        for group in self.adamw.param_groups:
            group["lr"] = self.learning_rate(step)
        self.adamw.step()
