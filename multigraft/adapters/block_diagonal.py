"""Block-diagonal LoRA (BD-LoRA, arXiv 2510.23346): LoRA of which one factor of a module is block-diagonal.

With N blocks, meant for a tensor-parallel group of N ranks: B of modules that are split by outputs (q, k, v, gate, up)
and A of those split by inputs (o, down). Then each rank's part of the adapter needs that rank's data alone.

Files are PEFT's (peft 0.21, tuners/lora/variants.py): `use_bdlora` in the config, and a block-diagonal factor stored as
its blocks one below the other, (rank, in / N) for A and (out, rank / N) for B. PEFT's help texts of the two lists of
modules are swapped; this file follows its code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from multigraft.core.errors import AdapterError

from .fields import Fields

BD_A = ("o_proj", "down_proj")
BD_B = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
"""The modules of Llama-like models whose A, and whose B, should be block-diagonal."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """Into how many blocks a module's factors are divided; 1 is a dense factor."""

    a: int = 1
    b: int = 1


DENSE = Blocks()


@dataclass(frozen=True, slots=True)
class BlockDiagonal:
    """A parsed `use_bdlora`. A text of the lists matches every path that it is a part of, as in PEFT."""

    bd_a: tuple[str, ...]
    bd_b: tuple[str, ...]
    nblocks: int
    strict: bool

    @classmethod
    def parse(cls, fields: Fields) -> BlockDiagonal | None:
        raw = fields.mapping("use_bdlora")
        if not raw:
            return None
        own = Fields(raw)
        lists = []
        for name in ("target_modules_bd_a", "target_modules_bd_b"):
            names = own.names(name) or ()
            if isinstance(names, str):
                raise AdapterError(f"use_bdlora's {name} must be a list of names, got {names!r}.")
            lists.append(names)
        strict = own.take("match_strict", True)
        if not isinstance(strict, bool):
            raise AdapterError(f"use_bdlora's match_strict must be true or false, got {strict!r}.")
        parsed = cls(*lists, nblocks=own.count("nblocks", 1), strict=strict)
        own.finish()
        return parsed

    def of(self, path: str) -> Blocks:
        """The blocks of an adapted linear."""
        in_a, in_b = (any(text in path for text in texts) for texts in (self.bd_a, self.bd_b))
        if in_a and in_b:
            raise AdapterError(
                f"use_bdlora makes both factors of {path} block-diagonal: target_modules_bd_a has {list(self.bd_a)}, "
                f"target_modules_bd_b has {list(self.bd_b)}; a module may be matched by one of them."
            )
        if self.strict and not (in_a or in_b):
            raise AdapterError(
                f"use_bdlora has match_strict, but neither target_modules_bd_a, {list(self.bd_a)}, nor "
                f"target_modules_bd_b, {list(self.bd_b)}, matches {path}."
            )
        return Blocks(a=self.nblocks if in_a else 1, b=self.nblocks if in_b else 1)


def dense_shape(key: str, shape: tuple[int, ...], blocks: int, rows: int, columns: int) -> tuple[int, ...]:
    """Shape of the dense factor that a stored one stands for.

    rows, columns: what the config and the base model want of the dense one. AdapterError when blocks does not divide
    them, or the stored shape is not that of blocks one below the other.
    """
    if blocks == 1:
        return shape
    stored = stored_shape(key, blocks, rows, columns)
    if shape != stored:
        raise AdapterError(
            f"`{key}` has shape {list(shape)}; use_bdlora makes it block-diagonal, {blocks} blocks of a {rows} x "
            f"{columns} matrix one below the other, so it must be {list(stored)}."
        )
    return (rows, columns)


def stored_shape(key: str, blocks: int, rows: int, columns: int) -> tuple[int, int]:
    """Shape in which a dense factor of rows x columns is stored; AdapterError when it cannot have so many blocks."""
    if blocks > 1:
        check_divisible(key, blocks, rows, columns)
    return (rows, columns // blocks)


def check_divisible(key: str, blocks: int, rows: int, columns: int) -> None:
    """AdapterError unless a factor of this shape can have so many blocks."""
    for size in (rows, columns):
        if size % blocks:
            raise AdapterError(
                f"nblocks is {blocks}, which does not divide {size}: `{key}` cannot be {rows} x {columns} and "
                "block-diagonal."
            )


def to_dense(stored: torch.Tensor, blocks: int) -> torch.Tensor:
    """The dense factor of blocks that lie one below the other."""
    return stored if blocks == 1 else torch.block_diag(*stored.chunk(blocks))


def diagonal(dense: torch.Tensor, blocks: int) -> torch.Tensor:
    """A view of the blocks of a dense factor, (blocks, rows / blocks, columns / blocks)."""
    return dense.unflatten(0, (blocks, -1)).unflatten(2, (blocks, -1)).diagonal(dim1=0, dim2=2).movedim(-1, 0)


def nearest(a: torch.Tensor, b: torch.Tensor, blocks: Blocks, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The stored factors (A, B) of the given rank, a multiple of the blocks, whose product is nearest to b @ a.

    In the Frobenius norm: each block of rows (B block-diagonal) or columns (A) of b @ a is a product of its own, so its
    truncated singular value decomposition is the nearest one of rank / blocks. Third: |b @ a - B A| / |b @ a|.
    """
    if blocks.a > 1:
        b_T, a_T, error = nearest(b.T, a.T, Blocks(b=blocks.a), rank)
        # The stored A has the blocks of the transposed problem's B, each transposed.
        return torch.cat([block.T for block in a_T.chunk(blocks.a)]), b_T.T, error
    q, r = torch.linalg.qr(a.double().T)  # b a = (b rᵀ) qᵀ, with orthonormal columns of q
    keep = rank // blocks.b
    new_a, new_b, lost, total = [], [], 0.0, 0.0
    for rows in (b.double() @ r.T).chunk(blocks.b):
        u, s, vh = torch.linalg.svd(rows, full_matrices=False)
        root = s[:keep].sqrt()
        part_a, part_b = q.new_zeros(keep, len(q)), q.new_zeros(len(rows), keep)
        part_a[: len(root)] = root[:, None] * (vh[:keep] @ q.T)
        part_b[:, : len(root)] = u[:, :keep] * root
        new_a.append(part_a)
        new_b.append(part_b)
        lost += float(s[keep:].square().sum())
        total += float(s.square().sum())
    error = (lost / total) ** 0.5 if total else 0.0
    return torch.cat(new_a).to(a.dtype), torch.cat(new_b).to(b.dtype), error
