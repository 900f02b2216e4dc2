"""What the README and the quickstart tell a user to type exists."""

import re
import shlex
from pathlib import Path

import pytest

from polarmask_tf import cli, config

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "exports").rglob("*.md")]


def commands():
    """Every `polarmask ...` line of the documents' code blocks, of the quickstart and of the configs' headers."""
    texts = [block for page in PAGES for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S)]
    texts.append((ROOT / "scripts/quickstart").read_text())
    texts += [re.sub(r"^#", "", file.read_text(), flags=re.M) for file in (ROOT / "configs").glob("*.yaml")]
    for text in texts:
        for line in text.replace("\\\n", " ").splitlines():
            # In the quickstart a command follows the step's title.
            found = re.search(r"^\s*(?:step \".*?\"\s+)?polarmask (.+)", line)
            if found:
                yield found.group(1)


@pytest.mark.parametrize("line", sorted(set(commands())))
def test_every_command_shown_is_one_that_the_command_line_takes(line):
    words = [w.replace("$((seed + 1))", "1") for w in shlex.split(line, comments=True)]
    args = cli.parser().parse_args(words)
    if args.command == "train" and args.config:
        name = "small" if args.config.endswith(".yaml") else args.config  # a file of the reader's own
        config.load(name, [o.replace("$seed", "0") for o in args.set])


def test_there_are_commands_to_check():
    assert {line.split()[0] for line in commands()} >= {"shapes", "convert", "train", "evaluate", "export", "predict"}


@pytest.mark.parametrize("script", ["scripts/quickstart", "scripts/test", ".ci/run"])
def test_scripts_can_be_run(script):
    assert (ROOT / script).stat().st_mode & 0o111
