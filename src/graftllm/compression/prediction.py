"""What a lossy operator predicts of the tuned values, with the same bits on every platform.

Exact values are coded given the prediction, so one other bit would spoil all that follows it. Products of
factors are therefore computed by `products`, not as decoding the lossy operator alone does.
"""

from collections.abc import Iterator
from typing import TypeGuard

import numpy as np
import torch
from torch import Tensor

from graftllm.compression.elementwise import Elementwise
from graftllm.compression.factored import Factored, Hybrid, MatrixCode
from graftllm.compression.matrix import matrix_shape
from graftllm.compression.products import steady_product

_BLOCK = 1 << 22  # entries that are predicted at a time


def is_predicting(operator: object) -> TypeGuard[MatrixCode]:
    """Return whether `predicted` takes an operator."""
    return isinstance(operator, Elementwise | Factored | Hybrid)


def predicted(operator: MatrixCode, payload: np.ndarray, base: Tensor, weight: float = 1.0) -> Tensor:
    """Return base + weight * delta in the base's dtype, some rows of the operator's matrix at a time.

    Raises:
        ValueError: the payload does not fit the operator and the base's shape, or gives no finite values.
    """
    values = base.clone(memory_format=torch.contiguous_format)
    matrix = values.view(matrix_shape(tuple(base.shape)))
    matrix = matrix.T if operator.transposed else matrix
    for start, part in _blocks(operator, payload, (matrix.shape[0], matrix.shape[1])):
        rows = matrix[start : start + len(part)]
        rows.copy_(rows.float() + weight * part)
    return values


def _blocks(operator: MatrixCode, payload: np.ndarray, shape: tuple[int, int]) -> Iterator[tuple[int, Tensor]]:
    if isinstance(operator, Elementwise):
        yield from operator.blocks(payload, shape)
    elif isinstance(operator, Factored):
        left, right = operator.factors(payload, shape)
        height = max(1, _BLOCK // shape[1])
        for start in range(0, shape[0], height):
            yield start, steady_product(left[start : start + height], right)
    else:
        left, right = operator.strong.factors(payload[: operator.split], shape)
        for start, rest in operator.rest.blocks(payload[operator.split :], shape):
            yield start, steady_product(left[start : start + len(rest)], right) + rest
