"""Writes casts.txt: what torch makes of the values that conversions get wrong, for the unit tests of `model::weights`.

    python tests/golden/make_casts.py

One line for each pair: type, type, the elements before and after as hexadecimal bytes, little-endian. NaN is left out
where torch's result depends on the place in the tensor or on the processor: in bfloat16, and in float32 from float16.
"""

import random
from pathlib import Path

import torch

FLOATS = {"float16": (16, 10), "bfloat16": (16, 7), "float32": (32, 23), "float64": (64, 52)}
FLOAT8 = {"float8_e4m3fn": 3, "float8_e5m2": 2}
INTEGERS = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}


def patterns(bits, mantissa, random):
    """Bit patterns around every boundary, and some at random."""
    top = 1 << (bits - 1)
    infinity = (top - 1) >> mantissa << mantissa
    found = {0, 1, 2, (1 << mantissa) - 1, 1 << mantissa, infinity - 1, infinity, infinity | 1 << (mantissa - 1)}
    # Where another type ends: the powers of two at which it overflows or underflows, and the ties around them.
    bias = (1 << (bits - mantissa - 2)) - 1
    for power in (-149, -134, -133, -126, -25, -24, -23, -15, -14, 0, 11, 15, 16, 127, 128):
        exponent = power + bias
        if 0 < exponent < (1 << (bits - mantissa - 1)) - 1:
            at = exponent << mantissa
            found |= {at - 1, at, at + 1}
            for kept in (7, 10, 23):
                if kept < mantissa:
                    tie = 1 << (mantissa - kept - 1)
                    found |= {at + tie - 1, at + tie, at + tie + 1, at + 3 * tie - 1, at + 3 * tie, at + 3 * tie + 1}
                    found |= {at - tie - 1, at - tie, at - tie + 1}
    found |= {random.randrange(infinity) for _ in range(8)}
    positive = sorted(found)
    return positive + [value | top for value in positive[::8] + positive[-8:]]


def tensor(bits, values, dtype):
    signed = [value - (1 << bits) if bits > 8 and value >> (bits - 1) else value for value in values]
    return torch.tensor(signed, dtype=INTEGERS[bits]).view(dtype)


def main():
    numbers = random.Random(7)
    lines = []
    for source in [*FLOAT8, *FLOATS]:
        bits, mantissa = FLOATS.get(source, (8, 0))
        values = patterns(bits, mantissa, numbers) if source in FLOATS else list(range(256))
        stored = tensor(bits, values, getattr(torch, source))
        for target in FLOATS:
            if source == target:
                continue
            settled = target != "bfloat16" and (source, target) != ("float16", "float32")
            taken = stored if settled else stored[~stored.isnan()]
            lines.append(" ".join([source, target, as_hex(taken), as_hex(taken.to(getattr(torch, target)))]))
    Path(__file__).with_name("casts.txt").write_text("\n".join(lines) + "\n")


def as_hex(values):
    return values.view(torch.uint8).numpy().tobytes().hex()


if __name__ == "__main__":
    main()
