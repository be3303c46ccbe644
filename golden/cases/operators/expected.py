# piecework stitching source, format 1

import torch
import operator


def execution_fn(x, n, *, __vllm_submods__):
    add = x + n
    sub = x - n
    mul = x * n
    truediv = x / n
    floordiv = x // n
    mod = x % n
    pow_1 = x**n
    eq = x == n
    ne = x != n
    lt = x < n
    le = x <= n
    gt = x > n
    ge = x >= n
    and_ = n & 3
    or_ = n | 3
    xor = n ^ 3
    lshift = n << 3
    rshift = n >> 3
    sub_1 = (-1) - n
    pow_2 = (-2) ** n
    matmul = x @ x
    neg = -n
    pos = +n
    invert = ~n
    not_ = not n
    neg_1 = operator.neg(-7)
    add_1 = operator.add(1, 2j)
    contains = operator.contains([1, 2, n], 2)
    index = operator.index(n)
    return (
        add,
        sub,
        mul,
        truediv,
        floordiv,
        mod,
        pow_1,
        eq,
        ne,
        lt,
        le,
        gt,
        ge,
        and_,
        or_,
        xor,
        lshift,
        rshift,
        sub_1,
        pow_2,
        matmul,
        neg,
        pos,
        invert,
        not_,
        neg_1,
        add_1,
        contains,
        index,
    )
