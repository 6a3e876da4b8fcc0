"""Services that track experiments, as sinks (see `sinks`): Weights & Biases and MLflow.

Both obey their own environment variables. Without any, they write into the run's folder and use no network. A run that
goes on goes on in the same run there: its name is a digest of the first line of its metrics.jsonl.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from seer_scale.observe.records import START_EVENTS, Record, scalars

if TYPE_CHECKING:
    import mlflow
    import wandb

PROJECT = "seer_scale"
ID_TAG = "seer_scale.run_id"
MAX_PARAMS = 100
"""That MLflow takes at once."""


def run_id(run_dir: Path) -> str:
    """The same at every start of a run, wherever its folder is moved. Raises OSError."""
    with (run_dir / "metrics.jsonl").open("rb") as file:
        return hashlib.sha256(file.readline()).hexdigest()[:16]


def _recipe(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "config.yaml"
    return yaml.safe_load(path.read_text()) if path.exists() else {}


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


class WandB:
    """Offline in RUN/wandb, for `wandb sync`, unless WANDB_MODE or WANDB_API_KEY is set."""

    def __init__(self, run_dir: Path):
        import wandb

        self._wandb, self._run_dir = wandb, run_dir
        self._run: wandb.Run | None = None

    def row(self, row: Record) -> None:
        self._opened().log({"samples_seen": row["samples_seen"]} | scalars(row))

    def event(self, event: Record) -> None:
        if event["event"] in START_EVENTS:
            self._opened()

    def close(self) -> None:
        if self._run:
            self._run.finish()
        self._run = None

    def _opened(self) -> wandb.Run:
        if self._run is None:
            is_told = {"WANDB_MODE", "WANDB_API_KEY"} & os.environ.keys()
            self._run = self._wandb.init(
                id=os.environ.get("WANDB_RUN_ID") or run_id(self._run_dir),
                resume="allow",
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=os.environ.get("WANDB_NAME", self._run_dir.resolve().name),
                dir=os.environ.get("WANDB_DIR", self._run_dir),
                config=_recipe(self._run_dir),
                allow_val_change=True,
                mode=None if is_told else "offline",
                settings=self._wandb.Settings(console="off", silent=True),
            )
            self._run.define_metric("*", step_metric="samples_seen")  # a restart goes back in samples, not in steps
        return self._run


class MLflow:
    """In RUN/mlflow.db, a SQLite store, unless MLFLOW_TRACKING_URI is set."""

    def __init__(self, run_dir: Path):
        import mlflow

        self._mlflow, self._run_dir = mlflow, run_dir
        self._client: mlflow.MlflowClient | None = None
        self._run = ""

    def row(self, row: Record) -> None:
        at_ms, step = int(1000 * row["wall_time"]), row["samples_seen"]
        metrics = [self._mlflow.entities.Metric(k, float(v), at_ms, step) for k, v in scalars(row).items()]
        self._opened().log_batch(self._run, metrics)

    def event(self, event: Record) -> None:
        if event["event"] in START_EVENTS:
            self._opened()

    def close(self) -> None:
        if self._client:
            self._client.set_terminated(self._run)

    def _opened(self) -> mlflow.MlflowClient:
        if self._client is None:
            own = None if os.environ.get("MLFLOW_TRACKING_URI") else self._run_dir.resolve()
            client = self._mlflow.MlflowClient(f"sqlite:///{own / 'mlflow.db'}" if own else None)
            experiment = _experiment(client, (own / "mlflow").as_uri() if own else None)
            tags = {ID_TAG: run_id(self._run_dir)}
            if known := client.search_runs([experiment], f"tags.`{ID_TAG}` = '{tags[ID_TAG]}'"):
                self._run = known[0].info.run_id
                client.update_run(self._run, status="RUNNING")
            else:
                name = os.environ.get("MLFLOW_RUN_NAME", self._run_dir.resolve().name)
                self._run = client.create_run(experiment, tags=tags, run_name=name).info.run_id
                params = [self._mlflow.entities.Param(k, str(v)) for k, v in _flat(_recipe(self._run_dir))]
                for begin in range(0, len(params), MAX_PARAMS):
                    client.log_batch(self._run, params=params[begin : begin + MAX_PARAMS])
            self._client = client
        return self._client


def _experiment(client: mlflow.MlflowClient, artifacts: str | None) -> str:
    """The id of the one that the environment names, made where there is none."""
    if known := os.environ.get("MLFLOW_EXPERIMENT_ID"):
        return known
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
    found = client.get_experiment_by_name(name)
    return found.experiment_id if found else client.create_experiment(name, artifact_location=artifacts)
