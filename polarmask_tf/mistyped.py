"""A parser of command lines that says in one line what is wrong, and what was probably meant."""

from __future__ import annotations

import argparse
import sys

from polarmask_tf.errors import did_you_mean, one_line


class Parser(argparse.ArgumentParser):
    """argparse's, without the usage before an error; of a mistyped command or option it names the one that is spelled alike."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {one_line(message)}; see {self.prog} --help\n")

    def parse_args(self, args=None, namespace=None):
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            sub = self._commands().get(getattr(found, "command", None), self)
            has_data = "--data" in sub._option_string_actions and getattr(found, "data", None) is None
            hint = f"; did you mean --data {rest[0]}?" if has_data and not rest[0].startswith("-") else ""
            sub.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
        return found

    def parse_known_args(self, args=None, namespace=None):
        args = list(sys.argv[1:] if args is None else args)
        self._check(args)
        return super().parse_known_args(args, namespace)

    def _commands(self):
        return self._subparsers._group_actions[0].choices if self._subparsers else {}

    def _check(self, words):
        """Before argparse, which speaks of other arguments first, and of what is mistyped in none of its words."""
        commands, options, before = self._commands(), self._option_string_actions, None
        for word in words:
            if word == "--":
                return
            if not word.startswith("-") or word == "-" or " " in word or self._negative_number_matcher.match(word):
                if commands:
                    if word not in commands:
                        hint = did_you_mean(word, commands) or f"; there are {', '.join(commands)}"
                        self.error(f"there is no command {word!r}{hint}")
                    return  # what follows is the command's
            elif not any(option.startswith(word.partition("=")[0]) for option in options):
                if before in options and options[before].nargs != 0:
                    self.error(f"{before} {word}: a value that begins with a dash is written {before}={word}")
                name = word.partition("=")[0].lstrip("-")
                self.error(f"there is no option {word}{did_you_mean(f'--{name}', options)}")
            before = word
