"""The run's table on terminals of several widths, and in log files."""

import io

import pytest
from rich.console import Console

from jaxft.display import COLUMNS, Display

ROW = {
    "epoch": 1,
    "is_best": True,
    "train/loss": 12.25,
    "valid/energy": 0.0125,
    "valid/forces": 0.25,
    "valid/stress": 0.0005,
    "valid/loss": 3.0,
    "learning_rate": 1e-3,
    "seconds": 3.5,
}
REPLAY = {"replay/energy": 0.001, "replay/forces": 0.0625, "replay/loss": 1.0}
HEAD = {"pbe[sol]/energy": 0.004, "pbe[sol]/stress": 0.002}

START = {**ROW, "epoch": 0, "seconds": 1.0}


def shown(*rows, width=None, **options):
    """The lines that these rows print: on a terminal of that width, or into a file."""
    file = io.StringIO()
    is_terminal = width is not None
    console = Console(file=file, width=width, force_terminal=is_terminal, color_system=None)
    display = Display(console, **options)
    for row in rows:
        display.epoch(row)
    return file.getvalue().splitlines()


def test_a_run_without_watched_sets_has_one_heading_and_a_line_per_epoch():
    heading, first, second = shown(START, ROW)
    names = "epoch train loss E meV/atom F meV/Å σ meV/Å³ s/epoch atoms/s"
    assert " ".join(heading.split()) == names
    assert first.split() == ["0", "12.25", "12.50", "250.00", "0.50", "1.0", "–", "*"]
    assert len(heading) == len(second) - 2  # the mark of the best epoch


def test_numbers_stand_below_their_headings():
    _, columns, line = shown(ROW | REPLAY | HEAD)
    for metric, (name, _) in COLUMNS.items():
        assert columns.count(name) == 3 * (metric != "moments")  # of which there are none here
    ends = [i for i, c in enumerate(columns) if c != " " and columns[i + 1 : i + 2] in ("", " ")]
    numbers = ["1", "12.25", "12.50", "250.00", "0.50", "1.00", "62.50", "4.00", "2.00", "3.5"]
    position = 0
    for number in numbers:
        position = line.index(number, position) + len(number)
        assert position - 1 in ends, number


def test_a_log_file_names_the_sets_above_their_columns_and_has_no_escape_codes():
    above, columns, line = shown(ROW | REPLAY | HEAD)
    blocks = [[part.strip() for part in text.split("│")] for text in (above, columns, line)]
    assert blocks[0][1:3] == ["replay", "pbe[sol]"]
    assert blocks[0][0] == "valid"
    assert [block.split() for block in blocks[2][1:3]] == [
        ["1.00", "62.50", "–"],
        ["4.00", "–", "2.00"],
    ]
    assert "\x1b" not in "".join((above, columns, line))


def test_a_narrow_terminal_wraps_watched_sets_into_lines_of_their_own():
    heading, line, replay, head = shown(ROW | REPLAY | HEAD, width=80)
    assert replay.split() == ["replay", "1.00", "62.50", "–"]
    assert head.split() == ["pbe[sol]", "4.00", "–", "2.00"]
    assert heading.index("E meV/atom") + len("E meV/atom") == replay.index("1.00") + len("1.00")
    assert line.split()[-1] == "*"


@pytest.mark.parametrize("width", range(64, 160))
def test_no_line_is_wider_than_the_terminal(width):
    lines = shown(START | REPLAY | HEAD, ROW | REPLAY | HEAD, width=width)
    assert max(map(len, lines)) <= width
    assert sum("250.00" in line for line in lines) == 2


def test_a_set_that_is_not_judged_every_epoch_moves_no_column():
    lines = shown(START | REPLAY, ROW, ROW | REPLAY)
    assert len(lines) == 2 + 3
    assert len({len(line) for line in lines[2:]}) == 1
    assert lines[3].split("│")[1].split() == ["–", "–", "–"]
    assert len(shown(START | REPLAY, ROW, ROW | REPLAY, width=72)) == 1 + 2 + 1 + 2


def test_a_set_that_appears_later_gets_a_new_heading():
    lines = shown(START, ROW | REPLAY, ROW | REPLAY)
    assert sum("epoch" in line for line in lines) == 2


def test_a_name_that_is_too_long_is_cut_not_wrapped():
    name = "a very long name of a head that nobody can fit above three columns"
    for width, expected in ((160, "a very long name of"), (72, "a very long")):
        lines = shown(ROW | {f"{name}/energy": 0.001}, width=width)
        assert max(map(len, lines)) <= width
        assert any(expected in line and "…" in line for line in lines)


def test_huge_and_broken_numbers_keep_their_column():
    _, line = shown({**ROW, "valid/energy": 1e9, "valid/forces": float("nan")}, initial_error=1e99)
    assert line.split()[2:4] == ["1.000e+12", "nan"]


def test_energies_of_another_level_of_theory_are_worth_a_warning_before_training():
    off = {"valid/energy": 0.75, "replay/energy": 0.625, "replay/forces": 0.1}
    lines = shown(START | off)
    assert [line[:8] for line in lines[-2:]] == ["warning:"] * 2
    assert "energies are off by 0.75 eV/atom" in lines[-2]
    assert "energies of replay are off by 0.62 eV/atom" in lines[-1]
    assert not any("warning" in line for line in shown(ROW | off))
    assert not any("warning" in line for line in shown(START | off, initial_error=1.0))


def test_messages_are_printed_as_they_are():
    file = io.StringIO()
    display = Display(Console(file=file))
    display.say("wrote [bold]out[/bold].jaxft " + "x" * 100)
    display.warn("beware of [brackets]")
    first, second = file.getvalue().splitlines()
    assert first == "wrote [bold]out[/bold].jaxft " + "x" * 100
    assert second == "warning: beware of [brackets]"


def test_a_bar_is_drawn_on_a_terminal_alone():
    for is_terminal in (True, False):
        file = io.StringIO()
        console = Console(file=file, force_terminal=is_terminal, width=80)
        assert list(Display(console).track(range(3), total=3, label="epoch 1")) == [0, 1, 2]
        assert ("epoch 1" in file.getvalue()) == is_terminal


def test_without_a_console_nothing_is_written_anywhere(capsys):
    display = Display()
    display.epoch(ROW | REPLAY)
    display.say("x")
    display.warn("x")
    assert list(display.track([1], total=1, label="x")) == [1]
    assert capsys.readouterr() == ("", "")
