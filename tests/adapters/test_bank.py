"""The device bank: contents, accounting and tables under random loads and unloads."""

import random

import pytest
import torch

from multigraft.adapters.bank import Bank
from multigraft.adapters.packing import pack
from multigraft.adapters.plan import ALIGN, MemberFactors, lay_out
from multigraft.adapters.site import PackedAdapter, Site, SiteKind
from multigraft.adapters.transfer import Load, new_block
from multigraft.core.errors import CapacityExceeded
from multigraft.kernels.lora import NO_OFFSET
from tests.adapters.lazy_stream import load_lazily

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = ["cpu", "lazy", pytest.param("cuda", marks=on_cuda)]
SITES = [
    Site(0, SiteKind.EMBEDDING, ("embed",), 50, (16,)),
    Site(1, SiteKind.LINEAR, ("q", "k", "v"), 16, (16, 8, 8)),
    Site(2, SiteKind.LINEAR, ("o",), 16, (16,)),
    Site(3, SiteKind.LINEAR, ("gate", "up"), 16, (40, 40)),
]
SHAPES = {path: (s.in_features, out) for s in SITES for path, out in zip(s.members, s.out_features, strict=True)}

Tensors = dict[str, tuple[torch.Tensor, torch.Tensor, float]]


def make_bank(device: str, max_slots: int, capacity_bytes: int) -> Bank:
    """lazy: on the CPU, loading as on CUDA."""
    on = "cpu" if device == "lazy" else device
    bank = Bank(SITES, max_slots=max_slots, capacity_bytes=capacity_bytes, dtype=torch.float32, device=on)
    if device == "lazy":
        load_lazily(bank)
    return bank


def make(ranks: dict[str, int], seed: int = 0) -> tuple[PackedAdapter, Tensors]:
    """An adapter with the given ranks, and its A, B and scale by module."""
    g = torch.Generator().manual_seed(seed)
    tensors, files, modules = {}, {}, {}
    for path, rank in ranks.items():
        fan_in, fan_out = SHAPES[path]
        a, b = torch.randn(rank, fan_in, generator=g), torch.randn(fan_out, rank, generator=g)
        tensors[path] = (a, b, 1.0 + rank / 4)
        files[f"{path}.a"], files[f"{path}.b"] = a, b
        modules[path] = MemberFactors(f"{path}.a", f"{path}.b", rank, 1.0 + rank / 4)
    return pack(lay_out(SITES, modules), files.__getitem__, torch.float32), tensors


def check_content(bank: Bank, slot: int, tensors: Tensors) -> None:
    """The slot's factors as views, through the python entries, and through the device's tables."""
    table, scales, arena = bank.table.cpu(), bank.scales.cpu(), bank.arena.cpu()
    for site in SITES:
        factors = bank.factors(site.index, slot)
        if not any(path in tensors for path in site.members):
            assert factors is None and slot not in bank.entries(site.index)
            assert slot not in bank.slots or not table[site.index, slot].any()
            continue
        assert factors.ranks == bank.entries(site.index)[slot].ranks
        row = 0
        for m, path in enumerate(site.members):
            a, b, scale = tensors.get(path, (None, None, 0.0))
            rank = 0 if a is None else a.shape[0]
            assert factors.ranks[m] == rank and factors.scales[m] == scale
            assert factors.b[m].shape == (rank, site.out_features[m])
            a_at, b_at, table_rank, c_at = table[site.index, slot, m].tolist()
            assert table_rank == rank and c_at == NO_OFFSET and scales[site.index, slot, m].item() == scale
            if rank:
                assert torch.equal(factors.a[row : row + rank].cpu(), a) and torch.equal(factors.b[m].cpu(), b.T)
                assert torch.equal(arena[a_at : a_at + a.numel()].view_as(a), a)
                assert torch.equal(arena[b_at : b_at + b.numel()].view(b.T.shape), b.T)
            row += rank
        assert factors.a.shape == (row, site.in_features)


def random_ranks(rng: random.Random) -> dict[str, int]:
    paths = rng.sample(list(SHAPES), rng.randint(1, len(SHAPES)))
    return {path: rng.choice([1, 2, 3, 8, 16]) for path in paths}


@pytest.mark.parametrize("device", DEVICES)
def test_random_loads_and_unloads(device, monkeypatch):
    compactions, compact = [], Bank._compact
    monkeypatch.setattr(Bank, "_compact", lambda bank: (compactions.append(1), compact(bank)))
    rng = random.Random(7)
    bank = make_bank(device, 6, 30_000)
    tenants: dict[int, tuple[PackedAdapter, Tensors]] = {}
    under_way: dict[int, Load] = {}
    loads = refusals = 0
    for step in range(400):
        slot, before = rng.randrange(6), bank.version
        if rng.random() < 0.3:
            bank.unload(slot)
            assert (bank.version > before) == (slot in tenants)
            tenants.pop(slot, None)
        else:
            new = make(random_ranks(rng), seed=step)
            others = sum(p.nbytes for s, (p, _) in tenants.items() if s != slot)
            if others + new[0].nbytes <= bank.capacity_bytes:  # bytes alone decide, however fragmented
                under_way[slot] = bank.load(slot, new[0])
                tenants[slot] = new
                assert bank.version > before
                loads += 1
            else:
                with pytest.raises(CapacityExceeded, match=f"needs {new[0].nbytes} bytes"):
                    bank.load(slot, new[0])
                assert bank.version == before
                refusals += 1
        assert bank.slots == sorted(tenants) and bank.used_bytes == sum(p.nbytes for p, _ in tenants.values())
        if step % 10 == 0:
            bank.check_integrity()
            while not all(load.ready() for load in under_way.values()):
                pass
            under_way.clear()
            for s in range(6):
                check_content(bank, s, tenants[s][1] if s in tenants else {})
    assert loads > 100 and refusals > 10 and len(compactions) > 10


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("chunk", [64, 2**24])
def test_compaction_makes_room(device, chunk, monkeypatch):
    monkeypatch.setattr("multigraft.adapters.bank.COMPACTION_CHUNK", chunk)
    small, big = {"o": 4}, {"o": 6}
    size = make(small)[0].nbytes
    bank = make_bank(device, 9, 8 * size)
    kept = {}
    for slot in range(8):
        packed, tensors = make(small, seed=slot)
        bank.load(slot, packed).wait()
        kept[slot] = tensors
    for slot in (0, 2, 4):
        bank.unload(slot)
        del kept[slot]
    generation = bank.generation(1)
    packed, tensors = make(big, seed=99)
    assert size < packed.nbytes <= 2 * size  # fits no single hole
    bank.load(8, packed).wait()
    kept[8] = tensors
    bank.check_integrity()
    for slot, tensors in kept.items():
        check_content(bank, slot, tensors)
    assert bank.generation(1) == generation, "moving an adapter does not make it another one"


def locked(packed: PackedAdapter) -> PackedAdapter:
    """The same, in memory that the GPU reads itself."""
    block = new_block(packed.block.numel(), packed.block.dtype, "cuda")
    block.copy_(packed.block)
    return PackedAdapter(block=block, sites=packed.sites)


@on_cuda
def test_loads_under_way_are_moved_and_replaced_in_order():
    """Nobody waits for a load here but the reader at the end: copies of 64 MiB, overtaken by moves and unloads.

    And they take no page-locked memory of PyTorch's, but the little that a row of the table is.
    """
    site = Site(0, SiteKind.LINEAR, ("big",), 2**20, (64,))

    def big(value: float, rank: int) -> PackedAdapter:
        plan = lay_out([site], {"big": MemberFactors("a", "b", rank, 1.0)})
        a, b = torch.full((rank, 2**20), value), torch.full((64, rank), value)
        return locked(pack(plan, {"a": a, "b": b}.__getitem__, torch.float32))

    adapters = {value: big(value, rank) for value, rank in ((1.0, 16), (2.0, 16), (3.0, 16), (4.0, 24))}
    capacity = adapters[1.0].nbytes + adapters[2.0].nbytes + adapters[3.0].nbytes
    bank = Bank([site], max_slots=4, capacity_bytes=capacity, dtype=torch.float32, device="cuda")
    torch.cuda.memory.reset_peak_host_memory_stats()
    allocated = torch.cuda.memory.host_memory_stats()["allocated_bytes.current"]
    overtaken = 0
    for _ in range(5):
        loads = []
        for slot, value in ((0, 1.0), (1, 2.0), (2, 3.0)):
            loads.append(bank.load(slot, adapters[value]))
        overtaken += not loads[-1].ready()
        bank.unload(0)
        bank.unload(2)
        loads.append(bank.load(3, adapters[4.0]))  # slot 1 moves to the arena's start
        bank.check_integrity()
        for load in loads:
            load.wait()
        for slot, value in ((1, 2.0), (3, 4.0)):
            factors = bank.factors(0, slot)
            assert (factors.a == value).all() and (factors.b[0] == value).all()
        bank.unload(1)
        bank.unload(3)
    assert overtaken, "every load had ended before it could be overtaken: nothing was tested"
    assert torch.cuda.memory.host_memory_stats()["allocated_bytes.peak"] - allocated < 2**20


@on_cuda
def test_blocks_are_locked_while_they_live():
    for _ in range(3):
        block = new_block(2**20 + 5, torch.bfloat16, "cuda")
        assert block.is_pinned()
        del block
    small = [new_block(10, torch.float32, "cuda") for _ in range(50)]  # each has pages of its own
    assert all(block.is_pinned() for block in small)


@on_cuda
@pytest.mark.parametrize("told", [False, True])
def test_loads_beside_launches(told):
    """Loads queue behind what uses the extents that were freed for them, and kernels after them see them whole.

    Where the bank was told what reads a slot, they do not queue behind what was launched later.
    """
    ranks = {"q": 16, "k": 16, "v": 16, "o": 16, "gate": 16, "up": 16, "embed": 16}
    adapters = [locked(make(ranks, seed)[0]) for seed in range(4)]
    nbytes = adapters[0].nbytes
    bank = Bank(SITES, max_slots=2, capacity_bytes=2 * nbytes, dtype=torch.float32, device="cuda")
    a, seen, overtook = torch.randn(4096, 4096, device="cuda"), [], 0
    bank.load(0, adapters[0]).join()

    def compute() -> None:
        nonlocal a
        for _ in range(20):
            a = torch.nn.functional.normalize(a @ a)

    for i in range(1, 40):
        compute()
        start = bank._tenants[0].start
        seen.append(bank.arena[start : start + nbytes // 4].clone())  # queued behind the products
        if told:
            bank.used([0])
        compute()
        end = torch.cuda.Event()
        end.record()
        bank.unload(0)
        load = bank.load(0, adapters[i % 4])
        if i % 2:
            load.join()
        else:
            load.wait()
            overtook += not end.query()
    torch.cuda.synchronize()
    for i, block in enumerate(seen):
        assert torch.equal(block.cpu(), adapters[i % 4].block), f"load {i}"
    assert bool(overtook) is told


def one_adapter(slots: int = 1) -> tuple[Bank, PackedAdapter, Tensors]:
    """And a bank that loads it, through chunks much smaller than it is."""
    packed, tensors = make({"q": 16, "gate": 8, "up": 3})
    bank = Bank(SITES, max_slots=slots, capacity_bytes=slots * packed.nbytes, dtype=torch.float32)
    return bank, packed, tensors


def test_a_load_ends_with_its_last_copy():
    bank, packed, tensors = one_adapter()
    load_lazily(bank)
    load = bank.load(0, packed)
    assert bank.slots == [0] and not load.ready() and load.source is packed.block
    while not load.ready():
        pass
    check_content(bank, 0, tensors)


def test_loads_follow_what_used_their_extents():
    bank, packed, _ = one_adapter(slots=2)
    stream = load_lazily(bank)

    def load(slot: int) -> list[str]:
        del stream.calls[:]
        bank.load(slot, packed).wait()
        return stream.calls

    stream.queued = "step 1"
    assert [load(0), load(1)] == [["copy after None"]] * 2, "nothing was there before"
    assert load(0) == ["copy after step 1"], "nobody told what read slot 0"
    stream.queued = "step 2"
    bank.used([0])
    stream.queued = "step 3"
    bank.used([1])
    stream.queued = "step 4"
    assert load(0) == ["copy after step 2"]
    assert load(1) == ["copy after step 3"]
    bank.used([0])
    bank.used([1])
    stream.queued = "step 5"
    bank.used([0])
    bank.unload(0)
    bank.unload(1)
    assert load(1) == ["copy after step 5"], "the latest use of all that went, wherever it was"
    del stream.calls[:]
    stream.queued = "moves"
    bank._compact()
    assert stream.calls == ["join"], "blocks are there before they move"
    assert load(0) == ["copy after moves"]
    bank.check_integrity()


def test_load_takes_the_slot_over_or_changes_nothing():
    packed, tensors = make({"q": 4, "v": 2})
    bank = Bank(SITES, max_slots=2, capacity_bytes=packed.nbytes, dtype=torch.float32)
    bank.load(0, packed)
    before, generation = bank.version, bank.generation(0)
    with pytest.raises(CapacityExceeded, match=r"0 of the device's \d+ bytes for adapters are free"):
        bank.load(1, packed)
    with pytest.raises(CapacityExceeded):
        bank.load(0, make({"q": 16, "gate": 16})[0])
    assert bank.version == before
    check_content(bank, 0, tensors)
    other, other_tensors = make({"o": 3}, seed=1)
    assert bank.load(0, other).ready() and bank.generation(0) > generation
    check_content(bank, 0, other_tensors)
    bank.check_integrity()


def test_factors_are_views_of_the_arena():
    packed, _ = make({"gate": 4, "up": 2})
    bank = Bank(SITES, max_slots=1, capacity_bytes=packed.nbytes, dtype=torch.float32)
    bank.load(0, packed)
    factors = bank.factors(3, 0)
    assert bank.factors(3, 0) is factors
    bank.arena.fill_(2.5)
    assert (factors.a == 2.5).all() and all((b == 2.5).all() for b in factors.b)


def test_table_has_the_place_of_c():
    """Of ReFT's bias, and for siblings the member's own part of what they have stacked."""
    sites = [Site(0, SiteKind.RESIDUAL, ("layer",), 16, (16,)), Site(1, SiteKind.LINEAR, ("p", "q"), 16, (8, 24))]
    widths = {"layer": 16, "p": 8, "q": 24}
    ranks = {"layer": 3, "p": 2, "q": 5}
    g = torch.Generator().manual_seed(0)
    files, modules = {}, {}
    for path, rank in ranks.items():
        modules[path] = MemberFactors(f"{path}.a", f"{path}.b", rank, 1.0, c=f"{path}.c")
        for name, shape in (("a", (rank, 16)), ("b", (widths[path], rank)), ("c", (rank,))):
            files[f"{path}.{name}"] = torch.randn(shape, generator=g)
    packed = pack(lay_out(sites, modules), files.__getitem__, torch.float32)
    bank = Bank(sites, max_slots=2, capacity_bytes=2 * packed.nbytes, dtype=torch.float32)
    bank.load(1, packed)
    bank.load(0, packed)
    for site in sites:
        for slot in (0, 1):
            for m, path in enumerate(site.members):
                c = int(bank.table[site.index, slot, m, 3])
                assert torch.equal(bank.arena[c : c + ranks[path]], files[f"{path}.c"])
    bank.check_integrity()


def test_check_integrity_notices_damage():
    for damage in (
        lambda bank: bank.table[1, 0, 0, 1].add_(1),
        lambda bank: bank.scales[1, 0, 0].add_(1),
        lambda bank: bank.entries(1).pop(0),
        lambda bank: setattr(bank._tenants[0], "start", ALIGN),
    ):
        bank = Bank(SITES, max_slots=2, capacity_bytes=10_000, dtype=torch.float32)
        bank.load(0, make({"q": 4})[0])
        bank.check_integrity()
        damage(bank)
        with pytest.raises(AssertionError):
            bank.check_integrity()
