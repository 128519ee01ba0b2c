"""Sound and frames of every kind: written, with what was done said, or refused by their true cause."""

from __future__ import annotations

import errno
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from i2v_lab.errors import InvalidVideo, OutputError
from i2v_lab.pipeline.contract import media
from i2v_lab.pipeline.contract.media import write_video
from i2v_lab.pipeline.contract.sound import AAC_RATES, prepare_sound

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64, np.float16, np.float32, np.float64]
INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.int32, np.int16, np.int32, np.uint8]
TINY = torch.full((3, 16, 16, 3), 128, dtype=torch.uint8)


def _prepared(waveform, rate=48000):
    notes = []
    made = prepare_sound(
        SimpleNamespace(waveform=waveform, sampling_rate=rate), lambda count, text: notes.append((count, text))
    )
    return made, notes


def _written(path, chunks, audio=None, rate=Fraction(24)):
    notes = []
    frames = write_video(chunks, audio, path, rate, on_note=lambda count, text: notes.append((count, text)))
    with av.open(str(path)) as container:
        video = container.streams.video[0]
        pixels = [frame.to_ndarray(format="rgb24") for frame in container.decode(video)]
    assert len(pixels) == frames
    if audio is not None:
        with av.open(str(path)) as container:
            sound = list(container.decode(container.streams.audio[0]))
        return np.stack(pixels), sound, notes
    return np.stack(pixels), None, notes


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS], ids=str)
def test_every_dtype_means_the_same_sound(dtype):
    wave = np.array([[0.0, 0.5, -0.5, 0.25], [-1.0, 0.75, 0.0, -0.25]])
    kind = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else np.dtype(dtype).name
    scaled = wave
    if "int" in kind:
        bits = int("".join(filter(str.isdigit, kind)))
        scaled = wave * 2 ** (bits - 1) + (128 if kind == "uint8" else 0)
    as_torch = isinstance(dtype, torch.dtype)
    waveform = torch.from_numpy(scaled.copy()).to(dtype) if as_torch else scaled.astype(dtype)
    (values, rate), notes = _prepared(waveform)
    assert (values.dtype, rate, notes) == (np.float32, 48000, [])
    assert np.array_equal(values, wave.astype(np.float32))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.sampled_from(["mono", "flat", "batch", "columns"]) | st.integers(1, 8),
    samples=st.sampled_from([0, 1, 2, 1023, 5000, 30000]),
    rate=st.sampled_from([*AAC_RATES, 1000, 5512, 37800, 47999, 192000, 48000.0, np.int64(44100)]),
    dtype=st.sampled_from([*FLOATS, *INTEGERS]),
    odd=st.sampled_from([0, 1, 7]),
    seed=st.integers(0, 2**16),
)
def test_any_sound_is_written_and_what_was_done_is_said(tmp_path, shape, samples, rate, dtype, odd, seed):
    random = np.random.default_rng(seed)
    channels = shape if isinstance(shape, int) else {"mono": 1, "flat": 1}.get(shape, 2)
    wave = random.uniform(-1.5, 1.5, (channels, samples))
    floating = dtype in FLOATS
    if not floating:
        wave = wave * 100
    if odd and floating and samples > 7:
        wave[0, random.choice(samples, odd, replace=False)] = random.choice([np.nan, np.inf, -np.inf], odd)
    if shape == "flat":
        wave = wave[0]
    elif shape == "batch":
        wave = wave[None]
    elif shape == "columns" and samples > 8:
        wave = wave.T  # not contiguous
    waveform = torch.from_numpy(wave).to(dtype) if isinstance(dtype, torch.dtype) else wave.astype(dtype)
    with np.errstate(all="ignore"):
        audio = SimpleNamespace(waveform=waveform, sampling_rate=rate)
    _, sound, notes = _written(tmp_path / "video.mp4", [TINY], audio)
    kept = rate if rate in AAC_RATES else 48000
    assert {(frame.layout.name, frame.sample_rate) for frame in sound} == {("stereo", int(kept))}
    length = sum(frame.samples for frame in sound)
    assert 0 <= length - round(3 / 24 * kept) < 1024
    heard = np.concatenate([frame.to_ndarray() for frame in sound], axis=1)
    assert np.isfinite(heard).all()
    replaced = [count for count, text in notes if "NaN or infinite" in text]
    assert replaced == ([odd] if odd and floating and samples > 7 else [])
    assert any("resampled" in text for _, text in notes) == (rate not in AAC_RATES)


def test_values_that_are_not_finite_are_silence_and_counted_and_the_rest_is_as_it_was():
    wave = torch.linspace(-1, 1, 20).reshape(2, 10)
    broken = wave.clone()
    broken[0, 1], broken[1, 2], broken[1, 3] = torch.nan, torch.inf, -torch.inf
    (values, _), notes = _prepared(broken)
    assert [count for count, _ in notes] == [3]
    mask = torch.isfinite(broken).numpy()
    assert np.array_equal(values, np.where(mask, wave.numpy(), 0))


def test_resampling_keeps_length_and_pitch():
    times = np.arange(11111) / 11111  # a second at a rate that AAC does not have
    (values, rate), notes = _prepared(np.stack([np.sin(2 * np.pi * 440 * times)] * 2), 11111)
    assert (rate, abs(values.shape[1] - 48000) < 100, len(notes)) == (48000, True, 1)
    spectrum = np.abs(np.fft.rfft(values[0, :48000]))
    assert abs(int(spectrum.argmax()) - 440) <= 1


@pytest.mark.parametrize(
    ("waveform", "rate"),
    [
        (None, 48000),
        ("sound", 48000),
        (torch.zeros(2, 10, dtype=torch.int64), 48000),
        (torch.zeros(2, 10, dtype=torch.complex64), 48000),
        (torch.zeros(2, 10, dtype=torch.bool), 48000),
        (torch.zeros(0, 10), 48000),
        (torch.zeros(9, 10), 48000),
        (torch.zeros(2, 2, 10), 48000),
        (torch.zeros(()), 48000),
        *((torch.zeros(2, 10), rate) for rate in (0, -1, 44100.5, 10**9, float("nan"), float("inf"), None, "fast")),
    ],
    ids=str,
)
def test_sound_that_cannot_be_used_is_left_out_with_its_cause_and_the_video_is_written(tmp_path, waveform, rate):
    audio = SimpleNamespace(waveform=waveform, sampling_rate=rate)
    notes = []
    path = tmp_path / "video.mp4"
    assert write_video([TINY], audio, path, Fraction(24), on_note=lambda *note: notes.append(note)) == 3
    with av.open(str(path)) as container:
        assert [stream.type for stream in container.streams] == ["video"]
    assert len(notes) == 1
    assert notes[0][1].endswith("the video is written without it")


def test_an_encoder_of_sound_that_fails_does_not_lose_the_video(tmp_path, monkeypatch):
    monkeypatch.setattr(media, "fit_audio", lambda samples, wanted: np.full((2, wanted), np.nan, np.float32))
    notes = []
    audio = SimpleNamespace(waveform=torch.zeros(2, 6000), sampling_rate=48000)
    path = tmp_path / "video.mp4"
    assert write_video([TINY], audio, path, Fraction(24), on_note=lambda *note: notes.append(note[1])) == 3
    assert len(notes) == 1
    assert "cannot be encoded" in notes[0]
    with av.open(str(path)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 3


@pytest.mark.parametrize(("seconds", "word"), [(0.0, "shorter"), (1.0, "longer"), (0.1, ""), (0.15, "")])
def test_a_sound_of_another_length_than_the_video_is_said(tmp_path, seconds, word):
    audio = SimpleNamespace(waveform=torch.zeros(2, round(seconds * 8000)), sampling_rate=8000)
    _, _, notes = _written(tmp_path / "video.mp4", [TINY], audio)
    assert [count for count, _ in notes] == ([abs(1000 - round(seconds * 8000))] if word else [])
    assert all(word in text for _, text in notes)


# --- Frames ---


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    parts=st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(any),
    form=st.sampled_from(["torch", "numpy", "strided", "reversed"]),
)
def test_frames_of_any_size_are_written_and_padded_to_even_sides(tmp_path, height, width, parts, form):
    colour = np.array([200, 40, 90], np.uint8)

    def chunk(count):
        pixels = np.broadcast_to(colour, (count, height, width, 3)).copy()
        if form == "strided":
            return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        return {"torch": torch.from_numpy(pixels), "numpy": pixels, "reversed": pixels[:, ::-1, ::-1]}[form]

    pixels, _, notes = _written(tmp_path / "video.mp4", [chunk(count) for count in parts])
    even = (height + height % 2, width + width % 2)
    assert pixels.shape == (sum(parts), *even, 3)
    assert np.abs(pixels.astype(int) - colour).max() <= 6
    assert [f"{even[1]}x{even[0]}" in text for _, text in notes] == [True] * (even != (height, width))


@pytest.mark.parametrize(
    ("chunks", "word"),
    [
        ([], "no frames"),
        ([TINY[:0], TINY[:0]], "no frames"),
        ([TINY.float() / 255], "torch.float32"),
        ([TINY.numpy().astype(np.float64)], "float64"),
        ([TINY.to(torch.int16)], "torch.int16"),
        ([TINY > 0], "torch.bool"),
        ([TINY, torch.zeros(1, 16, 32, 3, dtype=torch.uint8)], "16x16 to 32x16"),
        ([TINY, TINY.float()], "torch.float32"),
        ([TINY[0]], "(16, 16, 3)"),
        ([TINY.permute(0, 3, 1, 2)], "(3, 3, 16, 16)"),
        ([TINY[:, :0]], "(3, 0, 16, 3)"),
        ([TINY[..., :1]], "(3, 16, 16, 1)"),
        ([TINY.tolist()], "()"),
        ([None], "()"),
    ],
    ids=range(14),
)
def test_frames_that_are_none_are_refused_by_their_shape_or_dtype(tmp_path, chunks, word):
    with pytest.raises(InvalidVideo) as caught:
        write_video(iter(chunks), None, tmp_path / "video.mp4", Fraction(24))
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "space" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "rate", [0, -1, Fraction(0), 10**12, Fraction(1, 10**12), float("nan"), float("inf"), "24", None]
)
def test_a_frame_rate_that_is_none_is_refused(tmp_path, rate):
    with pytest.raises(InvalidVideo) as caught:
        write_video([TINY], None, tmp_path / "video.mp4", rate)
    assert list(caught.value.fields) == ["frame_rate"]


@pytest.mark.parametrize(
    ("number", "kind", "word"),
    [
        (errno.ENOSPC, OutputError, "free some space"),
        (errno.EFBIG, OutputError, "free some space"),
        (errno.EACCES, OutputError, "choose another folder"),
        (errno.EINVAL, InvalidVideo, "could not be encoded"),
    ],
)
def test_the_advice_follows_from_the_cause(tmp_path, monkeypatch, number, kind, word):
    def fails(*_, **__):
        raise av.FFmpegError(number, "why")

    monkeypatch.setattr(media, "_encode", fails)
    with pytest.raises(kind, match=word):
        write_video([TINY], None, tmp_path / "video.mp4", Fraction(24))


def test_by_default_what_was_done_is_logged(tmp_path, caplog):
    write_video([TINY[:, :15]], None, tmp_path / "video.mp4", Fraction(24))
    assert [record.getMessage() for record in caplog.records] == [
        "video: H.264 has even sides only; 16x15 is padded to 16x16"
    ]
