"""Thresholds are changed in files, which stay whole."""

import json

import pytest
import torch

from anomalib_decad.decisions import CategoryPostProcessor, exported_thresholds
from anomalib_decad.decisions.command import main
from conftest import validated


@pytest.fixture
def checkpoint(tmp_path):
    post_processor = CategoryPostProcessor()
    validated(post_processor)
    path = tmp_path / "model.ckpt"
    state = {**post_processor.state_dict(prefix="post_processor."), "model.weight": torch.ones(2)}
    torch.save({"state_dict": state, "epoch": 3}, path)
    return path


@pytest.fixture
def exported(tmp_path):
    path = tmp_path / "model.thresholds.json"
    post_processor = validated(CategoryPostProcessor(image_sensitivity=0.4))
    path.write_text(json.dumps(exported_thresholds(post_processor)))
    return path


def limits_of(path, name):
    state = torch.load(path, weights_only=True)["state_dict"]
    post_processor = CategoryPostProcessor()
    own = {key.removeprefix("post_processor."): value for key, value in state.items() if key.startswith("post_")}
    post_processor.load_state_dict(own)
    return post_processor.limits(name)


def test_a_checkpoint_is_shown_and_changed(checkpoint, capsys):
    before = checkpoint.read_bytes()
    main([str(checkpoint)])
    output = capsys.readouterr().out
    assert "raw scores" in output
    assert output.count("0.25") == 3
    assert checkpoint.read_bytes() == before
    main([str(checkpoint), "--category", "nut", "--image", "0.75", "--pixel", "2"])
    assert "0.75" in capsys.readouterr().out
    assert limits_of(checkpoint, "nut")[::3] == (0.75, 2.0)
    assert limits_of(checkpoint, "bolt")[::3] == (0.25, 0.5)
    content = torch.load(checkpoint, weights_only=True)
    assert content["epoch"] == 3
    assert content["state_dict"]["model.weight"].tolist() == [1, 1]


def test_the_change_can_go_elsewhere(checkpoint, tmp_path):
    before = checkpoint.read_bytes()
    main([str(checkpoint), "--image", "0.75", "--output", str(tmp_path / "other.ckpt")])
    assert checkpoint.read_bytes() == before
    assert limits_of(tmp_path / "other.ckpt", None).image_threshold == 0.75


def test_an_export_is_shown_and_changed(exported, capsys):
    main([str(exported), "--category", "bolt", "--image", "0.7"])
    assert "normalized scores" in capsys.readouterr().out
    content = json.loads(exported.read_text())
    assert content["categories"] == [
        {"index": 0, "name": "bolt", "image": 0.7, "pixel": 0.5},
        {"index": 1, "name": "nut", "image": 0.6, "pixel": 0.5},
    ]
    assert content["image"] == 0.6


def test_an_export_of_raw_scores_has_raw_thresholds(tmp_path, capsys):
    post_processor = validated(CategoryPostProcessor(enable_normalization=False, image_sensitivity=0.25), names=())
    post_processor.image_max.fill_(5.0)
    post_processor.follow(["bolt"])
    path = tmp_path / "model.thresholds.json"
    path.write_text(json.dumps(exported_thresholds(post_processor)))
    main([str(path), "--pixel", "7"])
    assert "raw scores" in capsys.readouterr().out
    content = json.loads(path.read_text())
    # A quarter of the range above the threshold, as a sensitivity of a quarter wants.
    assert content["categories"] == [{"index": 0, "name": "bolt", "image": 1.25, "pixel": 0.5}]
    assert (content["image"], content["pixel"]) == (1.25, 7)


def test_a_model_that_was_never_validated_has_no_thresholds(tmp_path, capsys):
    post_processor = CategoryPostProcessor()
    post_processor.follow(["bolt"])
    path = tmp_path / "model.thresholds.json"
    path.write_text(json.dumps(exported_thresholds(post_processor)))
    assert json.loads(path.read_text())["image"] is None
    main([str(path)])
    assert capsys.readouterr().out.count("-") >= 4
    main([str(path), "--category", "bolt", "--image", "3"])
    assert json.loads(path.read_text())["categories"] == [{"index": 0, "name": "bolt", "image": 3, "pixel": None}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--category", "screw", "--image", "0.5"], "no category 'screw': there are bolt, nut"),
        (["--category", "bolt"], "Give --image, --pixel or both"),
        (["--image", "nan"], "a threshold"),
    ],
)
@pytest.mark.parametrize("kind", ["checkpoint", "exported"])
def test_wrong_arguments_are_one_line_and_change_nothing(kind, arguments, message, request, capsys):
    path = request.getfixturevalue(kind)
    before = path.read_bytes()
    with pytest.raises(SystemExit) as stop:
        main([str(path), *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("content", [b"", b"no checkpoint"])
def test_a_file_that_is_no_checkpoint(content, tmp_path, capsys):
    path = tmp_path / "model.ckpt"
    for name in (path, tmp_path / "gone.ckpt"):
        path.write_bytes(content)
        with pytest.raises(SystemExit):
            main([str(name)])
        assert capsys.readouterr().err.count("\n") == 1
    torch.save({"state_dict": {"post_processor._image_threshold": torch.tensor(1.0)}}, path)
    with pytest.raises(SystemExit):
        main([str(path)])
    assert "without thresholds of each product" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "no thresholds of an export"),
        ("{}", "no thresholds of an export"),
        ('{"image": 0.5, "pixel": 0.5}', "no thresholds of an export"),
        ('{"unit": "metre", "image": 0.5, "pixel": 0.5, "categories": []}', "no thresholds of an export"),
        ('{"image": null, "pixel": 0.5, "categories": []}', "no thresholds of an export"),
        ('{"image": "0.5", "pixel": 0.5, "categories": []}', "no thresholds of an export"),
        (f'{{"image": 1{400 * "0"}, "pixel": 0.5, "categories": []}}', "no thresholds of an export"),
        ('{"image": 0.5, "pixel": 0.5, "categories": [{"name": 5, "image": 0.5, "pixel": 0.5}]}', "a name of its own"),
        (
            '{"image": 0, "pixel": 0, "categories": [{"index": 1, "name": "a", "image": 0, "pixel": 0},'
            '{"index": 1, "name": "b", "image": 0, "pixel": 0}]}',
            "the index that it was exported with",
        ),
        ("{", "no JSON: Expecting property name enclosed in double quotes: line 1 column 2"),
    ],
)
def test_an_edited_file_that_is_wrong(content, message, tmp_path, capsys):
    path = tmp_path / "model.thresholds.json"
    path.write_text(content)
    with pytest.raises(SystemExit):
        main([str(path), "--image", "0.4"])
    assert message in " ".join(capsys.readouterr().err.split())
    assert path.read_text() == content


def test_a_mark_of_the_encoding_is_no_error(exported, capsys):
    exported.write_bytes(b"\xef\xbb\xbf" + exported.read_bytes())
    main([str(exported)])
    assert "nut" in capsys.readouterr().out


def test_what_is_no_file_is_not_replaced(exported, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    with pytest.raises(SystemExit):
        main([str(exported), "--image", "0.4", "--output", str(tmp_path / "folder")])
    assert "no file that could be replaced" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "folder").is_dir()


def test_odd_names_links_and_modes(tmp_path, capsys):
    names = ["[/x]", "[red]nut", "Größe ü", "a/b.c"]
    post_processor = validated(CategoryPostProcessor(), names)
    path, link = tmp_path / "model.thresholds.json", tmp_path / "link.json"
    path.write_text(json.dumps(exported_thresholds(post_processor)))
    path.chmod(0o640)
    link.symlink_to(path)
    for name in names:
        main([str(link), "--category", name, "--image", "0.75"])
        assert name in capsys.readouterr().out
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert [row["image"] for row in json.loads(path.read_text())["categories"]] == [0.75] * 4


def test_an_output_without_a_change_is_an_error(checkpoint, capsys):
    with pytest.raises(SystemExit):
        main([str(checkpoint), "--output", str(checkpoint.with_name("other.ckpt"))])
    assert "--output is for a change" in capsys.readouterr().err
