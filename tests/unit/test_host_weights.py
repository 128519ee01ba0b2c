"""Streamed weights in host memory: read from files by threads, kept over generations, released after any end."""

from __future__ import annotations

import gc
import json
import mmap
import os
import shutil
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from i2v_lab.errors import CheckpointError, InvalidRequest
from i2v_lab.events import ComponentBuilt, Phase, PhaseStarted, StepEnded
from i2v_lab.lab.generation_job import GenerationJob, State
from i2v_lab.memory_policy import TECHNIQUES, MemoryPolicy
from i2v_lab.pipeline.contract.lifecycle import rare_collections
from i2v_lab.pipeline.ltx2 import loader
from i2v_lab.pipeline.ltx2.components import Ledger
from i2v_lab.pipeline.ltx2.memory import block_reader, host_blocks, host_copies, host_weights, readers, tensors_ahead
from i2v_lab.pipeline.ltx2.memory.host_copies import HostCopy, packed
from i2v_lab.pipeline.ltx2.memory.host_memory import PageLocked
from i2v_lab.pipeline.ltx2.memory.host_weights import HostWeights
from i2v_lab.pipeline.ltx2.pipeline import TwoStagePipeline
from i2v_lab.pipeline.ltx2.synthetic import SyntheticStateDictLoader
from i2v_lab.pipeline.ltx2.weights import skeleton_weights
from i2v_lab.request import I2VRequest, Quantization
from i2v_lab.runs.execute import execute
from i2v_lab.runs.spec import RunSpec

CPU = torch.device("cpu")
STREAMED = TECHNIQUES[MemoryPolicy.STREAMED]
PLENTY = 2**30
E4M3 = torch.float8_e4m3fn


@pytest.fixture
def request_64(still) -> I2VRequest:
    return I2VRequest(
        image=str(still), prompt="waves", width=64, height=64, frames=9, fps=120, seed=3, memory="streamed"
    )


@pytest.fixture
def own_checkpoint(tiny, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    shutil.copy(tiny.checkpoint, path)
    return replace(tiny, checkpoint=str(path))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Threads read in pieces so small that tensors of the tiny model are read in several."""
    monkeypatch.setattr(host_copies, "PIECE_BYTES", 3000)


@pytest.fixture
def reads(monkeypatch) -> list[tuple[str, int]]:
    """Tensor and offset of every read of the transformer's blocks."""
    seen: list[tuple[str, int]] = []
    original = readers._read_into

    def noting(path, offset, target, what):
        if what.startswith("model.diffusion_model.transformer_blocks."):
            seen.append((what, offset))
        original(path, offset, target, what)

    monkeypatch.setattr(readers, "_read_into", noting)
    return seen


@pytest.fixture
def gate(monkeypatch) -> threading.Event:
    """Reads of the transformer's blocks wait until it is set."""
    opened = threading.Event()
    original = readers._read_into

    def waiting(path, offset, target, what):
        if "transformer_blocks.1." in what:
            opened.wait(20)
        original(path, offset, target, what)

    monkeypatch.setattr(readers, "_read_into", waiting)
    return opened


def _frames(pipeline, request) -> torch.Tensor:
    with pipeline(request).video as chunks:
        return torch.cat(list(chunks))


def _stream(weights, host, component="transformer", quantization=Quantization.FP8_CAST, **options):
    module = getattr(Ledger(weights, CPU, quantization, STREAMED, host_weights=host, **options), component)()
    return next(m.weight_stream for m in module.modules() if "weight_stream" in vars(m))


def _passes(stream, expected, count=2) -> None:
    """Fetch every block in the order of calls, several times; each tensor is as expected, to the bit."""
    for _ in range(count):
        for name in stream._order:
            for key, value in stream._fetch(name).items():
                assert value.dtype is expected[key].dtype
                assert value.shape == expected[key].shape
                assert torch.equal(_bytes(value), _bytes(expected[key])), key


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _expected(weights, component="transformer", quantization=Quantization.FP8_CAST, **options):
    """All blocks' tensors, as they are loaded where nothing is in host memory."""
    stream = _stream(weights, HostWeights(), component, quantization, **options)
    tensors = {key: value for load in stream._loads.values() for key, value in load().items()}
    stream.close()
    return tensors


def _threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(block_reader.THREAD_NAME)]


def test_generations_of_one_process_give_the_frames_of_a_cold_one_and_read_blocks_once(tiny, request_64, reads):
    cold = _frames(TwoStagePipeline(tiny), request_64)
    reads.clear()
    with TwoStagePipeline(tiny) as pipeline:
        pipeline._own = host = HostWeights(PLENTY, keep=True)  # a CPU has no host memory apart from its own
        for _ in range(2):
            assert torch.equal(_frames(pipeline, request_64), cold)
            assert not _threads()
            assert len(reads) == len(set(reads)) > 0  # once for both stages, and for both generations
        assert host.held_bytes > 0
    assert host.held_bytes == 0


def test_every_use_reports_the_host_memory_that_it_took_itself(tiny, reads):
    """Also after one with a LoRA, with which it shares all other blocks, and where there is no room for all."""

    def taken(host, component="transformer", **options):
        stream = _stream(tiny, host, component, **options)
        for name in stream._order:
            stream._fetch(name)
        stream.close()
        return stream.page_locked_bytes, stream.pageable_bytes

    with HostWeights(PLENTY, keep=True) as host:
        cold, text, warm, lora, last = (
            taken(host),
            taken(host, "text_encoder"),
            taken(host),
            taken(host, with_lora=True),
            taken(host),
        )
        assert len(reads) == len(set(reads)) > 0
        most = host.held_bytes
    assert cold[1] > 0  # bfloat16 was cast on its way
    assert warm == last == (cold[0], 0)
    assert lora[0] > cold[0]
    assert most == lora[0] + text[0]
    with HostWeights(cold[0] + text[0] // 2, keep=True) as small:  # the text encoder's blocks make room
        assert taken(small, "text_encoder")[0] == text[0]
        assert taken(small)[0] == cold[0]
        assert taken(small, "text_encoder")[0] < text[0]


@pytest.mark.parametrize("component", ["transformer", "text_encoder", "gemma_embeddings_processor", "video_decoder"])
def test_whatever_the_budget_it_is_kept_to_and_blocks_are_the_same(tiny, component, monkeypatch):
    expected = _expected(tiny, component)
    stream = _stream(tiny, HostWeights(PLENTY), component)
    sizes = [plan.nbytes for plan in stream._host._plans.values()]
    stream.close()
    monkeypatch.setattr(host_blocks, "AHEAD_BYTES", 2 * max(sizes))
    for share in (0, 0.3, 0.7, 1):
        for keep in (False, True):
            with HostWeights(int(share * sum(sizes)), keep=keep) as host:
                for _ in range(2):
                    stream = _stream(tiny, host, component)
                    _passes(stream, expected)
                    assert host.held_bytes <= stream.page_locked_bytes <= share * sum(sizes)
                    stream.close()
                    assert host.held_bytes == 0 or keep
                    assert host.held_bytes == sum(sizes) or not keep or share < 1
            assert host.held_bytes == 0
    assert not _threads()


def test_blocks_with_a_lora_are_kept_beside_those_without_and_made_from_them(tiny, reads):
    expected, fused = _expected(tiny), _expected(tiny, with_lora=True)
    reads.clear()
    counts = []
    with HostWeights(PLENTY, keep=True) as host:
        for tensors, with_lora in ((expected, False), (fused, True)) * 2:
            stream = _stream(tiny, host, with_lora=with_lora)
            _passes(stream, tensors)
            stream.close()
            counts.append(len(reads))
    assert counts == [counts[0]] * 4
    assert counts[0] > 0
    assert host.held_bytes == 0
    small = HostWeights(sum(tensor.nbytes for tensor in fused.values()) * 6 // 5, keep=True)
    for tensors, with_lora in ((expected, False), (fused, True)):  # there is no room for both
        stream = _stream(tiny, small, with_lora=with_lora)
        _passes(stream, tensors)
        stream.close()
    small.close()
    assert small.held_bytes == 0


def test_once_blocks_are_in_host_memory_every_pass_prefetches_also_the_first_of_a_later_use(tiny):
    """In the order that was observed, so that no block waits on the device for longer than in the use before."""
    with HostWeights(PLENTY, keep=True) as host:
        for use in (1, 2):
            stream = _stream(tiny, host)
            called = [*reversed(list(stream._order)[:3]), *list(stream._order)[3:]]  # not as they are built
            stream._order = {name: index for index, name in enumerate(called)}
            for number in (1, 2):
                for name in called:
                    block = stream._model.get_submodule(name)
                    stream._before_call(name, block, ())
                    stream._after_call(name, block, (), None)
                    prefetched = (use, number) != (1, 1) and name != called[-1]
                    assert [*stream._in_flight] == called[called.index(name) + 1 :][:1] * prefetched
            stream.close()


def test_float8_never_becomes_bfloat16_in_host_memory(tiny, tmp_path):
    """From the file to the buffer as it is, or looked up; bfloat16 only on the device, for a module that has it."""
    tensors = load_file(tiny.checkpoint)
    matrices = [k for k, v in tensors.items() if "transformer_blocks." in k and k.endswith(".weight") and v.ndim == 2]
    every = torch.arange(256, dtype=torch.uint8).view(E4M3)  # with both zeros, subnormal values and no numbers
    biases = [k for k in tensors if "transformer_blocks." in k and k.endswith(".bias")]
    plain = {k: v.to(E4M3) if k in matrices + biases else v for k, v in tensors.items()}
    for key in matrices:
        plain[key].view(-1)[: len(every)] = every[: plain[key].numel()]
    scales = {f"{key}_scale": torch.tensor(0.37) for key in matrices}
    rows = {f"{key}_scale": torch.rand(len(tensors[key]), 1) + 0.1 for key in matrices}
    metadata = {"config": json.dumps(tiny.architecture.config)}
    for number, factors in enumerate(({}, scales, rows)):
        save_file(plain | factors, tmp_path / f"{number}", metadata=metadata)
        weights = replace(tiny, checkpoint=str(tmp_path / f"{number}"))
        for quantization, target in ((Quantization.BF16, torch.bfloat16), (Quantization.FP8_CAST, E4M3)):
            expected = _expected(weights, quantization=quantization)
            stream = _stream(weights, HostWeights(PLENTY), quantization=quantization)
            _passes(stream, expected, count=1)
            copies = [stream._host.ready(block) for block in stream._order if "transformer_blocks." in block]
            own = [one for copy in copies for one in copy.tensors if one.name.endswith("to_q.weight")]
            assert {one.dtype for one in own} == {E4M3}
            assert {expected[one.name].dtype for one in own} == {target}
            assert {one.scale is None for one in own} == {not factors or target is E4M3}
            assert stream.pageable_bytes == 0
            stream.close()
            whole = Ledger(weights, CPU, quantization, host_weights=HostWeights(PLENTY)).transformer().state_dict()
            for key, value in expected.items():
                assert torch.equal(_bytes(whole[f"velocity_model.{key}"]), _bytes(value))


@pytest.mark.parametrize("budget", [2000, PLENTY])
def test_whole_components_are_read_ahead_too(tiny, own_checkpoint, monkeypatch, budget):
    monkeypatch.setattr(tensors_ahead, "GROUP_BYTES", 2**16)
    monkeypatch.setattr(host_blocks, "AHEAD_BYTES", 2**17)
    for component in ("transformer", "text_encoder", "video_decoder", "vocoder", "spatial_upsampler"):
        states = [
            getattr(Ledger(tiny, CPU, Quantization.FP8_CAST, host_weights=HostWeights(most)), component)().state_dict()
            for most in (None, budget)
        ]
        assert states[0].keys() == states[1].keys()
        for key, value in states[0].items():
            assert value.dtype is states[1][key].dtype
            assert torch.equal(_bytes(value), _bytes(states[1][key])), key
    os.truncate(own_checkpoint.checkpoint, Path(own_checkpoint.checkpoint).stat().st_size - 4096)
    read_ahead = loader.AheadStateDictLoader(HostWeights(budget))
    with pytest.raises(CheckpointError) as caught:
        read_ahead.load(own_checkpoint.checkpoint, device=CPU)
    assert caught.value.fields["path"] == own_checkpoint.checkpoint
    assert not _threads()


def test_a_file_that_changed_between_generations_is_read_anew(own_checkpoint):
    with HostWeights(PLENTY, keep=True) as host:
        for factor in (1, 2):
            tensors = load_file(own_checkpoint.checkpoint)
            metadata = {"config": json.dumps(own_checkpoint.architecture.config)}
            save_file({k: v * factor for k, v in tensors.items()}, own_checkpoint.checkpoint, metadata=metadata)
            expected = _expected(own_checkpoint)
            held = []
            for _ in range(2):
                stream = _stream(own_checkpoint, host)
                _passes(stream, expected)
                stream.close()
                held.append(host.held_bytes)
            assert held == [held[0]] * 2
    assert host.held_bytes == 0


@pytest.mark.parametrize("damage", ["cut short", "removed", "replaced"])
def test_a_file_damaged_while_it_is_read_is_an_error_with_its_path(own_checkpoint, tiny, gate, damage):
    checkpoint = Path(own_checkpoint.checkpoint)
    with HostWeights(PLENTY, keep=True) as host:
        stream = _stream(own_checkpoint, host)
        stream._host.read_ahead()
        if damage == "cut short":
            os.truncate(checkpoint, 4096)
        else:
            checkpoint.unlink()
        if damage == "replaced":
            shutil.copy(tiny.checkpoint, checkpoint)
        gate.set()
        with pytest.raises(CheckpointError) as caught:
            _passes(stream, _expected(tiny))
        assert caught.value.fields["path"] == str(checkpoint)
        assert "\n" not in str(caught.value)
        stream.close()
        assert not _threads()
        shutil.copy(tiny.checkpoint, checkpoint)
        stream = _stream(own_checkpoint, host)
        _passes(stream, _expected(tiny))
        stream.close()
    assert host.held_bytes == 0


def test_a_file_cut_short_during_text_encoding_ends_the_generation_and_frees_everything(
    own_checkpoint, request_64, gate
):
    def once_the_text_encoder_is_there(event):
        if isinstance(event, ComponentBuilt) and event.name == "text_encoder":
            os.truncate(own_checkpoint.checkpoint, 4096)
            gate.set()

    host = HostWeights(PLENTY)
    with pytest.raises(CheckpointError) as caught:
        TwoStagePipeline(own_checkpoint, host_weights=host, sinks=[once_the_text_encoder_is_there])(request_64)
    assert caught.value.fields["path"] == own_checkpoint.checkpoint
    assert not _threads()
    assert host.held_bytes == 0


@pytest.mark.parametrize("when", [PhaseStarted(Phase.ENCODE_IMAGE), StepEnded(Phase.DENOISE_STAGE_1, 1, 8)])
@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_an_interrupted_generation_leaves_no_thread_and_no_memory_and_the_next_one_works(
    own_checkpoint, request_64, when, error
):
    def interrupt(event):
        if event == when:
            raise error

    for keep in (error is KeyboardInterrupt, False):
        with HostWeights(PLENTY, keep=keep) as host:
            with pytest.raises(error):
                TwoStagePipeline(own_checkpoint, host_weights=host, sinks=[interrupt])(request_64)
            assert not _threads()
            assert keep or host.held_bytes == 0
            stream = _stream(own_checkpoint, host)
            _passes(stream, _expected(own_checkpoint))
            stream.close()
        assert host.held_bytes == 0


@pytest.fixture
def interruptible():
    """An interrupt is a KeyboardInterrupt, which jobs in a shell's background ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_while_a_block_is_waited_for_ends_the_wait(tiny, gate, interruptible):
    host = HostWeights(PLENTY)
    stream = _stream(tiny, host)
    timers = [threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)), threading.Timer(0.4, gate.set)]
    for timer in timers:
        timer.start()
    with pytest.raises(KeyboardInterrupt):
        for name in stream._order:
            stream._fetch(name)
    stream.close()
    assert not _threads()
    assert host.held_bytes == 0
    for timer in timers:
        timer.join()


def test_generations_of_a_run_and_those_of_the_lab_share_kept_weights(request_64, reads, monkeypatch, tmp_path):
    monkeypatch.setattr(host_weights, "host_budget_bytes", lambda _: PLENTY)
    execute(RunSpec(request=request_64, model="ltx-2.3-tiny", generations=2, profiler="none"), device="cpu")
    assert len(reads) == len(set(reads)) > 0
    job = GenerationJob(tmp_path, device="cpu")
    job.start(request_64, "ltx-2.3-tiny")
    job.wait()
    assert job.state is State.DONE, job.message
    (kept,) = job._kept.values()
    assert kept.held_bytes > 0
    job.close()
    assert kept.held_bytes == 0


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: out of memory"), OSError(12, "Cannot allocate memory")])
def test_where_memory_cannot_be_had_or_locked_blocks_are_loaded(tiny, monkeypatch, error):
    def refused(*_):
        raise error

    monkeypatch.setattr(block_reader, "PageLocked", refused)
    monkeypatch.setattr(host_blocks, "PageLocked", refused)
    with HostWeights(PLENTY, keep=True) as host:
        stream = _stream(tiny, host)
        _passes(stream, _expected(tiny))
        assert host.held_bytes == 0
        stream.close()


def test_blocks_of_no_file_are_loaded_once_and_kept_as_they_are_on_the_device(tiny, reads):
    made: list[str] = []

    class Noting(SyntheticStateDictLoader):
        def tensor(self, path, key, device):
            made.extend([key] if "transformer_blocks." in key and device.type != "meta" else [])
            return super().tensor(path, key, device)

    weights = replace(skeleton_weights(tiny.architecture), loader=Noting(tiny.architecture))
    expected = _expected(weights)
    made.clear()
    with HostWeights(PLENTY, keep=True) as host:
        for _ in range(2):
            stream = _stream(weights, host)
            _passes(stream, expected)
            stream.close()
            assert len(made) == len(set(made)) > 0
        assert host.held_bytes > 0
    assert host.held_bytes == 0
    assert not _threads()


def test_tensors_are_where_their_block_begins_wherever_that_is_in_its_memory():
    """Page-aligned buffers begin within a wider one."""
    values = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.randn(2, 4, 2).to(E4M3)}
    layout, size = packed((name, one.dtype, one.shape, one.dtype, None) for name, one in values.items())
    copy = HostCopy(PageLocked(size, CPU), layout)
    assert copy.buffer.data.data_ptr() % mmap.PAGESIZE == 0
    for first in (0, 4096):
        copy.buffer.data = torch.zeros(size + 4096, dtype=torch.uint8)[first : first + size]
        for one, value in zip(layout, values.values(), strict=True):
            copy.buffer.data[one.offset : one.offset + value.nbytes] = _bytes(value)
        for found in (copy.unpacked(copy.buffer.data), dict(copy.tensors_on(CPU))):
            for name, value in values.items():
                assert torch.equal(_bytes(found[name]), _bytes(value)), name


def test_an_interrupt_between_the_decision_to_read_a_block_and_its_reading_leaves_nothing(tiny, monkeypatch):
    """The next use would wait for a reading that nobody began."""

    def interrupted(*_):
        raise KeyboardInterrupt

    with HostWeights(PLENTY, keep=True) as host:
        with monkeypatch.context() as patch:
            patch.setattr(block_reader.BlockReader, "read", interrupted)
            with pytest.raises(KeyboardInterrupt):
                _stream(tiny, host)
        assert host.held_bytes == 0
        stream = _stream(tiny, host)
        _passes(stream, _expected(tiny))
        stream.close()
    assert host.held_bytes == 0


def test_a_lack_of_host_memory_while_a_block_is_read_ends_the_generation_and_frees_everything(
    tiny, request_64, monkeypatch
):
    def starved(*_):
        raise MemoryError("cannot allocate memory")

    host = HostWeights(PLENTY)
    with monkeypatch.context() as patch:
        patch.setattr(host_copies._Conversion, "__call__", starved)
        with pytest.raises(MemoryError):
            _frames(TwoStagePipeline(tiny, host_weights=host), request_64)
    assert not _threads()
    assert host.held_bytes == 0
    stream = _stream(tiny, host)
    _passes(stream, _expected(tiny), count=1)
    stream.close()


def test_a_header_damaged_after_verification_is_an_error_with_its_path(tmp_path):
    path = tmp_path / "damaged.safetensors"
    valid = {"a": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}
    wrong = ([], {"a": 1}, {"a": {}}, {"a": valid["a"] | {"dtype": "?"}}, {"a": valid["a"] | {"data_offsets": []}})
    texts = [b"{", b"\xff" * 8, *(json.dumps(header).encode() for header in wrong)]
    for content in [b"", b"1234567", (2**60).to_bytes(8, "little"), *(len(t).to_bytes(8, "little") + t for t in texts)]:
        path.write_bytes(content + bytes(16))
        with pytest.raises(CheckpointError) as caught:
            readers.SafetensorsReader().keys(str(path))
        assert caught.value.fields["path"] == str(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("budget", [-1, True, 1.5, "8GiB"])
def test_a_budget_that_is_no_number_of_bytes_is_refused(budget):
    with pytest.raises(InvalidRequest) as caught:
        HostWeights(budget)
    assert caught.value.fields == {"budget_bytes": budget}


def test_what_is_used_after_it_was_closed_keeps_nothing(tiny):
    host = HostWeights(PLENTY, keep=True)
    for _ in range(2):
        stream = _stream(tiny, host)
        _passes(stream, _expected(tiny), count=1)
        assert host.held_bytes > 0
        host.close()
        assert host.held_bytes == 0
        _passes(stream, _expected(tiny), count=1)  # which is still in use
        stream.close()
        assert host.held_bytes == 0


@pytest.mark.parametrize("own", [(700, 10, 10), (0, 10, 10), (60_000, 5, 5)])
def test_a_generation_is_not_interrupted_by_collections_of_all_objects(tiny, request_64, own):
    seen = []

    def interrupt(event):
        seen.append(gc.get_threshold())
        if isinstance(event, PhaseStarted) and event.phase is Phase.ENCODE_IMAGE:
            raise KeyboardInterrupt

    before = gc.get_threshold()
    gc.set_threshold(*own)
    try:
        with rare_collections(), pytest.raises(KeyboardInterrupt):  # as another thread's generation
            TwoStagePipeline(tiny, sinks=[interrupt])(request_64)
        assert gc.get_threshold() == own
    finally:
        gc.set_threshold(*before)
    assert set(seen) == {(own[0] and max(own[0], 50_000), *own[1:])}
