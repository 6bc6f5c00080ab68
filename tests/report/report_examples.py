"""Tests without a model: predictions are made up, and go through the callbacks as in a real test."""

from types import SimpleNamespace
from unittest.mock import Mock

import torch
from anomalib.post_processing import PostProcessor

from anomalib_decad.data.category_batch import CategoryBatch
from anomalib_decad.metrics import CategoryEvaluator, RawScores
from anomalib_decad.report import Report

#: Names that would be something else in a page that does not escape them.
NASTY = [
    "<script>alert(1)</script>", "</script><script>window.hacked=1</script>", "\"'><img src=x onerror=hacked=1>",
    "' onmouseover='hacked=1", "</title><b>", "<!--", "{{ 7 * 7 }}", "&lt;b&gt;", "]]>",
    "50 % \N{GREEK SMALL LETTER MU}m",
]  # fmt: skip
MODEL = SimpleNamespace(hparams={"encoder": "tiny", "loss": {"weight": 0.5}}, log_dict=Mock())


def make_batch(scores, labels=None, category="bolts", paths=None, size=(16, 16), masks=True, maps=True):
    """Images with scores; a defect is a square in the map and in the mask."""
    count, (height, width) = len(scores), size
    scores = torch.tensor(scores, dtype=torch.float32)
    label = None if labels is None else torch.tensor(labels, dtype=torch.bool)
    square = torch.zeros(count, height, width)
    square[:, height // 4 : height // 2, width // 4 : width // 2] = 1
    defects = torch.zeros(count, dtype=torch.bool) if label is None else label
    return CategoryBatch(
        image=torch.rand(count, 3, height, width),
        gt_label=label,
        gt_mask=(square * defects[:, None, None]).bool() if masks and label is not None else None,
        image_path=paths if paths is not None else [f"/data/{category}/test/{i}.png" for i in range(count)],
        category=[category] * count,
        pred_score=scores,
        anomaly_map=square * scores.nan_to_num()[:, None, None] if maps else None,
    )


def make_post_processor(threshold=0.5, low=0.0, high=1.0):
    post_processor = PostProcessor()
    for name, value in (("_image_threshold", threshold), ("_pixel_threshold", threshold), ("image_min", low),
                        ("image_max", high), ("pixel_min", low), ("pixel_max", high)):  # fmt: skip
        getattr(post_processor, name).fill_(value)
    return post_processor


def run_test(folder, batches, report=None, post_processor=None, evaluator=True, **model):
    """Have callbacks see batches, as Lightning does in a test, and give the report's file."""
    report = report or Report()
    pl_module = SimpleNamespace(**{**vars(MODEL), "post_processor": post_processor, **model})
    callbacks = [report, *([post_processor] if post_processor else []), *([CategoryEvaluator()] if evaluator else [])]
    trainer = SimpleNamespace(
        callbacks=callbacks, datamodule=SimpleNamespace(name="factory"), default_root_dir=str(folder), barebones=False,
        is_global_zero=True, world_size=1, num_devices=1, ckpt_path=None, checkpoint_callback=None, precision="32-true",
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )  # fmt: skip
    for callback in callbacks:
        callback.setup(trainer, pl_module, "test")
    assert any(isinstance(callback, RawScores) for callback in trainer.callbacks)
    for name in ("on_test_start", "on_test_epoch_start"):
        for callback in trainer.callbacks:
            getattr(callback, name)(trainer, pl_module)
    for number, batch in enumerate(batches):
        for callback in trainer.callbacks:
            callback.on_test_batch_end(trainer, pl_module, batch, batch, number)
    for name in ("on_test_epoch_end", "on_test_end"):
        for callback in trainer.callbacks:
            getattr(callback, name)(trainer, pl_module)
    return folder / "report.html"


def two_products(folder, post_processor=None, **kwargs):
    """A test of two products with each kind of decision: bolts has one of each error."""
    batches = [
        make_batch([0.1, 0.2, 0.8], [False] * 3, "bolts", [f"/data/bolts/test/good/{i}.png" for i in range(3)]),
        make_batch([0.9, 0.7, 0.3], [True] * 3, "bolts", [f"/data/bolts/test/scratch/{i}.png" for i in range(3)]),
        make_batch([0.1, 0.2], [False] * 2, "cloth", [f"/data/cloth/test/good/{i}.png" for i in range(2)]),
        make_batch([0.9, 0.95], [True] * 2, "cloth", [f"/data/cloth/test/hole/{i}.png" for i in range(2)]),
    ]
    return run_test(folder, batches, post_processor=post_processor or make_post_processor(), **kwargs)
