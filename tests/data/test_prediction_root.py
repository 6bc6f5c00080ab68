"""Where the images of a prediction are, below what is above all of them."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_decad.data import PredictionRoot
from anomalib_decad.data.prediction_root import plain


def trainer_of(files, predicting=True):
    loader = SimpleNamespace(dataset=SimpleNamespace(image_filenames=files))
    return SimpleNamespace(predicting=predicting, predict_dataloaders=loader)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.sampled_from(["..", ".", "a", "b", "c"]), min_size=1, max_size=5), min_size=1, max_size=5))
def test_nothing_leads_out_of_the_folder_and_images_stay_apart(folders):
    files = [str(Path("photos", *parts, "x.png")) for parts in folders]
    root, trainer = PredictionRoot(), trainer_of(files)
    below = [root.below(trainer, file) for file in files]
    assert all(path is not None and ".." not in path.parts and not path.is_absolute() for path in below)
    assert len(set(below)) == len({plain(file) for file in files})


@pytest.mark.parametrize(
    ("trainer", "path"),
    [
        (trainer_of(["/photos/a/x.png"], predicting=False), "/photos/a/x.png"),
        (trainer_of(["/photos/a/x.png"]), ""),
        (trainer_of(["/photos/a/x.png"]), "/elsewhere/x.png"),
        (trainer_of(["/photos/a/x.png"]), "/photos/../elsewhere/x.png"),
        (trainer_of([]), "/photos/a/x.png"),
    ],
)
def test_what_is_not_in_the_folder_has_no_place(trainer, path):
    assert PredictionRoot().below(trainer, path) is None
