"""Launches of several matrices, taken apart: what the blocks of each matrix do.

IS: the op and the kernel that a block of one part could as well belong to. Blocks of different
parts execute different loops, so the model of cost counts them apart, and adds up what they need.
IS NOT: launches that anybody makes.
"""

from __future__ import annotations

from flashrt.backends.cuda.fused_ops import LINEARS, NORM_LINEAR, NORM_LINEARS
from flashrt.backends.cuda.kernels import KernelLaunch, part_of
from flashrt.core.op import Launch, bind
from flashrt.core.region import Operand
from flashrt.ops.linear import LINEAR


def parts_of(launch: Launch, kernel: KernelLaunch) -> list[tuple[Launch, KernelLaunch]]:
    """The parts of a kernel launch of several matrices; of any other, itself."""
    several = {op: n for ops in (LINEARS, NORM_LINEARS) for n, op in ops.items()}
    found: list[tuple[Launch, KernelLaunch]] = []
    for i in range(several.get(launch.op, 0)):
        w, y = launch.operand(f"w{i}"), launch.operand(f"y{i}")
        op = NORM_LINEAR if launch.op in NORM_LINEARS.values() else LINEAR
        operands: dict[str, Operand] = {"w": w, "y": y}
        for name in {param.name for param in op.params} - set(operands):
            operands[name] = launch.operand(name)
        attrs = {attr.name: launch.attr(attr.name) for attr in op.attrs}
        alone = bind(op, operands, attrs)
        found.append((alone, part_of(kernel, i, w.shape[0])))
    return found or [(launch, kernel)]
