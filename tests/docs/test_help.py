"""Every command explains itself."""

from __future__ import annotations

import argparse

import pytest

import bench.__main__
import ghostfused.__main__

PROGRAMS = {
    "bench": (bench.__main__.main, list(bench.__main__.COMMANDS)),
    "ghostfused": (ghostfused.__main__.main, list(ghostfused.__main__.COMMANDS)),
}
COMMANDS = [(program, command) for program, (_, commands) in PROGRAMS.items() for command in commands]


def help_of(program: str, *command: str) -> None:
    with pytest.raises(SystemExit) as ended:
        PROGRAMS[program][0]([*command, "--help"])
    assert not ended.value.code


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_names_its_commands(program, capsys):
    help_of(program)
    said = capsys.readouterr().out
    assert said.startswith(f"usage: python -m {program} ")
    assert all(f"\n    {command} " in said for command in PROGRAMS[program][1])


@pytest.mark.parametrize(("program", "command"), COMMANDS)
def test_a_command_names_its_options(program, command, capsys):
    help_of(program, command)
    said = capsys.readouterr().out
    assert said.startswith("usage: ")
    assert "--help" in said


@pytest.mark.parametrize("command", ghostfused.__main__.COMMANDS)
def test_an_option_says_what_it_is(command):
    parser = argparse.ArgumentParser()
    ghostfused.__main__.COMMANDS[command].add_arguments(parser)
    assert not [action.option_strings for action in parser._actions if action.option_strings and not action.help]
