"""The one exception that means "your input, not our bug", and text of others: in one line, in one spelling, misspelled."""

import unicodedata


def one_line(text, longest: int = 2000) -> str:
    """Text out of a file, a server or a library, as one line that a terminal shows and does not obey.

    Line ends become spaces, other control characters (and what Unicode does not print) their escapes, like \\x1b, and of a
    longer text the middle is left out.
    """
    line = " ".join(part.strip() for part in str(text).splitlines() if part.strip())
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    return line if len(line) <= longest else f"{line[: longest // 2]} ... {line[-(longest // 2) :]}"


def nfc(text: str) -> str:
    """Text of which letters with marks are one character each: macOS takes names apart, and other systems do not."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def counted(number: int, noun: str, plural: str = "") -> str:
    """Like "1 image", "2,000 images", "3 classes" (plural="classes")."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def did_you_mean(word: str, known) -> str:
    """ "; did you mean 'this'?" of the one of `known` that is spelled most alike; "" if none is."""
    import difflib  # here: it would be a tenth of the time of `polarmask --help`

    plain = {name.lower(): name for name in reversed(list(known))}
    near = difflib.get_close_matches(word[:200].lower(), plain, 1, 0.5)
    return f"; did you mean {plain[near[0]]!r}?" if near else ""


class InputError(Exception):
    """What is wrong, where (file, image id, annotation id) and what to do, in one line.

    The command line prints it as `polarmask: error: ...` and exits with 2; library callers catch it. The message may hold
    text of files as it is: it is passed through one_line.
    """

    def __init__(self, message=""):
        super().__init__(one_line(message))
