"""``Generate``: controls for a generation, its progress by step, and its video."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from i2v_lab.capacity.cards import FITS, NO
from i2v_lab.capacity.this_machine import available_memory
from i2v_lab.display import escaped
from i2v_lab.errors import I2VLabError
from i2v_lab.lab.answer import Answer, Remedy
from i2v_lab.lab.controls import (
    WIDTH,
    RequestForm,
    choose,
    memory_controls,
    runnable_models,
    searching,
    two_columns,
    with_supported_policy,
)
from i2v_lab.lab.exploration import Exploration
from i2v_lab.lab.generation_job import GenerationJob, State
from i2v_lab.lab.last_choice import Choice, check_runs_here, recall, remember
from i2v_lab.lab.monitor import VramMonitor
from i2v_lab.lab.question import Question
from i2v_lab.lab.remedy_buttons import RemedyButtons
from i2v_lab.lab.stills import DROP_ZONE, add_still, list_stills, preview
from i2v_lab.lab.view import View, close_widgets, page, sentence
from i2v_lab.reporting.figures.style import VERDICT_COLOURS
from i2v_lab.reporting.headlines import headline
from i2v_lab.reporting.run_tables import phase_table
from i2v_lab.reporting.tables import WORDS, as_sentence, html_table, readable
from i2v_lab.request import DecodeScope, I2VRequest
from i2v_lab.runs.forecast import is_quiet
from i2v_lab.runs.random_weights import random_weights
from i2v_lab.runs.sources import choose_model
from i2v_lab.studies.published import study_request
from i2v_lab.units import format_seconds

PHASES = {"phase": "phase", "peak_bytes": "peak", "end_bytes": "allocated at end", "seconds": "time"}


class Generate(View):
    """Generates videos interactively: choose or drop a still, enter a prompt, start, and stop within one step.

    Each generation is recorded as a run directory with its video below ``runs_dir``. Before it starts, a forecast says
    whether it fits this machine.

    Args:
        runs_dir: For run directories, and for dropped stills.
        request: The initial request; by default the model's defaults.
        model: An architecture's name; ``auto`` is the full size with a GPU, the tiny model without.
        device: ``auto``, ``cpu`` or ``cuda``.
        monitor: Displayed below the progress; receives every event. By default a new one.
        budget: The most that a generation may take of the device's memory, such as ``12GiB``; empty, or ``auto``, for
            all that is free.

    In JupyterLab it opens with what was chosen last, where request, model and budget are left at their defaults.

    Attributes:
        job: The generation; usable without widgets.
        exploration: The forecast for the current request.

    Example:
        >>> from i2v_lab import Generate
        >>> Generate("runs")  # as the last line of a cell  # doctest: +SKIP
    """

    def __init__(
        self,
        runs_dir: str | Path = "runs",
        request: I2VRequest | None = None,
        model: str = "auto",
        device: str = "auto",
        monitor: VramMonitor | None = None,
        budget: str = "",
    ) -> None:
        super().__init__()
        self.runs_dir, self.budget, self._starts, last, self._said = Path(runs_dir), budget, False, None, ""
        self.device_memory = available_memory(device)
        if request is None and model == "auto" and not budget and not is_quiet(progress=True):
            last, self._said = recall("generate", check_runs_here)
        if last is not None:
            self.model, self.request, self.budget = last.model, last.request, last.budget
        else:
            self.model = choose_model(model, "measure", device)
            self.request = with_supported_policy(request or self._default(self.model), self.model)
        self._own_monitor = monitor is None
        self.monitor = monitor or VramMonitor(device)
        self.job = GenerationJob(self.runs_dir, device, self.monitor.monitor, self._show)
        self.exploration = Exploration(self._question(), self._explored)

    def __repr__(self) -> str:
        request = self.request
        size = f"{request.width}x{request.height}, {request.frames} frames"
        return f"Generate({self.model}, {size}: {self.job.state})"

    def _default(self, model: str) -> I2VRequest:
        """On a GPU by what is fastest and fits; on a CPU, whose weights are in host memory anyway, as it is."""
        request = study_request(model, prompt="waves roll in below the lighthouse")
        return searching(request, model) if self.device_memory[2] == "cuda" else request

    def _question(self) -> Question:
        name, memory_bytes, device = self.device_memory
        return Question(
            request=self.request,
            model=self.model,
            gpu=name,
            memory_bytes=memory_bytes,
            budget=self.budget,
            device=device,
        )

    # --- HTML ---

    def html(self) -> str:
        """The request, its forecast and the latest generation as static HTML."""
        request = self.request
        described = (
            f"{self.model}, {request.width}x{request.height}, {request.frames} frames, seed {request.seed}, "
            f"{self._held()}, decoded {WORDS[request.decode_scope.value]}. "
            f"{request.prompt}"
        )
        return preview(request.image) + sentence(described) + self._verdict() + self._progress() + self._result()

    def _held(self) -> str:
        held = self.request.settings.options or str(self.request.memory)
        held = "held by what is fastest and fits" if self._question().searches else held
        return f"{held}, budget {self.budget}" if self.budget else held

    def _verdict(self) -> str:
        exploration, answer = self.exploration, self.exploration.answer
        if exploration.problem:
            return sentence(f"No forecast: {exploration.problem}", "problem")
        if exploration.working:
            waits = "waits for it" if self._needs_answer() else "does not wait for it"
            return sentence(f"Forecasting whether it fits this machine; Generate {waits}.", "working")
        if answer is None or answer.question != exploration.question:
            return ""
        colour = VERDICT_COLOURS[answer.fit.verdict]
        words = answer.sentence if answer.fit.verdict == FITS else f"Warning. {answer.sentence}"
        more = sentence(answer.duration) + sentence(answer.host)
        return f'<p class="verdict" style="border-color:{colour}">{escaped(words)}</p>{more}'

    def _progress(self) -> str:
        job = self.job
        rows = []
        for phase in list(job.progress):
            share = 100 if phase.seconds is not None else 100 * phase.step / phase.steps if phase.steps else 4
            count = f"{phase.step} of {phase.steps}" if phase.steps else ""
            time = format_seconds(phase.seconds) if phase.seconds is not None else "…"
            rows.append(
                f"<tr><td>{escaped(phase.phase.replace('_', ' '))}</td><td><span class='bar'>"
                f"<span style='width:{share:.0f}%'></span></span></td><td>{count}</td><td>{time}</td></tr>"
            )
        table = f"<table>{''.join(rows)}</table>" if rows else ""
        if job.state is State.RUNNING and not rows:
            return sentence("Preparing the weights; this takes longer the first time.", "state")
        words = job.message or ("Ready." if job.state is State.IDLE else "Generating.")
        notes = [] if job.state is State.DONE else job.notes  # then the run's headline has them
        return sentence(words, "state") + "".join(sentence(note, "note") for note in notes) + table

    def _result(self) -> str:
        """The phases of a generation that has ended, and its video where no widget shows it."""
        job = self.job
        run = job.run if job.state not in (State.IDLE, State.RUNNING) else None
        if run is None:
            return ""
        phases = phase_table(run)
        table = html_table(readable(phases, PHASES)) if len(phases) else ""
        words = as_sentence(headline(run)) if job.state is State.DONE else ""
        random = sentence(random_weights(job.model), "random") if job.video is not None else ""
        return self._video_html() + random + sentence(words) + table

    def _video_html(self) -> str:
        video = self.job.video
        if video is None or self._widget is not None:
            return ""
        data = base64.b64encode(video.read_bytes()).decode()
        return f'<video controls loop muted src="data:video/mp4;base64,{data}" aria-label="the video"></video>'

    # --- Widgets ---

    def _build(self) -> Any:
        import ipywidgets as widgets

        wide = widgets.Layout(width=WIDTH, height="4.5em")
        controls: dict[str, Any] = {
            "image": choose(widgets.Dropdown, "still", list_stills(self.runs_dir, self.request.image)),
            "prompt": widgets.Textarea(description="prompt", continuous_update=False, layout=wide),
            "model": choose(widgets.Dropdown, "model", list(dict.fromkeys([*runnable_models(), self.model]))),
            "size": choose(widgets.Dropdown, "size", ["1x1"]),
            "frames": choose(widgets.SelectionSlider, "frames", [1]),
            "seed": widgets.FloatText(description="seed", layout=widgets.Layout(width=WIDTH)),  # others clamp or round
            **memory_controls(),
            "decode_scope": choose(
                widgets.Dropdown, "decoded", [(WORDS[s], s) for s in (DecodeScope.NO_GRAD, DecodeScope.ESCAPED)]
            ),
        }
        for name in ("prompt", "seed"):
            controls[name].style.description_width = "70px"
        controls["budget"].value = self.budget
        self._dropped = widgets.Textarea()
        self._dropped.add_class("i2v-dropped")
        self._dropped.layout.display = "none"
        self._dropped.observe(self._drop, "value")
        self._start = widgets.Button(description="Generate", button_style="primary", icon="play")
        self._stop = widgets.Button(description="Stop", icon="stop", disabled=True)
        self._start.on_click(lambda _: self.start())
        self._stop.on_click(lambda _: self.job.stop())
        self._still_box, self._verdict_box, self._progress_box = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self._result_box = widgets.HTML()
        self._video_box = widgets.VBox([])
        self._shown: Path | None = None
        self._note = widgets.HTML(page(sentence(self._said, "note")))
        self._remedies = RemedyButtons(lambda changes: self._form.apply(changes))
        self._form = RequestForm(controls, self.model, self.request, self._edited)
        drop = widgets.VBox([widgets.HTML(page(DROP_ZONE)), self._dropped, self._note])
        form = two_columns([self._still_box, widgets.VBox([drop, *controls.values()])])
        buttons = widgets.HBox([self._start, self._stop])
        whole = widgets.VBox(
            [
                form,
                self._verdict_box,
                self._remedies.box,
                buttons,
                self._progress_box,
                self._video_box,
                self._result_box,
                self.monitor.widget,
            ]
        )
        whole.layout.max_width = "740px"
        whole.add_class("i2v-generate")
        self._widget = whole
        self._ask()
        return whole

    @property
    def controls(self) -> dict[str, Any]:
        """The control widgets by name: ``model`` and the fields of a request; ``size`` is width and height."""
        assert self.widget is not None  # creates them
        return dict(self._form.widgets)

    def _edited(self) -> None:
        self._notify(self._form.problem)
        self.model, self.request = self._form.model, self._form.request
        self.budget, self._starts = self._form.widgets["budget"].value.strip(), False
        if not self._form.problem:
            self._remember()
        self._ask()

    def _remember(self) -> None:
        if not is_quiet(progress=True):
            remember("generate", Choice(self.request, self.model, budget=self.budget))

    def _ask(self) -> None:
        """Show the still, and forecast the request."""
        if self._widget is not None:
            self._still_box.value = page(preview(self.request.image))
        self.exploration.ask(self._question())

    @property
    def _refused(self) -> str:
        """Why what the controls show is no request; empty where it is one."""
        return self._form.problem if self._widget is not None else ""

    def _drop(self, change: Any) -> None:
        if change["new"]:
            file = json.loads(change["new"])
            self._dropped.value = ""
            self.add_still(file["name"], base64.b64decode(file["data"]))

    def add_still(self, name: str, content: bytes) -> None:
        """Store an uploaded picture and select it as the still; an unreadable one is reported in the view."""
        try:
            path = add_still(self.runs_dir, name, content)
        except I2VLabError as error:
            self._notify(str(error))
            return
        self._notify(f"{name} is selected.")
        self.request = replace(self.request, image=str(path))
        if self._widget is not None:
            self._form.show(self.model, self.request, image=list_stills(self.runs_dir, str(path)))
            self._remember()
        self._ask()

    def _notify(self, words: str) -> None:
        self._said = words
        if self._widget is not None:
            self._note.value = page(sentence(words, "note"))

    def _needs_answer(self) -> bool:
        """Whether the forecast decides how the request is held, or what it may take."""
        return self._question().searches or bool(self.budget)

    def _answer(self) -> Answer | None:
        """The answer to the current question."""
        answer = self.exploration.answer
        return answer if answer is not None and answer.question == self.exploration.question else None

    def start(self) -> None:
        """Start generating the current request; returns immediately. What is refused is said in the view.

        A request whose memory is searched for, or has a budget, starts when its forecast is there.
        """
        if self._refused:
            self._notify(self._refused)
            return
        if not self._needs_answer():
            self._begin(self.request)
            return
        if self.exploration.question != self._question():
            self._ask()
        self._notify("It starts when the forecast is there.")
        self._starts = True
        if not self.exploration.working:
            self._begin_as_answered()

    def _begin_as_answered(self) -> None:
        with self._drawing:
            starts, self._starts = self._starts, False
        if not starts:
            return
        answer = self._answer()
        if self.exploration.problem or answer is None:
            self._notify(f"Not started: {self.exploration.problem or 'there is no forecast'}")
        elif answer.fit.verdict == NO:
            self._notify("Not started: it does not fit.")
        else:
            self._notify("")
            self._begin(answer.held.request, answer.held.cap_bytes if self.budget else None)

    def _begin(self, request: I2VRequest, cap_bytes: int | None = None) -> None:
        try:
            self.job.start(request, self.model, cap_bytes)
        except I2VLabError as error:
            self._notify(str(error))
        self._show()

    def _explored(self) -> None:
        """The question, its answer or its problem has changed."""
        if self._starts and not self.exploration.working:
            self._begin_as_answered()
        self._show()

    def _offered(self) -> Sequence[Remedy]:
        """Remedies that this view has controls for."""
        answer = None if self.exploration.working else self._answer()
        return [each for each in answer.remedies if "gpu" not in each.changes] if answer is not None else []

    def _show(self) -> None:
        with self._drawing:
            if self._widget is None:
                return
            running = self.job.state is State.RUNNING
            self._verdict_box.value = page(self._verdict())
            self._remedies.show(self._offered())
            self._start.disabled, self._stop.disabled = running or bool(self._refused), not running
            self._progress_box.value = page(self._progress())
            self._result_box.value = page(self._result())
            self._show_video()

    def _show_video(self) -> None:
        import ipywidgets as widgets

        video = self.job.video
        if video == self._shown:
            return
        self._shown = video
        old, new = self._video_box.children, []
        if video is not None:
            layout = widgets.Layout(width="384px")
            options = {"format": "mp4", "autoplay": True, "loop": True, "controls": True, "layout": layout}
            new.append(widgets.Video.from_file(video, **options))
        self._video_box.children = new
        for each in old:
            close_widgets(each)

    def _foreign_widgets(self) -> Sequence[Any]:
        return () if self._own_monitor or self.monitor._widget is None else (self.monitor._widget,)

    def close(self) -> None:
        """Stop a running generation, wait for its end, release kept weights, and close the widgets.

        A monitor that was given stays open.
        """
        self.job.close()
        self.exploration.close()
        super().close()
        if self._own_monitor:
            self.monitor.close()
