"""Mutations for fuzz.py: of bytes, and of JSON values that keep what makes them JSON."""

import copy
import json
import math
import re

HOSTILE = [
    *(None, True, False, 0, -1, 1, 3, 2**31, -(2**31) - 1, 2**63, 2**64 + 5, 10**9, 10**30, 10**400, -(10**400)),
    *(0.5, -0.5, 1e-300, 1e308, -1e308, math.nan, math.inf, -math.inf),
    *("", "x", "0", "1e5", "\x1b]0;title\x07\x1b[2J", "a\nb\rc", "\u202egpj", "\ud800", "a\0b", "x" * 10_000, "\xe9\u3000"),
    *("../../../../etc/passwd", "/etc/passwd", "/dev/zero", "/proc/self/mem", "..", ".", "~", "a/b", "\\\\a\\b", "[a]*?.png"),
    *([], {}, [[]], [None], [{}], {"": {}}, [0] * 1000, [[0, 0]] * 50, "@DEEP@", "@LONG@", "@OBJECTS@"),
]
# What json.dumps cannot write, or takes too long to.
_TEXTS = {
    '"@DEEP@"': "[" * 50_000 + "]" * 50_000,
    '"@LONG@"': "9" * 100_000,
    '"@OBJECTS@"': '{"a":' * 3000 + "0" + "}" * 3000,
}


def mutate_bytes(rng, data):
    """One to four changes of a run of bytes."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, size = rng.randrange(len(data) + 1), min(len(data), int(2 ** rng.uniform(0, 8)))
        match rng.randrange(9):
            case 0 | 1 if data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
            case 2 if data:
                data[at % len(data)] = rng.choice((0, 1, 0x20, 0x7F, 0x80, 0xFE, 0xFF))
            case 3:
                data[at : at + size] = rng.randbytes(size)
            case 4:
                del data[at : at + size]
            case 5:
                data[at:at] = rng.randbytes(size)
            case 6:
                data[at:at] = data[at : at + size] * rng.choice((1, 2, 100))
            case 7:
                number = rng.choice((0, 1, 0x7FFF, 0xFFFF, 2**24, 2**31 - 1, 2**31, 2**32 - 1)).to_bytes(
                    4, rng.choice(("big", "little"))
                )
                data[at : at + 4] = number
            case 8:
                del data[at:]
    return bytes(data)


def mutate_text(rng, data, odd):
    """One to four changes of words and lines of UTF-8 text; `odd` are words and lines that its readers may stumble over."""
    lines = data.decode(errors="surrogateescape").splitlines()
    hostile = [str(value) for value in HOSTILE if not isinstance(value, (list, dict))]
    for _ in range(rng.choice((1, 1, 2, 4))):
        lines = lines or [""]
        at = rng.randrange(len(lines))
        words = list(re.finditer(r"[^\s,;:\"'<>=/]+", lines[at]))
        match rng.randrange(6):
            case 0 | 1 | 2 if words:
                word = rng.choice(words)
                new = rng.choice(hostile) if rng.random() < 0.7 else rng.choice(odd)
                lines[at] = lines[at][: word.start()] + new + lines[at][word.end() :]
            case 3:
                lines[at:at] = [rng.choice(odd)]
            case 4:
                lines[at:at] = [lines[rng.randrange(len(lines))]] * rng.choice((1, 2, 300))
            case _:
                del lines[at]
    return rng.choice(("\n", "\n", "\r\n")).join(lines).encode(errors="surrogatepass")


def mutate_json(rng, value):
    """JSON text of a value of which one to four places were changed."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        value = copy.deepcopy(_change(rng, value))  # the next change must not reach what HOSTILE holds
    return to_text(value, rng)


def to_text(value, rng=None):
    text = json.dumps(value, ensure_ascii=rng is None or rng.random() < 0.5)
    for name, replacement in _TEXTS.items():
        text = text.replace(name, replacement)
    return re.sub(r'@TWICE\d*@"', '"', text).encode(errors="surrogatepass")


def places(value, path=()):
    """The path of every place in a value, itself first."""
    yield path
    for key in value if isinstance(value, dict) else range(min(len(value), 20)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def _change(rng, value):
    path = rng.choice(list(places(value)))
    if not path:
        return rng.choice(HOSTILE) if rng.random() < 0.1 else value
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    key, old = path[-1], holder[path[-1]]
    match rng.randrange(8):
        case 0 if isinstance(holder, dict):
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[f"{key}@TWICE{len(holder)}@"] = rng.choice((old, rng.choice(HOSTILE)))
        case 2 if isinstance(holder, list):
            holder[key:key] = [old] * rng.choice((1, 2, 1000))
        case 3 if isinstance(holder, list):
            del holder[key:]
        case 4 | 5 if isinstance(old, (int, float)) and not isinstance(old, bool):
            holder[key] = rng.choice(
                (
                    -old,
                    old + 0.5 if abs(old) < 1e300 else old,
                    str(old),
                    old * 10 ** rng.randrange(1, 12),
                    old + rng.choice((-1, 1)),
                    [old],
                )
            )
        case 6 if isinstance(old, list) and old:
            holder[key] = rng.choice(
                (old * rng.choice((2, 300)), old[::-1], old[:-1], {"0": old}, [old], rng.sample(old, len(old)))
            )
        case _:
            holder[key] = rng.choice(HOSTILE)
    return value
