# SPDX-License-Identifier: Apache-2.0
"""Experiments on cached features: settings in, the seven metrics of each category out, in minutes a run.

usage: python benchmarks/experiments.py --data ROOT [--categories a b] [--set delta=2.0 ...] [--seeds 0 1 2]
       python benchmarks/experiments.py --data ROOT --vary delta=1.0,2.5 --vary decouple=true,false
       python benchmarks/experiments.py --data ROOT --ablation delta --seeds 0 1 2 --choose toothbrush tile

ROOT is a folder in MVTec AD's layout; one model is trained for all of its categories. Settings are arguments of
`DecAD`, those in groups with a dot (synthesis.num_steps=3). --vary runs all combinations, --ablation a list of settings
that has a name. The encoder runs once over all images, and every run reads its features. With --choose, choices are
made by these categories and the others are reported.

One line for each run is appended to --log, as JSON: settings, seed, data, versions, the metrics of each category, their
means, and with --score-at what was measured on the way: metrics of the map, of the error alone and of the energy alone,
how well patch errors with and without removal tell defects, and the losses.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler

import common
import features
from anomalib_decad import DecAD
from anomalib_decad.metrics import CategoryMetrics
from features import Split
from scoring import measure, score
from tables import print_table, rounded, summarize, table_of

_LAYERS = ((3, 6, 9), (1, 6, 12), (2, 4, 8), (2, 8, 12), (3, 6, 10), (4, 8, 10))

# Anomalies and losses of the energy train the invertible network, which prototypes keep as it is.
_LEARNED = {"decoupler.num_prototypes": 0}
_ANOMALIES = {**_LEARNED, "synthesis.fraction": 0.5}

#: Lists of settings that are compared, by name.
ABLATIONS: dict[str, list[dict[str, Any]]] = {
    "decoupling": [{}, {"decouple": False}],
    "anomalies": [
        _LEARNED,
        *({**_ANOMALIES, **setting} for setting in ({}, {"synthesis.num_steps": 0})),
        {**_ANOMALIES, "synthesis.noise": "gaussian", "synthesis.num_steps": 0},
    ],
    "layers": [{"layers": list(layers)} for layers in _LAYERS],
    "delta": [{**_ANOMALIES, "delta": delta} for delta in (1.0, 1.5, 2.0, 2.5, 3.0)],
    "latent": [{"decoupler.abnormal_fraction": fraction} for fraction in (0.8, 0.9, 0.95, 0.97)],
    "prototypes": [{"decoupler.num_prototypes": number} for number in (1024, 4096, 16384, 65536)],
    "neighbors": [{"decoupler.num_neighbors": number} for number in (1, 4, 8, 16)],
    "energy": [{"anomaly_map.energy_power": power} for power in (0.0, 0.125, 0.25)],
    "depth": [{"decoder_depth": depth} for depth in (1, 2, 3)],
    "steps": [{**_ANOMALIES, "synthesis.num_steps": steps} for steps in (0, 1, 3)],
    "losses": [
        _LEARNED,
        {**_LEARNED, "loss.normal_weight": 1.0},
        {**_ANOMALIES, "loss.normal_weight": 1.0, "loss.abnormal_weight": 1.0},
        {**_ANOMALIES, "loss.restoration_weight": 1.0},
    ],
    "region": [
        *({**_ANOMALIES, "synthesis.blob_size": size} for size in (1, 4, 10)),
        {**_LEARNED, "synthesis.fraction": 1.0},
    ],
    "optimizer": [{}, {"learning_rate": 3e-4}, {"learning_rate": 3e-3}, {"warmup_steps": 1}, {"weight_decay": 0.05}],
}


def options_of(settings: dict[str, Any]) -> dict[str, Any]:
    """Make arguments of `DecAD` of settings, whose names may lead into groups: ``synthesis.num_steps``."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(DecAD).parameters.items()}
    options: dict[str, Any] = {}
    for name, value in settings.items():
        group, _, field = name.partition(".")
        if group not in defaults:
            raise SystemExit(f"DecAD has no argument {group!r}")
        options[group] = replace(options.get(group, defaults[group]), **{field: value}) if field else value
    return options


def create(args: argparse.Namespace, settings: dict[str, Any], **kwargs: Any) -> DecAD:
    """Create a DecAD with the encoder, layers and image size of the command line, unless settings name others."""
    common = {
        "encoder": args.encoder,
        "encoder_weights": args.encoder_weights,
        "image_size": (args.image_size, args.image_size),
        "layers": args.layers,
        "visualizer": False,
    }
    return DecAD(**{**common, **options_of(settings), **kwargs})


def load(args: argparse.Namespace, layers: Sequence[int]) -> dict[str, Split]:
    """Find the features of the encoder's layers, or compute them."""
    model = create(args, {}, layers=layers).to(common.device_of(args))
    return features.load(model, args.data, args.categories, args.features, args.workers)


class Progress(Callback):
    """Measures a model on the way of its training.

    Args:
        test (Split): The test images.
        args (argparse.Namespace): Command line; ``score_at`` are the steps.
        total (CategoryMetrics | None): Gets the predictions after the last step, if it is one of them.
    """

    def __init__(self, test: Split, args: argparse.Namespace, total: CategoryMetrics | None) -> None:
        self.test = test
        self.args = args
        self.total = total
        self.points: list[dict[str, Any]] = []
        #: What measuring has taken.
        self.seconds = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure before training."""
        self._measure(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Measure at the chosen steps."""
        self._measure(trainer, pl_module)

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step not in self.args.score_at:
            return
        start = time.perf_counter()
        losses = {name: round(float(value), 5) for name, value in trainer.callback_metrics.items()}
        total = self.total if trainer.global_step == self.args.steps else None
        point = {"step": trainer.global_step, "losses": losses, **measure(pl_module, self.test, total)}
        self.points.append(point)
        mean = {name: f"{100 * row['mean']['mAD']:.1f}" for name, row in point["metrics"].items()}
        print(f"    {trainer.global_step} steps: {mean}", flush=True)
        pl_module.train()
        self.seconds += time.perf_counter() - start


class FeatureRows(Dataset):
    """Rows of a split in place of images: what DecAD asks of a dataset.

    Args:
        split (Split): The split.
        rows (Sequence[int]): Its rows.
        layers (Sequence[int]): Encoder layers whose features are read.
    """

    def __init__(self, split: Split, rows: Sequence[int], layers: Sequence[int]) -> None:
        self.rows = rows
        names = [split.categories[row] for row in rows]
        self.samples = pd.DataFrame({"category": names, "image_path": [f"row {row}" for row in rows]})
        self.collate_fn = lambda indices: split.batch(indices, layers)

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> int:
        """Give a row."""
        return self.rows[index]


class FeatureData(LightningDataModule):
    """Batches of the features of training images.

    Args:
        split (Split): The training images.
        rows (Sequence[int]): Those to train with.
        layers (Sequence[int]): Encoder layers whose features are read.
        batch_size (int): Images in a batch.
        weights (Sequence[float] | None): How often each is drawn; ``None`` for each once in an epoch.
    """

    def __init__(
        self, split: Split, rows: Sequence[int], layers: Sequence[int], batch_size: int, weights: Sequence[float] | None
    ) -> None:
        super().__init__()
        self.train_data = FeatureRows(split, rows, layers)
        self.batch_size, self.weights = batch_size, weights

    def train_dataloader(self) -> DataLoader:
        """Load batches in random order."""
        count = len(self.train_data)
        size = max(count, self.batch_size) if self.weights else count
        return DataLoader(
            self.train_data,
            batch_size=self.batch_size,
            sampler=WeightedRandomSampler(self.weights or [1.0] * count, size, replacement=self.weights is not None),
            collate_fn=self.train_data.collate_fn,
            drop_last=True,
        )


def train(
    args: argparse.Namespace,
    splits: dict[str, Split],
    settings: dict[str, Any],
    seed: int,
    rows: Sequence[int] | None = None,
    total: CategoryMetrics | None = None,
) -> tuple[DecAD, float, list[dict[str, Any]]]:
    """Train a model on the training images of some rows, or of all, and measure it on the way.

    Args:
        args (argparse.Namespace): Command line.
        splits (dict[str, Split]): Training and test images.
        settings (dict[str, Any]): Arguments of `DecAD`.
        seed (int): Of everything random.
        rows (Sequence[int] | None): Training images to use.
        total (CategoryMetrics | None): Gets the predictions after the last step, if ``score_at`` has it.

    Returns:
        tuple[DecAD, float, list[dict[str, Any]]]: The model, the seconds of the training without those of measuring,
            and what was measured.
    """
    seed_everything(seed, verbose=False)
    model = create(args, settings, evaluator=False)
    normal = splits["train"]
    rows = range(len(normal.categories)) if rows is None else rows
    if args.images:
        rows = [row for row in rows if normal.categories[:row].count(normal.categories[row]) < args.images]
    categories = [normal.categories[row] for row in rows]
    weights = None
    if args.sampling == "balanced":
        weights = [1 / categories.count(category) for category in categories]
    datamodule = FeatureData(normal, rows, model.model.encoder.layers, args.batch_size, weights)
    progress = Progress(splits["test"], args, total)
    trainer = Trainer(
        default_root_dir=args.features,
        max_steps=args.steps,
        accelerator=args.accelerator,
        precision=args.precision,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=args.progress,
        callbacks=[progress] if args.score_at else [],
    )
    start = time.perf_counter()
    trainer.fit(model, datamodule=datamodule)
    seconds = time.perf_counter() - start - progress.seconds
    if args.checkpoints:
        name = "-".join([args.name or "run", *(f"{key}={value}" for key, value in settings.items()), f"seed{seed}"])
        part = f"-{categories[0]}" if args.one_class else ""
        trainer.save_checkpoint(args.checkpoints / f"{name}{part}.ckpt")
    return model, seconds, progress.points


def run(args: argparse.Namespace, splits: dict[str, Split], settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """Train and score one model, or one for each category."""
    seconds, points, metrics = 0.0, [], CategoryMetrics()
    for categories in [[name] for name in args.categories] if args.one_class else [args.categories]:
        chosen = {name: split.of(categories) for name, split in splits.items()}
        model, its_seconds, its_points = train(args, chosen, settings, seed, total=metrics)
        if args.steps not in args.score_at:
            # Lightning brings the model back to the CPU.
            score(model.to(common.device_of(args)), chosen["test"], metrics)
        seconds, points = seconds + its_seconds, points + its_points
    return {
        "settings": settings,
        "seed": seed,
        "steps": args.steps,
        "batch_size": args.batch_size,
        "encoder": args.encoder,
        "image_size": args.image_size,
        "precision": args.precision,
        "accelerator": args.accelerator,
        "sampling": args.sampling,
        "one_class": args.one_class,
        "training_images": args.images,
        "images": {
            name: {c: split.categories.count(c) for c in dict.fromkeys(split.categories)}
            for name, split in splits.items()
        },
        "training_seconds": round(seconds, 1),
        "metrics": rounded(table_of(metrics)),
        "progress": points,
    }


def main() -> None:
    """Run all settings with all seeds."""
    args = parse()
    configurations = [{**args.settings, **setting} for setting in args.configurations]
    splits = load(args, sorted({layer for setting in configurations for layer in setting.get("layers", args.layers)}))
    splits = {name: split.to(common.device_of(args)) for name, split in splits.items()}
    facts = common.machine()
    results: list[tuple[dict[str, Any], list[dict[str, Any]]]] = []
    for settings in configurations:
        results.append((settings, []))
        for seed in args.seeds:
            line = {"time": time.strftime("%Y-%m-%d %H:%M"), "name": args.name, **facts}
            line |= run(args, splits, settings, seed)
            args.log.parent.mkdir(parents=True, exist_ok=True)
            with args.log.open("a") as log:
                log.write(json.dumps(line) + "\n")
            results[-1][1].append(line)
            print(f"{settings} seed {seed}: {summarize([line], args)}", flush=True)
    print()
    print_table("settings", ((json.dumps(settings), lines) for settings, lines in results), args)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _setting(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form name=value")
    return name, value


def parse(doc: str | None = __doc__, varies: bool = True, log: str = "experiments.jsonl") -> argparse.Namespace:
    """Read the command line.

    Args:
        doc (str | None): Docstring of the script.
        varies (bool): Whether the script runs several settings, or a model for each category.
            Defaults to ``True``.
        log (str): Name of the default file of results, in this folder.

    Returns:
        argparse.Namespace: The arguments.
    """
    parser = common.argument_parser(doc)
    parser.add_argument("--name", default="", help="noted in the log")
    parser.add_argument("--set", type=_setting, nargs="+", default=[], help="arguments of DecAD, as name=value")
    parser.set_defaults(vary=[], ablation=None, one_class=False)
    if varies:
        parser.add_argument("--vary", type=_setting, action="append", help="name=value,value,...")
        parser.add_argument("--ablation", choices=ABLATIONS, help="settings that are compared, by their name")
        parser.add_argument("--one-class", action="store_true", help="one model for each category, not one for all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--sampling", choices=["balanced", "natural"], default="balanced")
    parser.add_argument("--precision", default="bf16-mixed", help="of Lightning's trainer")
    parser.add_argument("--accelerator", choices=["cpu", "gpu", "mps"], default="cpu", help="of Lightning's trainer")
    parser.add_argument("--images", type=int, help="training images of each category, the first; all by default")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images to encode")
    parser.add_argument("--choose", nargs="+", default=[], help="categories that choices are made by")
    parser.add_argument(
        "--score-at", type=int, nargs="+", default=[], help="also measure after so many steps, and look into the model"
    )
    parser.add_argument("--checkpoints", type=Path, help="folder to keep the trained models in")
    parser.add_argument("--encoder-weights", type=Path, help="a local file instead of timm's")
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 6, 9])
    parser.add_argument("--features", type=Path, default=Path("results/features"), help="folder of the features")
    parser.add_argument("--log", type=Path, default=Path(__file__).parent / log, help="file of results")
    parser.add_argument("--progress", action="store_true", help="progress bars of the training")
    args = parser.parse_args()
    args.settings = {name: _value(value) for name, value in args.set}
    lists = [[(name, _value(value)) for value in values.split(",")] for name, values in args.vary]
    args.configurations = ABLATIONS[args.ablation] if args.ablation else [dict(c) for c in itertools.product(*lists)]
    common.check_data(args)
    if unknown := sorted(set(args.choose) - set(args.categories)):
        parser.error(f"--choose: no category {', '.join(unknown)}: there are {', '.join(args.categories)}")
    if set(args.choose) == set(args.categories):
        args.choose = []
    return args


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
