"""Elias' omega code and QSGD's codes of buckets, bit by bit on strings of "0" and "1", as the papers have them."""

import numpy as np

FORMS = (("sparse", False), ("dense", False), ("dense", True))  # and whether zeros have a sign
LARGEST = 2**20 - 1


class RefusedError(Exception):
    """These bits are no code."""


def omega(k):
    out = "0"
    while k > 1:
        out = f"{k:b}" + out
        k = len(f"{k:b}") - 1
    return out


def bucket_code(levels, form, sign_for_zeros):
    out, last = "", -1
    for i, level in enumerate(levels):
        sign = "1" if level < 0 else "0"
        if form == "dense":
            out += omega(abs(level) + 1) + (sign if level or sign_for_zeros else "")
        elif level:
            out += omega(i - last) + sign + omega(abs(level))
            last = i
    return out


def encode(levels, capacity, form, sign_for_zeros):
    """The buckets before the first that does not fit, and the lengths of all."""
    codes = [bucket_code(bucket, form, sign_for_zeros) for bucket in np.asarray(levels).tolist()]
    bits = ""
    for code in codes:
        if len(bits) + len(code) > 8 * capacity:
            break
        bits += code
    bits = bits.ljust(8 * capacity, "0")
    return np.packbits([int(bit) for bit in bits]), np.array([len(code) for code in codes], np.int32)


class Reader:
    """Reads a bucket's bits, none beyond them."""

    def __init__(self, bits):
        self.bits, self.at = bits, 0

    def read(self, count):
        if self.at + count > len(self.bits):
            raise RefusedError
        self.at += count
        return self.bits[self.at - count : self.at]

    def omega(self):
        k = 1
        while (bit := self.read(1)) == "1":
            k = int(bit + self.read(k), 2)
            if k > LARGEST:
                raise RefusedError
        return k

    def ended(self):
        return self.at == len(self.bits)


def read_bucket(bits, d, most, form, sign_for_zeros):
    reader, levels, i = Reader(bits), [0] * d, -1
    while not reader.ended() if form == "sparse" else i < d - 1:
        if form == "sparse":
            i += reader.omega()
            minus = reader.read(1) == "1"
            magnitude = reader.omega()
        else:
            i += 1
            magnitude = reader.omega() - 1
            minus = (magnitude > 0 or sign_for_zeros) and reader.read(1) == "1"
        if i >= d or magnitude > most or (minus and magnitude == 0):
            raise RefusedError
        levels[i] = -magnitude if minus else magnitude
    if not reader.ended():
        raise RefusedError
    return levels


def decode(data, lengths, d, most, form, sign_for_zeros):
    """The levels, or None where they are refused."""
    lengths = [int(length) for length in lengths]
    if min(lengths, default=0) < 0 or sum(lengths) > 8 * len(data):
        return None
    bits, levels, start = "".join(map(str, np.unpackbits(data))), [], 0
    try:
        for length in lengths:
            levels.append(read_bucket(bits[start : start + length], d, most, form, sign_for_zeros))
            start += length
    except RefusedError:
        return None
    return levels
