"""What all programs do alike."""

import re

import pytest

from experiments import command


@pytest.fixture(autouse=True)
def no_flags(monkeypatch):
    monkeypatch.setattr(command.app, "run", lambda program, argv: program(argv))


def test_what_is_no_flag_is_refused():
    with pytest.raises(SystemExit, match=r"error: 'qsgd' is no flag; all settings are given as --name=value"):
        command.run(lambda: pytest.fail("ran"), ["program", "qsgd"])


def test_an_interruption_ends_in_a_word(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        command.run(main, ["program"])
    assert end.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_directory_is_made_before_the_work(tmp_path):
    made = command.directory("out_dir", str(tmp_path / "a" / "b"))
    assert made.is_dir()
    assert not list(made.iterdir())


def test_a_place_where_nothing_can_be_written_is_refused(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SystemExit, match=rf"error: --out_dir={re.escape(str(file))} is no directory to write in \("):
        command.directory("out_dir", str(file))


def test_a_program_may_take_words():
    took = []
    command.run(took.extend, ["program", "sh", "-c"], words=True)
    assert took == ["sh", "-c"]
