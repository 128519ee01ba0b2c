"""Modes that belong to a thread: carried with a producer, and never left in its consumer."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

from i2v_lab.profiling.meters.live_storages import LiveStorageMeter
from i2v_lab.thread_modes import Autocast, CarriedModes
from i2v_lab.torch_compat import ModeStacks, TorchDispatchMode


@contextmanager
def _autocast_of_cuda():
    """What ``torch.autocast`` sets where there is a card."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    yield
    torch.set_autocast_enabled("cuda", before[0])
    torch.set_autocast_dtype("cuda", before[1])


SCOPES = {
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.float16, cache_enabled=False),
    "autocast of cuda": _autocast_of_cuda,
    "device": lambda: torch.device("meta"),
}


def _state() -> tuple:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), Autocast.current(), ModeStacks.current()


def _visible() -> tuple:
    return *_state()[:3], torch.get_default_device()


def _in_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def _producer(scope):
    with scope():
        yield _visible()
        yield _visible()
    yield _visible()


@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize("consumer", SCOPES)
@pytest.mark.parametrize("producer", SCOPES)
def test_each_side_keeps_its_own_modes(producer, consumer, threaded):
    with CarriedModes().step():
        first, _, last = _producer(SCOPES[producer])
    stream, modes = _producer(SCOPES[producer]), CarriedModes(grad=True, inference=False)
    seen = []

    def consume() -> None:
        with SCOPES[consumer]():
            before = _state()
            with modes.step():
                seen.append(next(stream))
            assert _state() == before
        assert _state()[:2] == (True, False)

    for _ in range(3):
        _in_thread(consume) if threaded else consume()
    assert seen == [first, first, last]


def test_the_default_device_that_a_producer_sets_is_its_own():
    def producer():
        torch.set_default_device("meta")
        yield torch.ones(1).device
        yield torch.ones(1).device
        torch.set_default_device(None)
        yield torch.ones(1).device

    stream, modes = producer(), CarriedModes()
    before = _state()
    devices = []
    for _ in range(3):
        with modes.step():
            devices.append(next(stream).type)
        assert _state() == before
        assert torch.ones(1).device.type == "cpu"
    assert devices == ["meta", "meta", "cpu"]


def test_what_is_set_for_a_thread_is_carried_to_another():
    def captured() -> CarriedModes:
        torch.set_default_device("meta")
        with torch.autocast("cpu", torch.float16):
            return CarriedModes()

    modes = _in_thread(captured)
    with modes.step():
        assert torch.ones(1).device.type == "meta"
        assert Autocast.current().devices[0] == (True, torch.float16)
        assert Autocast.current().nesting == 1
    assert torch.ones(1).device.type == "cpu"
    assert Autocast.current().nesting == 0


def test_a_mode_that_a_producer_entered_sees_its_steps_and_nothing_else():
    seen = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(threading.get_ident())
            return func(*args, **(kwargs or {}))

    def producer():
        with Seen():
            yield torch.ones(1)
            yield torch.ones(1)
        yield torch.ones(1)

    stream, modes = producer(), CarriedModes()

    def step() -> int:
        with modes.step():
            next(stream)
        torch.ones(1)  # the consumer's
        return threading.get_ident()

    threads = [step(), _in_thread(step)]
    step()
    assert seen == threads


def test_the_consumers_mode_is_followed_until_the_producer_sets_its_own():
    modes, seen = CarriedModes(), []
    for consumers in (True, False, True):
        with torch.set_grad_enabled(consumers), modes.step():
            seen.append(torch.is_grad_enabled())
    with modes.step():
        torch.set_grad_enabled(False)
    assert torch.is_grad_enabled()
    with modes.step():
        seen.append(torch.is_grad_enabled())
        torch.set_grad_enabled(True)  # as it found it: the consumer's again
    with torch.no_grad(), modes.step():
        seen.append(torch.is_grad_enabled())
    assert seen == [True, False, True, False, False]


def test_an_error_of_a_step_leaves_the_consumer_as_it_was():
    before = _state()
    with pytest.raises(ValueError, match="no more"), CarriedModes().step():
        torch.set_grad_enabled(False)
        torch.set_autocast_enabled("cpu", True)
        raise ValueError("no more")
    assert _state() == before


def test_a_fork_begins_as_the_producer_left_off():
    modes = CarriedModes(grad=True)
    with modes.step():
        torch.set_grad_enabled(False)
        torch.set_autocast_enabled("cpu", True)
    with modes.fork().step():
        assert not torch.is_grad_enabled()
        assert torch.is_autocast_enabled("cpu")
        torch.set_autocast_enabled("cpu", False)
    with modes.step():
        assert torch.is_autocast_enabled("cpu")


def test_meters_entered_and_left_within_steps_follow_the_thread():
    outer, inner = LiveStorageMeter(), LiveStorageMeter()

    def producer():
        inner.__enter__()
        yield
        outer.__exit__(None, None, None)
        yield
        inner.__exit__(None, None, None)
        yield

    stream, modes = producer(), CarriedModes()
    before = _state()
    outer.__enter__()
    counts, held = [], []
    for _ in range(3):
        with modes.step():
            next(stream)
        held.append(torch.ones(4))
        counts.append((outer.allocated_bytes(), inner.allocated_bytes()))
    assert counts == [(16, 16), (16, 32), (16, 32)]
    assert _state() == before
