"""AdamW, clipping and the learning rate of one job."""

from __future__ import annotations

import math

import torch

from .spec import Hyperparameters

BETAS = (0.9, 0.999)
EPS = 1e-8


class Optimizer:
    """AdamW over one flat float32 tensor: one tensor, however many modules the adapter has."""

    def __init__(self, parameters: torch.Tensor, hyperparameters: Hyperparameters, num_steps: int):
        """hyperparameters: resolved. num_steps: of the whole job, where the schedule ends."""
        self._parameters = parameters
        self._hyperparameters = hyperparameters
        self._num_steps = num_steps
        self._adamw = torch.optim.AdamW(
            [parameters],
            betas=BETAS,
            eps=EPS,
            weight_decay=hyperparameters.weight_decay,
            fused=parameters.is_cuda,
        )

    def learning_rate(self, step: int) -> float:
        """Of step `step`, from 0: as transformers' schedulers of the same names."""
        h = self._hyperparameters
        peak = h.learning_rate * h.learning_rate_multiplier
        if step < h.warmup_steps:
            return peak * step / h.warmup_steps
        progress = (step - h.warmup_steps) / max(1, self._num_steps - h.warmup_steps)
        match h.schedule:
            case "linear":
                return peak * max(0.0, 1.0 - progress)
            case "cosine":
                return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
        return peak

    def step(self, step: int, grad: torch.Tensor, norm: float) -> None:
        """grad: (numel,), scaled down in place when its norm is over max_grad_norm. No host sync."""
        limit = self._hyperparameters.max_grad_norm
        if limit:
            grad.mul_(min(1.0, limit / (norm + 1e-6)))  # as torch.nn.utils.clip_grad_norm_
        self._parameters.grad = grad
        self._adamw.param_groups[0]["lr"] = self.learning_rate(step)
        self._adamw.step()
        self._parameters.grad = None

    def moments(self) -> dict[str, torch.Tensor]:
        """exp_avg and exp_avg_sq, (numel,); empty before the first step."""
        state = self._adamw.state.get(self._parameters, {})
        return {name: state[name] for name in ("exp_avg", "exp_avg_sq") if name in state}

    def restore(self, moments: dict[str, torch.Tensor], num_done: int) -> None:
        """moments: as `moments` gave them after num_done steps."""
        self._adamw.state.clear()
        if moments:
            device = self._parameters.device
            own = {name: moment.to(device, copy=True) for name, moment in moments.items()}
            self._adamw.state[self._parameters] = {"step": torch.tensor(float(num_done), device=device), **own}
