"""The views of JupyterLab without a browser: what they show, what they leave behind, what they say of themselves."""

from __future__ import annotations

import base64
import gc
import inspect
import io
import json
import re
import sys
import threading
import time
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import comm
import numpy as np
import pytest
import torch
from endurance import MIB, change_controls, stop_at_random
from ipywidgets import Widget
from PIL import Image

import i2v_lab
from i2v_lab import Compare, Explorer, Generate, I2VRequest, PhaseProfiler, Tiling, VramMonitor
from i2v_lab.capacity.device_profile import device_profile
from i2v_lab.capacity.time_model import predicted_seconds
from i2v_lab.cli.lab import START, lab_command, lab_environment
from i2v_lab.errors import ForecastError, InvalidImage, OutputError, ProfilerError
from i2v_lab.events import Note, Phase, PhaseStarted
from i2v_lab.lab import background_forecast as background
from i2v_lab.lab.exploration import Exploration, _downsampled
from i2v_lab.lab.generation_job import State
from i2v_lab.lab.question import Question
from i2v_lab.lab.stills import add_still, list_stills, preview
from i2v_lab.lab.view import View
from i2v_lab.memory_policy import MemoryPolicy
from i2v_lab.paths import CACHE_VARIABLE
from i2v_lab.pipeline.contract.media import load_still
from i2v_lab.profiling.monitor import MemoryMonitor
from i2v_lab.profiling.records import Forecast, GraphRecord, ModuleRecord, PhaseRecord, TimelineRecord
from i2v_lab.reporting.comparison import find_runs
from i2v_lab.reporting.figures import live as pictures
from i2v_lab.runs.forecast import forecast_spec
from i2v_lab.runs.spec import RunSpec
from i2v_lab.runs.store import COMPLETE, Run, RunWriter
from i2v_lab.units import format_seconds

TINY = "ltx-2.3-tiny"
WIDGET = "application/vnd.jupyter.widget-view+json"


def _request(**changes) -> I2VRequest:
    return I2VRequest(**{"image": "stills/lighthouse.png", "width": 64, "height": 64, "frames": 9, **changes})


def _phase(name: str, peak: int, **changes) -> PhaseRecord:
    values = dict.fromkeys(("start_bytes", "end_bytes", "start_s"), 0) | {"peak_so_far_bytes": peak, "seconds": 0.5}
    known = {"parent": None, "peak_reserved_bytes": None, "saved_for_backward_bytes": 0, "completed": True}
    return PhaseRecord(**{"phase": name, "peak_bytes": peak, **values, **known, **changes})


# --- Impatience; `make endurance` does the same at full length ---


def test_random_control_changes_leave_nothing_behind():
    done = change_controls(25)
    assert done.problems == []
    assert (done.threads, done.processes) == (0, 0)
    assert done.grown_bytes < 20 * MIB
    assert len(done.known_ms) >= 6


@pytest.mark.usefixtures("tiny")
def test_a_generation_stopped_at_a_random_moment_ends_within_a_step_and_the_next_one_works(tmp_path):
    stops = stop_at_random(1, tmp_path, seed=5)
    assert [stop.state for stop in stops] == [State.STOPPED]
    for stop in stops:
        assert stop.steps_after <= 1
        assert stop.tensors <= 0
        assert stop.leftovers == []


# --- Explorer ---


def test_a_newer_question_overtakes_a_forecast_that_is_under_way(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(background, "POLL_INTERVAL_S", 0.01)
    latest = background.LatestForecast(lambda spec, _, error: seen.append((spec, error)))
    first = RunSpec(request=_request(width=192, height=192, frames=17), model=TINY)
    unreadable = replace(first, request=_request(image="gone.png"))
    latest.ask(first, partial(forecast_spec, first))
    time.sleep(0.3)
    latest.ask(unreadable, partial(forecast_spec, unreadable))
    deadline = time.monotonic() + 60
    while not seen and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [spec for spec, _ in seen] == [unreadable], "the first one was ended and says nothing"
    assert isinstance(seen[0][1], InvalidImage)
    assert not list(tmp_path.rglob("forecasts/*.json")), "it did not come to its end unheard, either"
    latest.cancel(wait_s=5)
    assert latest._thread is None


def test_a_process_that_dies_is_a_problem_in_words_and_the_next_question_is_answered(monkeypatch):
    monkeypatch.setattr(background, "_forecast", _die)
    seen = []
    latest = background.LatestForecast(lambda spec, _, error: seen.append(error))
    latest.ask("asked", list)
    latest._thread.join(60)
    assert isinstance(seen[0], ForecastError)
    assert "ended with status 3" in str(seen[0])


def _die(*_) -> None:
    sys.exit(3)


def test_an_answer_holds_what_the_forecast_says(tiny):
    exploration = Exploration(Question(request=_request(), model=TINY, gpu="T4"))
    exploration.ask(exploration.question, wait=True)
    answer = exploration.answer
    whole = i2v_lab.forecast_request(_request(), TINY)
    reserved = whole.peak_reserved_bytes
    assert answer.needed_bytes == reserved + reserved * 6 // 100 + whole.context_bytes
    assert answer.fit.verdict == "fits"
    assert answer.sentence.startswith("It fits: T4 has 14.56 GiB, this needs")
    assert "not known" in answer.duration  # tensor cores of a T4 have no bfloat16
    for gpu in ("H100 80GB", "L4"):
        exploration.ask(replace(exploration.question, gpu=gpu))
        predicted = format_seconds(predicted_seconds(whole, device_profile(gpu)))
        assert predicted in exploration.answer.duration
        assert ("not measured" in exploration.answer.duration) == (gpu == "L4")
    small = replace(exploration.question, memory_bytes=answer.needed_bytes - 1, gpu="a small card")
    exploration.ask(small)
    assert exploration.answer.fit.verdict == "tight"
    exploration.ask(replace(small, memory_bytes=whole.context_bytes))
    assert exploration.answer.duration == ""
    answer = exploration.answer
    assert answer.sentence.startswith("It does not fit as it is: a small card has")
    assert answer.instead is None
    assert [each.changes for each in answer.remedies] == [{"memory": MemoryPolicy.AUTO}]
    assert "memory auto" in answer.sentence
    exploration.ask(replace(small, request=_request(image="gone.png")), wait=True)
    assert "gone.png" in exploration.problem
    # What is left out of a picture changes none of its sums.
    thin = replace(whole, records=_downsampled(whole))
    assert thin.phases == whole.phases
    assert len(thin.records) < len(whole.records) / 5
    assert _by_category(thin) == _by_category(whole)
    assert _highest(thin) == _highest(whole)
    code = exploration.question.code()
    assert 'image="gone.png"' in code


def _by_category(forecast: Forecast) -> dict[tuple[str, str], int]:
    found: dict[tuple[str, str], int] = {}
    for record in forecast.records:
        if isinstance(record, ModuleRecord):
            found[record.phase, record.category] = found.get((record.phase, record.category), 0) + record.nbytes
    return found


def _highest(forecast: Forecast) -> int:
    moments = [record for record in forecast.records if isinstance(record, TimelineRecord)]
    return max(m.weight_bytes + m.saved_bytes + m.activation_bytes + m.other_bytes for m in moments)


def test_the_code_of_a_question_asks_the_same_question():
    for tiling, scope, memory in ((None, "escaped", "lean"), (Tiling(128, 32, 16, 8), "no_grad", "resident")):
        question = Question(request=_request(tiling=tiling, decode_scope=scope, memory=memory), model=TINY, gpu="L4")
        body = question.code().rpartition("\nforecast = ")[0]
        scope_of_cell: dict[str, object] = {}
        exec(body, scope_of_cell)
        assert scope_of_cell["request"] == question.request
        assert f'model="{TINY}")' in question.code()


def test_another_model_brings_its_own_sizes_and_tiles(tiny):
    explorer = Explorer(_request(), TINY)
    controls = explorer.controls
    assert "64x64" in controls["size"].options
    controls["model"].value = "ltx-2.3-22b"
    assert controls["size"].value == "1024x768"
    assert explorer.exploration.question.request.frames == controls["frames"].value
    assert "2048x1536" in controls["size"].options
    explorer.close()


@pytest.mark.parametrize("kind", [Explorer, Generate])
def test_a_memory_policy_is_chosen_where_the_model_has_it(tiny, tmp_path, kind):
    lead = [] if kind is Explorer else [tmp_path]
    view = kind(*lead, _request(memory="auto"), TINY)
    assert view.widget is not None
    controls = view.controls
    assert [policy.value for policy in controls["memory"].options] == ["auto", "resident", "lean", "streamed"]
    assert controls["memory"].value == "auto"
    controls["memory"].value = MemoryPolicy.STREAMED
    assert view.exploration.question.request.memory is MemoryPolicy.STREAMED
    assert "streamed" in view.html()
    controls["model"].value = "ltxv-tiny"
    assert [policy.value for policy in controls["memory"].options] == ["resident"]
    assert view.exploration.question.request.memory is MemoryPolicy.RESIDENT
    view.close()


def test_a_request_that_its_model_does_not_support_is_a_problem_and_not_an_error(tiny):
    explorer = Explorer(_request(quantization="bf16", tiling=None), "ltxv-tiny")
    explorer.controls["quantization"].value = "fp8-cast"
    assert "quantization='fp8-cast'" in explorer.exploration.problem
    assert not explorer.exploration.working
    assert "quantization=" in explorer.html()
    assert "fp8-cast" in repr(explorer)
    explorer.controls["model"].value = TINY
    assert explorer.exploration.problem is None
    explorer.close()


# --- Every view, with a front end and without ---


def _views(tmp_path: Path) -> list[object]:
    explorer = Explorer(_request(), TINY)
    return [explorer, VramMonitor("cpu"), Generate(tmp_path, _request(), TINY, "cpu"), Compare([tmp_path])]


def test_a_view_is_widgets_for_those_who_watch_and_html_for_everybody(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "0")
    for view in _views(tmp_path):
        bundle = view._repr_mimebundle_()
        assert {WIDGET, "text/html", "text/plain"} <= set(bundle), view
        view.close()
    monkeypatch.setenv("TQDM_DISABLE", "1")
    for view in _views(tmp_path):
        bundle = view._repr_mimebundle_()
        assert set(bundle) == {"text/html", "text/plain"}, view
        assert "i2v-view" in bundle["text/html"]
        assert "<script" not in bundle["text/html"]
        assert view._widget is None
        view.close()


# --- Closing ---


def _widgets_alive() -> int:
    gc.collect()
    return sum(issubclass(type(each), Widget) for each in gc.get_objects())


def _opened(kind: str, folder: Path) -> View:
    views = {
        "Explorer": lambda: Explorer(_request(), TINY),
        "VramMonitor": lambda: VramMonitor("cpu", interval_s=0.01),
        "Generate": lambda: Generate(folder, _request(), TINY, "cpu"),
        "Compare": lambda: Compare([folder]),
    }
    return views[kind]()


@pytest.mark.parametrize("kind", ["Explorer", "VramMonitor", "Generate", "Compare"])
def test_a_closed_view_leaves_no_widget_and_no_memory(tiny, tmp_path, kind):
    for name in ("a", "b"):
        with RunWriter(tmp_path / name, {"device": "cpu"}) as writer:
            writer.append(_phase("decode_video", 400))

    for device in ("cuda", "cpu"):  # what is not cached would be forecast in a process, each time
        forecast_spec(RunSpec(request=_request(), model=TINY), device)

    def open_and_close() -> weakref.ref:
        view = _opened(kind, tmp_path)
        assert view.widget is view.widget
        if kind == "VramMonitor":
            with view:
                time.sleep(0.02)
        view.close()
        view.close()
        return weakref.ref(view)

    open_and_close()
    before = _widgets_alive()
    threads = threading.active_count()
    comms = len(comm.get_comm_manager().comms)
    blocks = []
    for _ in range(2):
        views = [open_and_close() for _ in range(5)]
        assert _widgets_alive() <= before
        assert [view() for view in views] == [None] * 5
        blocks.append(sys.getallocatedblocks())
    assert blocks[1] - blocks[0] < 1000  # a view has tens of thousands
    assert len(comm.get_comm_manager().comms) <= comms
    assert threading.active_count() <= threads


def test_a_view_that_is_closed_while_it_works_ends_its_work_and_can_be_shown_again(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "0")
    before = _widgets_alive()
    monitor = VramMonitor("cpu", interval_s=0.01)
    generate = Generate(tmp_path, _request(), TINY, "cpu", monitor=monitor)
    assert generate.widget is not None
    own = monitor.widget
    generate.start()
    while not generate.job.progress:
        time.sleep(0.01)
    generate.close()
    assert generate.job.state is State.STOPPED
    assert not monitor.monitor.running
    assert own.comm is not None, "a monitor that was given belongs to whoever gave it"
    assert "Stopped by the user" in generate.html()
    assert generate._repr_mimebundle_()[WIDGET]
    generate.start()
    generate.job.wait()
    assert generate.job.state is State.DONE
    assert len(generate._video_box.children) == 1
    assert "Made with random weights" in generate._result_box.value
    assert "--checkpoint" in generate._result_box.value
    generate.start()
    generate.job.wait()
    generate.close()
    monitor.close()
    unknown = Explorer(_request(width=320, frames=17, seed=5), TINY)
    assert unknown.widget is not None
    unknown.close()
    assert not unknown.exploration.working
    del generate, monitor, unknown, own
    assert _widgets_alive() <= before


# --- VramMonitor ---


def test_a_monitor_that_was_not_started_shows_a_single_sample_and_says_so():
    html = VramMonitor("cpu").html()
    assert html.count("<circle") == 1
    assert "this is a single sample" in html


def test_a_monitor_counts_tensors_marks_phases_and_says_what_it_shows():
    view = VramMonitor("cpu", interval_s=0.01)
    with view:
        kept = torch.zeros(2**20)
        view(PhaseStarted(Phase.DECODE_VIDEO))
        time.sleep(0.05)
        with pytest.raises(ProfilerError, match="another monitor counts"):
            MemoryMonitor("cpu").start()
    assert view.monitor.samples[-1].allocated_bytes == kept.nbytes
    assert view.monitor.samples[-1].reserved_bytes is None
    assert len(view.monitor.samples) >= 3
    html = view.html()
    assert "No GPU is in use here" in html
    assert "allocated 4.0 MiB" in html
    assert "decode video" in html
    assert not view.monitor.running


def test_a_monitor_follows_a_profiler_of_another_thread():
    monitor = MemoryMonitor("cpu", interval_s=0.01)
    with PhaseProfiler("cpu") as profiler, monitor.following(profiler):
        kept = torch.zeros(1000)
        time.sleep(0.05)
    assert max(sample.allocated_bytes for sample in monitor.samples) == kept.nbytes
    assert not monitor.running
    with pytest.raises(ProfilerError, match="interval_s=0"):
        MemoryMonitor("cpu", interval_s=0)


# --- Generate ---


def test_a_dropped_file_that_is_no_picture_is_refused_in_words(tmp_path):
    generate = Generate(tmp_path, _request(), TINY, "cpu")
    assert generate.widget is not None
    generate.add_still("notes.txt", b"hello")
    assert "&#x27;notes.txt&#x27; is not a picture" in generate._note.value
    cut = Path(i2v_lab.paths.data_dir() / "stills" / "tower.png").read_bytes()[:5000]
    generate.add_still("broken.png", cut)
    assert "&#x27;broken.png&#x27; is damaged or truncated" in generate._note.value
    assert not list((tmp_path / "stills").glob("*"))
    generate.add_still("../../a b.png", Path(i2v_lab.paths.data_dir() / "stills" / "tower.png").read_bytes())
    assert generate.request.image == str(tmp_path / "stills" / "a_b.png")
    assert generate.controls["image"].value == generate.request.image
    assert ("a_b.png", generate.request.image) in list_stills(tmp_path, "")
    with pytest.raises(InvalidImage):
        add_still(tmp_path, "x", b"")
    (tmp_path / "stills" / "notes.txt").write_text("hello")
    (tmp_path / "stills" / "folder.png").mkdir()
    assert {label for label, _ in list_stills(tmp_path, "stills/tower.png")} == {"a_b.png", "lighthouse", "tower"}
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        add_still(tmp_path / "file", "tower.png", (tmp_path / "stills" / "a_b.png").read_bytes())
    generate.close()


def _pictures() -> dict[str, bytes]:
    """Pictures whose pixels are not what a plain conversion to RGB gives, and formats by other names."""
    rng = np.random.default_rng(3)
    noise = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)
    rgb = Image.fromarray(noise)
    upside = Image.Exif()
    upside[0x0112] = 6  # the camera was held upright
    clear = Image.fromarray(np.dstack([noise, noise[:, :, 0]]))
    deep = Image.fromarray((noise[:, :, 0].astype(np.uint16) << 8) + 255)
    made = {
        "turned.jpg": (rgb, "JPEG", {"exif": upside}),
        "grey16.png": (deep, "PNG", {}),
        "float.tiff": (Image.fromarray(rng.random((40, 60), dtype=np.float32)), "TIFF", {}),
        "clear.png": (clear, "PNG", {}),
        "palette.gif": (clear.convert("RGB").quantize(7), "GIF", {"transparency": 3}),
        "cmyk.tif": (rgb.convert("CMYK"), "TIFF", {}),
        "photo.jfif": (rgb, "JPEG", {}),
        "photo.jp2": (rgb, "JPEG2000", {}),
        "photo.webp": (clear, "WEBP", {}),
        "photo.bmp": (rgb, "BMP", {}),
        "no suffix": (rgb, "PNG", {}),
        "wrong.txt": (rgb, "PNG", {}),
        "\N{HIRAGANA LETTER A}" * 300 + ".png": (rgb, "PNG", {}),
    }
    if ".avif" in Image.registered_extensions():  # from Pillow 11.3 on
        made["photo.avif"] = (rgb, "AVIF", {})
    contents = {}
    for name, (picture, kind, options) in made.items():
        picture.save(buffer := io.BytesIO(), kind, **options)
        contents[name] = buffer.getvalue()
    return contents


def test_the_preview_of_a_still_has_the_pixels_that_the_pipeline_gets(tmp_path):
    for name, content in _pictures().items():
        path = add_still(tmp_path, name, content)
        assert str(path) in [known for _, known in list_stills(tmp_path, "stills/tower.png")], name
        data = re.search(r"base64,([^\"]+)", preview(str(path)))[1]
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        np.testing.assert_array_equal(shown, load_still(path), err_msg=name)
    assert preview("gone.png") == preview("a\0b") == preview("x" * 300) == ""


def test_a_request_that_will_not_fit_this_machine_gets_a_warning_before_it_runs(tiny, tmp_path):
    generate = Generate(tmp_path, _request(), TINY, "cpu")
    generate.device_memory = ("this GPU", 2**20, "cuda")
    generate.exploration.ask(generate._question(), wait=True)
    assert "Warning. It does not fit as it is: this GPU has 1.0 MiB" in generate.html()


def test_a_seed_that_is_refused_stays_in_its_field_and_starts_nothing(tiny, tmp_path):
    generate = Generate(tmp_path, _request(seed=3), TINY, "cpu")
    seed = generate.controls["seed"]
    for value, field in ((-5, -5), (12.7, 12.7), (2.0**60, 2.0**60), (-(2.0**60), -(2.0**60))):
        seed.value = value
        assert seed.value == field
        assert "seed=" in generate._note.value
        assert generate._start.disabled
        generate.start()
        assert generate.job.state is State.IDLE
        assert generate.request.seed == 3
    seed.value = 7
    assert (generate.request.seed, type(generate.request.seed)) == (7, int)
    assert "seed=" not in generate._note.value
    assert not generate._start.disabled
    generate.close()


# --- Pictures and comparisons ---


def _run(name: str, *records) -> Run:
    return Run(Path(name), {"device": "cpu"}, records, COMPLETE)


def _numbers(svg: str, attribute: str) -> list[float]:
    return [float(part.get(attribute)) for part in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}rect")]


def test_bars_are_as_long_as_what_they_stand_for_and_end_at_the_cards_line():
    parts = [ModuleRecord("decode_video", "a", "weight", 300), ModuleRecord("decode_video", "b", "saved", 100)]
    run = _run("one", _phase("decode_video", 400, peak_reserved_bytes=500), *parts)
    svg = pictures.phase_bars(run, context_bytes=100, line=pictures.Line(600, "a card"))
    saved, weights, reserve, context, *_ = _numbers(svg, "width")
    assert weights / saved == pytest.approx(3, rel=0.01)
    assert reserve == pytest.approx(saved, rel=0.01)
    assert context == pytest.approx(saved, rel=0.01)
    line = re.search(r'<line x1="([\d.]+)"', svg)
    assert float(line[1]) == pytest.approx(pictures.LEFT + saved + weights + reserve + context, abs=0.5)
    unknown = _run("two", _phase("decode_video", 400, saved_for_backward_bytes=300))
    saved, rest, *_ = _numbers(pictures.phase_bars(unknown), "width")
    assert saved / rest == pytest.approx(3, rel=0.01)


def test_the_value_of_a_bar_is_not_struck_through_by_the_cards_line():
    for size in (350, 390, 410, 430, 600):
        run = _run("one", _phase("decode_video", 400 * MIB), _phase("encode_prompt", 250 * MIB))
        svg = pictures.phase_bars(run, line=pictures.Line(size * MIB, "a card"))
        line = float(re.search(r'<line x1="([\d.]+)"', svg)[1])
        for x, value in re.findall(r'<text x="([\d.]+)"[^>]*>([\d.]+ MiB)</text>', svg):
            assert not float(x) - 2 < line < float(x) + 6 * len(value)


def test_a_pointer_over_a_view_is_told_exact_bytes_phase_and_module():
    held = ModuleRecord("decode_video", "video_decoder.up_blocks", "weight", 400)
    moments = [TimelineRecord("decode_video", t / 1000, 100 * t, 0, 5, 0) for t in range(1000)]
    run = _run("one", _phase("decode_video", 400), held, *moments)
    space = "{http://www.w3.org/2000/svg}"
    hit = [part for part in ElementTree.fromstring(pictures.timeline(run)).iter(f"{space}rect") if part.get("class")]
    assert len(hit) < pictures.WIDTH / pictures.COLUMN, "columns that a pointer can hit"
    assert hit[-1].find(f"{space}title").text == (
        "decode_video: 97.6 KiB (99,905 bytes); saved for backward 0 B (0 bytes); activations 5 B (5 bytes); "
        "weights 97.6 KiB (99,900 bytes), at the peak most in video_decoder.up_blocks; other 0 B (0 bytes)"
    )
    titles = [part.text for part in ElementTree.fromstring(pictures.phase_bars(run)).iter(f"{space}title")]
    assert titles == ["decode_video: weights, 400 B (400 bytes); most of it: video_decoder.up_blocks"]


def test_a_timeline_needs_storages_that_were_tracked():
    assert "No timeline" in pictures.timeline(_run("one", _phase("decode_video", 400)))
    moments = [TimelineRecord("decode_video", t / 10, 100 * t, 0, 50, 0) for t in range(4)]
    svg = pictures.timeline(_run("one", *moments), _run("two", *moments[:2]))
    assert "dashed: all of two" in svg
    ElementTree.fromstring(svg)


@pytest.mark.parametrize(
    ("top", "labels"),
    [
        (1, ["0", "0.5", "1 B"]),
        (100, ["0", "50", "100 B"]),
        (1500, ["0", "0.732", "1.46 KiB"]),
        (1023 * MIB + MIB // 2, ["0", "512", "1024 MiB"]),
        (3000 * 2**30, ["0", "1500", "3000 GiB"]),
    ],
)
def test_an_axis_of_any_range_reads_without_an_exponent(top, labels):
    curve = pictures.Curve("allocated", "#000000", [0, top], filled=True)
    svg = pictures.over_time([0.0, 1.0], [curve], [], "words")
    texts = [part.text for part in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert texts[:3] == labels
    moments = [TimelineRecord("decode_video", 0.0, top, 0, 0, 0)]
    assert labels[2] in pictures.timeline(_run("one", *moments))


def test_two_runs_are_compared_by_name(tmp_path):
    for name, peak in (("a", 400), ("b", 900)):
        with RunWriter(tmp_path / name, {"device": "cpu"}) as writer:
            writer.append(_phase("decode_video", peak * 2**20))
    assert list(find_runs([tmp_path])) == ["a", "b"]
    compare = Compare([tmp_path])
    assert (compare.first, compare.second) == ("a", "b")
    assert "Peak 900.0 MiB instead of 400.0 MiB: +500.0 MiB (+125 %)" in compare.html()
    assert "+500.0 MiB</td>" in compare.html()
    (tmp_path / "b" / "records.jsonl").write_text("x\n")
    assert "SHA-256" in compare.html()
    assert "no pair of runs" in Compare([tmp_path / "a"]).html()
    with RunWriter(tmp_path / "c", {"device": "cpu"}) as writer:
        writer.append(_phase("decode_video", 2**20))
    assert compare.widget is not None
    compare.refresh()
    assert compare._choices[0].options == ("a", "b", "c")
    compare._choices[1].value = "c"
    assert "Peak 1.0 MiB instead of 400.0 MiB" in compare._picture.value


# --- JupyterLab itself; that it starts is in tests/browser ---


def test_jupyterlab_is_told_to_listen_here_and_to_ask_nobody(tmp_path):
    command = lab_command(["--port=1234"])
    assert command[:3] == [sys.executable, "-m", "jupyterlab"]
    assert "--ServerApp.ip=127.0.0.1" in command
    assert not any("token=" in word or "password=" in word for word in command), "others see it in the process list"
    assert command[-1] == "--port=1234"
    assert "--ServerApp.kernel_spec_manager_class=i2v_lab.reproduce.kernel.InterpreterKernelSpecs" in command
    environment = lab_environment(tmp_path / "jupyter", {"JUPYTER_CONFIG_PATH": "/elsewhere", "TQDM_DISABLE": "1"})
    assert environment["JUPYTER_CONFIG_PATH"] == f"{tmp_path / 'jupyter'}:/elsewhere"
    assert environment["TQDM_DISABLE"] == "0"
    page = json.loads((tmp_path / "jupyter" / "labconfig" / "page_config.json").read_text())
    assert page["disabledExtensions"] == {"@jupyterlab/apputils-extension:announcements": True}


def test_the_start_page_leads_to_every_notebook():
    folder = Path(i2v_lab.__file__).parents[2] / "notebooks"
    text = (folder / START).read_text()
    assert set(re.findall(r"\]\(([^)]+)\)", text)) == {path.name for path in folder.glob("*.ipynb")}
    names = re.search(r"from i2v_lab import (.+)", text)[1].split(", ")
    assert set(names) <= set(i2v_lab.__all__)


# --- Help where people look ---


@pytest.mark.parametrize("name", i2v_lab.__all__)
def test_a_question_mark_behind_a_public_name_says_something_useful(name):
    text = inspect.getdoc(getattr(i2v_lab, name)) or ""
    assert len(text) > 60
    assert "Example:" in text
    assert ">>>" in text


def test_records_requests_and_profilers_show_themselves_as_tables(tmp_path):
    record = _phase("decode_video", 3 * 2**20)
    html = record._repr_html_()
    assert '<td style="text-align:left">peak_bytes</td><td >3.0 MiB</td>' in html.replace("<td>", "<td >")
    assert "n/a" in html
    assert "&lt;b&gt;" in GraphRecord("<b>", "m", 1)._repr_html_()
    assert "1024" in I2VRequest(image="x.png")._repr_html_()
    with PhaseProfiler("cpu") as profiler:
        assert "no phase has ended" in profiler._repr_html_()
        with profiler.phase("multiply"):
            torch.ones(16, 16) @ torch.ones(16, 16)
    assert "the peak is 3.0 KiB in multiply" in profiler._repr_html_()
    assert "<td>3.0 KiB</td>" in profiler._repr_html_().replace("<td >", "<td>")
    assert "takes 5.0 MiB from the card" in Forecast((record,), 2 * 2**20, 0.1)._repr_html_()
    assert "decode_video" in _run("one", record)._repr_html_()


def test_what_was_done_to_an_input_is_said_while_a_generation_runs_and_escaped(tmp_path):
    view = Generate(tmp_path, model="ltx-2.3-tiny", device="cpu")
    view.job.state = State.RUNNING
    view.job._follow(PhaseStarted(Phase.ENCODE_PROMPT))
    view.job._follow(Note(Phase.ENCODE_PROMPT, "prompt", 3, "prompt: 3 <b>dropped</b>"))
    assert view.job.notes == ["prompt: 3 <b>dropped</b>"]
    assert '<p class="note">prompt: 3 &lt;b&gt;dropped&lt;/b&gt;</p>' in view.html()
    view.job.state = State.IDLE
    view.close()
