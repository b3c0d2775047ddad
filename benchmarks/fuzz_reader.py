"""Damaged torch files by the thousand: the reader reads or refuses each one and does no harm.

    python benchmarks/fuzz_reader.py --cases 20000
    python benchmarks/fuzz_reader.py --cases 10000 --convert

Real files of several kinds of model (only the shipped one where torch is not installed), in both of
torch's formats, are changed at random: bytes, instructions of the pickle inside a sound container,
numbers, strings, members and storages. Each must end in a model or in a ModelFileError, within a
limit of time and memory, without importing anything; with --convert, in a model in JAX. The cases
run in a process of their own, which is replaced when it dies; each is made from the files, the seed
and its number alone, and --keep FOLDER keeps those that fail. 10 000 cases take two minutes on one
core. Prints a table, writes its part of results/fuzz_reader.json, and fails if any case did.
"""

from __future__ import annotations

import argparse
import codecs
import collections
import dataclasses
import gzip
import io
import json
import os
import pickletools
import platform
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch_files as tf  # noqa: E402

from converters.reader import ModelFileError, read  # noqa: E402
from converters.unpickle import ALLOWED  # noqa: E402

RESULT = Path(__file__).parent / "results" / "fuzz_reader.json"
TINY = ROOT / "tests" / "data" / "tiny.model.gz"

SECONDS = 10  # of the clock, for one case
MEMORY = 1 << 30  # bytes of address space beyond what the worker has at the start
CASES_PER_WORKER = 1000

INTEGERS = (0, 1, 2, 3, -1, 7, 255, 256, 65535, 2**31 - 1, 2**31, -(2**31), 2**32, 2**62, 2**63)
FLOATS = (0.0, -1.0, 0.5, 1e-308, 1e308, float("inf"), float("nan"))
STRINGS = (
    *("", ".", "..", "../data.pkl", "0", "1", "a" * 101, "\0", "é", "_modules", "_buffers"),
    *(
        "2x0e",
        "2x0e+2x1o",
        "2x0o",
        "0e+0e",
        "999999999x0e",
        "1x11o",
        "1x99e",
        "+".join(["1e"] * 999),
    ),
)
SNIPPETS = (
    *(b"cos\nsystem\n", b"cbuiltins\neval\n", b"\x8c\x02os\x8c\x06system\x93"),
    *(b"X\xff\xff\xff\xff", b"\x8d" + b"\xff" * 8, b"r\xff\xff\xff\xff", b"j\xff\xff\xff\xff"),
    *(b"I" + b"9" * 5000 + b"\n", b"L" + b"9" * 5000 + b"L\n", b"\x8b\xff\xff\xff\x7f"),
    *(b"\x85" * 3000, b"(" * 3000, b"]" * 3000, b"N0", b"2", b"1", b"(", b".", b"Q", b"R", b"b"),
    *(b"\x81", b"t", b"e", b"u", b"s", b"a", b"\x8f(", b"\x90", b"\x91", b"\x82\x01", b"\x97"),
)


# --- files ----------------------------------------------------------------------------------------


@dataclasses.dataclass
class Base:
    """A sound file, taken apart.

    Attributes:
      name: Which model, and in which format.
      data: The whole file.
      like: The model that it needs, if it holds weights only.
      steps: The instructions of its pickle.
      members: The other parts: members of the archive, or the storages as they lie in the file.
      head: What precedes the pickle in the old format, or the pickle's name in the archive.
      keys: The pickle with the keys of the storages; only in the old format.
    """

    name: str
    data: bytes
    like: Path | None
    steps: list[bytes]
    members: dict[str, bytes]
    head: bytes | str
    keys: bytes = b""

    def rebuild(self, instructions: bytes, members: dict[str, bytes] | None = None) -> bytes:
        """A file with another pickle, or other members, in a sound container."""
        members = self.members if members is None else members
        if isinstance(self.head, bytes):
            return b"".join([self.head, instructions, self.keys, *members.values()])
        stream = io.BytesIO()
        with warnings.catch_warnings(), zipfile.ZipFile(stream, "w") as archive:
            warnings.simplefilter("ignore")  # names that occur twice
            archive.writestr(zipfile.ZipInfo(self.head), instructions)
            for name, content in members.items():
                archive.writestr(zipfile.ZipInfo(name), content)
        return stream.getvalue()


def steps_of(stream: io.BytesIO) -> list[bytes]:
    """The instructions of the pickle at the stream's position, which moves behind it."""
    start = stream.tell()
    positions = [position for _, _, position in pickletools.genops(stream)]
    data = stream.getvalue()
    ends = [*positions[1:], stream.tell()]
    assert positions[0] == start
    return [data[a:b] for a, b in zip(positions, ends, strict=True)]


def take_apart(name: str, path: Path, like: Path | None = None) -> Base:
    data = path.read_bytes()
    if data.startswith(b"PK"):
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: archive.read(info) for info in archive.infolist()}
        head = next(name for name in members if name.endswith("/data.pkl"))
        steps = steps_of(io.BytesIO(members.pop(head)))
        return Base(f"{name}, zip", data, like, steps, members, head)
    stream = io.BytesIO(data)
    header = b"".join(step for _ in range(3) for step in steps_of(stream))
    steps = steps_of(stream)
    keys = b"".join(steps_of(stream))
    rest = data[stream.tell() :]
    # Sizes of the storages are not needed: parts of a plausible length do as well
    members = {str(i): rest[i : i + 4096] for i in range(0, len(rest), 4096)}
    return Base(f"{name}, old", data, like, steps, members, header, keys)


def shipped(folder: Path) -> Iterator[Base]:
    """The model of the tests, and its weights alone, which need no torch."""
    model = folder / "tiny.model"
    model.write_bytes(gzip.decompress(TINY.read_bytes()))
    weights = tf.state_dict(read(model).tensors, folder / "weights.pt")
    checkpoint = tf.state_dict(
        read(model).tensors,
        folder / "checkpoint.pt",
        wrap=lambda found: {"model": found, "optimizer": {"state": {}}, "lr_scheduler": {}},
    )
    yield take_apart("shipped", model)
    yield take_apart("shipped", tf.to_legacy(model, folder / "tiny.old"))
    yield take_apart("weights", weights, model)
    yield take_apart("checkpoint", tf.to_legacy(checkpoint, folder / "checkpoint.old"), model)


def built(folder: Path) -> Iterator[Base]:
    """Models of several kinds, as torch and mace write them."""
    os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        from e3nn import o3
        from mace.modules import interaction_classes as blocks
        from mace.modules.blocks import NonLinearBiasReadoutBlock

    small = {
        "hidden_irreps": o3.Irreps("2x0e+2x1o"),
        "MLP_irreps": o3.Irreps("2x0e"),
        "max_ell": 1,
        "num_bessel": 3,
    }
    heads = {"heads": ["a", "b"], "atomic_inter_scale": [1.0, 1.0], "atomic_inter_shift": [0.0] * 2}
    families = {
        "residual": {},
        "density": {
            "interaction_cls": blocks["RealAgnosticDensityResidualInteractionBlock"],
            "interaction_cls_first": blocks["RealAgnosticDensityInteractionBlock"],
            "distance_transform": "Agnesi",
            "pair_repulsion": True,
            "dtype": "float32",
        },
        "nonlinear": {
            "interaction_cls": blocks["RealAgnosticResidualNonLinearInteractionBlock"],
            "interaction_cls_first": blocks["RealAgnosticResidualNonLinearInteractionBlock"],
            "edge_irreps": o3.Irreps("2x0e+2x1o"),
        },
        "heads": {
            "interaction_cls_first": blocks["RealAgnosticInteractionBlock"],
            "radial_type": "gaussian",
            "gate": torch.tanh,
            "atomic_energies": torch.ones(2, 3).numpy(),
            **heads,
        },
    }
    spec = {"type": "categorical", "per": "graph", "num_classes": 5, "offset": 2, "emb_dim": 3}
    families["embeddings"] = families["nonlinear"] | {
        "readout_cls": NonLinearBiasReadoutBlock,
        "apply_cutoff": False,
        "use_embedding_readout": True,
        "embedding_specs": {
            "total_charge": spec,
            "colour": {"type": "continuous", "per": "node", "in_dim": 2, "emb_dim": 3},
        },
    }
    for name, changes in families.items():
        model = tf.mace_model(**small | changes)
        path = folder / f"{name}.model"
        tf.save(model, path, pickle_protocol=4 if name == "heads" else 2)
        yield take_apart(name, path)
        tf.save(model, folder / "old", _use_new_zipfile_serialization=False)
        yield take_apart(name, folder / "old")
    optimizer = torch.optim.Adam(model.parameters(), amsgrad=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    tf.save(states, folder / "states.pt")
    yield take_apart("states", folder / "states.pt", path)


# --- mutations ------------------------------------------------------------------------------------


def flip_bytes(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def splice_bytes(data: bytes, rng: random.Random) -> bytes:
    """Cut, repeat or move a piece of the file."""
    start, target = rng.randrange(len(data)), rng.randrange(len(data))
    piece = data[start : start + rng.choice((1, 8, 100, 5000))]
    match rng.randrange(3):
        case 0:
            return data[:start] + data[start + len(piece) :]
        case 1:
            return data[:target] + piece + data[target:]
        case _:
            return data[:target] + piece + data[target + len(piece) :]


def flip_headers(data: bytes, rng: random.Random) -> bytes:
    """Bytes of the archive's tables, or of the first pickles and the end of the old format."""
    changed = bytearray(data)
    marks = (b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06")
    starts = [start for mark in marks if (start := data.rfind(mark)) >= 0] or [0]
    for _ in range(rng.randint(1, 4)):
        start = rng.choice(starts)
        index = min(start + rng.randrange(60), len(changed) - 1)
        changed[index] = rng.choice((0, 1, 8, 127, 128, 255, rng.randrange(256)))
    return bytes(changed)


def literal(value: int | float | str) -> bytes:
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        raw = value.encode()
        return b"X" + len(raw).to_bytes(4, "little") + raw
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def delete_steps(steps: list[bytes], rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 2, 5))):
        start = rng.randrange(len(steps))
        del steps[start : start + rng.choice((1, 1, 3, 50))]
        if not steps:
            steps.append(b".")


def repeat_steps(steps: list[bytes], rng: random.Random) -> None:
    start = rng.randrange(len(steps))
    piece = steps[start : start + rng.choice((1, 1, 3, 50))]
    target = rng.choice((start, rng.randrange(len(steps))))
    steps[target:target] = piece * rng.choice((1, 1, 2, 100))


def swap_steps(steps: list[bytes], rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 2, 5))):
        a, b = rng.randrange(len(steps)), rng.randrange(len(steps))
        steps[a], steps[b] = steps[b], steps[a]


def insert_hostile(steps: list[bytes], rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 3))):
        steps.insert(rng.randrange(len(steps)), rng.choice(SNIPPETS))


def change_numbers(steps: list[bytes], rng: random.Random) -> None:
    places = [i for i, step in enumerate(steps) if step[:1] in b"KMJ\x8aG"]
    for i in rng.sample(places, min(len(places), rng.choice((1, 1, 2, 10)))):
        steps[i] = literal(rng.choice((*INTEGERS, *FLOATS, *[rng.randrange(100)] * 5)))


def change_memo(steps: list[bytes], rng: random.Random) -> None:
    """Fetch another object than the one that is meant."""
    places = [i for i, step in enumerate(steps) if step[:1] in b"hj"]
    for i in rng.sample(places, min(len(places), rng.choice((1, 1, 2, 10)))):
        steps[i] = b"j" + rng.choice((0, 1, rng.randrange(3000))).to_bytes(4, "little")


def change_strings(steps: list[bytes], rng: random.Random) -> None:
    places = [i for i, step in enumerate(steps) if step[:1] in b"X\x8c"]
    for i in rng.sample(places, min(len(places), rng.choice((1, 1, 2, 10)))):
        steps[i] = rng.choice((literal(rng.choice(STRINGS)), steps[rng.choice(places)]))


def change_globals(steps: list[bytes], rng: random.Random) -> None:
    places = [i for i, step in enumerate(steps) if step[:1] == b"c"]
    names = sorted(ALLOWED)
    for i in rng.sample(places, min(len(places), rng.choice((1, 1, 2)))):
        module, _, name = rng.choice((*names, "os.system", "builtins.exec")).rpartition(".")
        steps[i] = f"c{module}\n{name}\n".encode()


def flip_steps(steps: list[bytes], rng: random.Random) -> None:
    """Other instructions with the same arguments, and the reverse."""
    for _ in range(rng.choice((1, 1, 2, 5))):
        i = rng.randrange(len(steps))
        steps[i] = flip_bytes(steps[i], rng) if steps[i] else b"N"


def change_members(members: dict[str, bytes], rng: random.Random) -> dict[str, bytes]:
    names = list(members)
    a, b = rng.choice(names), rng.choice(names)
    content = members[a]
    match rng.randrange(6):
        case 0:
            return members | {a: members[b], b: content}
        case 1:
            return {name: members[name] for name in names if name != a}
        case 2:
            return members | {a: content[: rng.randrange(len(content) + 1)]}
        case 3:
            return members | {a: content + bytes(rng.choice((1, 4, 8, 4096)))}
        case 4:
            return {
                name if name != a else f"{b[:-1]}{rng.choice(STRINGS)}": members[name]
                for name in names
            }
        case _:
            rng.shuffle(names)
            return {name: members[name] for name in names}


WHOLE: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "bytes flipped": flip_bytes,
    "truncated": truncate,
    "bytes moved": splice_bytes,
    "headers flipped": flip_headers,
}
STEPS: dict[str, Callable[[list[bytes], random.Random], None]] = {
    "instructions deleted": delete_steps,
    "instructions repeated": repeat_steps,
    "instructions swapped": swap_steps,
    "instructions flipped": flip_steps,
    "hostile instructions": insert_hostile,
    "numbers": change_numbers,
    "strings": change_strings,
    "globals": change_globals,
    "memo": change_memo,
}
MUTATIONS = (*WHOLE, *STEPS, "members", "several")


def mutate(base: Base, mutation: str, rng: random.Random) -> bytes:
    """The file of ``base`` after one kind of damage."""
    if mutation in WHOLE:
        return WHOLE[mutation](base.data, rng)
    if mutation == "members":
        return base.rebuild(b"".join(base.steps), change_members(base.members, rng))
    steps = list(base.steps)
    kinds = [mutation] if mutation in STEPS else rng.sample(sorted(STEPS), 3)
    for kind in kinds:
        STEPS[kind](steps, rng)
    return base.rebuild(b"".join(steps))


def case(bases: list[Base], seed: int, number: int) -> tuple[Base, str, bytes]:
    """Case ``number``, which depends on nothing else but the seed and the files."""
    rng = random.Random(f"{seed}/{number}")
    base, mutation = rng.choice(bases), rng.choice(MUTATIONS)
    return base, mutation, mutate(base, mutation, rng)


# --- running them ---------------------------------------------------------------------------------


def convert(path: Path, like: Path | None) -> None:
    """What :func:`read` gives, and then the model in JAX."""
    from converters.to_jax import convert

    read(path, like=like)
    convert(path) if like is None else convert(path, like=like)


def attempt(path: Path, like: Path | None, function: Callable[..., object] = read) -> str:
    """``read``, ``refused``, ``damaged`` (refused since Python failed on it), or the failure."""
    modules = set(sys.modules)
    try:
        function(path, like=like)
        outcome = "read"
    except ModelFileError as error:
        outcome = "damaged" if "not an intact" in str(error) else "refused"
    except BaseException as error:  # whatever it is, it is the finding
        return f"failed: {type(error).__name__}: {error!s:.200}"
    added = sorted(set(sys.modules) - modules)
    return f"failed: imported {added}" if added else outcome


SOUND = frozenset({"read", "refused", "damaged"})


def prepare() -> None:
    """Load the codecs that Python itself looks up for old instructions and names in archives."""
    for name in ("cp437", "raw-unicode-escape", "latin1", "utf-8", "ascii"):
        codecs.lookup(name)
    warnings.simplefilter("ignore")


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def work(bases: list[Base], seed: int, numbers: range, function: Callable, out: int) -> None:
    """In the child: one line of JSON for each case, as soon as it is done."""
    prepare()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    at_start = peak_memory()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.model"
        for number in numbers:
            base, mutation, data = case(bases, seed, number)
            path.write_bytes(data)
            del data
            signal.alarm(SECONDS)
            start = time.process_time()
            outcome = attempt(path, base.like, function)
            seconds = time.process_time() - start
            signal.alarm(0)
            line = [number, base.name, mutation, outcome, seconds, peak_memory() - at_start]
            os.write(out, (json.dumps(line) + "\n").encode())


def campaign(
    bases: list[Base], seed: int, cases: int, function: Callable[..., object] = read
) -> Iterator[list]:
    """``[number, file, mutation, outcome, seconds, growth of the worker]``."""
    done = 0
    while done < cases:
        numbers = range(done, min(done + CASES_PER_WORKER, cases))
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(reading)
                work(bases, seed, numbers, function, writing)
                os._exit(0)
            except BaseException as error:
                print(f"the worker failed: {error!r}", file=sys.stderr)
                os._exit(1)
        os.close(writing)
        with os.fdopen(reading) as lines:
            for line in lines:
                found = json.loads(line)
                done = found[0] + 1
                yield found
        _, status = os.waitpid(child, 0)
        if status:
            base, mutation, _ = case(bases, seed, done)
            code = os.waitstatus_to_exitcode(status)
            cause = "too slow" if code == -signal.SIGALRM else f"died ({code})"
            yield [done, base.name, mutation, f"failed: {cause}", float(SECONDS), 0]
            done += 1


# --- report ---------------------------------------------------------------------------------------


def report(
    bases: list[Base],
    seed: int,
    cases: int,
    function: Callable[..., object] = read,
    keep: Path | None = None,
) -> dict:
    """Counts, the slowest case, the largest growth of memory and every failure of a campaign."""
    counts: dict[str, dict[str, collections.Counter]] = {
        "mutation": collections.defaultdict(collections.Counter),
        "file": collections.defaultdict(collections.Counter),
    }
    slowest, growth, total = [0.0, -1], [0, -1], 0.0
    failures = []
    for number, name, mutation, outcome, seconds, grown in campaign(bases, seed, cases, function):
        kind = outcome if outcome in SOUND else "failed"
        counts["mutation"][mutation][kind] += 1
        counts["file"][name][kind] += 1
        slowest = max(slowest, [seconds, number])
        growth = max(growth, [grown, number])
        total += seconds
        if kind == "failed":
            failures.append({"case": number, "file": name, "mutation": mutation, "what": outcome})
            print(failures[-1], file=sys.stderr, flush=True)
            if keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{number}.model").write_bytes(case(bases, seed, number)[2])
        if number % 2000 == 1999:
            print(f"{number + 1} cases, {total:.0f} s", file=sys.stderr, flush=True)
    outcomes: collections.Counter = collections.Counter()
    for counter in counts["mutation"].values():
        outcomes += counter
    return {
        "cases": cases,
        "seed": seed,
        "outcomes": dict(sorted(outcomes.items())),
        "by_mutation": {k: dict(sorted(v.items())) for k, v in sorted(counts["mutation"].items())},
        "by_file": {k: dict(sorted(v.items())) for k, v in sorted(counts["file"].items())},
        "failures": failures,
        "processor_seconds": {"mean": round(total / cases, 4), "max": round(slowest[0], 3)},
        "slowest_case": slowest[1],
        "largest_growth_of_memory_in_MiB": round(growth[0] / 2**20, 1),
        "limits": {"seconds": SECONDS, "memory_MiB": MEMORY >> 20},
        "largest_file_in_MiB": round(max(len(base.data) for base in bases) / 2**20, 2),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("numpy", "ml_dtypes", "torch", "mace-torch", "e3nn", "e3nn-jax", "pydantic"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def print_table(document: dict) -> None:
    columns = ("read", "refused", "damaged", "failed")
    print(f"| damage | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    rows = {**document["by_mutation"], "all": document["outcomes"]}
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(str(row.get(column, 0)) for column in columns)} |")
    seconds = document["processor_seconds"]
    print(
        f"\nslowest {seconds['max']} s (case {document['slowest_case']}), mean {seconds['mean']} s "
        f"of processor time; "
        f"memory grew by at most {document['largest_growth_of_memory_in_MiB']} MiB; "
        f"files of up to {document['largest_file_in_MiB']} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--convert", action="store_true", help="convert to JAX what can be read")
    parser.add_argument("--no-torch", action="store_true", help="only the shipped model")
    parser.add_argument("--keep", type=Path, help="a folder for the files that fail")
    options = parser.parse_args()
    function = convert if options.convert else read
    with tempfile.TemporaryDirectory() as folder:
        bases = list(shipped(Path(folder)))
        if not options.no_torch:
            bases += built(Path(folder))
        for base in bases:
            path = Path(folder) / "sound"
            path.write_bytes(base.data)
            function(path, like=base.like)
            path.write_bytes(base.rebuild(b"".join(base.steps)))
            function(path, like=base.like)
        document = report(bases, options.seed, options.cases, function, options.keep)
    print_table(document)
    RESULT.parent.mkdir(exist_ok=True)
    found = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    found["convert" if options.convert else "read"] = document
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(bool(document["failures"]))


if __name__ == "__main__":
    main()
