"use strict";
(() => {
  const data = JSON.parse(document.getElementById("points").textContent);
  const form = document.getElementById("choose"), GIB = 2 ** 30;
  const field = (name) => form.elements.namedItem(name);
  const cards = new Map(data.cards.map((card) => [card.name, card]));
  const element = (name, text, kind) => {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (kind) made.className = kind;
    return made;
  };
  const bytes = (count) => count === null ? "not known" : count >= GIB ? `${(count / GIB).toFixed(2)} GiB` : `${(count / 2 ** 20).toFixed(0)} MiB`;
  const seconds = (count) => count < 120 ? `${Math.round(count)} s` : count < 7200 ? `${Math.round(count / 60)} min` : `${(count / 3600).toFixed(1)} h`;
  const sizeOf = (point) => `${point.width}x${point.height}`;

  function chosen() {
    const name = field("gpu").value, own = name === "";
    const typed = Number(field("gib").value.replace(",", "."));
    const memory = own ? (typed > 0 && typed <= 1024 ? typed * GIB : null) : cards.get(name).memory_bytes;
    return { name: own ? `${field("gib").value} GiB` : name, own, memory, card: own ? null : cards.get(name) };
  }

  // The seconds of a way on the chosen card; on the reference for a size of memory; null where they are not known.
  function timeOf(way, card) {
    const found = way.seconds[card.own ? data.reference : card.name];
    return found === undefined ? null : found;
  }
  function timeText(way, card) {
    const time = timeOf(way, card);
    if (time === null) return "not known";
    if (card.own) return `${seconds(time)} on an ${data.reference}`;
    return seconds(time) + (card.card.rates === "measured" ? "" : " *");
  }

  // For a card in the list Python has chosen; for a size of memory the fastest way that fits by the reference's rates.
  function bestOf(point, card) {
    if (!card.own) return point.best[card.name] === null ? null : point.ways[point.best[card.name]];
    const fit = point.ways.filter((way) => card.memory !== null && way.needed_bytes <= card.memory && timeOf(way, card) !== null);
    return fit.sort((one, other) => timeOf(one, card) - timeOf(other, card))[0] || null;
  }
  const budget = (card) => `${Math.floor(card.memory / GIB * 100) / 100}GiB`;
  function command(point, way, card) {
    const shape = `--model ${point.model} --width ${point.width} --height ${point.height} --frames ${point.frames}`;
    const memory = point.placed ? `--vram-budget ${budget(card)}` : way.options;
    return `i2v-lab generate --device cuda ${shape} ${memory}`.trim() + " --image still.png --prompt \"...\" --out video.mp4";
  }
  function search(card, model, size, frames) {
    const [width, height] = size.split("x");
    const gpu = card.own ? budget(card) : `"${card.name}"`;
    return `i2v-lab fit --gpu ${gpu} --model ${model} --width ${width} --height ${height} --frames ${frames}`;
  }

  function table(head, rows) {
    const made = element("table"), top = made.createTHead().insertRow(), body = made.createTBody();
    head.forEach((name, index) => { const cell = element("th", name, index ? "" : "key"); cell.scope = "col"; top.append(cell); });
    for (const { cells, kind } of rows) {
      const row = body.insertRow();
      if (kind) row.className = kind;
      cells.forEach((text, index) => {
        const cell = element(index ? "td" : "th", text, index ? "" : "key");
        if (!index) cell.scope = "row";
        row.append(cell);
      });
    }
    return made;
  }

  function fill(select, values, wanted) {
    select.replaceChildren(...values.map((value) => element("option", value)));
    if (values.includes(wanted)) select.value = wanted;
  }
  const OTHER = "another";
  function offer(wanted) {
    const points = data.points.filter((point) => point.model === field("model").value);
    fill(field("size"), [...new Set(points.map(sizeOf)), OTHER], wanted.size);
    const lengths = points.filter((point) => sizeOf(point) === field("size").value).map((point) => String(point.frames));
    fill(field("frames"), [...(lengths.length ? lengths : [String(points[0].frames)]), OTHER], wanted.frames);
  }

  function show() {
    const card = chosen(), result = document.getElementById("result");
    document.getElementById("own").hidden = !card.own;
    const model = field("model").value, size = field("size").value, frames = field("frames").value;
    const point = data.points.find((one) => one.model === model && sizeOf(one) === size && String(one.frames) === frames);
    const near = data.points.find((one) => one.model === model);
    result.replaceChildren();
    result.className = "";
    const facts = element("dl"), say = (name, text) => facts.append(element("dt", name), element("dd", text));
    if (card.memory === null) {
      result.className = "unknown";
      result.append(element("p", `${field("gib").value} is no size; type the card's memory in GiB, such as 10`));
    } else if (!point) {
      result.className = "unknown";
      const [width, height] = size === OTHER ? ["WIDTH", "HEIGHT"] : size.split("x");
      result.append(element("p", "This was not forecast, and nothing is guessed here. The command computes it, without a card:", "best"));
      result.append(element("pre", search(card, model, `${width}x${height}`, frames === OTHER ? "FRAMES" : frames)));
    } else {
      const way = bestOf(point, card);
      if (way) {
        result.append(element("p", `${model}, ${size}, ${frames} frames fits ${card.name}: ${way.name}`, "best"));
        say("needs", `${bytes(way.needed_bytes)} of ${bytes(card.memory)}`);
        say("peak", `${bytes(way.peak_bytes)} allocated, in ${way.peak_phase}`);
        say("host memory", bytes(way.host_bytes));
        say("time", timeText(way, card) + (card.card && card.card.rates === "published" ? ` (${data.caveat})` : ""));
        result.append(facts, element("pre", command(point, way, card)));
        if (!point.placed && !way.options) result.append(element("p", "In diffusers: nothing besides .to(\"cuda\").", "quiet"));
      } else {
        result.className = "none";
        const lack = `${model}, ${size}, ${frames} frames does not fit ${card.name}: it needs ${bytes(point.least_bytes)} at least`;
        result.append(element("p", lack, "best"));
        const smaller = data.points.filter((one) => one.model === model && bestOf(one, card)).map((one) => `${sizeOf(one)}, ${one.frames} frames`);
        result.append(element("p", smaller.length ? `What fits of this model: ${smaller.join("; ")}` : "This finds the largest that fits, without a card:"));
        result.append(element("pre", `i2v-lab fit --gpu ${card.own ? budget(card) : `"${card.name}"`} --model ${model}`));
      }
    }
    const ways = point ? [...point.ways].sort((one, other) => one.needed_bytes - other.needed_bytes) : [];
    const best = point ? bestOf(point, card) : null;
    document.getElementById("all-ways").replaceChildren(table(
      ["way", "needs", "peak", "most in", "host memory", "time"],
      ways.map((way) => ({
        cells: [way.name, bytes(way.needed_bytes), bytes(way.peak_bytes), way.peak_phase, bytes(way.host_bytes), timeOf(way, card) === null ? "" : timeText(way, card)],
        kind: way === best ? "chosen" : card.memory !== null && way.needed_bytes > card.memory ? "over" : "",
      })),
    ));
    document.getElementById("line").textContent = `Every model on ${card.name}`;
    document.getElementById("every-model").replaceChildren(table(
      ["model", "size", "frames", "fastest that fits", "needs", "host memory", "time"],
      data.points.map((one) => {
        const found = bestOf(one, card);
        const rest = found
          ? [found.name, bytes(found.needed_bytes), bytes(found.host_bytes), timeText(found, card)]
          : ["does not fit", `${bytes(one.least_bytes)} at least`, "", ""];
        return { cells: [one.model, sizeOf(one), one.frames, ...rest], kind: one === point ? "chosen" : found ? "" : "over" };
      }),
    ));
    const kept = new URLSearchParams({ gpu: card.own ? field("gib").value : card.name, model, size, frames });
    history.replaceState(null, "", `#${kept}`);
  }

  function read() {
    const asked = new URLSearchParams(location.hash.slice(1)), gpu = asked.get("gpu");
    if (gpu !== null && cards.has(gpu)) field("gpu").value = gpu;
    else if (gpu !== null && Number(gpu.replace(/ ?GiB$/, "")) > 0) {
      field("gpu").value = "";
      field("gib").value = gpu.replace(/ ?GiB$/, "");
    } else field("gpu").value = cards.has("RTX 4090") ? "RTX 4090" : data.cards[0].name;
    if (data.models.includes(asked.get("model"))) field("model").value = asked.get("model");
    offer({ size: asked.get("size"), frames: asked.get("frames") });
    show();
  }
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", (event) => {
    const named = event.target.name;
    if (named === "model") offer({});
    if (named === "size") offer({ size: field("size").value });
    show();
  });
  addEventListener("hashchange", read);
  read();
})();
