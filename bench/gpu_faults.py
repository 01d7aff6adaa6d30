"""What is wrong with the PTX and the machine code of a compiled sparse product.

Faults that no interpreter shows, because they lie in what the instruction itself reads:
registers written while a product in flight reads them, and descriptors of shared memory
that lead elsewhere than where the copies put the tiles.

Sources: PTX ISA, wgmma.mma_async.sp, matrix descriptors and swizzling modes; canonical
layouts of cute/arch/mma_sm90_desc.hpp and cute/atom/mma_traits_sm90_gmma.hpp.
"""

import dataclasses
import re
from collections.abc import Iterator

import numpy as np

FAULTS = 3
"""Most faults of a kind that are told."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Registers of the products between two commits.

    Attributes:
      metadata: read while they run.
      sums: read and written while they run.
    """

    metadata: frozenset[int] = frozenset()
    sums: frozenset[int] = frozenset()

    def __or__(self, other: "Group") -> "Group":
        """The registers of both."""
        return Group(self.metadata | other.metadata, self.sums | other.sums)


@dataclasses.dataclass(frozen=True)
class Flight:
    """What may be in flight before an instruction, over all paths to it.

    Attributes:
      begun: products not yet committed.
      committed: groups, the newest first.
    """

    begun: Group = Group()
    committed: tuple[Group, ...] = ()

    def joined(self, other: "Flight") -> "Flight":
        """Where two paths meet."""
        pairs = zip(self.committed, other.committed, strict=False)
        longer = max(self.committed, other.committed, key=len)
        both = [a | b for a, b in pairs]
        return Flight(self.begun | other.begun, (*both, *longer[len(both) :]))


PRODUCT = re.compile(
    r"HGMMA\.SP\.64x(\d+)x32\S* R(\d+), gdesc\[UR\d+\]\S*, R\d+, R(\d+)"
)
WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x([0-9a-f]+)")
MOST_IN_FLIGHT = 4


def machine_faults(sass: str, latched: bool = False) -> list[str]:
    """Registers touched while a product that uses them may be in flight.

    Args:
      sass: machine code as nvdisasm lists it.
      latched: take it that a product has read its metadata when it begins, which is
        what a cut with `in_flight` supposes and a GPU has to show.

    Returns:
      Sentences, none if the metadata are whole until the wait that covers their product
      and the sums are left alone until then.
    """
    lines = [line.rpartition("*/")[2].strip() for line in sass.splitlines()]
    labels = {line[:-1]: k for k, line in enumerate(lines) if line.endswith(":")}
    before: dict[int, Flight] = {0: Flight()}
    todo = [0]
    while todo:
        k = todo.pop()
        after = _after(lines[k], before[k])
        for following in _next(lines, labels, k):
            known = before.get(following)
            joined = after if known is None else known.joined(after)
            if joined != known:
                before[following] = joined
                todo.append(following)
    faults = [
        f
        for k, flight in sorted(before.items())
        for f in _touch(lines[k], flight, latched)
    ]
    return list(dict.fromkeys(faults))[:FAULTS]


def _next(lines: list[str], labels: dict[str, int], k: int) -> Iterator[int]:
    line = lines[k]
    if jump := re.search(r"\bBRA `\((\S+)\)", line):
        yield labels[jump[1]]
        if not line.startswith("@"):
            return
    if re.search(r"\b(EXIT|RET)\b", line) and not line.startswith("@"):
        return
    if k + 1 < len(lines):
        yield k + 1


def _after(line: str, flight: Flight) -> Flight:
    if product := PRODUCT.search(line):
        n, base, word = map(int, product.groups())
        group = Group(frozenset({word}), frozenset(range(base, base + n // 2)))
        begun = flight.begun | group
        if "gsb0" not in line:
            return Flight(begun, flight.committed)
        return Flight(Group(), (begun, *flight.committed)[:MOST_IN_FLIGHT])
    if wait := WAIT.search(line):
        return Flight(flight.begun, flight.committed[: int(wait[1], 16)])
    return flight


def _touch(line: str, flight: Flight, latched: bool) -> Iterator[str]:
    if "HGMMA" in line or line.endswith(":"):
        return
    whole = flight.begun
    for group in flight.committed:
        whole |= group
    for r in () if latched else sorted(_written(line) & whole.metadata):
        yield f"R{r}, metadata of a product in flight, is written: {line}"
    for r in sorted(_named(line) & whole.sums):
        yield f"R{r}, a sum of a product in flight, is used: {line}"


def _named(line: str) -> set[int]:
    return {int(r) for r in re.findall(r"(?<!U)\bR(\d+)\b", line)}


def _written(line: str) -> set[int]:
    """Registers that an instruction writes: its first operand, a pair or four."""
    form = re.match(r"(?:@!?U?P\w+ +)?(\S+) +R(\d+)\b", line)
    if form is None or form[1].startswith("BAR"):
        return set()
    operation, first = form[1], int(form[2])
    wide = {".64": 2, ".128": 4, "WIDE": 2, "CS2R": 2}
    count = max((n for name, n in wide.items() if name in operation), default=1)
    return set(range(first, first + count))


@dataclasses.dataclass(frozen=True)
class Descriptor:
    """Fields of a matrix descriptor, in bytes.

    Attributes:
      leading: stride between the columns of swizzled atoms.
      stride: stride between atoms of 8 rows.
      swizzle: width of a row of an atom: 128, 64 or 32.
    """

    leading: int
    stride: int
    swizzle: int

    def fast_k(self, start: int, mn: np.ndarray, k: np.ndarray) -> np.ndarray:
        """Address of 16-bit element (mn, k) of an operand whose k is contiguous."""
        at = start + mn // 8 * self.stride + mn % 8 * self.swizzle + 2 * k
        return swizzled(at, self.swizzle)

    def fast_mn(self, start: int, mn: np.ndarray, k: np.ndarray) -> np.ndarray:
        """The same where mn is contiguous."""
        wide = self.swizzle // 2
        at = start + mn // wide * self.leading + k // 8 * self.stride
        return swizzled(at + k % 8 * self.swizzle + mn % wide * 2, self.swizzle)


def swizzled(address: np.ndarray, width: int) -> np.ndarray:
    """Bits 7 and up onto bits 4 and up, as many as the width has chunks of 16 bytes."""
    return address ^ (address >> 7 & width // 16 - 1) << 4


def written_at(row: np.ndarray, column: np.ndarray, columns: int, wide: int):
    """Where the copies put 16-bit element (row, column): tiles [8, wide], swizzled."""
    tile = row // 8 * (columns // wide) + column // wide
    return swizzled(tile * 16 * wide + row % 8 * 2 * wide + column % wide * 2, 2 * wide)


OPERANDS = re.compile(
    r"wgmma\.mma_async\.sp\.sync\.aligned\.m64n(\d+)k32\S* \{[^}]*\}, "
    r"(%rd\d+), (%rd\d+), (%r\d+), (\d), p, 1, 1, (\d), (\d);"
)


def descriptor_faults(
    ptx: str, width: int, stored: int = 64, selectors: int = 2
) -> list[str]:
    """Elements that a product reads elsewhere than where they were written.

    Args:
      ptx: of a kernel.
      width: tokens of a block.
      stored: columns of a step, 16 of them to a product.
      selectors: that are in use, one word of metadata for as many products.

    Returns:
      Sentences, none if every element of both operands is read where it is, with the
      selectors 0, 1, 0, 1 or 0 alone.
    """
    constant = {
        name: int(value) % 2**64
        for name, value in re.findall(
            r"(?:or\.b64|add\.s64)\s+(%rd\d+), %rd\d+, (-?\d{16,});", ptx
        )
    }
    products = [match.groups() for match in OPERANDS.finditer(ptx)]
    count = stored // 16
    if not products or len(products) % count:
        return [f"{len(products)} sparse products, {count} are one step"]
    faults = []
    for first in range(0, len(products), count):  # more where a loop was unrolled
        step = products[first : first + count]
        faults += _step_faults(step, constant, width, selectors)
    return faults[:FAULTS]


def _step_faults(
    products: list[tuple[str, ...]],
    constant: dict[str, int],
    width: int,
    use: int,
) -> list[str]:
    """The faults of one step."""
    faults = []
    words = [word for *_, word, _, _, _ in products]
    each = [name for name in dict.fromkeys(words) for _ in range(use)]
    if words != each or len(set(words)) != len(words) // use:
        faults.append(f"metadata {words}: one register for {use} products")
    wanted = [k % use for k in range(len(products))]
    if (selectors := [int(p[4]) for p in products]) != wanted:
        faults.append(f"selectors {selectors} instead of {wanted}")
    n, (a, b) = int(products[0][0]), zip(*((p[1], p[2]) for p in products), strict=True)
    if missing := [name for name in (*a, *b) if name not in constant]:
        return [*faults, f"{missing[0]} is no descriptor"]
    turned = products[0][6] == "1"
    first = (constant[a[0]], constant[b[0]])
    columns = 16 * len(products)
    for k in range(len(products)):
        values = (constant[a[k]], constant[b[k]])
        for name, base, value in zip("AB", first, values, strict=True):
            start, field = 16 * (value - base & 0x3FFF), decoded(base)
            if value >> 14 != base >> 14:
                faults.append(f"{name}, product {k}: another layout than the first")
            if field is None:
                faults.append(f"{name}: the descriptor has no swizzle or an offset")
                continue
            faults += list(
                _stored(field, start, k, columns)
                if name == "A"
                else _activations(field, start, k, n, width, turned, 2 * columns)
            )
    return faults


def decoded(constant: int) -> Descriptor | None:
    """The fields of a descriptor without its address, or None for another form."""
    mode, offset = constant >> 62 & 3, constant >> 49 & 7
    if not mode or offset or constant & 0x3FFF:
        return None
    leading, stride = (16 * (constant >> s & 0x3FFF) for s in (16, 32))
    return Descriptor(leading, stride, {1: 128, 2: 64, 3: 32}[mode])


def _stored(field: Descriptor, start: int, product: int, columns: int) -> Iterator[str]:
    m, k = np.mgrid[:64, :16]
    read = field.fast_k(start, m, k)
    wrote = written_at(m, 16 * product + k, columns, columns)
    yield from _differences("A", read, wrote, product)


def _activations(
    field: Descriptor,
    start: int,
    product: int,
    n: int,
    width: int,
    turned: bool,
    columns: int,
) -> Iterator[str]:
    token, k = np.mgrid[:n, :32]
    if turned:
        read = field.fast_mn(start, token, k)
        wrote = written_at(32 * product + k, token, width, field.swizzle // 2)
    else:
        read = field.fast_k(start, token, k)
        wrote = written_at(token, 32 * product + k, columns, 64)
    yield from _differences("B", read, wrote, product)


def _differences(
    name: str, read: np.ndarray, wrote: np.ndarray, product: int
) -> Iterator[str]:
    wrong = np.argwhere(read != wrote)
    if len(wrong):
        at = tuple(wrong[0])
        yield (
            f"{name}, product {product}: {len(wrong)} elements are read elsewhere, "
            f"first {tuple(map(int, at))} at byte {read[at]}, written at {wrote[at]}"
        )
