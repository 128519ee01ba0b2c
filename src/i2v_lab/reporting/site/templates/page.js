(() => {
  "use strict";

  /** The cells of a table by row and column; a cell that spans several is in the first, so that columns stay columns. */
  function grid(table) {
    const rows = [...table.rows].map(() => []);
    [...table.rows].forEach((row, y) => {
      for (const cell of row.cells) {
        let x = 0;
        while (rows[y][x] !== undefined) x += 1;
        for (let dy = 0; dy < cell.rowSpan && y + dy < rows.length; dy += 1) {
          for (let dx = 0; dx < cell.colSpan; dx += 1) rows[y + dy][x + dx] = null;
        }
        rows[y][x] = cell;
      }
    });
    return rows;
  }

  const words = (cell) => cell ? cell.textContent.replace(/\s+/g, " ").trim() : "";

  function copyBySelection(text) {
    const area = document.createElement("textarea");
    area.value = text;
    area.setAttribute("readonly", "");
    area.style.cssText = "position: fixed; top: 0; left: 0; opacity: 0";
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }

  async function copy(text) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {  // not there, as on pages from a file in some browsers, or not allowed
      return copyBySelection(text);
    }
  }

  function addButton(table) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "copy";
    button.textContent = "Copy";
    button.title = "Copy the table as tab-separated text";
    button.setAttribute("aria-live", "polite");
    button.addEventListener("click", async () => {
      const done = await copy(grid(table).map((row) => row.map(words).join("\t")).join("\n") + "\n");
      button.focus();
      button.textContent = done ? "Copied" : "Could not copy";
      setTimeout(() => { button.textContent = "Copy"; }, 2000);
    });
    const shown = table.closest(".scroll") ?? table;
    const bar = document.createElement("div");
    bar.className = "bar-of-table";
    bar.append(button);
    if (shown.dataset.csv) {
      const link = document.createElement("a");
      link.href = shown.dataset.csv;
      link.download = "";
      link.textContent = "CSV";
      bar.prepend(link);
    }
    const box = document.createElement("div");  // as wide as the table, so that the button is beside it
    box.className = "copied";
    shown.before(box);
    box.append(bar, shown);
    if (shown.scrollWidth > shown.clientWidth) table.classList.add("dense");  // rather small than cut, where there is room
  }

  /** Numbers to the right, words to the left; numbers and single words stay on one line. The first column stays in sight. */
  function align(table) {
    const number = /^[-+−≈~<>≤≥]?\s*\d[\d.,]*(\s*\S{1,5})?$|^(n\/a|nan|None|<NA>|—|-)?$/i;
    const rows = grid(table);
    const head = table.tHead ? table.tHead.rows.length : 0;
    for (const row of rows) {
      row.forEach((cell, x) => {
        if (!cell) return;
        if (number.test(words(cell)) || words(cell).length <= 14 || /^\S{1,20}$/.test(words(cell))) cell.classList.add("short");
        if (x === 0) cell.classList.add("key");
        if (x === 0 && words(cell).length > 20) cell.classList.add("long");
        if (cell.colSpan === 1 && rows.slice(head).some((other) => other[x] && !number.test(words(other[x])))) cell.classList.add("words");
      });
    }
  }

  for (const table of document.querySelectorAll("main table:not(.data)")) {  // those behind charts are long, and all numbers
    align(table);
    addButton(table);
  }

  for (const text of document.querySelectorAll(".again code")) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "Copy";
    button.title = "Copy the command";
    button.addEventListener("click", async () => {
      button.textContent = await copy(text.textContent) ? "Copied" : "Could not copy";
      button.focus();
      setTimeout(() => { button.textContent = "Copy"; }, 2000);
    });
    text.parentElement.after(button);
  }

  // A figure as large as the window allows. It is moved there and back: a copy would need other ids.
  for (const figure of document.querySelectorAll(".drawn")) {
    const svg = figure.querySelector("svg");
    const button = figure.querySelector("[data-enlarge]");
    if (!svg || !button || !window.HTMLDialogElement) continue;
    button.hidden = false;
    const enlarge = () => {
      const dialog = document.createElement("dialog");
      const close = document.createElement("button");
      const sheet = document.createElement("div");
      const home = svg.parentElement;
      dialog.setAttribute("aria-label", svg.getAttribute("aria-label") ?? "Figure");
      close.type = "button";
      close.textContent = "Close";
      close.addEventListener("click", () => dialog.close());
      sheet.className = "scroll";
      sheet.tabIndex = 0;
      home.style.minHeight = `${home.offsetHeight}px`;
      sheet.append(svg);
      dialog.append(close, sheet);
      dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
      dialog.addEventListener("close", () => {
        home.append(svg);
        home.style.minHeight = "";
        dialog.remove();
        button.focus();
      });
      document.body.append(dialog);
      dialog.showModal();
    };
    button.addEventListener("click", enlarge);
    svg.addEventListener("click", () => { if (!svg.closest("dialog")) enlarge(); });
  }

  // What a link leads to is shown, also where it is folded.
  const unfoldTarget = () => {
    const part = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    const folded = part && part.closest("details:not([open])");
    if (folded) {
      folded.open = true;
      part.scrollIntoView();
    }
  };
  window.addEventListener("hashchange", unfoldTarget);
  unfoldTarget();

  const contents = document.querySelector(".contents details");
  if (contents) {  // beside the text where there is room, folded above it otherwise
    const wide = matchMedia("(min-width: 70rem)");
    const follow = () => { contents.open = wide.matches; };
    wide.addEventListener("change", follow);
    follow();
    contents.addEventListener("click", (event) => { if (event.target.closest("a") && !wide.matches) contents.open = false; });
  }

  const unfold = document.querySelector("[data-unfold]");
  const code = [...document.querySelectorAll("details.code")];
  if (unfold && code.length) {
    unfold.hidden = false;
    unfold.addEventListener("click", () => {
      const open = code.some((part) => !part.open);
      for (const part of code) part.open = open;
      unfold.textContent = open ? "Hide all code" : "Show all code";
    });
  }

  const toggle = document.querySelector("[data-toggle-theme]");
  if (toggle) {
    const root = document.documentElement;
    const system = matchMedia("(prefers-color-scheme: dark)");
    const theme = () => root.dataset.theme ?? (system.matches ? "dark" : "light");
    const shown = () => {
      toggle.textContent = theme() === "dark" ? "Light theme" : "Dark theme";
      document.dispatchEvent(new CustomEvent("themechange", {detail: theme()}));
    };
    toggle.hidden = false;
    toggle.addEventListener("click", () => {
      root.dataset.theme = theme() === "dark" ? "light" : "dark";
      try { localStorage.setItem("i2v-lab-theme", root.dataset.theme); } catch { /* for this page only */ }
      shown();
    });
    system.addEventListener("change", shown);
    shown();
  }

  const form = document.querySelector("form[role=search]");
  if (form) {
    const field = form.elements.q;
    const data = document.getElementById("search-index");
    const found = document.getElementById("found");
    form.hidden = false;
    document.addEventListener("keydown", (event) => {
      if (event.key === "/" && !event.ctrlKey && !event.metaKey && !event.altKey
          && !event.target.closest("input, textarea, select, dialog")) {
        event.preventDefault();
        field.focus();
      }
    });
    if (!data) {
      form.addEventListener("submit", (event) => {
        event.preventDefault();
        location.href = `index.html?q=${encodeURIComponent(field.value)}`;
      });
    } else {
      const entries = JSON.parse(data.textContent).map((entry) => ({
        ...entry, where: `${entry.page} ${entry.title}`.toLowerCase(), low: entry.text.toLowerCase(),
      }));
      const show = () => {
        const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
        found.hidden = !words.length;
        found.replaceChildren(...(words.length ? results(entries, words) : []));
      };
      field.addEventListener("input", show);
      form.addEventListener("submit", (event) => {
        event.preventDefault();
        show();
        found.querySelector("a")?.focus();
      });
      const step = (event) => {
        const stops = [field, ...found.querySelectorAll("a")];
        const next = stops.indexOf(document.activeElement) + {ArrowDown: 1, ArrowUp: -1}[event.key];
        if (!stops[next] || !stops.includes(document.activeElement)) return;
        event.preventDefault();
        stops[next].focus();
      };
      for (const part of [form, found]) {
        part.addEventListener("keydown", (event) => {
          if (event.key === "Escape") {
            field.value = "";
            show();
            field.focus();
          } else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
            step(event);
          }
        });
      }
      field.value = new URLSearchParams(location.search).get("q") ?? "";
      show();
      if (field.value) field.focus();
    }
  }

  /** The sections in which every word is, those with the words in their heading first. */
  function results(entries, words) {
    const count = (text, word) => text.split(word).length - 1;
    const hits = entries
      .filter((entry) => words.every((word) => entry.where.includes(word) || entry.low.includes(word)))
      .map((entry) => [words.reduce((sum, word) => sum + 5 * count(entry.where, word) + Math.min(count(entry.low, word), 4), 0), entry])
      .sort((a, b) => b[0] - a[0])
      .map(([, entry]) => entry);
    const said = document.createElement("p");
    said.setAttribute("role", "status");
    said.textContent = hits.length ? `${hits.length} section${hits.length > 1 ? "s" : ""}${hits.length > 20 ? ", the first 20" : ""}` : "Nothing found";
    const list = document.createElement("ol");
    for (const entry of hits.slice(0, 20)) {
      const item = document.createElement("li");
      const link = document.createElement("a");
      link.href = entry.href;
      link.textContent = entry.title ? `${entry.page}: ${entry.title}` : entry.page;
      const text = document.createElement("p");
      const at = Math.max(0, entry.low.indexOf(words.find((word) => entry.low.includes(word)) ?? "") - 60);
      const cut = entry.text.slice(at, at + 200);
      const parts = cut.split(new RegExp(`(${words.map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join("|")})`, "gi"));
      text.append(at ? "… " : "", ...parts.map((part, index) => {
        if (index % 2 === 0) return part;
        const mark = document.createElement("mark");
        mark.textContent = part;
        return mark;
      }), at + 200 < entry.text.length ? " …" : "");
      item.append(link, text);
      list.append(item);
    }
    return [said, list];
  }
})();
