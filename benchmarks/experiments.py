# SPDX-License-Identifier: Apache-2.0
"""Experiments on cached features: settings in, the seven metrics of each category out, in minutes a run.

usage: python benchmarks/experiments.py --data ROOT [--categories a b] [--set delta=2.0 ...] [--seeds 0 1 2]
       python benchmarks/experiments.py --data ROOT --vary delta=1.0,2.5 --vary decouple=true,false
       python benchmarks/experiments.py --data ROOT --ablation delta --seeds 0 1 2 --choose toothbrush tile

ROOT is a folder in MVTec AD's layout; one model is trained for all of its categories. Settings are arguments of
`DecAD`; --vary runs all combinations, --ablation a list of settings that has a name. The encoder runs once over all
images, and every run reads its features. With --choose, choices are made by these categories and the others are
reported.

One line for each run is appended to --log, as JSON: settings, seed, data, versions, the metrics of each category, their
means, and the leakage over the training (reconstruction errors of defect and of normal patches).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from rich.progress import track
from torch.nn import functional
from torch.utils.data import DataLoader, WeightedRandomSampler

from anomalib_decad import DecAD, MultiCategory
from anomalib_decad.data.feature_cache import FeatureBatch, FeatureCode, fingerprint
from anomalib_decad.metrics import METRICS
from anomalib_decad.metrics.category_metrics import CategoryMetrics

_BLOCKS = ((3, 6, 9), (1, 6, 12), (2, 4, 8), (2, 8, 12), (3, 6, 10), (4, 8, 10))

#: Lists of settings that are compared, by name.
ABLATIONS: dict[str, list[dict[str, Any]]] = {
    "decoupling": [
        {"num_prototypes": number, **settings}
        for number in (0, 2560)
        for settings in (
            {"decouple": False},
            {"synthesis_noise": "gaussian", "synthesis_steps": 0},
            {"synthesis_noise": "gaussian"},
            {"synthesis_steps": 0},
            {},
        )
    ],
    "blocks": [{"blocks": list(blocks)} for blocks in _BLOCKS],
    "delta": [{"delta": delta} for delta in (1.0, 1.5, 2.0, 2.5, 3.0)],
    "memory": [{"num_prototypes": number} for number in (0, 640, 1280, 2560)],
    "energy": [{"energy_power": power} for power in (0.0, 0.25, 0.5)],
    "prior": [{"num_prototypes": number, "prior_dim": dim} for number in (0, 2560) for dim in (0, 128, 512)],
    "latent": [{"abnormal_fraction": fraction} for fraction in (0.25, 0.5, 0.75)],
    "depth": [{"decoder_depth": depth} for depth in (1, 2, 3)],
    "steps": [{"synthesis_steps": steps} for steps in (0, 1, 3)],
    "losses": [
        {},
        *({f"{term}_weight": weight} for term in ("normal", "abnormal", "restoration") for weight in (0.0, 3.0)),
        {"normal_weight": 0.3},
        {"margin": 3.0},
    ],
    "region": [
        *({"synthesis_blob_size": size} for size in (1, 4, 10)),
        {"synthesis_fraction": 1.0},
    ],
    "optimiser": [{}, {"learning_rate": 3e-4}, {"learning_rate": 3e-3}, {"warmup_steps": 1}, {"weight_decay": 0.05}],
}


@dataclass
class Split:
    """The features of a split, and what is known of its images.

    Args:
        codes (dict[int, np.ndarray]): For each encoder block, counted from 1, encoded features (images, N, dim).
        code (dict[int, FeatureCode]): How they are decoded.
        categories (list[str]): Category of each image.
        labels (torch.Tensor): Whether each image has a defect, shape (images,).
        masks (torch.Tensor): Their defects, booleans of shape (images, height, width).
    """

    codes: dict[int, np.ndarray]
    code: dict[int, FeatureCode]
    categories: list[str]
    labels: torch.Tensor
    masks: torch.Tensor

    def batch(self, indices: Sequence[int], blocks: Sequence[int], grid: tuple[int, int]) -> FeatureBatch:
        """Read the features of some images."""
        codes = np.stack([self.codes[block][indices] for block in blocks], axis=1)
        offset, scale = (
            torch.cat([getattr(self.code[block], name) for block in blocks]) for name in ("offset", "scale")
        )
        return FeatureBatch(torch.from_numpy(codes), FeatureCode(offset, scale), grid)

    def defect_shares(self, indices: Sequence[int], grid: tuple[int, int]) -> torch.Tensor:
        """Compute which share of each patch of some images is defect, shape (images, N)."""
        return functional.adaptive_avg_pool2d(self.masks[indices][:, None].float(), grid).flatten(1)


def create(args: argparse.Namespace, **settings: Any) -> DecAD:
    """Create a DecAD with the encoder, blocks and image size of the command line, unless settings name others."""
    options = {
        "encoder": args.encoder,
        "encoder_weights": args.encoder_weights,
        "image_size": (args.image_size, args.image_size),
        "blocks": args.blocks,
        "visualizer": False,
    }
    return DecAD(**{**options, **settings})


def load(args: argparse.Namespace, blocks: Sequence[int]) -> dict[str, Split]:
    """Find the features of the encoder's blocks, or compute them; note their grid in the command line."""
    if not args.data.is_dir():
        raise SystemExit(f"--data: no such folder: {args.data}")
    size = (args.image_size, args.image_size)
    weights = args.encoder_weights
    model = create(args, blocks=blocks).eval()
    args.grid = model.model.encoder.grid(*size)
    datamodule = MultiCategory("MVTecAD", root=args.data, categories=args.categories, num_workers=0)
    datamodule.setup()
    splits = {}
    for name in ("train", "test"):
        dataset = getattr(datamodule, f"{name}_data")
        paths = [Path(path) for path in dataset.samples.image_path]
        folder = args.features / fingerprint(args.encoder, str(weights), size, *paths)
        folder.mkdir(parents=True, exist_ok=True)
        missing = [block for block in blocks if not (folder / f"{block}.done").is_file()]
        if missing or not (folder / "masks.npy").is_file():
            encode(model, dataset, folder, missing, name)
        splits[name] = Split(
            {block: np.load(folder / f"{block}.npy", mmap_mode="r") for block in blocks},
            {block: FeatureCode(*torch.from_numpy(np.load(folder / f"{block}.code.npy"))) for block in blocks},
            list(dataset.samples["category"]),
            torch.from_numpy(dataset.samples.label_index.to_numpy()).bool(),
            torch.from_numpy(np.load(folder / "masks.npy")),
        )
    return splits


@torch.inference_mode()
def encode(model: DecAD, dataset: Any, folder: Path, blocks: Sequence[int], split: str) -> None:
    """Write the features of some blocks, and the masks, to a folder."""
    prepare, encoder = model.pre_processor.transform, model.model.encoder
    wanted = [index for index, block in enumerate(blocks_of(model)) if block in blocks]
    files: list[np.ndarray] = []
    masks: list[torch.Tensor] = []
    step = 8
    order = np.random.default_rng(0).permutation(len(dataset))[: 2 * step]
    images = torch.stack([prepare(dataset[int(index)].image[None])[0] for index in order])
    codes = [FeatureCode.of(tap[:, None]) for index, tap in enumerate(encoder(images)) if index in wanted]
    for start in track(range(0, len(dataset), step), description=f"Encoding {split} images"):
        items = [dataset[index] for index in range(start, min(start + step, len(dataset)))]
        images = torch.cat([prepare(item.image[None]) for item in items])
        for item in items:
            mask = torch.zeros(item.image.shape[-2:]) if item.gt_mask is None else item.gt_mask
            mask = functional.interpolate(mask[None, None].float(), images.shape[-2:], mode="nearest")
            masks.append(mask[0, 0] > 0)
        taps = encoder(images)
        for number, index in enumerate(wanted):
            values = codes[number].encode(taps[index][:, None])[:, 0].numpy()
            if len(files) <= number:
                path = folder / f"{blocks[number]}.npy"
                shape = (len(dataset), *values.shape[1:])
                files.append(np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape))
            files[number][start : start + len(values)] = values
    for block, code, file in zip(blocks, codes, files, strict=True):
        file.flush()
        np.save(folder / f"{block}.code.npy", torch.stack([code.offset, code.scale]).numpy())
        (folder / f"{block}.done").touch()
    np.save(folder / "masks.npy", torch.stack(masks).numpy())


class Leakage(Callback):
    """Follows how well defect and normal patches are reconstructed during training.

    Args:
        test (Split): The test images.
        args (argparse.Namespace): Command line.
    """

    def __init__(self, test: Split, args: argparse.Namespace) -> None:
        self.test = test
        self.args = args
        self.curve: list[dict[str, float]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure before training."""
        self._measure(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Measure every some steps."""
        every = self.args.leakage_every
        if (every and trainer.global_step % every == 0) or trainer.global_step == trainer.max_steps:
            self._measure(trainer, pl_module)

    @torch.no_grad()
    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        net = pl_module.model.eval()
        sums = dict.fromkeys(("defect", "normal", "defect_kept", "normal_kept"), 0.0)
        counts = dict.fromkeys(("defect", "normal"), 0)
        indices = range(0, len(self.test.labels), self.args.leakage_stride)
        for chunk in chunks(indices, 16):
            batch = self.test.batch(chunk, blocks_of(pl_module), self.args.grid)
            features = batch.features()
            x, targets = net.fusion(features), net.standardiser(features)
            clean = net.decoupler(x)[0] if net.decoupler else x
            share = self.test.defect_shares(chunk, self.args.grid)
            groups = {"defect": share > 0.5, "normal": share == 0}
            for suffix, embeddings in (("", clean), ("_kept", x)):
                errors = net.anomaly_map_generator.patch_errors(targets, net.decoder(embeddings))
                for name, group in groups.items():
                    sums[name + suffix] += errors[group].sum().item()
            for name, group in groups.items():
                counts[name] += int(group.sum())
        values = {name: total / counts[name.removesuffix("_kept")] for name, total in sums.items()}
        self.curve.append({"step": trainer.global_step, **values})
        net.train()


def train(
    args: argparse.Namespace, splits: dict[str, Split], settings: dict[str, Any], seed: int
) -> tuple[DecAD, float, list[dict[str, float]]]:
    """Train a model; give it, the seconds that it took and its leakage over the training."""
    seed_everything(seed, verbose=False)
    blocks = settings.get("blocks", args.blocks)
    model = create(args, evaluator=False, **settings)
    normal = splits["train"]
    weights = None
    if args.sampling == "balanced":
        weights = [1 / normal.categories.count(category) for category in normal.categories]
    count = len(normal.categories)
    loader = DataLoader(
        range(count),  # type: ignore[arg-type]
        batch_size=args.batch_size,
        sampler=WeightedRandomSampler(weights or [1.0] * count, count, replacement=weights is not None),
        collate_fn=lambda indices: normal.batch(indices, blocks, args.grid),
        drop_last=True,
    )
    leakage = Leakage(splits["test"], args)
    trainer = Trainer(
        max_steps=args.steps,
        accelerator="cpu",
        precision=args.precision,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=args.progress,
        callbacks=[leakage] if args.leakage_every else [],
    )
    start = time.perf_counter()
    trainer.fit(model, loader)
    return model, time.perf_counter() - start, leakage.curve


def run(args: argparse.Namespace, splits: dict[str, Split], settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """Train and score one model."""
    model, seconds, leakage = train(args, splits, settings, seed)
    table = score(args, model, splits["test"])
    return {
        "settings": settings,
        "seed": seed,
        "steps": args.steps,
        "batch_size": args.batch_size,
        "encoder": args.encoder,
        "image_size": args.image_size,
        "precision": args.precision,
        "sampling": args.sampling,
        "images": {
            name: {c: split.categories.count(c) for c in dict.fromkeys(split.categories)}
            for name, split in splits.items()
        },
        "training_seconds": round(seconds, 1),
        "metrics": {name: {key: round(value, 5) for key, value in row.items()} for name, row in table.items()},
        "leakage": [{key: round(value, 5) for key, value in point.items()} for point in leakage],
    }


@torch.inference_mode()
def score(args: argparse.Namespace, model: DecAD, test: Split) -> dict[str, dict[str, float]]:
    """Compute the seven metrics, and their mean, of each category and of all."""
    net = model.eval().model.frozen(None)
    size = (args.image_size, args.image_size)
    metrics = CategoryMetrics()
    for chunk in chunks(range(len(test.labels)), 16):
        batch = test.batch(chunk, blocks_of(model), args.grid)
        output = net.inference_output(batch.features(), args.grid, size)
        metrics.update(
            [test.categories[index] for index in chunk],
            output.pred_score,
            test.labels[chunk],
            output.anomaly_map,
            test.masks[chunk],
        )
    return table_of(metrics)


def table_of(metrics: CategoryMetrics) -> dict[str, dict[str, float]]:
    """Compute the seven metrics, and their mean, of each category and of all."""
    return {
        name: {**{metric: row[metric] for metric in METRICS}, "mean_of_seven": metrics.mean_of_seven(row)}
        for name, row in metrics.compute().items()
    }


def blocks_of(model: LightningModule) -> list[int]:
    """Name the encoder's blocks that a DecAD reads, counted from 1."""
    return [index + 1 for index in model.model.encoder.indices]


def chunks(indices: Sequence[int], length: int) -> list[list[int]]:
    """Cut indices into lists of a length; the last may be shorter."""
    return [list(indices[start : start + length]) for start in range(0, len(indices), length)]


def machine() -> dict[str, str]:
    """Describe what the figures depend on beside the settings."""
    import anomalib
    import timm

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parent,
    ).stdout.strip()  # fmt: skip
    return {
        "commit": commit,
        "cpu": f"{cpu}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "timm": timm.__version__,
        "anomalib": anomalib.__version__,
    }


def main() -> None:
    """Run all settings with all seeds."""
    args = parse()
    configurations = [{**args.settings, **setting} for setting in args.configurations]
    blocks = sorted({block for setting in configurations for block in setting.get("blocks", args.blocks)})
    splits = load(args, blocks)
    facts = machine()
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
            print(f"{settings} seed {seed}: {summarise([line], args)}", flush=True)
    print()
    print_table("settings", ((json.dumps(settings), lines) for settings, lines in results), args)


def print_table(title: str, rows: Iterable[tuple[str, Sequence[dict[str, Any]]]], args: argparse.Namespace) -> None:
    """Print a table of runs: a title for the first column, and for each row its name and the runs of all seeds."""
    print(f"| {title} | {' | '.join(METRICS)} | mean of seven | chosen by | reported |")
    print("|---" * (len(METRICS) + 4) + "|")
    for name, lines in rows:
        print(f"| {name} | {summarise(lines, args)} |")


def summarise(lines: Sequence[dict[str, Any]], args: argparse.Namespace) -> str:
    """Write means over seeds, and their standard deviation, in percent."""

    def of(read: Callable[[dict[str, Any]], float]) -> str:
        values = [100 * read(line["metrics"]) for line in lines]
        deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.1f}{deviation}"

    def half(chosen: bool) -> Callable[[dict[str, Any]], float]:
        return lambda metrics: statistics.mean(
            row["mean_of_seven"] for name, row in metrics.items() if name != "mean" and (name in args.choose) == chosen
        )

    cells = [of(lambda metrics, key=metric: metrics["mean"][key]) for metric in (*METRICS, "mean_of_seven")]
    if args.choose:
        cells += [of(half(chosen=True)), of(half(chosen=False))]
    return " | ".join(cells)


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


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--categories", nargs="+", help="default: those of MVTec AD that are in the folder")
    parser.add_argument("--name", default="", help="noted in the log")
    parser.add_argument("--set", type=_setting, nargs="+", default=[], help="arguments of DecAD, as name=value")
    parser.add_argument("--vary", type=_setting, action="append", default=[], help="name=value,value,...")
    parser.add_argument("--ablation", choices=ABLATIONS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sampling", choices=["balanced", "natural"], default="balanced")
    parser.add_argument("--precision", default="bf16-mixed", help="of Lightning's trainer")
    parser.add_argument("--choose", nargs="+", default=[], help="categories that choices are made by")
    parser.add_argument(
        "--leakage-every", type=int, default=0, help="measure the leakage every so many steps; 0: never"
    )
    parser.add_argument("--leakage-stride", type=int, default=4, help="... on every so many test images")
    parser.add_argument("--encoder", default="vit_small_patch14_dinov2")
    parser.add_argument("--encoder-weights", type=Path, help="a local file instead of timm's")
    parser.add_argument("--blocks", type=int, nargs="+", default=[3, 6, 9])
    parser.add_argument("--image-size", type=int, default=280)
    parser.add_argument("--features", type=Path, default=Path("results/features"), help="folder of the features")
    parser.add_argument("--log", type=Path, default=Path(__file__).parent / "experiments.jsonl")
    parser.add_argument("--progress", action="store_true", help="progress bars of the training")
    args = parser.parse_args()
    args.settings = {name: _value(value) for name, value in args.set}
    lists = [[(name, _value(value)) for value in values.split(",")] for name, values in args.vary]
    args.configurations = ABLATIONS[args.ablation] if args.ablation else [dict(c) for c in itertools.product(*lists)]
    if args.categories is None and args.data.is_dir():
        args.categories = sorted(path.name for path in args.data.iterdir() if (path / "train" / "good").is_dir())
    return args


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
