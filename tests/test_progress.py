"""How far something is, on a terminal and in a file."""

from anomalib_decad.progress import progress_bar


def run(enabled=True):
    with progress_bar("Working", enabled) as report:
        for index in range(20):
            report((index + 1) / 20)


def test_it_begins_and_ends_with_a_line_and_writes_few_between(capsys):
    run()
    error = capsys.readouterr().err
    assert "Working: 100%" in error
    assert error.count("Working") <= 3


def test_nothing_if_not_wanted(capsys):
    run(enabled=False)
    assert not "".join(capsys.readouterr())
