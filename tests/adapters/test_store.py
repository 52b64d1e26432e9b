"""The store: names, versions, the host cache, concurrency, and what happens to files under it."""

import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from multigraft.adapters import peft_files
from multigraft.adapters.names import LoraModule, parse_lora_module
from multigraft.adapters.store import AdapterStore
from multigraft.core.config import AdapterConfig, fetch_threads
from multigraft.core.errors import AdapterError, CapacityExceeded, ModelNotFound, ShuttingDown
from multigraft.core.request import Scope
from tests.adapters.peft_folders import save_adapter

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def make_store(sites):
    stores = []

    def make(max_cpu_loras=4, **options):
        config = AdapterConfig(max_cpu_loras=max_cpu_loras, max_lora_rank=8)
        stores.append(AdapterStore(sites, config, torch.float32, base_name="base", **options))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def reads(monkeypatch):
    """Names of the folders read from disk, in order."""
    seen, real = [], peft_files.read

    def read(spec, *args, **kwargs):
        seen.append(spec.folder.name)
        return real(spec, *args, **kwargs)

    monkeypatch.setattr(peft_files, "read", read)
    return seen


def overwrite(folder, factor):
    """Put other weights of the same shapes in a folder's place."""
    tensors = {k: v * factor for k, v in load_file(folder / WEIGHTS).items()}
    time.sleep(0.01)  # a later mtime even where the clock is coarse
    save_file(tensors, folder / WEIGHTS)


def test_register_resolve_fetch(make_store, make_folder):
    store = make_store()
    ref = store.register("a", make_folder("a"))
    assert (
        store.resolve("a") == store.current("a") == ref and ref.uid > 0 and ref.name == "a" and ref.scope is Scope.ALL
    )
    packed = store.fetch(ref).result(10)
    assert packed.nbytes == ref.nbytes == store.host_bytes
    prefill = store.register("p", make_folder("p"), Scope.PREFILL)
    assert prefill.scope is Scope.PREFILL and prefill.uid != ref.uid
    own = store.register("own", make_folder("own", config={"adapter_scope": "prefill"}))
    assert own.scope is Scope.PREFILL
    assert (
        store.register("over", make_folder("over", config={"adapter_scope": "prefill"}), Scope.ALL).scope is Scope.ALL
    )
    infos = store.list()
    assert [i.name for i in infos] == ["a", "over", "own", "p"]
    assert (infos[0].version, infos[0].rank, infos[0].scope) == (1, 4, Scope.ALL)
    assert infos[0].path.endswith("/a") and abs(infos[0].created - time.time()) < 60


def test_unknown_names(make_store):
    store = make_store()
    for call in (store.resolve, store.unregister, store.reload):
        assert "ghost" not in store and store.current("ghost") is None
        with pytest.raises(ModelNotFound) as e:
            call("ghost")
        assert str(e.value) == "The model `ghost` does not exist." and e.value.status == 404


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "must not be empty"),
        (" a", "begin or end with a space"),
        ("x" * 257, "257 characters, over the limit of 256"),
        ("a\nb", "control characters"),
        ("a\0b", "control characters"),
        ("../a", "must not look like a path"),
        ("/etc/passwd", "must not look like a path"),
        ("a/../b", "must not look like a path"),
        ("a//b", "must not look like a path"),
        ("..\\a", "must not look like a path"),
        ("base", "is the base model's"),
    ],
)
def test_bad_names(name, message, make_store, make_folder):
    store = make_store()
    with pytest.raises(AdapterError, match=message):
        store.register(name, make_folder())
    assert not store.list()


def test_good_names(make_store, make_folder):
    store, folder = make_store(), make_folder()
    for name in ("org/name", "a.b-c_d", "ein Name", "ft:base:org:x:1", "名前", "x" * 256):
        assert store.register(name, folder).name == name


def test_duplicate_name(make_store, make_folder):
    store, folder = make_store(), make_folder()
    ref = store.register("a", folder)
    with pytest.raises(AdapterError, match="`a` is already registered"):
        store.register("a", folder)
    assert store.resolve("a") == ref


def test_bad_adapter_is_not_registered(make_store, make_folder):
    def poison(tensors):
        next(iter(tensors.values()))[0, 0] = float("nan")

    store = make_store()
    with pytest.raises(AdapterError, match="use_dora"):
        store.register("a", make_folder("dora", config={"use_dora": True}))
    nan = make_folder("nan", tensors=poison)
    with pytest.raises(AdapterError, match="NaN"):
        store.register("a", nan, validate=True)
    assert not store.list()
    ref = store.register("a", make_folder("good"), validate=True)
    with pytest.raises(AdapterError, match="NaN"):
        store.reload("a", nan, validate=True)
    assert store.resolve("a") == ref and store.list()[0].version == 1
    store.reload("a", nan)  # unread: found at the fetch
    with pytest.raises(AdapterError, match="NaN"):
        store.fetch(store.resolve("a")).result(10)
    with pytest.raises(AdapterError, match="NaN"):  # and the failure is not kept as a result
        store.fetch(store.resolve("a")).result(10)


def test_validation_reads_once(make_store, make_folder, reads):
    store = make_store()
    ref = store.register("a", make_folder(), validate=True)
    store.fetch(ref).result(10)
    assert reads == ["a"]


def test_larger_than_the_device(make_store, make_folder):
    ref = make_store().register("a", make_folder())
    with pytest.raises(CapacityExceeded, match=f"needs {ref.nbytes} bytes on the device, which has {ref.nbytes - 1}"):
        make_store(capacity_bytes=ref.nbytes - 1).register("a", make_folder("b"))


def test_reload_makes_a_version_and_requests_keep_theirs(make_store, make_folder):
    store, folder = make_store(), make_folder()
    old = store.register("a", folder, Scope.PREFILL)
    store.acquire(old)
    before = store.fetch(old).result(10).block.clone()
    overwrite(folder, 2)
    new = store.reload("a")
    assert new.uid != old.uid and store.resolve("a") == new and store.list()[0].version == 2
    assert new.scope is Scope.PREFILL  # as registered
    # Weights doubled on both sides; the old version comes from host memory though its file is gone.
    assert torch.equal(store.fetch(new).result(10).block, 2 * before)
    assert torch.equal(store.fetch(old).result(10).block, before)
    store.release(old)
    with pytest.raises(ModelNotFound):
        store.acquire(old)
    with pytest.raises(ModelNotFound):
        store.fetch(old).result(10)
    assert store.host_bytes == new.nbytes


def test_unregister_while_in_use(make_store, make_folder):
    store = make_store()
    ref = store.register("a", make_folder())
    store.acquire(ref)
    store.acquire(ref)
    store.unregister("a")
    with pytest.raises(ModelNotFound):
        store.resolve("a")
    store.release(ref)
    assert store.fetch(ref).result(10).nbytes == ref.nbytes  # first read only now: its files are still there
    store.release(ref)
    assert store.host_bytes == 0 and not store._versions
    again = store.register("a", make_folder("other"))
    assert again.uid != ref.uid


def test_files_changed_without_reload(make_store, make_folder):
    store = make_store(max_cpu_loras=1)
    folder = make_folder("a")
    ref, other = store.register("a", folder), store.register("b", make_folder("b"))
    store.fetch(ref).result(10)
    store.fetch(other).result(10)  # pushes a out
    overwrite(folder, 3)
    with pytest.raises(AdapterError, match="changed on disk since it was registered; reload it"):
        store.fetch(ref).result(10)
    store.fetch(store.reload("a")).result(10)
    shutil.rmtree(folder)
    store.fetch(other).result(10)
    with pytest.raises(AdapterError, match="there is no such folder"):
        store.fetch(store.resolve("a")).result(10)


def test_host_cache_is_lru_by_count(make_store, make_folder, reads):
    store = make_store(max_cpu_loras=2)
    refs = {n: store.register(n, make_folder(n)) for n in "abc"}
    for name in "abacab":
        store.fetch(refs[name]).result(10)
    assert reads == ["a", "b", "c", "b"]  # c pushed b out, since a was used after it; then b pushed c
    assert store.host_bytes == 2 * refs["a"].nbytes


def test_host_cache_is_bounded_by_bytes(make_store, tmp_path, reads):
    small = save_adapter(tmp_path / "small", peft.LoraConfig(r=1, target_modules=["q_proj"])).folder
    large = save_adapter(tmp_path / "large", peft.LoraConfig(r=8, target_modules=["q_proj", "down_proj"])).folder
    probe = make_store()
    s, la = probe.register("s", small).nbytes, probe.register("l", large).nbytes
    store = make_store(max_cpu_loras=100, max_host_bytes=la + s)
    refs = {n: store.register(n, f) for n, f in {"s1": small, "s2": small, "l1": large, "l2": large}.items()}
    for name in ("s1", "s2", "l1"):
        store.fetch(refs[name]).result(10)
    assert store.host_bytes == la + s  # s1 left
    store.fetch(refs["l2"]).result(10)
    assert store.host_bytes == la


def test_copies_in_use_are_not_evicted(make_store, make_folder, reads):
    store = make_store(max_cpu_loras=1)
    refs = {n: store.register(n, make_folder(n)) for n in "abc"}
    for ref in (refs["a"], refs["b"]):
        store.acquire(ref)
        store.fetch(ref).result(10)
    assert store.host_bytes == refs["a"].nbytes + refs["b"].nbytes
    store.fetch(refs["a"]).result(10)
    assert reads == ["a", "b"]
    store.release(refs["b"])
    assert store.host_bytes == refs["a"].nbytes
    with pytest.raises(AssertionError, match="more often than acquired"):
        store.release(refs["b"])


def test_fetches_in_flight_are_shared(make_store, make_folder, monkeypatch):
    go, started, real = threading.Event(), [], peft_files.read

    def slow(spec, *args, **kwargs):
        started.append(spec.folder.name)
        assert go.wait(10)
        return real(spec, *args, **kwargs)

    monkeypatch.setattr(peft_files, "read", slow)
    store = make_store()
    refs = [store.register(n, make_folder(n)) for n in "ab"]
    first, second, other = store.fetch(refs[0]), store.fetch(refs[0]), store.fetch(refs[1])
    assert first is second and other is not first
    assert not first.cancel() and not first.done()
    store.unregister("b")  # while it is being read: its reader gets it, nobody keeps it
    go.set()
    assert first.result(10).nbytes == refs[0].nbytes and other.result(10).nbytes == refs[1].nbytes
    assert sorted(started) == ["a", "b"] and store.host_bytes == refs[0].nbytes


def test_close_fails_what_has_not_begun(make_store, make_folder, monkeypatch):
    go, real = threading.Event(), peft_files.read
    monkeypatch.setattr(peft_files, "read", lambda *a, **k: go.wait(10) and real(*a, **k))
    store = make_store()
    num = fetch_threads()
    futures = [store.fetch(store.register(str(n), make_folder(str(n)))) for n in range(2 * num)]
    threading.Timer(0.1, go.set).start()
    store.close()
    assert all(f.exception(10) is None for f in futures[:num])
    assert all(isinstance(f.exception(10), ShuttingDown) for f in futures[num:])


def test_many_threads(make_store, make_folder):
    """Every request sees one version's weights, whole, whatever is reloaded meanwhile."""
    store = make_store(max_cpu_loras=2)
    names = ["a", "b", "c", "d"]
    folders = {n: [make_folder(f"{n}{k}") for k in range(2)] for n in names}
    for n in names:
        overwrite(folders[n][1], 2)
        store.register(n, folders[n][0])
    reference = store.fetch(store.resolve("a")).result(10).block.clone()
    expected = {store.resolve(n).uid: 1 for n in names}
    stop = threading.Event()

    def requests(i):
        for k in range(60):
            ref = store.resolve(names[(i + k) % 4])
            try:
                store.acquire(ref)
            except ModelNotFound:  # reloaded between the two calls
                continue
            block = store.fetch(ref).result(10).block
            ratio = block[0] / reference[0]
            assert ratio in (1, 2) and torch.equal(block, ratio * reference)
            assert expected.get(ref.uid, ratio) == ratio
            store.release(ref)

    def reloads():
        k = 0
        while not stop.is_set():
            k += 1
            for n in names:
                ref = store.reload(n, folders[n][k % 2])
                expected[ref.uid] = 1 + k % 2
            time.sleep(0.001)

    with ThreadPoolExecutor(5) as pool:
        changer = pool.submit(reloads)
        for done in [pool.submit(requests, i) for i in range(4)]:
            done.result(60)
        stop.set()
        changer.result(10)
    assert len(store._versions) == 4 and len(store._host) <= 2


def test_two_thousand_adapters_in_one_folder(make_store, plain_folder, tmp_path):
    many = tmp_path / "many"
    for i in range(2000):
        (many / f"user-{i:04}").mkdir(parents=True)
        for file in ("adapter_config.json", WEIGHTS):
            os.link(plain_folder / file, many / f"user-{i:04}" / file)
    (many / "not an adapter").mkdir()
    (many / "stray.txt").write_text("x")
    (many / "bad\nname").mkdir()
    (many / "bad\nname" / "adapter_config.json").write_text("{}")
    (many / "user-0007" / WEIGHTS).unlink()
    store = make_store()
    start = time.perf_counter()
    count = store.register_dir(many)
    assert time.perf_counter() - start < 1
    assert count == len(store.list()) == 2000 and store.list()[5].rank is None
    assert "user-0005" in store and store.current("user-0005") is None
    ref = store.resolve("user-0005")
    assert store.current("user-0005") == ref
    assert store.resolve("user-0005") == ref and store.list()[5].rank == 4
    assert store.fetch(ref).result(10).nbytes == ref.nbytes
    with pytest.raises(AdapterError, match=r"user-0007: adapter_model.safetensors is missing"):
        store.resolve("user-0007")
    assert store.reload("user-0009").uid and store.list()[9].version == 1
    with pytest.raises(AdapterError, match="already registered"):
        store.register_dir(many)
    with pytest.raises(AdapterError, match="cannot be read: No such file"):
        store.register_dir(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("a=/x/y", LoraModule("a", "/x/y", None)),
        ("a=/x=y", LoraModule("a", "/x=y", None)),
        ('{"name": "a", "path": "p"}', LoraModule("a", "p", None)),
        (
            ' {"name": "a", "path": "p", "scope": "prefill", "base_model_name": "b"}',
            LoraModule("a", "p", Scope.PREFILL),
        ),
    ],
)
def test_parse_lora_module(text, want):
    assert parse_lora_module(text) == want


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a", "needs name=path or a JSON object, got 'a'"),
        ("=p", "needs name=path"),
        ("a=", "needs name=path"),
        ("", "needs name=path"),
        ("{a}", "is not JSON"),
        ('{"name": "a"}', "needs JSON as"),
        ('{"name": "a", "path": 3}', "needs JSON as"),
        ('{"name": "a", "path": "p", "rank": 3}', "needs JSON as"),
        ('{"name": "a", "path": "p", "scope": "some"}', "scope must be 'all' or 'prefill', got 'some'"),
    ],
)
def test_parse_lora_module_errors(text, message):
    with pytest.raises(AdapterError, match=message):
        parse_lora_module(text)
