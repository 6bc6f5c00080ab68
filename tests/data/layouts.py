"""Small copies of the layouts of the data sets that anomalib knows: two categories each, with 4, 2 and 2 images."""

import csv
import json
from pathlib import Path

import cv2
import numpy as np

SIZE = (24, 32)
TRAIN, GOOD, BAD = 4, 2, 2


def write(path: Path, image: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)
    return path


def mask(value: int = 255) -> np.ndarray:
    image = np.zeros(SIZE, np.uint8)
    image[4:12, 6:16] = value
    return image


def picture(number: int = 0, defect: bool = False, both: bool = False) -> np.ndarray:
    image = np.random.default_rng(number).integers(60, 120, (*SIZE, 3), dtype=np.uint8)
    if defect:
        image[mask() > 0] = 250
    if both:
        image[mask()[::-1] > 0] = 250
    return image


def _mvtec(root, category, suffix="png", good="good", mask_name="{}_mask", bad="hole"):
    for split, label, count in (("train", good, TRAIN), ("test", good, GOOD), ("test", bad, BAD)):
        for number in range(count):
            write(root / category / split / label / f"{number:03}.{suffix}", picture(number, label == bad))
            if label == bad:
                write(root / category / "ground_truth" / bad / f"{mask_name.format(f'{number:03}')}.png", mask())


def mvtec(root, names):
    for name in names:
        _mvtec(root, name)


def btech(root, names):
    for name in names:
        _mvtec(root, name, "bmp", "ok", "{}", "ko")


def autovi(root, names):
    for name in names:
        _mvtec(root, name, mask_name="{}/0000")


def mvtec_2(root, names):
    for name in names:
        for folder, count in (("train/good", TRAIN), ("validation/good", GOOD), ("test_public/good", GOOD),
                              ("test_public/bad", BAD), ("test_private", 3), ("test_private_mixed", 5)):  # fmt: skip
            for number in range(count):
                write(root / name / folder / f"{number:03}_regular.png", picture(number, folder.endswith("bad")))
        for number in range(BAD):
            write(root / name / "test_public/ground_truth/bad" / f"{number:03}_regular_mask.png", mask())


def loco(root, names):
    for name in names:
        for folder, count in (("train/good", TRAIN), ("validation/good", GOOD), ("test/good", GOOD),
                              ("test/structural_anomalies", 1), ("test/logical_anomalies", 1)):  # fmt: skip
            for number in range(count):
                image = picture(number, "anomalies" in folder, "logical" in folder)
                write(root / name / folder / f"{number:03}.png", image)
        write(root / name / "ground_truth/structural_anomalies/000/000.png", mask())
        # Several masks of one image, whose values are kinds of defects.
        write(root / name / "ground_truth/logical_anomalies/000/000.png", mask(254))
        write(root / name / "ground_truth/logical_anomalies/000/001.png", mask(253)[::-1])


def visa(root, names):
    rows = []
    for name in names:
        for number in range(TRAIN + GOOD):
            path = write(root / name / "Data/Images/Normal" / f"{number:04}.JPG", picture(number))
            rows.append((name, "train" if number < TRAIN else "test", "normal", path.relative_to(root), ""))
        for number in range(BAD):
            path = write(root / name / "Data/Images/Anomaly" / f"{number:03}.JPG", picture(number, defect=True))
            found = write(root / name / "Data/Masks/Anomaly" / f"{number:03}.png", mask(number + 1))
            rows.append((name, "test", "anomaly", path.relative_to(root), found.relative_to(root)))
    (root / "split_csv").mkdir()
    with (root / "split_csv" / "1cls.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("object", "split", "label", "image", "mask"), *rows])


def visa_prepared(root, names):
    for name in names:
        _mvtec(root / "visa_pytorch", name, "JPG", mask_name="{}", bad="bad")


def real_iad(root, names):
    for name in names:
        table = {"meta": {"prefix": name, "normal_class": "OK"}, "train": [], "test": []}
        for split, kind, count in (("train", "OK", TRAIN), ("test", "OK", GOOD), ("test", "AK", BAD)):
            for number in range(count):
                # Two views of an object.
                sample, view = f"S{number // 2:04}", f"C{number % 2 + 1}"
                place = Path(kind if kind == "OK" else f"NG/{kind}") / f"{split}{sample}"
                image = write(root / "realiad_256" / name / place / f"{name}_{view}.jpg", picture(number, kind != "OK"))
                row = {"category": name, "anomaly_class": kind, "image_path": str(place / image.name)}
                if kind != "OK":
                    write(image.with_suffix(".png"), mask())
                table[split].append({**row, "mask_path": str(place / f"{image.stem}.png") if kind != "OK" else None})
        path = root / "realiad_jsons" / "realiad_jsons" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(table))


def kaputt(root, names):
    import pandas as pd

    for split, counts in (("train", (TRAIN, 0)), ("validation", (GOOD, 1)), ("test", (GOOD, BAD))):
        rows = []
        for name in names:
            for number in range(sum(counts)):
                defect = number >= counts[0]
                place = f"data/{split}/query-data/{{}}/{name}-{split}-{number}.{{}}"
                write(root / "query-image" / place.format("image", "jpg"), picture(number, defect))
                if defect:
                    write(root / "query-mask" / place.format("mask", "png"), mask())
                rows.append({
                    "capture_id": f"{name}-{split}-{number}", "defect": defect, "item_material": name,
                    "defect_types": "hole" if defect else None, "item_identifier": str(number),
                    "query_image": place.format("image", "jpg"), "query_crop": place.format("crop", "jpg"),
                    "query_mask": place.format("mask", "png"),
                })  # fmt: skip
        (root / "datasets").mkdir(exist_ok=True)
        pd.DataFrame(rows).to_parquet(root / "datasets" / f"query-{split}.parquet")
