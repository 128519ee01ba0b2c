(() => {
  "use strict";

  const NARROW = 480;  // pixels of a figure on a phone

  /** The description for a figure's own width. */
  function fitted(spec, width) {
    const narrow = width < NARROW;
    const text = JSON.stringify(spec, (name, value) => (name === "columns" && narrow ? 2 : value));
    const own = JSON.parse(text);
    own.width = width;
    own.autosize = {type: "fit-x", contains: "padding"};
    own.config.axisY = {...own.config.axisY, labelLimit: Math.round(width * 0.36)};
    own.config.legend.labelLimit = narrow ? Math.round(width * 0.4) : 320;
    if (narrow && own.title) own.title.limit = width;
    return own;
  }

  const options = {
    ast: true,  // expressions are interpreted: the page allows no code made of text
    renderer: "svg",
    actions: {export: true, source: false, compiled: false, editor: false},
    i18n: {CLICK_TO_VIEW_ACTIONS: "Save this figure", SVG_ACTION: "Save as SVG", PNG_ACTION: "Save as PNG"},
    tooltip: {theme: "page"},
  };

  function addButton(bar, words, title, action) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = words;
    button.title = title;
    button.addEventListener("click", action);
    bar.append(button);
  }

  /** Zoom about the middle of the x axis, which may be logarithmic. */
  function zoom(view, factor) {
    const scale = view.scale("x");
    const [low, high] = scale.range();
    const middle = (low + high) / 2, half = (high - low) / 2 * factor;
    view.signal("zoom_x", [scale.invert(middle - half), scale.invert(middle + half)]).runAsync();
  }

  class Drawing {
    constructor(figure) {
      this.figure = figure;
      this.still = figure.querySelector("svg");
      this.spec = JSON.parse(figure.querySelector("script[type='application/json']").textContent);
      this.label = this.still.getAttribute("aria-label");
      this.width = 0;
    }

    async draw() {
      const width = Math.floor(this.figure.clientWidth);
      if (!width || width === this.width) return;
      this.width = width;
      const place = document.createElement("div");
      place.className = "live";
      place.hidden = true;
      (this.place ?? this.still).before(place);
      const result = await vegaEmbed(place, fitted(this.spec, width), options);
      const svg = place.querySelector("svg.marks");
      svg.setAttribute("role", "img");
      svg.setAttribute("aria-label", this.label);
      for (const part of place.querySelectorAll(".vega-embed [aria-label], .vega-embed[role]")) {
        if (part.contains(svg)) part.removeAttribute("role");
      }
      this.result?.finalize();
      this.place?.remove();
      this.still.remove();
      this.result = result;
      this.place = place;
      place.hidden = false;
      if (!this.bar) this.addControls();
      this.figure.dataset.live = width;
    }

    addControls() {
      const meta = this.spec.usermeta, hint = [];
      const bar = this.bar = document.createElement("div");
      bar.className = "controls";
      const view = () => this.result.view;
      if (meta.zooms) {
        addButton(bar, "Zoom in", "Twice as much of the x axis", () => zoom(view(), 0.5));
        addButton(bar, "Zoom out", "Half as much of the x axis", () => zoom(view(), 2));
        hint.push("drag to move, Ctrl and wheel to zoom, double click to reset");
      }
      addButton(bar, "Reset", "As it was", () => { this.width = 0; this.draw(); });
      if (JSON.stringify(this.spec).includes('"bind":"legend"')) hint.push("click a name in the legend to hide it");
      const words = document.createElement("span");
      words.textContent = `Point at the figure for exact values${hint.map((each) => `; ${each}`).join("")}.`;
      bar.append(words);
      this.place.after(bar);
    }
  }

  const drawings = new Map([...document.querySelectorAll("figure.chart")].map((figure) => [figure, new Drawing(figure)]));
  const seen = new IntersectionObserver((entries) => {
    for (const {isIntersecting, target} of entries) {
      if (!isIntersecting) continue;
      seen.unobserve(target);
      drawings.get(target).draw().then(() => sizes.observe(target));
    }
  }, {rootMargin: "300px"});
  const sizes = new ResizeObserver((entries) => {
    for (const {target} of entries) drawings.get(target).draw();
  });
  for (const figure of drawings.keys()) seen.observe(figure);
})();
