"""Click's classes with two additions: options have headings in the help, and may have old names."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from dcconvert.passes.ir.errors import UsageError

OTHER = "Other options"  # the heading of options that have no other, such as --help
NAME_WIDTH = 30  # longer names have a line of their own
PATH = click.Path(path_type=Path)
METAVARS = {"integer": "N", "integer range": "N", "float": "X", "float range": "X"}


class Option(click.Option):
    """An option under a heading of the help. `aliases` are old names, which still work but are not shown."""

    def __init__(self, *args: Any, heading: str = OTHER, aliases: Sequence[str] = (), **attrs: Any) -> None:
        super().__init__(*args, **attrs)
        self.heading, self.aliases = heading, list(aliases)
        self.metavar = self.metavar or METAVARS.get(self.type.name)

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        shown = self.opts
        self.opts = shown + self.aliases
        super().add_to_parser(parser, ctx)
        self.opts = shown

    def get_help_extra(self, ctx: click.Context) -> Any:
        """Shows defaults given in words without parentheses, and no ranges: help texts state ranges if needed."""
        extra = super().get_help_extra(ctx)
        extra.pop("range", None)
        if isinstance(self.show_default, str):
            extra["default"] = self.show_default
        return extra


class Command(click.Command):
    """A command whose help lists its options under their headings, in the order of the source.

    `late` returns a decorator with more options. It is called when the options are first needed, and a list of
    commands does not need them.
    """

    def __init__(self, *args: Any, late: Callable[[], Callable[[Any], Any]] | None = None, **attrs: Any) -> None:
        self._late = late
        super().__init__(*args, **attrs)

    @property
    def params(self) -> list[click.Parameter]:
        late, self._late = self._late, None
        if late is not None:
            self._params += click.command()(late()(lambda: None)).params
        return self._params

    @params.setter
    def params(self, value: list[click.Parameter]) -> None:
        self._params = value

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if isinstance(param, click.Option) and (record := param.get_help_record(ctx)):
                sections.setdefault(getattr(param, "heading", OTHER), []).append(record)
        sections[OTHER] = sections.pop(OTHER)  # last
        longest = max(len(name) for records in sections.values() for name, _ in records)
        width = min(longest, NAME_WIDTH)
        for heading, records in sections.items():
            with formatter.section(heading):  # padded, so that the columns of all sections line up
                formatter.write_dl([(name.ljust(width), text) for name, text in records], col_max=NAME_WIDTH)


class Commands(click.Group):
    """A group with a default command, listed in the order in which the commands are written.

    A first word that is neither a command nor an option of the group belongs to the default command.
    """

    command_class = Command

    def __init__(self, *args: Any, default: str, **attrs: Any) -> None:
        super().__init__(*args, **attrs)
        self.default = default

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = {name for param in self.get_params(ctx) for name in param.opts}
        if args and args[0] not in self.commands and args[0] not in own:
            if not ctx.resilient_parsing:
                self.check_spelling(args[0])
            args = [self.default, *args]
        return super().parse_args(ctx, args)

    def check_spelling(self, word: str) -> None:
        """Raises UsageError for a word that is close to the name of a command and is not a file."""
        near = difflib.get_close_matches(word, self.commands, 1)
        if near and not Path(word).exists():
            raise UsageError(f"there is no command or file '{word}': did you mean 'dcconvert {near[0]}'?")

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Names of commands and options; if none matches, files for the default command."""
        found = super().shell_complete(ctx, incomplete)
        return found or [CompletionItem(incomplete, type="file")] * (not incomplete.startswith("-"))


def option(*names: str, **attrs: Any) -> Callable[[str], Any]:
    """An option for `section`. Takes click's arguments and `aliases`."""
    return lambda heading: click.option(*names, cls=Option, heading=heading, **attrs)


def section(heading: str, *made: Callable[[str], Any]) -> Callable[[Any], Any]:
    """A decorator that adds options under a heading to a command."""
    return options(*(under(heading) for under in made))


def options(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Combines several decorators into one. Options appear in the help in the order of the source."""

    def decorate(command: Any) -> Any:
        for decorator in reversed(decorators):  # click reads decorators from the last to the first
            command = decorator(command)
        return command

    return decorate
