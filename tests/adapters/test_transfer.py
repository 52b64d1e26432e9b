"""Pages of blocks: locked once, then handed on, with a stand-in for CUDA's runtime."""

import gc
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from multigraft.adapters import transfer
from multigraft.adapters.transfer import new_block

MIB = 2**20


class Driver:
    """CUDA's runtime, as far as pages know it."""

    def __init__(self) -> None:
        self.cudaError = SimpleNamespace(success="success")
        self.error = "success"
        self.locked: dict[int, int] = {}
        """Bytes by address."""
        self.num_locks = self.num_unlocks = 0
        self.inside = self.most_inside = 0
        """Threads at once."""

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> str:
        self._work()
        if self.error == "success":
            assert address not in self.locked
            self.locked[address] = nbytes
            self.num_locks += 1
        return self.error

    def cudaHostUnregister(self, address: int) -> None:
        self._work()
        del self.locked[address]
        self.num_unlocks += 1

    def _work(self) -> None:
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        time.sleep(1e-3)
        self.inside -= 1


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    return driver


@pytest.fixture(autouse=True)
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[transfer._Pool]:
    pool = transfer._Pool()
    monkeypatch.setattr(transfer, "_pool", pool)
    yield pool
    pool.close()


def block_of(nbytes: int, device: str = "cuda:0") -> torch.Tensor:
    return new_block(nbytes, torch.uint8, device)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(1e-3)


def test_blocks_keep_their_pages():
    block = new_block(10**6, torch.bfloat16)
    assert block.shape == (10**6,) and block.dtype == torch.bfloat16
    view = block[5:].view(torch.int16)
    del block
    others = [new_block(10**6, torch.int16).fill_(3) for _ in range(3)]
    assert not view.fill_(7).ne(7).any() and all((other == 3).all() for other in others)
    assert new_block(0, torch.float32).numel() == 0


@pytest.mark.parametrize("hold", [lambda b: b[5:], lambda b: b.view(2, -1), lambda b: b.numpy(), lambda b: [b]])
def test_pages_are_handed_on_when_the_last_reference_goes(driver, hold):
    block = block_of(MIB)
    address = block.data_ptr()
    assert driver.locked == {address: MIB}
    held = hold(block)
    del block
    gc.collect()
    other = block_of(MIB)
    assert other.data_ptr() != address
    del held
    assert block_of(MIB).data_ptr() == address
    assert (driver.num_locks, driver.num_unlocks) == (2, 0)


def test_a_block_in_a_cycle_goes_with_it(driver):
    """As those do that a failed read leaves in its traceback."""
    cycle = [block_of(MIB)]
    cycle.append(cycle)
    address = cycle[0].data_ptr()
    del cycle
    gc.collect()
    assert block_of(MIB).data_ptr() == address


def test_pages_may_return_while_the_pool_is_at_work(driver, pool):
    """A collection of garbage may come at any moment: here with the pool's lock taken, by the same thread."""
    block = block_of(MIB)
    address = block.data_ptr()
    with pool._lock:
        del block
    assert block_of(MIB).data_ptr() == address


def test_near_sizes_share_pages_and_others_do_not(driver):
    block = block_of(40 * MIB - 5)
    address = block.data_ptr()
    del block
    assert block_of(40 * MIB).data_ptr() == address
    for nbytes in (40 * MIB + 1, 30 * MIB, 80 * MIB):
        assert block_of(nbytes).data_ptr() != address
    for nbytes in (1, 10**4, 10**5 + 1, 10**7 + 1, 41_943_040):
        size = driver.locked[block_of(nbytes).data_ptr()]
        assert nbytes <= size <= max(4096, nbytes * 17 / 16 + 4096)
    assert size == 41_943_040, "rank 8 of all of an 8B model's linears"


def test_devices_do_not_share_pages(driver):
    addresses = {}
    for device in ("cpu", "cuda:0", "cuda:1"):
        block = block_of(MIB, device)
        addresses[device] = block.data_ptr()
        del block
    assert len(set(addresses.values())) == 3 and driver.num_locks == 2
    assert all(block_of(MIB, device).data_ptr() == address for device, address in addresses.items())


def test_what_could_not_be_locked_is_used_and_never_taken_for_locked(driver, caplog):
    driver.error = "no memory"
    block = block_of(MIB).fill_(1)
    assert "could not be page-locked: no memory" in caplog.text
    driver.error = "success"
    del block
    block = block_of(MIB)
    assert block.data_ptr() in driver.locked


def test_free_pages_are_bounded(driver, monkeypatch):
    monkeypatch.setattr(transfer, "FREE_BYTES", 4 * MIB)
    blocks = [block_of(MIB) for _ in range(12)]
    last = {block.data_ptr() for block in blocks[8:]}
    while blocks:
        del blocks[0]
    wait_for(lambda: len(driver.locked) == 4)
    assert set(driver.locked) == last, "the oldest go first"
    blocks = [block_of(MIB) for _ in range(4)]
    assert driver.num_locks == 12
    small = [block_of(MIB // 2) for _ in range(8)]
    small.clear()
    wait_for(lambda: not transfer._pool._returned)
    assert driver.num_unlocks == 8
    blocks.clear()  # 8 MiB are free
    wait_for(lambda: sum(driver.locked.values()) == 4 * MIB)
    assert set(driver.locked.values()) == {MIB}, "sizes that nobody asks for any more leave"


def test_many_blocks_in_use_let_more_be_free(driver, monkeypatch):
    monkeypatch.setattr(transfer, "FREE_BYTES", 0)
    blocks = [block_of(MIB) for _ in range(100)]
    del blocks[80:]
    time.sleep(0.05)
    assert driver.num_unlocks == 0
    del blocks[76:]  # 24 are free now, for 76
    wait_for(lambda: driver.num_unlocks == 5)
    blocks.clear()
    wait_for(lambda: not driver.locked)


def test_threads_in_churn_share_nothing_and_lock_next_to_nothing(driver):
    num_threads, kept = 4, 3

    def churn(number: int) -> None:
        rng, blocks = random.Random(number), []
        for step in range(200):
            value = number * 50 + step % 50
            blocks.append((value, block_of(rng.choice([MIB, 2 * MIB])).fill_(value)))
            if len(blocks) > kept:
                value, block = blocks.pop(rng.randrange(len(blocks)))
                damaged.extend([value] * bool((block != value).any()))

    damaged: list[int] = []
    threads = [threading.Thread(target=churn, args=(number,)) for number in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not damaged
    held = kept + 2  # and the new one, and the one that was looked at last
    assert driver.num_locks <= 2 * num_threads * held and driver.num_unlocks == 0
    assert driver.most_inside == 1


def test_exit_is_quiet_and_does_not_wait_for_what_is_left():
    """With blocks alive, blocks returned, and pages that would be unlocked for a minute."""
    program = """
import time, torch
from contextlib import nullcontext
from types import SimpleNamespace
from multigraft.adapters import transfer
transfer.FREE_BYTES = 0
register = lambda *args: 0
unregister = lambda address: time.sleep(0.6)
cudart = SimpleNamespace(
    cudaError=SimpleNamespace(success=0), cudaHostRegister=register, cudaHostUnregister=unregister
)
torch.cuda.cudart, torch.cuda.device = lambda: cudart, lambda device: nullcontext()
blocks = [transfer.new_block(10, torch.float32, "cuda") for _ in range(100)]
alive = transfer.new_block(10, torch.float32, "cuda")
blocks.clear()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
