"""Files that are whole or not there."""

import pytest

from anomalib_decad.files import atomic_write, write_text_atomically


def test_a_file_that_was_there_survives_an_error(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("before")

    def fail():
        with atomic_write(path) as partial:
            partial.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_text_is_written_with_its_folder_and_odd_names_of_files(tmp_path):
    path = tmp_path / "deep" / "er" / "file.txt"
    write_text_atomically(path, "größe \udcff")
    assert path.read_text(encoding="utf-8") == "größe ?"
    assert list(path.parent.iterdir()) == [path]
