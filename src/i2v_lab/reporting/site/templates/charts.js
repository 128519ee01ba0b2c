(() => {
  "use strict";

  const NARROW = 480;
  const LETTER = 7, SYMBOL = 36, AXIS = 70;  // pixels in a legend, and beside it

  /** The description for a figure's own width. */
  function fitted(spec, width) {
    let longest = 0;
    JSON.stringify({...spec, datasets: null}, (name, value) => {
      if (name === "domain" && Array.isArray(value)) for (const each of value) longest = Math.max(longest, `${each}`.length);
      return value;
    });
    const room = Math.max(1, Math.floor((width - AXIS) / (longest * LETTER + SYMBOL)));
    const own = JSON.parse(JSON.stringify(spec, (name, value) => (name === "columns" ? Math.min(value, room) : value)));
    own.width = Math.max(width, spec.usermeta.least_width);
    own.autosize = {type: "fit-x", contains: "padding"};
    if (width < NARROW) own.config.axisX = {titleAnchor: "end"};  // a long one begins left of the axis
    own.config.axisY = {labelLimit: Math.round(own.width * 0.36)};
    own.config.legend.labelLimit = width - AXIS - SYMBOL;
    if (own.title) own.title.limit = own.width;
    return own;
  }

  const options = {
    ast: true,  // expressions are interpreted: the page allows no code made of text
    mode: "vega-lite",
    logLevel: 1,  // errors: a series that is hidden has no extent, which is none
    renderer: "svg",
    actions: false,  // the files are below
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

  /** Zoom about the middle of the axes, which may be logarithmic. */
  function zoom(view, fields, factor) {
    for (const [axis, field] of Object.entries(fields)) {
      const scale = view.scale(axis);
      const [low, high] = scale.range();
      const middle = (low + high) / 2, half = (high - low) / 2 * factor;
      view.signal(`zoom_${field}`, [scale.invert(middle - half), scale.invert(middle + half)]);
    }
    view.runAsync();
  }

  class Drawing {
    constructor(figure) {
      this.figure = figure;
      this.home = figure.querySelector(".scroll");
      this.still = this.home.querySelector("svg");
      this.spec = JSON.parse(figure.querySelector("script[type='application/json']").textContent);
      this.label = this.still.getAttribute("aria-label");
      this.width = 0;
    }

    async draw() {
      const width = Math.floor(this.home.clientWidth);
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
      if (Object.keys(meta.zooms).length) {
        addButton(bar, "Zoom in", "The middle half of what is shown", () => zoom(view(), meta.zooms, 0.5));
        addButton(bar, "Zoom out", "Twice of what is shown", () => zoom(view(), meta.zooms, 2));
        hint.push("drag to move, Ctrl and wheel to zoom, double click to reset");
      }
      addButton(bar, "Reset", "As it was", () => { this.width = 0; this.draw(); });
      if (JSON.stringify(this.spec).includes('"bind":"legend"')) hint.push("click a name in the legend to hide it");
      const words = document.createElement("span");
      words.textContent = `Point at the figure for exact values${hint.map((each) => `; ${each}`).join("")}.`;
      bar.append(words);
      this.home.after(bar);
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
