"""Where a job's metrics are shown beside our own API: TensorBoard when it is installed, wandb when the job asks."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from multigraft.core.errors import InvalidRequest
from multigraft.core.training import JobRequest, WandbRun

log = logging.getLogger(__name__)


def check_wandb(run: WandbRun | None) -> None:
    """InvalidRequest when a job asks for what is not installed."""
    if run is not None and importlib.util.find_spec("wandb") is None:
        raise InvalidRequest(
            "The integration wandb needs the package wandb, which this server does not have: pip install wandb there, "
            "or leave the integration out.",
            param="integrations",
        )


class Trackers:
    """All of one job's. They wait for disk and network, and may fail: training goes on without them."""

    def __init__(self, job_id: str, request: JobRequest, folder: Path):
        """folder: for TensorBoard's logs."""
        self._tensorboard: Any = None
        self._wandb: Any = None
        self.failure: str | None = None
        """Why a tracker has been given up, until somebody has told it."""
        try:
            if importlib.util.find_spec("tensorboard") is not None:
                from torch.utils.tensorboard import SummaryWriter

                self._tensorboard = SummaryWriter(str(folder))
            if request.wandb is not None:
                import wandb

                run = request.wandb
                self._wandb = wandb.init(
                    project=run.project, name=run.name or job_id, entity=run.entity, tags=list(run.tags),
                    id=job_id, resume="allow", config={**request.hyperparameters, "adapter": dict(request.adapter)},
                )  # fmt: skip
        except Exception as error:
            self._give_up(error)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        try:
            if self._tensorboard is not None:
                for name, value in metrics.items():
                    self._tensorboard.add_scalar(name, value, step)
            if self._wandb is not None:
                self._wandb.log(dict(metrics), step=step)
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        try:
            if self._tensorboard is not None:
                self._tensorboard.close()
            if self._wandb is not None:
                self._wandb.finish()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        # Other people's code: it may raise anything, and none of it is the job's fault.
        log.warning("a tracker failed", exc_info=error)
        self._tensorboard = self._wandb = None
        self.failure = f"Metrics are no longer sent to TensorBoard or wandb: {error}"
