(() => {
  "use strict";

  /** A table as rows of text; a cell that spans several leaves the others empty, so that columns stay columns. */
  function cells(table) {
    const rows = [...table.rows].map(() => []);
    [...table.rows].forEach((row, y) => {
      for (const cell of row.cells) {
        let x = 0;
        while (rows[y][x] !== undefined) x += 1;
        for (let dy = 0; dy < cell.rowSpan && y + dy < rows.length; dy += 1) {
          for (let dx = 0; dx < cell.colSpan; dx += 1) rows[y + dy][x + dx] = "";
        }
        rows[y][x] = cell.textContent.replace(/\s+/g, " ").trim();
      }
    });
    return rows;
  }

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
      const done = await copy(cells(table).map((row) => row.join("\t")).join("\n") + "\n");
      button.focus();
      button.textContent = done ? "Copied" : "Could not copy";
      setTimeout(() => { button.textContent = "Copy"; }, 2000);
    });
    const shown = table.closest(".scroll") ?? table;
    const box = document.createElement("div");  // as wide as the table, so that the button is beside it
    box.className = "copied";
    shown.before(box);
    box.append(button, shown);
  }

  /** Numbers to the right, words to the left; short cells stay on one line. */
  function align(table) {
    const number = /^[-+−≈~<>≤≥]?\s*\d[\d.,]*(\s*\S{1,5})?$|^(n\/a|nan|None|<NA>|—|-)?$/i;
    const body = [...table.tBodies].flatMap((part) => [...part.rows]);
    for (const row of table.rows) {
      for (const cell of row.cells) {
        if (cell.textContent.trim().length <= 28) cell.classList.add("short");
        if (cell.colSpan > 1) continue;
        const fromEnd = row.cells.length - cell.cellIndex;
        const column = body.map((other) => other.cells[other.cells.length - fromEnd]).filter(Boolean);
        if (column.some((other) => !number.test(other.textContent.trim()))) cell.classList.add("words");
      }
    }
  }

  for (const table of document.querySelectorAll("main table")) {
    align(table);
    addButton(table);
  }

  for (const figure of document.querySelectorAll(".drawn")) {  // narrow screens have a style for it
    figure.addEventListener("click", () => figure.classList.toggle("enlarged"));
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
})();
