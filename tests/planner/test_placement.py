import json
import time

import numpy as np
import pytest

from multigraft.core.config import SchedulerConfig
from multigraft.core.errors import CapacityExceeded, InvalidRequest
from multigraft.planner.baselines import BASELINES, loraserve, relabelled
from multigraft.planner.loads import ServerLoads
from multigraft.planner.optimum import optimum
from multigraft.planner.packing import lower_bound, place, replace, spread
from multigraft.planner.placement import Demand, Placement, fewest, fullness, holds
from multigraft.scheduling.steptime import StepShape
from multigraft.twin.workload import SLO

from .instances import cpu, demands, loads, machine, random_loads


class Sizes:
    """Loads of one resource and one mode: bin packing, whose optima are known."""

    resources = ("size",)

    def __init__(self, *sizes: float):
        self.sizes = np.array(sizes)
        self.demands = [Demand(name=f"a{i}", rate=1, prompt_len=1, output_len=1, rank=8) for i in range(len(sizes))]

    def uses(self, which, shares):
        return (self.sizes[np.asarray(which, dtype=int)] * np.asarray(shares))[None, None]


@pytest.mark.parametrize("seed", range(24))
def test_never_more_gpus_than_a_baseline(seed):
    instance = random_loads(seed)
    ours = place(instance)
    assert holds(ours, instance) and lower_bound(instance) <= ours.num_gpus
    for name, method in BASELINES.items():
        theirs = fewest(method, instance)
        assert holds(theirs, instance)
        assert ours.num_gpus <= theirs.num_gpus, name


@pytest.mark.parametrize(("parts", "num", "whole"), [(1, 12, True), (4, 6, False)])
def test_optimal_where_the_optimum_is_known(parts, num, whole):
    found, gpus = [], []
    for seed in range(10):
        largest, rate = 2.0, 40.0
        while largest > 1:  # as loaded as can be without an adapter that must be cut
            rate *= 0.8
            instance = loads(demands(num, seed, rate=num * rate, skewed=False))
            largest = float(fullness(instance.uses(range(num), np.ones(num))).max())
        best = optimum(instance, parts=parts)
        ours = place(instance, whole=whole)
        assert holds(best, instance) and holds(ours, instance)
        found.append(ours.num_gpus <= best.num_gpus)
        gpus.append(best.num_gpus)
        assert lower_bound(instance) <= best.num_gpus
    assert np.mean(found) >= 0.9
    assert np.mean(gpus) > 2  # else anything would be optimal


def test_known_optima():
    thirds = Sizes(*[1 / 3 + 0.01] * 6)
    assert place(thirds, whole=True).num_gpus == optimum(thirds).num_gpus == 3
    sixty = Sizes(*[0.595] * 5)  # only cutting does better than one a GPU
    assert place(sixty, whole=True).num_gpus == optimum(sixty).num_gpus == 5
    assert place(sixty).num_gpus == lower_bound(sixty) == 3
    first_fit_fails = Sizes(0.4, 0.4, 0.6, 0.6)
    assert fewest(BASELINES["first fit"], first_fit_fails).num_gpus == 3
    assert place(first_fit_fails, whole=True).num_gpus == 2
    assert place(Sizes(2.5)).shares["a0"].keys() == {0, 1, 2}


def test_ten_thousand_adapters_in_seconds():
    instance = loads(demands(10_000, 3, rate=12_000.0))
    start = time.process_time()
    placed = place(instance)
    assert time.process_time() - start < 10
    assert holds(placed, instance) and 300 < placed.num_gpus <= 500
    assert placed.num_gpus < 1.1 * lower_bound(instance)


def test_loads_are_the_step_time_models():
    """A GPU that is just full takes, by the model itself, just the step time of the mode it is full in."""
    profile = cpu()
    deployment = profile.deployment(scheduler=SchedulerConfig(max_num_batched_tokens=100_000), max_loras=256)
    wanted = [Demand(name=f"a{i}", rate=0.5, prompt_len=32, output_len=200, rank=8) for i in range(16)]
    instance = ServerLoads(wanted, profile, deployment, SLO(itl=0.2), headroom=1.0)
    low, high = 0.0, 100.0
    for _ in range(40):
        share = (low + high) / 2
        sums = instance.uses(range(16), np.full(16, share)).sum(axis=2)
        low, high = (share, high) if fullness(sums) <= 1 else (low, share)
    t = instance.step_times[sums.max(axis=1).argmin()]
    begun, decoding = low * 16 * 0.5 * t, low * 16 * 0.5 * 199 * t
    nbytes = profile.adapter_bytes(8)
    present = 16 * (1 - np.exp(-decoding / 16))
    in_prefill = 16 * (1 - np.exp(-begun / 16))
    shape = StepShape(
        prefill_spans=begun, prefill_rows=32 * begun, prefill_attention=begun * 32 * 33 / 2,
        prefill_adapters=in_prefill, prefill_adapter_bytes=in_prefill * nbytes,
        prefill_adapter_work=begun * 32 * nbytes, decode_rows=decoding, decode_context=decoding * 132,
        decode_adapted=decoding, decode_adapters=present, decode_adapter_bytes=present * nbytes,
        decode_adapter_work=decoding * nbytes, samples=begun + decoding,
    )  # fmt: skip
    assert profile.steps.predict(shape) == pytest.approx(t, rel=0.05)
    assert sums.max() > 0.99


def test_loads_know_scopes_ranks_and_the_base_model():
    def size(**changes):
        fields = {"name": "a", "rate": 0.1, "prompt_len": 300, "output_len": 200, "rank": 64}
        return fullness(loads([Demand(**(fields | changes))], slots=1000).uses([0], [1.0]))[0]

    assert size(rank=0) < size(rank=8) < size() < size(rate=0.2)
    from multigraft.core.region import Scope

    assert size(scope=Scope.PREFILL) < size()


def test_what_cannot_be_kept_is_named():
    with pytest.raises(CapacityExceeded, match=r"itl 0.005 s cannot be kept.*binding limit is step time"):
        loads(demands(4, 0, 1.0), itl=0.005)
    profile = machine()
    deployment = profile.deployment(max_loras=4)
    with pytest.raises(CapacityExceeded, match=r"ttft 0.01 s cannot be kept"):
        ServerLoads(demands(4, 0, 1.0), profile, deployment, SLO(ttft=0.01))
    huge = Demand(name="huge", rate=1, prompt_len=900_000, output_len=10, rank=8)
    with pytest.raises(CapacityExceeded, match=r"'huge' cannot be served: it needs 900010.*max_model_len = 16384"):
        loads([huge], itl=None)
    wide = Demand(name="wide", rate=1, prompt_len=100, output_len=10, rank=2048)
    with pytest.raises(CapacityExceeded, match=r"'wide' cannot be served.*adapter memory = "):
        loads([wide], itl=None)
    with pytest.raises(CapacityExceeded, match=r"'a0'.* not even by 4096 GPUs: the binding limit is size"):
        place(Sizes(5000))
    with pytest.raises(InvalidRequest, match="no adapter to place"):
        place(Sizes())


def test_spread_levels_the_load():
    instance = loads(demands(60, 1, 100.0))
    least = place(instance).num_gpus
    placed = spread(instance, 2 * least)
    full = fullness(placed.sums(instance))
    assert full.max() < 1.1 * full.mean()
    others = [method(instance, 2 * least) for name, method in BASELINES.items() if name in ("round robin", "first fit")]
    assert all(full.max() < fullness(p.sums(instance)).max() for p in others if p is not None)
    assert np.median(instance.itl_s(placed.sums(instance))) < 0.05
    assert spread(instance, 1) is None


def test_drift_moves_few():
    before = demands(120, 2, 300.0)
    old = place(loads(before))
    rng = np.random.default_rng(0)
    factor = np.exp(rng.normal(0, 0.3, len(before)))
    after = [Demand(**{**_fields(d), "rate": d.rate * f}) for d, f in zip(before, factor, strict=True)]
    after = [*after[3:], *demands(123, 9, 300.0)[120:]]  # three go, three come
    changed = loads(after)
    with pytest.raises(InvalidRequest, match="3 adapters are placed and unknown to the workload: a0, a1, a2"):
        old.sums(changed)
    new = replace(old, changed)
    assert holds(new, changed)
    anew = place(changed)
    assert new.moves_from(old) < 0.5 * relabelled(anew, old).moves_from(old)
    assert new.num_gpus <= anew.num_gpus + 2
    assert replace(old, loads(before)).moves_from(old) == 0


def test_drained_gpus_stay_empty():
    old = Placement(3, {"a0": {0: 1.0}, "a1": {1: 1.0}, "a2": {2: 1.0}})
    new = replace(old, Sizes(0.2, 0.3, 0.4))
    assert new.num_gpus == 3 and new.moves_from(old) == 2 and [len(new.on(g)) for g in range(3)].count(0) == 2
    assert replace(old, Sizes(0.2, 0.3, 0.4), shrink=False) == old
    grown = replace(old, Sizes(0.9, 0.9, 2.9))
    assert holds(grown, Sizes(0.9, 0.9, 2.9)) and grown.shares["a0"] == {0: 1.0}


def test_loraserve_relabels():
    instance = loads(demands(40, 5, 120.0))
    old = fewest(loraserve, instance)
    turned = {name: {(gpu + 1) % old.num_gpus: s for gpu, s in on.items()} for name, on in old.shares.items()}
    before = Placement(old.num_gpus, turned)
    assert loraserve(instance, old.num_gpus, old=before).moves_from(before) == 0


def test_file(tmp_path):
    path = tmp_path / "placement.json"
    placed = Placement(2, {"french": {0: 0.25, 1: 0.75}, "latin": {1: 1.0}})
    placed.write(path)
    assert Placement.read(path) == placed
    assert json.loads(path.read_text())["adapters"]["french"] == [[0, 0.25], [1, 0.75]]
    for text, words in (
        ("{", "no file of"),
        ('{"num_gpus": 1, "adapters": {"a": [[0, 0.5]]}}', "must be positive and sum to 1"),
        ('{"num_gpus": 1, "adapters": {"a": [[1, 1]]}}', "there are 1"),
    ):
        path.write_text(text)
        with pytest.raises(InvalidRequest, match=words):
            Placement.read(path)
    with pytest.raises(InvalidRequest, match="Cannot read"):
        Placement.read(tmp_path / "absent.json")


def test_too_many_for_the_optimum():
    with pytest.raises(CapacityExceeded, match="too many for an exact placement"):
        optimum(loads(demands(40, 0, 10.0)))


def _fields(demand):
    return {name: getattr(demand, name) for name in Demand.__dataclass_fields__}
