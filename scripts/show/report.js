"use strict";
for (const section of document.querySelectorAll(".all")) {
  const body = section.querySelector("tbody"), rows = [...body.querySelectorAll("tr.row")];
  const search = section.querySelector("input[type=search]"), boxes = [...section.querySelectorAll("input[type=checkbox]")];
  const { curves, best } = JSON.parse(section.querySelector(".curves").textContent);

  function filter() {
    const words = search.value.toLowerCase().split(/\s+/), on = new Set(boxes.filter((b) => b.checked).map((b) => b.value));
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !on.has(row.classList[1]) || !words.every((word) => text.includes(word));
      shown += !row.hidden;
      if (row.inside) row.inside.hidden = row.hidden || !row.open;
    }
    section.querySelector(".shown").textContent = `${shown} of ${rows.length}`;
  }
  search.addEventListener("input", filter);
  for (const box of boxes) box.addEventListener("change", filter);
  filter();

  section.querySelectorAll("th").forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of section.querySelectorAll("th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent.toLowerCase();
    const order = (a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === ""); // what has no figure stays below
      const by = isNaN(x) || isNaN(y) ? (x < y ? -1 : x > y) : x - y;
      return down ? -by : by;
    };
    for (const row of rows.sort(order)) body.append(row, ...(row.inside ? [row.inside] : []));
  }));

  function toggle(row, open = !row.open) {
    row.open = open;
    row.querySelector("button").setAttribute("aria-expanded", open);
    if (open && !row.inside) {
      row.inside = document.createElement("tr");
      const cell = row.inside.insertCell();
      cell.className = "inside";
      cell.colSpan = row.cells.length;
      cell.append(section.querySelector(`template[data-of="${row.id}"]`).content.cloneNode(true));
      draw(cell.querySelector(".curve"), row);
      row.after(row.inside);
    }
    if (row.inside) row.inside.hidden = !open;
  }
  for (const row of rows) row.querySelector("button").addEventListener("click", () => toggle(row));

  // What a link to an experiment leads to is shown, filter or not.
  function follow() {
    const row = rows.find((other) => "#" + other.id === location.hash);
    if (!row) return;
    if (row.hidden) { search.value = ""; boxes.forEach((box) => (box.checked = true)); filter(); }
    toggle(row, true);
    row.scrollIntoView({ block: "start" });
    row.querySelector("button").focus({ preventScroll: true });
  }
  addEventListener("hashchange", follow);
  follow();

  function element(name, attributes, text) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const key in attributes) made.setAttribute(key, attributes[key]);
    if (text) made.textContent = text;
    return made;
  }

  function draw(place, row) {
    const own = row.dataset.number, lines = [];
    const add = (number, name, colour) => {
      if (curves[number] && !lines.some((line) => line.number === String(number))) lines.push({ number: String(number), name, colour, y: curves[number] });
    };
    add(own, "this", "var(--link)");
    if (!lines.length) return;
    add(row.dataset.against, `reference (${row.dataset.against})`, "var(--dot)");
    add(best, `best (${best})`, "var(--good)");
    const W = innerWidth < 700 ? 380 : 640, H = 240, left = 44, right = 110, bottom = 24, top = 8;
    const high = Math.max(...lines.map((line) => line.y[3])), low = Math.min(...lines.flatMap((line) => line.y));
    const x = (i) => left + (W - left - right) * (i + 1) / lines[0].y.length;
    const y = (v) => top + (H - top - bottom) * (1 - (Math.min(v, high) - low) / (high - low || 1));
    const svg = element("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": "training loss over the budget" });
    for (let i = 0; i <= 3; i++) {
      const v = low + (high - low) * i / 3;
      svg.append(element("line", { x1: left, x2: W - right, y1: y(v), y2: y(v), stroke: "var(--line)" }), element("text", { x: 4, y: y(v) + 4 }, (v / 1000).toFixed(2)));
    }
    svg.append(element("text", { x: left, y: H - 6 }, "training loss, nats a token, over the budget"));
    let last = -99;
    const ends = lines.slice().sort((a, b) => b.y.at(-1) - a.y.at(-1));
    for (const line of lines.reverse()) svg.append(element("path", { d: "M" + line.y.map((v, i) => `${x(i).toFixed(1)} ${y(v).toFixed(1)}`).join("L"), fill: "none", stroke: line.colour, "stroke-width": 1.6 }));
    for (const line of ends) {
      last = Math.max(last + 14, y(line.y.at(-1)) + 4);
      svg.append(element("text", { x: W - right + 6, y: last, style: `fill: ${line.colour}` }, line.name));
    }
    place.append(svg);
  }
}
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => (d.open = true)));
