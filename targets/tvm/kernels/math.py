"""Vector functions in plain arithmetic, so that results do not depend on the C library or on the SIMD width.

Every function takes an f32 expression of any width; NaN stays NaN.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.tirx.script.builder import ir as T

from qcn_compile.targets.tvm.kernels.core import Expr, dtype_of, f32, i32, lanes_of, let, local, splat, vector

LOG2E = 1.4426950408889634
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4  # Cody-Waite split of ln 2 (Cephes expf)
EXP_TERMS = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
LOG_TERMS = (7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
             -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1)  # Cephes logf


def horner(x: Expr, terms: tuple[float, ...]) -> Expr:
    """terms[0] x^(n-1) + ... + terms[n-1]."""
    lanes = lanes_of(x)
    total = f32(terms[0], lanes)
    for term in terms[1:]:
        total = T.fma(total, x, f32(term, lanes))
    return total


def _power_of_two(n: Expr) -> Expr:
    """2^n for an int32 n in -126..127, by building the exponent bits."""
    lanes = lanes_of(n)
    return T.reinterpret(vector("float32", lanes), T.shift_left(n + i32(127, lanes), i32(23, lanes)))


def exp(x: Expr, full_range: bool = False) -> Expr:
    """e^x within 2 ulp. Clamped to e^-87.3 .. e^88.3; with `full_range` it reaches 0 and infinity as IEEE wants."""
    lanes = lanes_of(x)
    high, low = (89.0, -104.0) if full_range else (88.3, -87.3)
    x = let("x", T.max(f32(low, lanes), T.min(f32(high, lanes), x)))  # this operand order lets NaN through
    n = let("n", T.nearbyint(x * f32(LOG2E, lanes)))
    r = T.fma(n, f32(-LN2_LOW, lanes), T.fma(n, f32(-LN2_HIGH, lanes), x))
    r = let("r", r)
    value = T.fma(r * r, horner(r, EXP_TERMS), r + f32(1.0, lanes))
    whole = let("whole", T.Cast(vector("int32", lanes), n))
    if not full_range:
        return value * _power_of_two(whole)
    half = let("half", T.shift_right(whole, i32(1, lanes)))
    return value * _power_of_two(half) * _power_of_two(whole - half)


def log(x: Expr) -> Expr:
    """ln x for normal x > 0."""
    lanes = lanes_of(x)
    bits = let("bits", T.reinterpret(vector("int32", lanes), x) - i32(0x3F3504F3, lanes))  # mantissa from sqrt(1/2)
    exponent = let("e", T.Cast(vector("float32", lanes), T.shift_right(bits, i32(23, lanes))))
    mantissa = T.bitwise_and(bits, i32(0x7FFFFF, lanes)) + i32(0x3F3504F3, lanes)
    m = let("m", T.reinterpret(vector("float32", lanes), mantissa) - f32(1.0, lanes))
    square = let("square", m * m)
    tail = T.fma(exponent, f32(LN2_LOW, lanes), horner(m, LOG_TERMS) * m * square) - square * f32(0.5, lanes)
    return T.fma(exponent, f32(LN2_HIGH, lanes), m + tail)


def log1p(x: Expr) -> Expr:
    """ln(1 + x) for x >= 0, exact for small x (Goldberg's correction)."""
    lanes = lanes_of(x)
    x = let("x1", x)
    u = let("u", x + f32(1.0, lanes))
    return log(u) + (x - (u - f32(1.0, lanes))) / u


def sigmoid(x: Expr) -> Expr:
    """1 / (1 + e^-x)."""
    one = f32(1.0, lanes_of(x))
    return one / (one + exp(f32(0.0, lanes_of(x)) - x))


def silu(x: Expr) -> Expr:
    """x / (1 + e^-x)."""
    x = let("x0", x)
    return x / (f32(1.0, lanes_of(x)) + exp(f32(0.0, lanes_of(x)) - x))


def softplus(x: Expr) -> Expr:
    """ln(1 + e^x); x itself above 20, as torch has it."""
    lanes = lanes_of(x)
    x = let("x0", x)
    return T.Select(x > f32(20.0, lanes), x, log1p(exp(T.min(f32(20.0, lanes), x))))


def absolute(x: Expr) -> Expr:
    """|x| by clearing the sign bit."""
    lanes = lanes_of(x)
    bits = T.bitwise_and(T.reinterpret(vector("int32", lanes), x), i32(0x7FFFFFFF, lanes))
    return T.reinterpret(vector("float32", lanes), bits)


def fold(combine: Callable[[Expr, Expr], Expr], value: Expr, stop: int = 1) -> Expr:
    """Lanes of a vector combined, its halves again and again, down to `stop` lanes."""
    base, lanes = dtype_of(value), lanes_of(value)
    while lanes > max(2, stop):
        lanes //= 2
        part = vector(base, lanes)
        value = let("part", combine(T.vectorlow(part, value), T.vectorhigh(part, value)))
    if stop > 1:
        return value
    pair = local("pair", base, 2)
    pair[0, 2] = value
    return let("folded", combine(pair[0], pair[1]))


def total(value: Expr) -> Expr:
    """Sum of the lanes."""
    return fold(lambda a, b: a + b, let("sum", value))


def greatest(value: Expr) -> Expr:
    """Maximum of the lanes."""
    return fold(T.max, let("most", value))


def widen(bits: Expr) -> Expr:
    """bf16 bit patterns (uint16) as f32."""
    lanes = lanes_of(bits)
    return T.reinterpret(vector("float32", lanes),
                         T.shift_left(T.Cast(vector("uint32", lanes), bits), splat(T.uint32(16), lanes)))


def narrow(value: Expr) -> Expr:
    """f32 as bf16 bit patterns (uint16), rounded to the nearest, ties to even; NaN stays NaN."""
    lanes = lanes_of(value)
    kind, value = vector("uint32", lanes), let("wide", value)
    bits = let("bits", T.reinterpret(kind, value))
    tie = T.bitwise_and(T.shift_right(bits, splat(T.uint32(16), lanes)), splat(T.uint32(1), lanes))
    rounded = T.shift_right(bits + splat(T.uint32(0x7FFF), lanes) + tie, splat(T.uint32(16), lanes))
    return T.Cast(vector("uint16", lanes), T.Select(value == value, rounded, splat(T.uint32(0x7FC0), lanes)))


def half(bits: Expr) -> Expr:
    """f16 bit patterns (uint16) as f32."""
    lanes = lanes_of(bits)
    return T.Cast(vector("float32", lanes), T.reinterpret(vector("float16", lanes), bits))
