"""Operators: one file per formula, listed in one table.

    OPERATORS["ties"].apply(chunk, parameters, traced)

base         what an operator declares and the rules that keep its bits
reductions   sums over a tensor with fixed bits
linear  slerp  task_arithmetic  ties     the formulas that a recipe can name
passthrough  what a plan uses for tensors without arithmetic
arithmetic   stored bytes to float32 and back; imports torch, so only execution imports it

Nothing else here imports torch: kernels use the tensors that they are handed.
"""

from __future__ import annotations

from merge_core.operators.base import Operator
from merge_core.operators.linear import LINEAR
from merge_core.operators.passthrough import PASSTHROUGH
from merge_core.operators.slerp import SLERP
from merge_core.operators.task_arithmetic import TASK_ARITHMETIC
from merge_core.operators.ties import TIES

METHODS: dict[str, Operator] = {op.name: op for op in (LINEAR, SLERP, TASK_ARITHMETIC, TIES)}
"""What a recipe's `merge_method` can say."""

OPERATORS: dict[str, Operator] = {**METHODS, PASSTHROUGH.name: PASSTHROUGH}
"""What a plan can name."""
