"""Runs the PTX of one block or one cluster of the sparse kernel, without a GPU.

Every warpgroup is one thread of control with 128 lanes. What the hardware does on its
own is queued and happens later, in an order drawn at random: copies of the tensor
memory engine, cp.async, and sparse products, which read their metadata and sums from
the registers as they are by then. Barriers count arrivals and bytes. Warpgroups take
turns at random, and one of them or all of a block may fall behind; the shared memory of
a block that has ended is gone. So a race shows as a wrong result for some seed, a
barrier that never opens as a `Fault`.

What only hardware knows stays open: whether an instruction does what the PTX ISA says.
"""

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from bench import gpu_faults

LANES = 128
SPACE = 40
"""Bits of an address inside one array of global memory."""
WINDOW = 24
"""Bits of an address inside the shared memory of one block of a cluster."""


class Fault(Exception):
    """The program did what must not happen."""


class TensorMap:
    """What the tensor memory engine copies at a time.

    Dimensions of size 1 have no coordinate: Mosaic leaves them out.

    Args:
      array: outermost dimension first, as the coordinates end.
      box: elements of a copy along each dimension.
      swizzle: bytes of a swizzled row, 0 for none.
    """

    def __init__(self, array: np.ndarray, box: tuple[int, ...], swizzle: int) -> None:
        pairs = zip(box, array.shape, strict=True)
        self.box = tuple(side for side, size in pairs if size > 1)
        self.array, self.swizzle = array.squeeze(), swizzle

    def read(self, at: tuple[int, ...]) -> np.ndarray:
        """Bytes of the box, zeros outside of the array."""
        part = np.zeros(self.box, self.array.dtype)
        ends = zip(at, self.box, self.array.shape, strict=True)
        sizes = [max(0, min(a + b, n) - a) for a, b, n in ends]
        to = tuple(slice(0, s) for s in sizes)
        pairs = zip(at, sizes, strict=True)
        part[to] = self.array[tuple(slice(a, a + s) for a, s in pairs)]
        return np.frombuffer(part.tobytes(), np.uint8)


class Barrier:
    """An mbarrier."""

    def __init__(self, count: int) -> None:
        self.count, self.waiting, self.bytes, self.phase = count, count, 0, 0

    def change(self, arrivals: int, expected: int) -> None:
        """Counts arrivals, and bytes that are expected or came."""
        self.waiting -= arrivals
        self.bytes += expected
        if self.waiting < 0:
            raise Fault("more arrivals at a barrier than it counts")
        if self.waiting == 0 and self.bytes == 0:
            self.phase, self.waiting = self.phase ^ 1, self.count


def statements(ptx: str) -> list[str]:
    """Labels and statements of the kernel, those of waits reduced to the wait."""
    body = ptx[ptx.index("{\n\t.reg") :]
    body = re.sub(r"//[^\n]*|\n\s*\.loc[^\n]*", "", body)
    body = re.sub(r"\{\s*\.reg \.pred\s+\w+;", "", body)
    body = re.sub(r";\s*\}", ";", body)
    texts = []
    for piece in re.split(r";|(\$L\w+:|LAB_WAIT:|DONE:)", body):
        text = " ".join((piece or "").split()).lstrip("{} ")
        noise = (".reg", ".shared", ".loc", "LAB_WAIT", "DONE", "@P1 bra", ".section")
        if text and not text.startswith(noise) and "LAB_WAIT" not in text:
            texts.append(text)
    end = max(k for k, text in enumerate(texts) if text == "ret")
    return texts[: end + 1]


class Warpgroup:
    """Registers and place of one warpgroup, and what it has in flight."""

    def __init__(self, machine: "Machine", number: int) -> None:
        self.machine, self.number = machine, number
        self.registers: dict[str, np.ndarray] = {}
        self.products: list[tuple[int, Callable[[], None]]] = []  # in order
        self.copies: list[tuple[int, Callable[[], None]]] = []
        self.product_group = self.copy_group = self.meets = 0
        self.until: Callable[[], bool] = lambda: True
        thread = np.arange(LANES, dtype=np.uint64) + np.uint64(LANES * number)
        special = {"%tid.x": thread}
        line, blocks = machine.line, len(machine.cluster)
        inside = (machine.rank % line, machine.rank // line, 0)
        places = {"ctaid": machine.at, "cluster_ctaid": inside}
        places["cluster_nctaid"] = (line, blocks // line, 1)
        for name, place in places.items():
            for axis, at in zip("xyz", place, strict=True):
                special[f"%{name}.{axis}"] = np.full(LANES, at, np.uint64)
        self.registers |= special

    # Operands

    def value(self, name: str) -> np.ndarray:
        """An operand as u64 lanes: a register, a number, shared memory, a parameter."""
        if name in self.registers:
            return self.registers[name]
        if name == "__dynamic_shmem__0":
            return np.zeros(LANES, np.uint64)
        if match := re.fullmatch(r"\w+_param_(\d+)", name):
            return np.full(LANES, int(match[1]) + 1 << SPACE, np.uint64)
        try:
            return np.full(LANES, int(name) % 2**64, np.uint64)
        except ValueError:
            raise Fault(f"{name} is read before it is written") from None

    def signed(self, name: str, bits: int) -> np.ndarray:
        """The same, its low bits with their sign."""
        kind = {32: np.uint32, 64: np.uint64}[bits]
        return self.value(name).astype(kind).view({32: np.int32, 64: np.int64}[bits])

    def write(self, name: str, value: np.ndarray, bits: int, mask: np.ndarray) -> None:
        """Sets a register in some lanes."""
        kind = np.uint32 if bits == 32 else np.uint64
        new = np.asarray(value).astype(kind).astype(np.uint64)
        if not mask.all():
            new = np.where(mask, new, self.registers.get(name, np.uint64(0)))
        self.registers[name] = new

    def address(self, text: str) -> np.ndarray:
        """[register+offset]."""
        match = re.fullmatch(r"\[(\S+?)(?:\+(-?\d+))?\]", text)
        assert match, text
        offset = np.uint64(int(match[2] or 0) % 2**64)
        return self.value(match[1]) + offset

    # Control

    def run(self) -> Iterator[None]:
        """Executes to the end; stops wherever another might come first."""
        program, labels = self.machine.program, self.machine.labels
        place = 0
        while program[place] != "ret":
            text = program[place]
            place += 1
            if text.endswith(":"):
                continue
            mask = np.ones(LANES, bool)
            if match := re.match(r"@(!?)(%?\w+) ", text):
                mask = self.registers[match[2]].astype(bool) ^ bool(match[1])
                text = text[match.end() :]
            operation, _, rest = text.partition(" ")
            operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)
            if operation.startswith("bra"):
                if mask.any() != mask.all():
                    raise Fault(f"lanes of a warpgroup part at {text}")
                place = labels[operands[0]] if mask.all() else place
                continue
            if self.asynchronous(operation, operands, mask):
                yield
            else:
                self.arithmetic(operation, operands, mask)

    def asynchronous(
        self, operation: str, operands: list[str], mask: np.ndarray
    ) -> bool:
        """Starts or awaits something; False if it is plain arithmetic."""
        machine = self.machine
        if operation.startswith(("prefetch", "fence.mbarrier", "wgmma.fence")):
            return True
        if operation.startswith("fence.proxy.async"):
            machine.unfenced[machine.unfenced == self.number + 1] = 0
        elif operation.startswith("bar.sync"):
            if len(operands) == 1:  # the whole block
                machine.arrived += 1
                goal = -(-machine.arrived // machine.groups) * machine.groups
                self.until = lambda: machine.arrived >= goal
        elif operation.startswith("barrier.cluster.arrive"):
            machine.meeting.arrived += 1
            everyone = machine.groups * len(machine.cluster)
            self.meets = -(-machine.meeting.arrived // everyone) * everyone
        elif operation.startswith("barrier.cluster.wait"):
            self.until = lambda: machine.meeting.arrived >= self.meets
        elif operation.startswith("mbarrier.init"):
            if mask.any():
                at, count = self.address(operands[0])[0], self.value(operands[1])[0]
                machine.barriers[int(at)] = Barrier(int(count))
        elif operation.startswith("mbarrier.arrive.shared::cluster"):
            for place in self.address(operands[1])[mask]:
                block, at = machine.peer(int(place))
                block.barriers[at].change(1, 0)
        elif operation.startswith("mbarrier.arrive"):
            barrier = machine.barriers[int(self.address(operands[1])[0])]
            expected = (
                int(self.value(operands[2])[0]) if "expect_tx" in operation else 0
            )
            barrier.change(0, LANES * expected)
            barrier.change(LANES, 0)
        elif operation.startswith("mbarrier.try_wait"):
            barrier = machine.barriers[int(self.address(operands[1])[0])]
            parity = int(self.value(operands[2])[0])
            self.until = lambda: barrier.phase != parity
        elif operation.startswith("cp.async.bulk"):
            if int(mask.sum()) == 1:
                self.bulk(operation, operands)
            elif mask.any():
                raise Fault("several lanes start one copy of the engine")
        elif operation.startswith("cp.async.cg"):
            self.copy(operands, mask)
        elif operation.startswith("cp.async.commit"):
            self.copy_group += 1
        elif operation.startswith("cp.async.wait"):
            last = self.copy_group - int(operands[0])
            self.until = lambda: all(group >= last for group, _ in self.copies)
        elif operation.startswith("wgmma.mma_async.sp"):
            self.product(operation, operands)
        elif operation.startswith("wgmma.commit"):
            self.product_group += 1
        elif operation.startswith("wgmma.wait"):
            last_product = self.product_group - int(operands[0])
            self.until = lambda: all(
                group >= last_product for group, _ in self.products
            )
        elif operation.startswith("st."):
            self.store(operation, operands, mask)
        else:
            return False
        return True

    def bulk(self, operation: str, operands: list[str]) -> None:
        """A copy of the tensor memory engine, to this block or to several."""
        machine = self.machine
        to = int(self.address(operands[0])[0])
        names = re.findall(r"%\w+|\d+", operands[1])
        number = int(self.value(names[0])[0]) % 2**SPACE // 128
        source = machine.maps[number]
        at = tuple(int(self.signed(name, 32)[0]) for name in names[1:])[::-1]
        signal, targets = int(self.address(operands[2])[0]), [machine]
        if "multicast" in operation:
            bits = int(self.value(operands[3])[0])
            targets = [b for k, b in enumerate(machine.cluster) if bits >> k & 1]

        def arrive(block: "Machine") -> None:
            if block.ended:
                raise Fault("a copy arrives in a block that has ended")
            data = source.read(at)
            place = to + np.arange(data.size)
            if source.swizzle:
                place = gpu_faults.swizzled(place, source.swizzle)
            block.shared[place] = data
            block.barriers[signal].change(0, -data.size)

        machine.bulk += [functools.partial(arrive, block) for block in targets]

    def copy(self, operands: list[str], mask: np.ndarray) -> None:
        """cp.async of 16 bytes per lane, zeros behind what is read."""
        machine, number = self.machine, self.number
        to, source = self.address(operands[0]), self.address(operands[1])
        count = self.value(operands[-1])
        order = machine.random.permutation(np.flatnonzero(mask))
        for lanes in np.array_split(order, 2):

            def arrive(lanes: np.ndarray = lanes) -> None:
                for lane in lanes:
                    data = np.zeros(16, np.uint8)
                    if count[lane]:
                        data[:] = machine.memory(source[lane], 16, "copied")
                    place = int(to[lane]) + np.arange(16)
                    machine.shared[place] = data
                    machine.unfenced[place] = number + 1

            self.copies.append((self.copy_group, arrive))

    def product(self, operation: str, operands: list[str]) -> None:
        """wgmma.mma_async.sp: reads its registers when it happens."""
        form = re.search(r"m64n(\d+)k32\.f32\.(\w+)\.", operation)
        assert form
        n, kind = int(form[1]), form[2]
        sums = re.findall(r"%\w+", operands[0])
        a, b = (int(self.value(name)[0]) for name in operands[1:3])
        word, selector, turned = operands[3], int(operands[4]), operands[9] == "1"

        def happen() -> None:
            stored = self.operand(a, np.mgrid[:64, :16], False, kind)
            x = self.operand(b, np.mgrid[:n, :32], turned, kind)  # [n, 32]
            matrix = spread(stored, self.registers[word], selector)
            change = matrix @ x.T
            for j, name in enumerate(sums):
                lane = np.arange(LANES)
                row = 16 * (lane // 32) + lane % 32 // 4 + 8 * (j // 2 % 2)
                column = 8 * (j // 4) + 2 * (lane % 4) + j % 2
                old = self.registers[name].astype(np.uint32).view(np.float32)
                new = (old + change[row, column]).astype(np.float32)
                self.registers[name] = new.view(np.uint32).astype(np.uint64)

        self.products.append((self.product_group, happen))

    def operand(self, word: int, at: Any, turned: bool, kind: str) -> np.ndarray:
        """The elements that a descriptor names."""
        field = gpu_faults.decoded(word >> 14 << 14)
        if field is None:
            raise Fault(f"a descriptor without swizzle: {word:#x}")
        read = field.fast_mn if turned else field.fast_k
        place = read(16 * (word & 0x3FFF), *at)
        if self.machine.unfenced[place].any():
            raise Fault("a product reads what no fence has handed to it")
        low, high = (self.machine.shared[place + k].astype(np.uint32) for k in (0, 1))
        return decoded(low | high << 8, kind)

    def store(self, operation: str, operands: list[str], mask: np.ndarray) -> None:
        """To global or shared memory, 2 or 4 bytes per register."""
        machine, at = self.machine, self.address(operands[0])
        size = int(operation[-2:]) // 8
        for k, name in enumerate(re.findall(r"%\w+", operands[1])):
            data = self.value(name).astype({2: np.uint16, 4: np.uint32}[size])
            for lane in np.flatnonzero(mask):
                start = int(at[lane]) + size * k
                space = "" if "shared" in operation else "stored"
                place = machine.bytes(start, size, space)
                place[:] = np.frombuffer(data[lane].tobytes(), np.uint8)
                if "shared" in operation:
                    machine.unfenced[start : start + size] = self.number + 1

    def arithmetic(self, operation: str, operands: list[str], mask: np.ndarray) -> None:
        """One instruction on registers."""
        name, *kinds = operation.replace("::entry", "").split(".")
        bits = 32 if kinds and kinds[-1].endswith("32") else 64
        if name == "ld" and "_param_" not in operands[1]:
            shared = next((kind for kind in kinds if "shared" in kind), "")
            for k, target in enumerate(re.findall(r"%\w+", operands[0])):
                size = int(kinds[-1][1:]) // 8
                self.write(
                    target, self.load(operands[1], shared, size, k, mask), bits, mask
                )
            return
        with np.errstate(over="ignore"):
            value = self.calculated(name, kinds, bits, operands)
        if (
            name == "mul"
            and "wide" in kinds
            or name == "cvt"
            and kinds[0].endswith("64")
        ):
            bits = 64
        if name in ("cvt",) and kinds[0] == "u32":
            bits = 32
        for target in operands[0].split("|"):
            self.write(target, value, bits, mask)

    def calculated(
        self, name: str, kinds: list[str], bits: int, operands: list[str]
    ) -> np.ndarray:
        """The result of an instruction on registers, lane by lane."""
        v = [self.value(g) for g in operands[1:] if g[0] not in "[{"]
        if name == "ld":  # a parameter
            return self.value(operands[1].strip("[]"))
        if name == "mapa":
            return v[0] & np.uint64(2**WINDOW - 1) | v[1] + np.uint64(1) << np.uint64(
                WINDOW
            )
        if name == "add" and kinds[-1] == "f32":
            left, right = (u.astype(np.uint32).view(np.float32) for u in v)
            return (left + right).astype(np.float32).view(np.uint32)
        if name == "elect":
            return np.arange(LANES) % 32 == 0
        if name == "shfl" and "bfly" in kinds:
            return v[0][np.arange(LANES) ^ int(v[1][0])]
        if name == "shfl":  # of lane 0
            return v[0].reshape(-1, 32)[:, :1].repeat(32, 1).reshape(-1)
        if name == "setp":
            return self.compared(kinds, operands)
        if name == "selp":
            return np.where(v[2].astype(bool), v[0], v[1])
        if name == "cvt" and kinds[0] == "rn":
            *high, low = (
                encoded(u.astype(np.uint32).view(np.float32), kinds[1]) for u in v
            )
            return high[0] << np.uint64(16) | low if high else low
        if name == "mov" and operands[1].startswith("{"):  # two halves, the low first
            low, high = (self.value(g) for g in re.findall(r"%\w+", operands[1]))
            return high << np.uint64(16) | low
        if name == "cvt" and kinds[:2] == ["s64", "s32"]:
            return self.signed(operands[1], 32).astype(np.int64)
        if name == "mul" and "wide" in kinds:
            if kinds[-1] == "s32":
                left, right = (
                    self.signed(g, 32).astype(np.int64) for g in operands[1:]
                )
                return left * right
            return (v[0] & np.uint64(2**32 - 1)) * (v[1] & np.uint64(2**32 - 1))
        if name in ("min", "max"):
            pick = {"min": np.minimum, "max": np.maximum}[name]
            signed = kinds[0].startswith("s")
            left, right = (self.signed(g, bits) for g in operands[1:]) if signed else v
            return pick(left, right)
        plain: dict[str, Callable[..., np.ndarray]] = {
            "mov": lambda a: a,
            "cvta": lambda a: a,
            "cvt": lambda a: a & np.uint64(2**32 - 1) if "32" in kinds[1] else a,
            "add": lambda a, b: a + b,
            "sub": lambda a, b: a - b,
            "mul": lambda a, b: a * b,
            "mad": lambda a, b, c: a * b + c,
            "and": lambda a, b: a & b,
            "or": lambda a, b: a | b,
            "div": lambda a, b: a // b,
            "rem": lambda a, b: a % b,
            "xor": lambda a, b: a ^ b,
            "not": lambda a: a ^ np.uint64(1 if kinds == ["pred"] else 2**64 - 1),
            "shl": lambda a, b: a << b,
            "shr": lambda a, b: a >> b,
        }
        if name not in plain:
            raise Fault(f"an instruction that is not known: {name}.{'.'.join(kinds)}")
        return plain[name](*v)

    def compared(self, kinds: list[str], operands: list[str]) -> np.ndarray:
        """setp, with a second predicate where there is one."""
        bits, signed = int(kinds[-1][1:]), kinds[-1][0] == "s"
        take = self.signed if signed else lambda g, _: self.value(g)
        left, right = (take(g, bits) for g in operands[1:3])
        tests = {
            "eq": left == right,
            "ne": left != right,
            "lt": left < right,
            "ge": left >= right,
            "gt": left > right,
            "le": left <= right,
        }
        result = tests[kinds[0]]
        if len(operands) == 4:
            other = self.registers[operands[3]].astype(bool)
            result = result & other if kinds[1] == "and" else result | other
        return result

    def load(
        self, operand: str, space: str, size: int, number: int, mask: np.ndarray
    ) -> np.ndarray:
        """The number-th register of a load, 2 or 4 bytes, from a space or global."""
        at, words = self.address(operand), np.zeros(LANES, np.uint64)
        kind = {2: np.uint16, 4: np.uint32}[size]
        for lane in np.flatnonzero(mask):
            block, place = self.machine, int(at[lane]) + number * size
            if space == "shared::cluster":
                block, place = block.peer(place)
            words[lane] = np.frombuffer(
                block.bytes(place, size, "" if space else "loaded"), kind
            )[0]
        return words


class Meeting:
    """The barrier of a cluster: arrivals of warpgroups so far."""

    arrived = 0


class Machine:
    """One block, alone or in a cluster.

    Args:
      ptx: of the kernel.
      parameters: arrays in global memory, by what happens to them: "loaded", "copied"
        or "stored". Numbers of parameters follow the first uses in the program.
      maps: tensor maps in their order.
      groups: warpgroups.
      at: the block's place in the grid, (x, y, z).
      seed: of the order in which things happen.
      rank: in the cluster, x first.
      line: blocks of the cluster along x.
    """

    def __init__(
        self,
        ptx: str,
        parameters: dict[str, np.ndarray],
        maps: list[TensorMap],
        groups: int,
        at: tuple[int, int, int],
        seed: int,
        rank: int = 0,
        line: int = 1,
    ) -> None:
        self.rank, self.line = rank, line
        self.cluster, self.meeting = [self], Meeting()
        self.ended = False
        self.program = statements(ptx)
        self.labels = {t[:-1]: k for k, t in enumerate(self.program) if t.endswith(":")}
        self.parameters = {
            k: a.view(np.uint8).reshape(-1) for k, a in parameters.items()
        }
        self.roles: dict[int, str] = {}
        self.maps, self.groups, self.at = maps, groups, at
        self.warpgroups: list[Warpgroup] = []
        self.random = np.random.default_rng(seed)
        self.shared = np.full(256 * 1024, 0xFF, np.uint8)  # NaN until it is written
        self.unfenced = np.zeros(256 * 1024, np.uint8)
        self.barriers: dict[int, Barrier] = {}
        self.bulk: list[Callable[[], None]] = []
        self.arrived = 0
        #: How soon things happen; some runs put off everything.
        self.haste = float(self.random.choice([0.0, 0.1, 0.5, 0.9]))

    def memory(self, at: Any, count: int, role: str) -> np.ndarray:
        """Bytes of global memory."""
        number, place = int(at) >> SPACE, int(at) % 2**SPACE
        if self.roles.setdefault(number, role) != role:
            raise Fault(f"parameter {number - 1} is {self.roles[number]} and {role}")
        array = self.parameters[role]
        if place + count > array.size:
            raise Fault(f"byte {place} of parameter {number - 1} does not exist")
        return array[place : place + count]

    def peer(self, at: int) -> tuple["Machine", int]:
        """The block that an address in the cluster leads to, and where in it."""
        number, place = at >> WINDOW, at % 2**WINDOW
        block = self.cluster[number - 1] if number else self
        if block.ended:
            raise Fault("shared memory of a block that has ended is used")
        return block, place

    def bytes(self, at: int, count: int, role: str) -> np.ndarray:
        """Bytes of global memory, without a role of shared memory."""
        return self.memory(at, count, role) if role else self.shared[at : at + count]

    def happen(self) -> bool:
        """One thing that was started, drawn at random; False if there is none."""
        queues: list[tuple[list[Any], int]] = []
        if self.bulk:
            queues.append((self.bulk, int(self.random.integers(len(self.bulk)))))
        for warpgroup in self.warpgroups:
            if warpgroup.products:
                queues.append((warpgroup.products, 0))
            if warpgroup.copies:
                place = int(self.random.integers(len(warpgroup.copies)))
                queues.append((warpgroup.copies, place))
        if not queues:
            return False
        queue, place = queues[self.random.integers(len(queues))]
        thing = queue.pop(place)
        (thing if callable(thing) else thing[1])()
        return True


def run(cluster: list[Machine]) -> None:
    """The blocks of a cluster in the order of their ranks, from start to end."""
    random, meeting = cluster[0].random, Meeting()
    for block in cluster:
        block.cluster, block.meeting = cluster, meeting
    for block in cluster:
        block.warpgroups = [Warpgroup(block, k) for k in range(block.groups)]
    going = {w: w.run() for block in cluster for w in block.warpgroups}
    late = [block.warpgroups for block in cluster] + [[w] for w in going] + [[]]
    slow = late[random.integers(len(late))]  # what falls behind the others
    while going:
        ready = [w for w in going if w.until()]
        if ready and random.random() >= cluster[0].haste:
            fast = [w for w in ready if w not in slow]
            turn = fast if fast and random.random() < 0.98 else ready
            warpgroup = turn[random.integers(len(turn))]
            warpgroup.until = lambda: True
            if next(going[warpgroup], cluster) is cluster:
                del going[warpgroup]
                block = warpgroup.machine
                block.ended = not any(w in going for w in block.warpgroups)
            continue
        order = random.permutation(len(cluster))
        if not any(cluster[k].happen() for k in order) and not ready:
            raise Fault("every warpgroup waits, and nothing is on its way")


def spread(stored: np.ndarray, words: np.ndarray, selector: int) -> np.ndarray:
    """The 64 x 32 tile of an instruction, from its stored values and its metadata."""
    matrix = np.zeros((64, 32), np.float32)
    row = np.arange(64)
    for half in range(2):
        thread = 32 * (row // 16) + 4 * (row % 8) + half + 2 * selector
        bits = words[thread].astype(np.int64) >> 16 * (row // 8 % 2)
        for group in range(4):
            first, second = bits >> 4 * group & 3, bits >> 4 * group + 2 & 3
            if (first >= second).any():
                raise Fault("metadata whose positions do not increase")
            at = 8 * half + 2 * group
            for place, column in ((first, at), (second, at + 1)):
                matrix[row, 16 * half + 4 * group + place] = stored[:, column]
    return matrix


def decoded(bits: np.ndarray, kind: str) -> np.ndarray:
    """Float32 values of 16-bit ones."""
    if kind == "f16":
        return bits.astype(np.uint16).view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def encoded(values: np.ndarray, kind: str) -> np.ndarray:
    """16-bit patterns of values that are exact in them."""
    if kind.startswith("f16"):
        return values.astype(np.float16).view(np.uint16).astype(np.uint64)
    return (values.view(np.uint32) >> 16).astype(np.uint64)
