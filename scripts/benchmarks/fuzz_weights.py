"""For fuzz.py: weights as torch.save writes them."""

import io
import itertools
import pickle
import pickletools
import zipfile

from fuzz_inputs import mutate_bytes
from fuzz_kind import Kind, refusing


def torch_files(out):
    """A training's checkpoint in the new and in the old format; made once for each OUT, since it takes torch."""
    files = [out / "seed" / "new.pth", out / "seed" / "old.pth"]
    if not all(file.is_file() for file in files):
        import torch

        files[0].parent.mkdir(parents=True, exist_ok=True)
        module = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3))
        content = {"meta": {"epoch": 12, "CLASSES": ("a", "b")}, "state_dict": module.state_dict()}
        for file in files:
            torch.save(content, file, _use_new_zipfile_serialization=file.name == "new.pth")
    return [file.read_bytes() for file in files]


# Opcodes that do something, good or bad, wherever they stand.
_OPCODES = [
    b"cos\nsystem\n",
    b"cbuiltins\ngetattr\n",
    b"\x93",
    b"\x81",
    b"R",
    b"Q",
    b"b",
    b"s",
    b"u",
    b"a",
    b"e",
    b"(",
    b"t",
    b"d",
]
_OPCODES += [b"0", b"1", b".", b"}", b"]", b")", b"N", b"h\0", b"q\0", b"r\xff\xff\xff\xff", b"\x94", b"\x85" * 50_000]
_OPCODES += [b"X\xff\xff\xff\x7f", b"\x8b\xff\xff\xff\x7f", b"\x95" + b"\xff" * 8, b"\x82\1", b"2"]
_COUNTS = (0, 1, -1, 2, 3, 54, 2**31, 2**40, 2**63, -(2**63))


def _change_pickle(rng, data):
    """One to four changes of opcodes: another number behind one, one more, one less."""
    places = [place for _, _, place in pickletools.genops(data)]
    pieces = [data[a:b] for a, b in zip(places, [*places[1:], len(data)], strict=True)]
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(pieces))
        match rng.randrange(6):
            case 0 | 1 | 2:
                numbers = [i for i, piece in enumerate(pieces) if piece[:1] in b"KMJ"]
                pieces[rng.choice(numbers or [at])] = pickle.dumps(rng.choice(_COUNTS), 2)[2:-1]
            case 3:
                pieces[at:at] = [rng.choice(_OPCODES)]
            case 4:
                del pieces[at]
            case 5:
                pieces[at] = pieces[rng.randrange(len(pieces))]
        pieces = pieces or [b"."]
    return b"".join(pieces)


def change_torch(rng, data):
    if rng.random() < 0.3:
        return mutate_bytes(rng, data)
    file = io.BytesIO()
    if data.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(data)) as before, zipfile.ZipFile(file, "w") as after:
            for name in before.namelist():
                content = before.read(name)
                after.writestr(name, _change_pickle(rng, content) if name.endswith("data.pkl") else content)
        return file.getvalue()
    text, ends = io.BytesIO(data), [0]
    while len(ends) < 6:  # magic number, protocol, system, content, keys
        for _ in pickletools.genops(text):
            pass
        ends.append(text.tell())
    parts = [data[a:b] for a, b in itertools.pairwise(ends)]
    changed = rng.choice((2, 3, 3, 3, 4))
    parts[changed] = _change_pickle(rng, parts[changed])
    numbers = data[ends[-1] :]
    return b"".join(parts) + (mutate_bytes(rng, numbers) if rng.random() < 0.3 else numbers)


def prepare_torch(folder, out):
    from polarmask_tf.weights.state_dict import read_tensors

    def run(data):
        (folder / "a.pth").write_bytes(data)
        tensors = read_tensors(folder / "a.pth")
        assert sum(value.nbytes for value in tensors.values()) <= 16 * len(data), "more numbers than the file holds"

    return refusing(run)


KINDS = {"torch": Kind(prepare_torch, torch_files, change_torch)}
