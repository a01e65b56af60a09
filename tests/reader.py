"""A second reader, written from docs/skillpack-format.md with nothing but NumPy; its packs are small."""

from collections.abc import Callable
from functools import cache
from math import isqrt, prod

import numpy as np


def _unpack(data: bytes, count: int, width: int) -> list[int]:
    stream = int.from_bytes(data, "little")
    return [stream >> i * width & (1 << width) - 1 for i in range(count)]


def _packed_size(count: int, width: int) -> int:
    return -(-count * width // 8)


def _bfloat16(data: bytes) -> np.ndarray:
    return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)


class _Ans:
    """The decoder of section "Coded integers": words as a stack whose top is the last."""

    def __init__(self, words: bytes) -> None:
        self.state, self.stack = 0, [int(word) for word in np.frombuffer(words, "<u4")]
        while self.stack and self.state < 1 << 32:
            self.state = self.state << 32 | self.stack.pop()

    def take(self, count: int, sizes: list[int]) -> list[int]:
        starts, found = np.concatenate([[0], np.cumsum(sizes)]), []
        for _ in range(count):
            low = self.state & (1 << 24) - 1
            symbol = int(np.searchsorted(starts, low, side="right")) - 1
            self.state = (self.state >> 24) * int(sizes[symbol]) + low - int(starts[symbol])
            if self.state < 1 << 32 and self.stack:
                self.state = self.state << 32 | self.stack.pop()
            found.append(symbol)
        return found

    @property
    def ended(self) -> bool:
        return (self.state, self.stack) == (0, [])


def _integers(data: bytes, count: int) -> tuple[list[int], bytes]:
    """Section "Coded integers"; one block, as these tensors are small."""
    size, data = data[0], data[1:]
    frequencies, data = [int(f) for f in np.frombuffer(data[: 2 * size], "<u2")], data[2 * size :]
    words, data = int.from_bytes(data[:4], "little"), data[4:]
    ans, data = _Ans(data[: 4 * words]), data[4 * words :]
    classes = ans.take(count, [frequency * 256 for frequency in frequencies])
    assert ans.ended
    values = list(classes)
    for number in range(8, size):
        width, here = number // 4 - 1, [i for i, symbol in enumerate(classes) if symbol == number]
        taken = _packed_size(len(here), width)
        for i, low in zip(here, _unpack(data[:taken], len(here), width), strict=True):
            values[i] = (4 + number % 4) << width | low
        data = data[taken:]
    return values, data


ROOTS = (9223372036854775808, 8089705464700925726, 6921480822830546630, 5749758898252946309)


def _root(n: int) -> int:
    return ROOTS[n] if 0 <= n <= 3 else _root(n - 4) ** 2 >> 64 if n > 3 else isqrt(_root(n + 4) << 64)


def _power(r: int, e: int) -> int:
    p = 1 << 64
    while e:
        p, r, e = p * r >> 64 if e & 1 else p, r * r >> 64, e >> 1
    return p


@cache
def _frequencies(family: int, table: int, classes: int) -> list[int]:
    """Section "Tables"."""
    weights = []
    for c in range(classes):
        n, v = (1, c) if c < 8 else (1 << c // 4 - 1, (4 + c % 4) << c // 4 - 1)
        m = 4 * ((c + 1) // 2) if c < 8 else 2 * v + n
        weights.append(n * (_power(_root(13 - table), m) if family else _power(_root(16 - 2 * table), m * m)))
    found = [max(1, (weight << 16) // sum(weights)) for weight in weights]
    found[found.index(max(found))] += (1 << 16) - sum(found)
    return found


class Codes:
    """Section "Codes"."""

    def __init__(self, data: bytes) -> None:
        size = int.from_bytes(data[:2], "little")
        self.head, self.ans = list(data[2 : 2 + size]), _Ans(data[2 + size :])

    def take(self, size: int) -> bytes:
        taken, self.head = bytes(self.head[:size]), self.head[size:]
        return taken

    def run(self, tables: np.ndarray, frequencies: Callable[[int], list[int]]) -> np.ndarray:
        """One integer for each table."""
        values = np.zeros(len(tables), np.int64)
        for table in range(1, 64):
            here = np.flatnonzero(tables == table)
            if len(here):
                values[here] = self.ans.take(len(here), [f * 256 for f in frequencies(table)])
        here, classes = np.flatnonzero(values >= 8), values[values >= 8]
        values[here] = (4 + classes % 4 << classes // 4 - 1) | self.bounded(1 << classes // 4 - 1)
        return values >> 1 ^ -(values & 1)

    def vector(self, count: int) -> np.ndarray:
        k, table, classes = self.take(3)
        own = np.frombuffer(self.take(2 * classes if k % 4 == 2 else 0), "<u2").tolist()
        a = int.from_bytes(self.take(2 if k // 4 else 0), "little", signed=True)
        b = int.from_bytes(self.take(1 if k // 4 == 1 else 0), "little", signed=True)
        rest = self.run(np.full(count, table), lambda t: own or _frequencies(k % 4, t, classes))
        if k // 4 == 2:
            return a + np.cumsum(rest)
        return rest + (a * count + 4 * b * np.arange(count) + 8 * count) // (16 * count) if k // 4 else rest

    def matrix(self, rows: int, columns: int, shifts: np.ndarray | None = None) -> np.ndarray:
        """These matrices are too small for chunks, but for those that follow the columns."""
        k, classes = self.take(2)
        of_rows, values = self.vector(rows), np.zeros((rows, columns), np.int64)
        shifts, start = np.zeros(columns, np.int64) if shifts is None else shifts, 0
        while start < rows:
            stop = min(rows, start + max(1, start // 2)) if k // 4 else rows
            named = of_rows[start:stop, None]
            tables = np.where(named == 0, 0, np.clip(named + shifts, 1, 63))
            found = self.run(tables.reshape(-1), lambda t: _frequencies(k % 4, t, classes))
            values[start:stop], start = found.reshape(-1, columns), stop
            if k // 4:
                shifts = self.followed(values[:start], of_rows[:start])
        return values

    @staticmethod
    def followed(codes: np.ndarray, tables: np.ndarray) -> np.ndarray:
        m, energies = 3, np.full(codes.shape[1], 3 << 8)
        for row, t in zip(codes, tables.tolist(), strict=True):
            if t:
                most, scale = isqrt(isqrt(1 << t - 1)) + 1, isqrt(1 << 81 - t)
                m, energies = m + 1, energies + (np.minimum(abs(row), most) ** 2 * scale >> 24)
        least = [isqrt(isqrt((m << 8) ** 4 << 2 * shift + 63)) >> 16 for shift in range(-23, 25)]
        return np.array([sum(energy >= each for each in least) - 24 for energy in energies.tolist()])

    def bounded(self, limits: np.ndarray) -> np.ndarray:
        values = np.zeros(len(limits), np.int64)
        for i in np.flatnonzero(limits > 1 << 16):
            values[i] = self.below((int(limits[i]) - 1 >> 16) + 1) << 16
        for i in np.flatnonzero(limits > 1):
            values[i] |= self.below(min(int(limits[i]), 1 << 16))
        return values

    def below(self, n: int) -> int:
        size = (1 << 24) // n
        return self.ans.take(1, [*[size] * (n - 1), (1 << 24) - size * (n - 1)])[0]

    def end(self) -> None:
        assert (self.head, self.ans.ended) == ([], True)


def _half_octaves(exponents: np.ndarray) -> np.ndarray:
    odd = np.array([0x3F800000, 0x3FB504F3], np.uint32).view(np.float32)[exponents % 2]
    return odd * np.float32(2) ** np.clip(exponents // 2, -126, 126).astype(np.float32)


def _elementwise(how: dict, data: bytes, rows: int, columns: int) -> np.ndarray:
    blocks = []
    for start in range(0, rows, how["height"]):
        height, size = min(how["height"], rows - start), int.from_bytes(data[:4], "little")
        codes, data = Codes(data[4 : 4 + size]), data[4 + size :]
        row, column = codes.vector(height), codes.vector(columns)
        values = codes.matrix(height, columns, -how["slope"] * column).astype(np.float32)
        codes.end()
        blocks.append(values * (_half_octaves(row) * np.float32(how["step"]))[:, None] * _half_octaves(column))
    assert not data
    return np.concatenate(blocks)


def _factors(how: dict, data: bytes, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    codes = Codes(data)
    column = codes.vector(columns)
    right = codes.matrix(how["rank"], columns).astype(np.float32) * (_half_octaves(column) * np.float32(how["step"]))
    row, direction = codes.vector(rows), codes.vector(how["rank"])
    left = codes.matrix(how["rank"], rows).astype(np.float32) * _half_octaves(direction)[:, None] * _half_octaves(row)
    codes.end()
    return left.T, right


def _factored(how: dict, data: bytes, rows: int, columns: int) -> np.ndarray:
    left, right = _factors(how, data, rows, columns)
    return left @ right


def matrix_delta(how: dict, data: bytes, rows: int, columns: int) -> np.ndarray:
    if how["operator"] == "hybrid":
        parts = (how["strong"], data[: how["split"]]), (how["rest"], data[how["split"] :])
        return sum(matrix_delta(part, payload, rows, columns) for part, payload in parts)
    return (_elementwise if how["operator"] == "elementwise" else _factored)(how, data, rows, columns)


def cut(shape: list[int]) -> tuple[int, int]:
    """Section "Matrices"."""
    cuts = [(prod(shape[:i]), prod(shape[i:])) for i in range(1, len(shape))] or [(1, prod(shape))]
    return max(cuts, key=min)


def _factor(data: bytes, length: int, bands: list, group_size: int) -> tuple[np.ndarray, bytes]:
    """Section "Factors": shape (rank, length)."""
    groups, rank = -(-length // group_size), sum(rows for _, rows in bands)
    scales, data = _bfloat16(data[: 2 * rank * groups]).reshape(rank, groups), data[2 * rank * groups :]
    rows: list[np.ndarray] = []
    for bits, count in bands:
        size = _packed_size(count * groups, bits)
        zeros, data = np.array(_unpack(data[:size], count * groups, bits)).reshape(count, groups), data[size:]
        size = _packed_size(count * length, bits)
        codes, data = np.array(_unpack(data[:size], count * length, bits)).reshape(count, length), data[size:]
        rows.append((codes - zeros.repeat(group_size, axis=1)[:, :length]).astype(np.float32))
    return np.concatenate(rows) * scales.repeat(group_size, axis=1)[:, :length], data


def _ordered(bfloat16: np.ndarray) -> np.ndarray:
    signed = bfloat16.view(np.int16).astype(np.int64)
    return np.where(signed < 0, signed ^ 0x7FFF, signed)


def _patterns(places: np.ndarray) -> np.ndarray:
    places = places.astype(np.int16)
    return np.where(places < 0, places ^ 0x7FFF, places).astype(np.int16).view(np.uint16)


BFLOAT16 = np.arange(-0x7F81, 0x7F81)  # the places of all values from minus to plus infinity


def _places(how: dict, data: bytes, base: np.ndarray, shape: list[int]) -> np.ndarray:
    """The tuned places by the coding `predicted`; one block, as these tensors are small."""
    parts = []
    while data:
        size = int.from_bytes(data[:4], "little")
        parts.append(Codes(data[4 : 4 + size]))
        data = data[4 + size :]
    (spreads, codes), (rows, columns) = parts, cut(shape)
    of_rows, of_columns = spreads.vector(rows), spreads.vector(columns)
    spreads.end()
    levels = np.clip(2 * how["exponent"] + of_rows[:, None] + of_columns, -400, 400).reshape(-1)
    values, places = _bfloat16(base.tobytes()).astype(np.float64), _ordered(base)
    octaves = np.where(values == 0, -10000, np.frexp(values)[1])
    groups = np.clip(2 * octaves - levels, 4 + levels % 2, 80)
    sorted_values = _bfloat16(_patterns(BFLOAT16).tobytes()).astype(np.float64)
    widths = 2.0 ** ((groups + levels) // 2 + 1 - 8)

    def first(cells: np.ndarray, width: np.ndarray) -> np.ndarray:
        return BFLOAT16[np.searchsorted(sorted_values, np.maximum((cells - 0.5) * width, sorted_values[1]))]

    for group in np.unique(groups):
        here = np.flatnonzero(groups == group)
        found, width = codes.vector(len(here)), widths[here]
        if group > 10:
            places[here] += found
            continue
        cells = found + np.rint(values[here] / width).astype(np.int64)
        middle = cells == 0
        edge, d = first(cells[middle] + 1, width[middle]), codes.vector(int(middle.sum()))
        places[here[middle]] = np.where(d < 0, -edge - 2 - d, edge - 1 - d)
        starts, ends = (first(cells[~middle] + i, width[~middle]) for i in (0, 1))
        places[here[~middle]] = starts + codes.bounded(ends - starts)
    codes.end()
    return places


def _whole(factor: np.ndarray, bits: int, axis: int) -> tuple[np.ndarray, np.ndarray]:
    octaves = np.frexp(np.abs(factor).max(axis=axis, keepdims=True))[1]
    return np.rint(factor.astype(np.float64) * 2.0 ** (bits - octaves)).astype(np.int64), octaves - bits


def _steady(how: dict, data: bytes, rows: int, columns: int) -> np.ndarray:
    """The delta of section "Predictions"."""
    if how["operator"] == "hybrid":
        strong, rest = data[: how["split"]], data[how["split"] :]
        return _steady(how["strong"], strong, rows, columns) + _elementwise(how["rest"], rest, rows, columns)
    if how["operator"] == "elementwise":
        return _elementwise(how, data, rows, columns)
    bits = (53 - len(f"{how['rank']:b}")) // 2
    (left, of_rows), (right, of_columns) = map(_whole, _factors(how, data, rows, columns), (bits, bits), (1, 0))
    return np.ldexp((left @ right).astype(np.float64), of_rows + of_columns).astype(np.float32)


def prediction(how: dict, data: bytes, base: np.ndarray, weight: float) -> np.ndarray:
    """Base patterns (u2) that the lossy operator brought nearer to the tuned ones."""
    if weight == 0:
        return base
    rows, columns = cut(list(base.shape))
    delta = _steady(how, data, columns, rows).T if how.get("transposed") else _steady(how, data, rows, columns)
    sums = _bfloat16(base.tobytes()) + np.float32(weight) * delta.reshape(-1)
    bits = sums.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).reshape(base.shape)


def tuned_patterns(entry: dict, payload: bytes, base: np.ndarray) -> np.ndarray:
    """The tuned bfloat16 patterns (u2) of one parameter from the base's."""
    how, shape = entry["how"], entry["shape"]
    values = _bfloat16(base.tobytes()).reshape(shape)
    if how["operator"] == "unchanged":
        return base
    if how["operator"] == "exact":
        if "product" in how:
            base = prediction(how["product"], payload[: how["split"]], base, 1.0)
            payload = payload[how["split"] :]
        if how["coding"] == "raw":
            return np.frombuffer(payload, "<u2").reshape(shape)
        if how["coding"] == "predicted":
            return _patterns(_places(how, payload, base.reshape(-1), shape)).reshape(shape)
        folded, rest = _integers(payload, base.size)
        assert not rest
        steps = np.array([value >> 1 ^ -(value & 1) for value in folded])
        return _patterns(_ordered(base.reshape(-1)) + steps).reshape(shape)
    if how["operator"] == "sparse":
        row, payload = _factor(payload, how["count"], [[8, 1]], how["group_size"])
        gaps, payload = _integers(payload, how["count"])
        delta = np.zeros(base.size, np.float32)
        delta[np.cumsum(np.array(gaps) + 1) - 1] = row[0]
        delta = delta.reshape(shape)
    elif how["operator"] == "lowrank":
        d_out, d_in = reversed(cut(shape)) if how.get("transposed") else cut(shape)
        right, payload = _factor(payload, d_in, how["bands"], how["group_size"])
        left, payload = _factor(payload, d_out, how["bands"], how["group_size"])
        delta = (left.T @ right).reshape(d_out, d_in)
        delta = (delta.T if how.get("transposed") else delta).reshape(shape)
    else:
        rows, columns = cut(shape)
        if how.get("transposed"):
            delta, payload = matrix_delta(how, payload, columns, rows).T.reshape(shape), b""
        else:
            delta, payload = matrix_delta(how, payload, rows, columns).reshape(shape), b""
    assert not payload
    return (values + delta).astype(np.float32)
