"""``Explorer``: the forecast of a request, phase by phase, and whether it fits a GPU."""

from __future__ import annotations

from typing import Any

from i2v_lab.capacity.cards import gpu_table
from i2v_lab.display import escaped
from i2v_lab.lab.controls import RequestForm, choose, two_columns, with_supported_policy
from i2v_lab.lab.exploration import DEFAULT_GPU, Exploration, Question
from i2v_lab.lab.view import View, page, sentence
from i2v_lab.memory_settings import NO_SETTINGS
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
        request: The initial request; by default the model's defaults.
        model: An architecture's name.
        gpu: A GPU in ``data/gpus.csv``.

    Attributes:
        exploration: The current question and its answer; usable without widgets.

    Example:
        >>> from i2v_lab import Explorer
        >>> Explorer(gpu="RTX 5090")  # as the last line of a cell  # doctest: +SKIP
    """

    def __init__(self, request: I2VRequest | None = None, model: str = FULL_SIZE_MODEL, gpu: str = DEFAULT_GPU) -> None:
        super().__init__()
        question = Question(request=with_supported_policy(request or study_request(model), model), model=model, gpu=gpu)
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
        held = request.settings.options or request.memory
        described = (
            f"{question.model}, {request.width}x{request.height}, {request.frames} frames, "
            f"{request.quantization.value}, {held}, {WORDS[request.decode_scope.value]}, on {question.gpu}"
        )
        return sentence(described) + self._status() + self._picture()

    def _status(self) -> str:
        exploration = self.exploration
        if self._widget is not None and self._form.problem:
            return sentence(self._form.problem, "problem")
        if exploration.working:
            return sentence("Forecasting in the background; this takes about ten seconds.", "working")
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
                f'<p class="verdict" style="border-color:{colour}">{escaped(answer.sentence)}</p>',
                sentence(answer.duration) if answer.duration else "",
                pictures.phase_bars(answer.run, answer.context_bytes, line),
                sentence(as_sentence(headline(answer.run))),
                pictures.timeline(answer.run),
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

        question = self.exploration.question
        controls: dict[str, Any] = {
            "model": choose(widgets.Dropdown, "model", architecture_names()),
            "size": choose(widgets.SelectionSlider, "size", ["1x1"]),
            "frames": choose(widgets.SelectionSlider, "frames", [1]),
            "tiling": choose(widgets.Dropdown, "tiles", [("", None)]),
            "memory": choose(widgets.Dropdown, "memory", [""]),
            "settings": choose(widgets.Dropdown, "diffusers", [("", NO_SETTINGS)]),
            "decode_scope": choose(widgets.Dropdown, "decoded", [(WORDS[s], s) for s in SCOPES]),
            "quantization": choose(widgets.Dropdown, "weights", [(q.value, q) for q in Quantization]),
            "gpu": choose(widgets.Dropdown, "GPU", list(gpu_table().sort_values("memory_bytes")["gpu"])),
        }
        self._status_box, self._picture_box = widgets.HTML(), widgets.HTML()
        self._code_box = widgets.Textarea(layout=widgets.Layout(width="100%", height="14em"))
        self._code_box.add_class("i2v-code")
        controls["gpu"].value = question.gpu
        self._form = RequestForm(controls, question.model, question.request, self._ask)
        code = widgets.Accordion([self._code_box], titles=["The same as code"])
        grid = two_columns([*controls.values(), widgets.HTML(COPY)])
        whole = widgets.VBox([grid, self._status_box, self._picture_box, code])
        whole.layout.max_width = "740px"
        whole.add_class("i2v-explorer")
        self._widget = whole
        self._show()
        return whole

    def _ask(self) -> None:
        form = self._form
        self.exploration.ask(Question(request=form.request, model=form.model, gpu=form.widgets["gpu"].value))

    def _show(self) -> None:
        with self._drawing:
            if self._widget is None:
                return
            self._code_box.value = self.exploration.question.code()
            self._status_box.value = page(self._status() or sentence("Up to date.", "done"))
            self._picture_box.value = page(self._picture())

    def close(self) -> None:
        """Cancel a forecast in progress and close the widgets."""
        self.exploration.close()
        super().close()
