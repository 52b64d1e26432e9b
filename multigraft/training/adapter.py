"""An adapter while it is trained: one flat float32 tensor, laid out as the block that serving reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from multigraft.adapters.block_diagonal import diagonal
from multigraft.adapters.fields import Fields
from multigraft.adapters.peft_files import CONFIG, WEIGHTS
from multigraft.adapters.peft_files import METHODS as SERVED
from multigraft.adapters.plan import Piece, Plan
from multigraft.adapters.site import Site, SiteBlock
from multigraft.core.errors import AdapterError, InvalidRequest, JobFailed
from multigraft.core.region import Ranges, Region, Scope, as_scope
from multigraft.kernels.lora_gemm import Factors

from .methods import METHODS
from .microbatch import Sample
from .spec import AdapterSpec

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterDesign:
    """What a trained adapter will be, before it takes any memory.

    Made from an adapter_config.json by the parser and the plan that serve adapters, so that what is trained can be
    served, and lies in the same layout.
    """

    config: Mapping[str, Any]
    """adapter_config.json."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of its tensors, by PEFT's names."""
    plan: Plan
    region: Region
    scope: Scope
    dropout: float

    @classmethod
    def new(cls, spec: AdapterSpec, sites: Sequence[Site], *, base_model: str | None, max_rank: int) -> AdapterDesign:
        """spec: resolved. InvalidRequest names what the base model cannot take."""
        try:
            return cls.parse(spec.config(sites, base_model), sites, max_rank=max_rank)
        except AdapterError as e:
            raise InvalidRequest(e.message, param="adapter") from e

    @classmethod
    def parse(cls, config: Mapping[str, Any], sites: Sequence[Site], *, max_rank: int) -> AdapterDesign:
        fields = Fields(config)
        method = SERVED[fields.take("peft_type")].parse(fields)
        shapes = method.shapes(sites)
        if not shapes:
            raise InvalidRequest(
                f"target_modules is {config.get('target_modules')!r}, which selects no module of the base model.",
                param="target_modules",
            )
        scope = as_scope(config.get("adapter_scope")) or method.region.scopes[0]
        return cls(
            config=config,
            shapes=shapes,
            plan=method.plan(shapes, sites, max_rank=max_rank),
            region=method.region,
            scope=method.region.check(scope),
            dropout=config.get("lora_dropout", 0.0),
        )

    @property
    def num_parameters(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())

    def nbytes(self, dtype: torch.dtype) -> int:
        """Device memory of its training: block, float32 tensors, their gradient, AdamW's two moments; of block-diagonal
        factors also what is beside the blocks, and a mask."""
        masked = any(piece.blocks > 1 for piece in self.plan.pieces)
        return self.plan.numel * (dtype.itemsize + 4 * 4 + masked)

    def views(self, flat: torch.Tensor) -> Tensors:
        """The tensors, as they lie in a (numel,) tensor: in PEFT's shapes, but with the blocks of a block-diagonal one
        as a first dimension of their own."""
        return {piece.key: self._view(flat, piece) for piece in self.plan.pieces}

    def named(self, flat: torch.Tensor) -> Tensors:
        """Contiguous copies of the views, in PEFT's shapes, as safetensors wants them."""
        views = self.views(flat).items()
        return {key: view.clone(memory_format=torch.contiguous_format).view(self.shapes[key]) for key, view in views}

    def _view(self, flat: torch.Tensor, piece: Piece) -> torch.Tensor:
        part = flat[piece.offset : piece.offset + torch.Size(piece.shape).numel()].view(piece.shape)
        dense = part.T if piece.transpose else part
        return dense if piece.blocks == 1 else diagonal(dense, piece.blocks)


class AdapterBlock:
    """What passes need of an adapter: they read `block`, and their backward passes add to `block_grad`."""

    def __init__(self, design: AdapterDesign, *, dtype: torch.dtype, device: torch.device | str):
        """Zeros. dtype: the block's."""
        self.design = design
        numel = design.plan.numel
        self.block = torch.zeros(numel, dtype=dtype, device=device)
        self.block_grad = torch.zeros(numel, dtype=torch.float32, device=device)
        """(numel,) d loss / d block, accumulated."""
        self.views: dict[int, tuple[Site, Factors, Factors]] = {}

    @property
    def region(self) -> Region:
        return self.design.region

    @property
    def scope(self) -> Scope:
        return self.design.scope

    @property
    def dropout(self) -> float:
        return self.design.dropout

    @property
    def sites(self) -> dict[int, SiteBlock]:
        return self.design.plan.sites

    def adapted(self, sample: Sample) -> Ranges:
        """The sample's positions on which the adapter acts: those of a request with its prompt."""
        return self.region.ranges(sample.tokens[: sample.prompt_len], len(sample.tokens), self.scope)

    def clear(self) -> None:
        """Forget the gradient."""
        self.block_grad.zero_()


class Replicas(Protocol):
    """The same adapter's blocks on the other ranks of a tensor-parallel engine, which run the same passes."""

    def add_gradients(self, block_grad: torch.Tensor) -> None:
        """Add theirs to it."""
        ...

    def update(self, block: torch.Tensor) -> None:
        """Give them this block."""
        ...

    def clear(self) -> None:
        """Forget their gradients."""
        ...


class TrainableAdapter(AdapterBlock):
    """A job's adapter.

    parameters: (numel,) float32, what the optimizer changes, laid out as the block. The block is made from it by
    `sync`: cast to the block's type, with two exceptions, both of ReFT. What lies beside the blocks of a block-diagonal
    factor is and stays zero: `collect` masks its gradient.
    - Where the method's factor is a difference (LoReFT's W - R), the parameters hold W.
    - Where the rows of a matrix R must be orthonormal, the parameters hold a matrix P of full rank, and R = L⁻¹ P
      with P Pᵀ = L Lᵀ (Cholesky): the orthonormal rows that Gram-Schmidt makes of P's. Every orthonormal R is reached,
      AdamW works on the unconstrained P, and the gradient goes through the factorisation. pyreft takes
      torch.nn.utils.parametrizations.orthogonal for the same purpose, whose Householder products make r reflections
      one after the other for each layer; here all layers are one batch of r × r factorisations.
    """

    def __init__(self, design: AdapterDesign, *, dtype: torch.dtype, device: torch.device | str):
        """Zeros; `new` and `load` fill it. dtype: the block's."""
        super().__init__(design, dtype=dtype, device=device)
        numel = design.plan.numel
        self.parameters = torch.zeros(numel, dtype=torch.float32, device=device)
        self.replicas: Replicas | None = None
        """While other ranks run its passes, too."""
        self._rows: Tensors = {}
        """The orthonormal matrices, by name."""

        pieces = design.plan.pieces
        own, block, grad = (design.views(flat) for flat in (self.parameters, self.block, self.block_grad))
        self._mask: torch.Tensor | None = None
        """(numel,) bool: what is trained. None: everything is."""
        if any(piece.blocks > 1 for piece in pieces):
            self._mask = torch.zeros(numel, dtype=torch.bool, device=device)
            for view in design.views(self._mask).values():
                view.fill_(True)
        self._orthonormal = design.plan.orthonormal
        self._free = [own[key] for key in self._orthonormal]
        self._free_grads = [grad[key] for key in self._orthonormal]
        self._free_blocks = [block[key] for key in self._orthonormal]
        self._differences = [(block[p.key], own[p.key], p.minus) for p in pieces if p.minus is not None]
        self._difference_grads = [(grad[p.key], grad[p.minus]) for p in pieces if p.minus is not None]

    @classmethod
    def new(
        cls,
        spec: AdapterSpec,
        design: AdapterDesign,
        *,
        seed: int,
        dtype: torch.dtype,
        device: torch.device | str,
        start: Path | None = None,
    ) -> TrainableAdapter:
        """With the weights in the PEFT folder `start`; without one, initialised so that the model starts as the base
        model. Equal seeds give equal adapters on every device. JobFailed when the folder cannot be read."""
        if start is not None:
            tensors = _read_weights(start)
        else:
            tensors = {key: torch.empty(shape) for key, shape in design.shapes.items()}
            METHODS[spec.method].initialise(tensors, torch.Generator().manual_seed(seed))
        adapter = cls(design, dtype=dtype, device=device)
        adapter.fill(tensors)
        return adapter

    @classmethod
    def load(
        cls, folder: Path, sites: Sequence[Site], *, max_rank: int, dtype: torch.dtype, device: torch.device | str
    ) -> TrainableAdapter:
        """From a PEFT folder that `save` wrote."""
        config = json.loads((folder / CONFIG).read_text())
        adapter = cls(AdapterDesign.parse(config, sites, max_rank=max_rank), dtype=dtype, device=device)
        adapter.fill(load_file(folder / WEIGHTS))
        return adapter

    @property
    def tensors(self) -> Tensors:
        """What PEFT's file holds, float32 on the device; `AdapterDesign.views` that the next `sync` changes."""
        return self.design.views(self.parameters) | self._rows

    def fill(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set all tensors, by PEFT's names."""
        for key, view in self.design.views(self.parameters).items():
            view.copy_(tensors[key].view(view.shape))
        self.sync()

    @torch.no_grad()
    def sync(self) -> None:
        """Make the block from the parameters. No host sync."""
        self.block.copy_(self.parameters)
        if self._orthonormal:
            rows = orthonormal_rows(torch.stack(self._free)).unbind()
            torch._foreach_copy_(self._free_blocks, rows)
            self._rows = dict(zip(self._orthonormal, rows, strict=True))
        if self._differences:
            targets, minuends, keys = zip(*self._differences, strict=True)
            tensors = self.tensors
            torch._foreach_copy_(targets, torch._foreach_sub(minuends, [tensors[key] for key in keys]))
        if self.replicas is not None:
            self.replicas.update(self.block)

    def collect(self) -> torch.Tensor:
        """Turn block_grad in place into the gradient of `parameters`, and return it. No host sync."""
        if self.replicas is not None:
            self.replicas.add_gradients(self.block_grad)
        if self._mask is not None:
            self.block_grad.mul_(self._mask)
        if self._difference_grads:
            of_difference, of_subtrahend = zip(*self._difference_grads, strict=True)
            torch._foreach_sub_(of_subtrahend, of_difference)
        if self._orthonormal:
            with torch.enable_grad():
                free = torch.stack(self._free).requires_grad_()
                rows = orthonormal_rows(free)
            (grads,) = torch.autograd.grad(rows, free, torch.stack(self._free_grads))
            torch._foreach_copy_(self._free_grads, grads.unbind())
        return self.block_grad

    def clear(self) -> None:
        super().clear()
        if self.replicas is not None:
            self.replicas.clear()

    def export(self) -> Tensors:
        """A copy of the tensors in host memory, which another thread may save."""
        flat = self.parameters.clone()
        views = self.design.views(flat)
        for key, rows in self._rows.items():
            views[key].copy_(rows)
        return self.design.named(flat.cpu())

    def save(self, folder: Path) -> None:
        """A PEFT folder, which peft reads as well if the method is LoRA."""
        write_folder(folder, self.design.config, self.export())


def orthonormal_rows(p: torch.Tensor) -> torch.Tensor:
    """(..., r, n) of full rank: the matrix with orthonormal rows, each spanning with those before it what p's do."""
    lower, _ = torch.linalg.cholesky_ex(p @ p.mT)
    return torch.linalg.solve_triangular(lower, p, upper=False)


def _read_weights(folder: Path) -> Tensors:
    try:
        return load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as e:
        raise JobFailed(f"The adapter that the job goes on from cannot be read: {e}.") from e


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Tensors) -> None:
    """Write a PEFT folder. Not atomic: write beside the final place, then rename."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(dict(config), indent=2, sort_keys=True) + "\n")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
