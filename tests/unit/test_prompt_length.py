"""A prompt longer than its text encoder takes is reported, by every runner."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from i2v_lab.events import Note, Phase
from i2v_lab.pipeline.contract.architectures import load_architecture
from i2v_lab.pipeline.contract.prompt_length import dropped_tokens, note_dropped_tokens
from i2v_lab.pipeline.diffusers.ltx2 import _tokenizer
from i2v_lab.pipeline.registry import RUNNERS
from i2v_lab.profiling.phase_profiler import PhaseProfiler
from i2v_lab.profiling.record_json import record_from_json, record_to_json
from i2v_lab.profiling.records import NoteRecord
from i2v_lab.reporting.headlines import headline
from i2v_lab.request import Variant
from i2v_lab.runs.spec import make_request


class _Noted(Exception):
    """Ends a run at its first note."""


@pytest.mark.parametrize("length", [0, 1, 8, 9, 30])
def test_what_is_dropped_is_what_the_tokenizer_leaves_out(length):
    tokenizer, prompt = _tokenizer(), "a" * length
    kept = tokenizer(prompt, max_length=8, truncation=True).input_ids
    assert dropped_tokens(tokenizer, f"  {prompt}\n", 8) == length - len(kept)
    seen = []
    note_dropped_tokens(seen.append, tokenizer, "prompt", prompt, 8)
    assert [(note.phase, note.topic, note.count) for note in seen] == [
        (Phase.ENCODE_PROMPT, "prompt", length - 8) for _ in range(length > 8)
    ]


@pytest.mark.parametrize(
    ("runner", "model", "limit", "topics", "variant"),
    [
        ("ltx-2", "ltx-2.3-tiny", 1024, ["prompt"], "distilled"),
        ("ltx-2", "ltx-2.3-tiny", 1024, ["prompt", "negative_prompt"], "dev"),
        ("ltx-2 upstream", "ltx-2.3-tiny", 1024, ["prompt"], "distilled"),
        ("ltx-2 upstream", "ltx-2.3-tiny", 1024, ["prompt", "negative_prompt"], "dev"),
        ("ltx-video", "ltxv-tiny", 256, ["prompt", "negative_prompt"], "distilled"),
        ("diffusers", "ltx-2.3-tiny-diffusers", 1024, ["prompt"], "distilled"),
    ],
)
def test_every_runner_reports_a_prompt_that_its_encoder_takes_in_part(
    still, runner, model, limit, topics, variant, caplog
):
    """The run itself ends with the first or second note, before its text encoder runs."""
    if runner == "ltx-2 upstream":
        runner = next(name for name, spec in RUNNERS.items() if spec.models == "ltx-2" and not spec.is_own)
    notes = []

    def sink(event):
        if isinstance(event, Note):
            notes.append(event)
            if len(notes) == len(topics):
                raise _Noted

    spec = RUNNERS[runner]
    size = {"width": 128, "height": 128, "frames": 9, "variant": variant}
    request = make_request(model, image=str(still), prompt="a" * (limit + 5), negative_prompt="b" * (limit + 7), **size)
    weights = spec.resolve_weights(load_architecture(model), Variant(variant))
    with pytest.raises(_Noted), torch.no_grad():
        spec.pipeline(weights, "cpu", [sink])(request)
    assert [note.topic for note in notes] == topics
    extra = 2 if runner == "ltx-video" else 0  # T5 ends a prompt with a token, and begins it with one for the space
    assert [note.count for note in notes] == [n + extra for n in (5, 7)][: len(topics)]
    assert all("counted by the synthetic weights' tokenizer" in note.text for note in notes)
    assert not caplog.records


def test_a_note_is_recorded_and_part_of_what_a_run_says():
    note = Note(Phase.ENCODE_PROMPT, "prompt", 3, "prompt: the last 3 are dropped")
    with PhaseProfiler("cpu") as profiler:
        profiler(note)
    record = NoteRecord("encode_prompt", "prompt", 3, note.text)
    assert [each for each in profiler.records if isinstance(each, NoteRecord)] == [record]
    assert record_from_json(record_to_json(record)) == record
    run = SimpleNamespace(
        finished=True, status="complete", records=[record], of=lambda kind: [record] * (kind is NoteRecord), metadata={}
    )
    assert headline(run).splitlines()[-1] == note.text
