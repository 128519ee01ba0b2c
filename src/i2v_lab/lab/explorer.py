"""``Explorer``: the forecast of a request, phase by phase, and whether it fits a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from i2v_lab.capacity.cards import card_name, gpu_table, is_size
from i2v_lab.display import escaped
from i2v_lab.lab.answer import Remedy
from i2v_lab.lab.controls import RequestForm, choose, memory_controls, searching, two_columns, with_supported_policy
from i2v_lab.lab.exploration import Exploration
from i2v_lab.lab.last_choice import Choice, recall, remember
from i2v_lab.lab.question import DEFAULT_GPU, Question
from i2v_lab.lab.remedy_buttons import RemedyButtons
from i2v_lab.lab.view import View, page, sentence
from i2v_lab.pipeline.contract.architectures import architecture_names
from i2v_lab.profiling.records import TimelineRecord
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

HOLDERS = {"module": "live at the peak, by module", "category": "category", "nbytes": "bytes"}
SCOPES = (DecodeScope.NO_GRAD, DecodeScope.ESCAPED)
COPY = """<button class="jupyter-button widget-button" style="width:11em" onclick="
  const area = this.closest('.i2v-explorer').querySelector('.i2v-code textarea');
  const done = () => { this.textContent = 'Copied'; setTimeout(() => { this.textContent = 'Copy as code'; }, 1500); };
  const byHand = () => { area.select(); document.execCommand('copy'); done(); };
  navigator.clipboard ? navigator.clipboard.writeText(area.value).then(done, byHand) : byHand();
">Copy as code</button>"""


class Explorer(View):
    """Controls for a request, and its forecast: memory by phase, and whether a GPU has enough; needs no GPU.

    A cached forecast is shown immediately. Any other one is computed in a background process within seconds; the page
    stays responsive, and another change cancels it.

    Args:
        request: The initial request; by default the model's defaults, held by what is fastest and fits.
        model: An architecture's name.
        gpu: A GPU by any of its names, or a size such as ``24GiB``.
        budget: The most that a run may take of its memory, such as ``12GiB``; ``auto`` for what this machine's card has
            free; empty for all of it.

    In JupyterLab it opens with what was chosen last, where all of these are left at their defaults.

    Attributes:
        exploration: The current question and its answer; usable without widgets.

    Example:
        >>> from i2v_lab import Explorer
        >>> Explorer(gpu="RTX 5090")  # as the last line of a cell  # doctest: +SKIP
    """

    def __init__(
        self,
        request: I2VRequest | None = None,
        model: str = FULL_SIZE_MODEL,
        gpu: str = DEFAULT_GPU,
        budget: str = "",
    ) -> None:
        super().__init__()
        self.note = ""
        default = study_request(model)
        asked = searching(default, model) if request in (None, default) else with_supported_policy(request, model)
        first = Question(request=asked, model=model, gpu=gpu if is_size(gpu) else card_name(gpu), budget=budget)
        question, plain = first, Question(request=searching(default, model))
        if first == plain and not is_quiet(progress=True):
            last, self.note = recall("explorer")
            if last is not None:
                question = Question(
                    request=last.request, model=last.model, gpu=last.gpu or DEFAULT_GPU, budget=last.budget
                )
        self.exploration = Exploration(question, self._show)
        self.exploration.ask(question, wait=is_quiet(progress=True))

    def __repr__(self) -> str:
        question, answer, problem = (getattr(self.exploration, name) for name in ("question", "answer", "problem"))
        current = answer is not None and answer.question == question
        text = answer.sentence if current else problem or "no forecast yet"
        size = f"{question.request.width}x{question.request.height}, {question.request.frames} frames"
        return f"Explorer({question.model}, {size}, on {question.gpu}: {text})"

    # --- HTML ---

    def html(self) -> str:
        """The answer as static HTML: verdict, bars by phase against the GPU's memory, timeline, largest modules."""
        question = self.exploration.question
        request = question.request
        held = "the fastest that fits" if question.searches else request.settings.options or request.memory
        where = f"{question.gpu}, budget {question.budget}" if question.budget else question.gpu
        described = (
            f"{question.model}, {request.width}x{request.height}, {request.frames} frames, "
            f"{request.quantization.value}, {held}, {WORDS[request.decode_scope.value]}, on {where}"
        )
        return sentence(described) + self._status() + self._picture()

    def _status(self) -> str:
        exploration = self.exploration
        if self._widget is not None and self._form.problem:
            return sentence(self._form.problem, "problem")
        if exploration.working:
            takes = "some ten seconds for each way to hold it" if exploration.question.searches else "some ten seconds"
            return sentence(f"Forecasting in the background; this takes {takes}.", "working")
        if exploration.problem:
            return sentence(exploration.problem, "problem")
        return ""

    def _picture(self) -> str:
        answer, question = self.exploration.answer, self.exploration.question
        if answer is None:
            return ""
        colour = VERDICT_COLOURS[answer.fit.verdict]
        whole = answer.room_bytes == answer.question.gpu_bytes
        label = f"{answer.fit.gpu if whole else 'budget'}, {format_bytes(answer.room_bytes)}"
        line = pictures.Line(answer.room_bytes, label)
        holders = modules_table(answer.run).head(6)
        body = "".join(
            [
                f'<p class="verdict" style="border-color:{colour}">{escaped(answer.sentence)}</p>',
                sentence(answer.duration),
                sentence(answer.host),
                pictures.phase_bars(answer.run, answer.context_bytes, line),
                sentence(as_sentence(headline(answer.run))),
                pictures.timeline(answer.run) if answer.run.of(TimelineRecord) else "",
                html_table(readable(holders, HOLDERS)) if len(holders) else "",
            ]
        )
        kind = "answer" if answer.question == question else "answer older"
        return f'<div class="{kind}" data-of="{escaped(answer.question.spec.name)}">{body}</div>'

    # --- Widgets ---

    @property
    def controls(self) -> dict[str, Any]:
        """The control widgets by name: ``model``, ``gpu`` and the fields of a request; ``size`` is width and height."""
        assert self.widget is not None  # creates them
        return dict(self._form.widgets)

    def _build(self) -> Any:
        import ipywidgets as widgets

        question, cards = self.exploration.question, gpu_table().sort_values("memory_bytes")["gpu"]
        controls: dict[str, Any] = {
            "model": choose(widgets.Dropdown, "model", architecture_names()),
            "size": choose(widgets.SelectionSlider, "size", ["1x1"]),
            "frames": choose(widgets.SelectionSlider, "frames", [1]),
            "tiling": choose(widgets.Dropdown, "tiles", [("", None)]),
            **memory_controls(),
            "decode_scope": choose(widgets.Dropdown, "decoded", [(WORDS[s], s) for s in SCOPES]),
            "quantization": choose(widgets.Dropdown, "weights", [(q.value, q) for q in Quantization]),
            "gpu": choose(widgets.Dropdown, "GPU", list(dict.fromkeys([*cards, question.gpu]))),
        }
        self._status_box, self._picture_box = widgets.HTML(), widgets.HTML()
        self._code_box = widgets.Textarea(layout=widgets.Layout(width="100%", height="14em"))
        self._code_box.add_class("i2v-code")
        controls["gpu"].value, controls["budget"].value = question.gpu, question.budget
        self._remedies = RemedyButtons(lambda changes: self._form.apply(changes))
        self._form = RequestForm(controls, question.model, question.request, self._ask)
        code = widgets.Accordion([self._code_box], titles=["The same as code"])
        grid = two_columns([*controls.values(), widgets.HTML(COPY)])
        whole = widgets.VBox([grid, self._status_box, self._remedies.box, self._picture_box, code])
        whole.layout.max_width = "740px"
        whole.add_class("i2v-explorer")
        self._widget = whole
        self._show()
        return whole

    def _ask(self) -> None:
        form = self._form
        gpu, budget = form.widgets["gpu"].value, form.widgets["budget"].value.strip()
        self.note = ""
        if not is_quiet(progress=True) and not form.problem:
            remember("explorer", Choice(form.request, form.model, gpu, budget))
        self.exploration.ask(Question(request=form.request, model=form.model, gpu=gpu, budget=budget))

    def _show(self) -> None:
        with self._drawing:
            if self._widget is None:
                return
            self._code_box.value = self.exploration.question.code()
            status = self._status() or sentence("Up to date.", "done")
            self._status_box.value = page(sentence(self.note, "note") + status)
            self._remedies.show(self._offered())
            self._picture_box.value = page(self._picture())

    def _offered(self) -> Sequence[Remedy]:
        answer, exploration = self.exploration.answer, self.exploration
        current = answer is not None and answer.question == exploration.question and not exploration.working
        return answer.remedies if answer is not None and current else ()

    def close(self) -> None:
        """Cancel a forecast in progress and close the widgets."""
        self.exploration.close()
        super().close()
