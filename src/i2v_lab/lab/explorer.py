"""``Explorer``: what a request would take, phase by phase, and which card has room for it."""

from __future__ import annotations

import threading
from dataclasses import replace
from html import escape
from typing import Any

from i2v_lab.capacity.cards import gpu_table
from i2v_lab.lab.controls import choose, for_model, frame_counts, policies, sizes, tilings, two_columns, under_a_policy
from i2v_lab.lab.exploration import DEFAULT_GPU, Exploration, Question
from i2v_lab.lab.view import View, page, sentence
from i2v_lab.pipeline.contract.architectures import architecture_names
from i2v_lab.reporting.figures import live as pictures
from i2v_lab.reporting.figures.style import VERDICT_COLOURS
from i2v_lab.reporting.headlines import headline
from i2v_lab.reporting.run_tables import modules_table
from i2v_lab.reporting.tables import WORDS, as_sentence, html_table, readable
from i2v_lab.request import DecodeScope, I2VRequest, Quantization
from i2v_lab.runs.forecast import is_quiet
from i2v_lab.runs.spec import FULL_SIZE_MODEL
from i2v_lab.studies.published import study_request
from i2v_lab.units import format_bytes

HOLDERS = {"module": "held at the peak by", "category": "what for", "nbytes": "bytes"}
COPY = """<button class="jupyter-button widget-button" style="width:11em" onclick="
  const area = this.closest('.i2v-explorer').querySelector('.i2v-code textarea');
  const done = () => { this.textContent = 'Copied'; setTimeout(() => { this.textContent = 'Copy as code'; }, 1500); };
  const byHand = () => { area.select(); document.execCommand('copy'); done(); };
  navigator.clipboard ? navigator.clipboard.writeText(area.value).then(done, byHand) : byHand();
">Copy as code</button>"""


class Explorer(View):
    """Move a slider and see what the request would take, and whether the card has room; no GPU is needed.

    A forecast that is known is shown at once. Another one takes some seconds in the background; the page stays free,
    and moving on ends it.

    Args:
        request: Where to begin; by default the model's own size, as in the published study.
        model: An architecture's name.
        gpu: A card of ``data/gpus.csv``.

    Attributes:
        exploration: The question and what is known of it; works without any widget.

    Example:
        >>> from i2v_lab import Explorer
        >>> Explorer(gpu="RTX 5090")  # as the last line of a cell  # doctest: +SKIP
    """

    def __init__(self, request: I2VRequest | None = None, model: str = FULL_SIZE_MODEL, gpu: str = DEFAULT_GPU) -> None:
        super().__init__()
        question = Question(request=under_a_policy(request or study_request(model), model), model=model, gpu=gpu)
        self.exploration = Exploration(question, self._show)
        self._drawing = threading.RLock()
        self._setting = False
        self.exploration.ask(question, wait=is_quiet(progress=True))

    def __repr__(self) -> str:
        question, answer, problem = (getattr(self.exploration, name) for name in ("question", "answer", "problem"))
        known = answer is not None and answer.question == question
        said = answer.sentence if known else problem or "no forecast yet"
        return f"Explorer({question.spec.name} on {question.gpu}: {said})"

    # --- What there is to see ---

    def html(self) -> str:
        """The answer as a static page: verdict, bars beside the card's line, timeline, holders."""
        question = self.exploration.question
        request = question.request
        asked = (
            f"{question.model}, {request.width}x{request.height}, {request.frames} frames, "
            f"{request.quantization.value}, {request.memory}, {WORDS[request.decode_scope.value]}, on {question.gpu}"
        )
        return sentence(asked) + self._status() + self._picture()

    def _status(self) -> str:
        exploration = self.exploration
        if exploration.working:
            return sentence("Forecasting in the background, for some ten seconds. Move on if you like.", "working")
        if exploration.problem:
            return sentence(exploration.problem, "problem")
        return ""

    def _picture(self) -> str:
        answer, question = self.exploration.answer, self.exploration.question
        if answer is None:
            return ""
        colour = VERDICT_COLOURS[answer.fit.verdict]
        line = pictures.Line(answer.fit.memory_bytes, f"{answer.fit.gpu}, {format_bytes(answer.fit.memory_bytes)}")
        holders = modules_table(answer.run).head(6)
        body = "".join(
            [
                f'<p class="verdict" style="border-color:{colour}">{escape(answer.sentence)}</p>',
                pictures.phase_bars(answer.run, answer.context_bytes, line),
                sentence(as_sentence(headline(answer.run))),
                pictures.timeline(answer.run),
                html_table(readable(holders, HOLDERS)) if len(holders) else "",
            ]
        )
        kind = "answer" if answer.question == question else "answer older"
        return f'<div class="{kind}" data-of="{answer.question.spec.name}">{body}</div>'

    # --- Widgets ---

    @property
    def controls(self) -> dict[str, Any]:
        """The control widgets by what they choose: ``model, size, frames, tiling, memory, ...``."""
        assert self.widget is not None  # which makes them
        return self._made_controls

    def _build(self) -> Any:
        import ipywidgets as widgets

        self._made_controls: dict[str, Any] = {
            "model": choose(widgets.Dropdown, "model", architecture_names()),
            "size": choose(widgets.SelectionSlider, "size", ["1x1"]),
            "frames": choose(widgets.SelectionSlider, "frames", [1]),
            "tiling": choose(widgets.Dropdown, "tiles", [("", None)]),
            "memory": choose(widgets.Dropdown, "memory", [""]),
            "decode_scope": choose(widgets.Dropdown, "decoded", [(WORDS[s], s) for s in SCOPES]),
            "quantization": choose(widgets.Dropdown, "weights", [(q.value, q) for q in Quantization]),
            "gpu": choose(widgets.Dropdown, "card", list(gpu_table().sort_values("memory_bytes")["gpu"])),
        }
        self._status_box, self._picture_box = widgets.HTML(), widgets.HTML()
        self._code_box = widgets.Textarea(layout=widgets.Layout(width="100%", height="14em"))
        self._code_box.add_class("i2v-code")
        self._set_controls(self.exploration.question)
        for control in self._made_controls.values():
            control.observe(self._moved, "value")
        code = widgets.Accordion([self._code_box], titles=["The same as code"])
        controls = two_columns([*self._made_controls.values(), widgets.HTML(COPY)])
        whole = widgets.VBox([controls, self._status_box, self._picture_box, code])
        whole.layout.max_width = "740px"
        whole.add_class("i2v-explorer")
        self._widget = whole
        self._show()
        return whole

    def _set_controls(self, question: Question) -> None:
        """Options and values for a question; the model decides which sizes and tiles there are."""
        request, controls = question.request, self._made_controls
        values: dict[str, Any] = {"model": question.model, "size": f"{request.width}x{request.height}"}
        values |= {name: getattr(request, name) for name in CHOSEN}
        values["gpu"] = question.gpu
        self._setting = True
        try:
            controls["size"].options = sizes(question.model, request)
            controls["frames"].options = frame_counts(request)
            controls["tiling"].options = tilings(question.model, request)
            controls["memory"].options = policies(question.model)
            for name, value in values.items():
                controls[name].value = value
        finally:
            self._setting = False

    def _moved(self, change: Any) -> None:
        if self._setting:
            return
        values = {name: control.value for name, control in self._made_controls.items()}
        asked = self.exploration.question
        if values["model"] != asked.model:
            model = values["model"]
            asked = Question(request=for_model(asked.request, model), model=model, gpu=values["gpu"])
            self._set_controls(asked)
        else:
            width, height = map(int, values["size"].split("x"))
            changes = {name: values[name] for name in CHOSEN}
            request = replace(asked.request, width=width, height=height, **changes)
            asked = Question(request=request, model=asked.model, gpu=values["gpu"])
        self.exploration.ask(asked)

    def _show(self) -> None:
        with self._drawing:
            if self._widget is None:
                return
            self._code_box.value = self.exploration.question.code()
            self._status_box.value = page(self._status() or sentence("Up to date.", "done"))
            self._picture_box.value = page(self._picture())

    def close(self) -> None:
        """End a forecast that is under way, and take the widgets off the page."""
        self.exploration.close()
        super().close()


SCOPES = (DecodeScope.NO_GRAD, DecodeScope.ESCAPED)
CHOSEN = ("frames", "tiling", "memory", "decode_scope", "quantization")  # of a request, each by a control of its own
