"""A test without a model: predictions are made up, and go through the callbacks as in a real one."""

from types import SimpleNamespace
from typing import Any

import torch
from anomalib.post_processing import PostProcessor

from anomalib_decad.callbacks import Report
from anomalib_decad.data import CategoryBatch
from anomalib_decad.metrics import DECISIONS, MAD, MEAN, METRICS, CategoryEvaluator

#: Names that would be something else in a page that does not escape them.
NASTY = [
    "<script>alert(1)</script>", "</script><script>window.hacked=1</script>", "\"'><img src=x onerror=hacked=1>",
    "' onmouseover='hacked=1", "</title><b>", "<!--", "{{ 7 * 7 }}", "&lt;b&gt;", "]]>",
    "50 % \N{GREEK SMALL LETTER MU}m",
]  # fmt: skip


def make_batch(scores, labels=None, category="bolts", paths=None, size=(16, 16), masks=True, maps=True):
    """Images with scores; a defect is a square in the map and in the mask."""
    count, (height, width) = len(scores), size
    scores = torch.tensor(scores, dtype=torch.float32)
    label = None if labels is None else torch.tensor(labels, dtype=torch.bool)
    square = torch.zeros(count, height, width)
    square[:, height // 4 : height // 2, width // 4 : width // 2] = 1
    defects = torch.zeros(count, dtype=torch.bool) if label is None else label
    batch = CategoryBatch(
        image=torch.rand(count, 3, height, width),
        gt_label=label,
        gt_mask=(square * defects[:, None, None]).bool() if masks and label is not None else None,
        image_path=paths if paths is not None else [f"/data/{category}/test/{i}.png" for i in range(count)],
        category=[category] * count,
        pred_score=scores,
        anomaly_map=square * scores.nan_to_num()[:, None, None] if maps else None,
    )
    batch.raw_score = scores.clone()  # as this package's models set it
    return batch


def make_post_processor(threshold=0.5, low=0.0, high=1.0, cls=PostProcessor):
    post_processor = cls()
    for kind in ("image", "pixel"):
        for name, value in ((f"_{kind}_threshold", threshold), (f"{kind}_min", low), (f"{kind}_max", high)):
            getattr(post_processor, name).fill_(value)
    return post_processor


def run_test(folder, batches, report=None, post_processor=None, evaluator=True, **trainer_parts):
    """Have callbacks see batches, as Lightning does in a test, and give the report's file."""
    report = report or Report()
    pl_module = SimpleNamespace(hparams={"encoder": "tiny", "loss": {"weight": 0.5}}, post_processor=post_processor)
    # In front of the post-processor: a report reads batches later.
    callbacks = [report, *([post_processor] if post_processor else [])]
    trainer = SimpleNamespace(
        callbacks=[*callbacks, *([make_evaluator()] if evaluator else [])], datamodule=SimpleNamespace(name="factory"),
        default_root_dir=str(folder), is_global_zero=True, world_size=1, testing=True, ckpt_path=None,
        checkpoint_callback=None, precision="32-true", strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )  # fmt: skip
    vars(trainer).update(trainer_parts)
    report.on_test_start(trainer, pl_module)
    for number, batch in enumerate(batches):
        report.on_test_batch_start(trainer, pl_module, batch, number)
        for callback in callbacks:
            callback.on_test_batch_end(trainer, pl_module, batch, batch, number)
    report.on_test_epoch_end(trainer, pl_module)
    report.on_test_end(trainer, pl_module)
    return folder / "report.html"


def make_evaluator(products=("bolts", "cloth")):
    """An evaluator that has measured."""
    evaluator: Any = CategoryEvaluator()
    evaluator.results = {name: dict.fromkeys((*METRICS, MAD), 0.905) for name in (*products, MEAN)}
    evaluator.decisions = {name: dict.fromkeys(DECISIONS, 0.75) for name in (*products, MEAN)}
    return evaluator


def two_products(folder, **kwargs):
    """A test of two products with each kind of decision: bolts has one of each error."""
    rows = [("bolts", "good", [0.1, 0.2, 0.8]), ("bolts", "scratch", [0.9, 0.7, 0.3]), ("cloth", "good", [0.1, 0.2]),
            ("cloth", "hole", [0.9, 0.95])]  # fmt: skip
    batches = [
        make_batch(scores, [kind != "good"] * len(scores), name, [f"/d/{name}/{kind}/{score}.png" for score in scores])
        for name, kind, scores in rows
    ]
    return run_test(folder, batches, post_processor=make_post_processor(), **kwargs)
