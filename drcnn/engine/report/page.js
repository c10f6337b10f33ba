"use strict";

const content = JSON.parse(document.getElementById("content").textContent);
const root = document.documentElement;
const hidden = new Set();
const charts = [];
const tables = [];

/** Makes an element; properties that are no properties of it become attributes, children are text or elements. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element && name !== "list") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function choice(label, options, changed, first = 0) {
  const select = make("select", { "aria-label": label });
  options.forEach((text, place) => select.add(new Option(text, place, place === first, place === first)));
  select.addEventListener("change", changed);
  return { label: make("label", {}, label, select), select };
}

// ---- light and dark ----

function remembered() {
  try { return localStorage.getItem("drcnn-theme"); } catch { return null; }
}

function setTheme(theme) {
  root.dataset.theme = theme;
  const button = document.getElementById("theme");
  button.textContent = theme === "dark" ? "☀ Light" : "☾ Dark";
  button.setAttribute("aria-label", `Switch to the ${theme === "dark" ? "light" : "dark"} colours`);
}

function startTheme() {
  const preferred = matchMedia("(prefers-color-scheme: dark)");
  setTheme(remembered() ?? (preferred.matches ? "dark" : "light"));
  preferred.addEventListener("change", (event) => {
    if (!remembered()) { setTheme(event.matches ? "dark" : "light"); charts.forEach(drawChart); }
  });
  document.getElementById("theme").addEventListener("click", () => {
    const theme = root.dataset.theme === "dark" ? "light" : "dark";
    try { localStorage.setItem("drcnn-theme", theme); } catch { /* a page from a file may not remember */ }
    setTheme(theme);
    charts.forEach(drawChart);
  });
}

// ---- charts ----

function themedLayout(layout, height) {
  const style = getComputedStyle(root);
  const colour = (name) => style.getPropertyValue(name).trim();
  const axis = {
    gridcolor: colour("--grid"), linecolor: colour("--line"), zerolinecolor: colour("--line"),
    automargin: true, title: { standoff: 8 }, ticks: "", zeroline: false,
  };
  const template = {
    layout: {
      font: { family: "system-ui, -apple-system, Segoe UI, Roboto, Arial, sans-serif", size: 12, color: colour("--soft") },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      margin: { l: 44, r: 14, t: 10, b: 34 }, showlegend: false, hovermode: "closest",
      hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--text") }, namelength: -1 },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", bgcolor: "rgba(0,0,0,0)" },
      xaxis: axis, yaxis: axis, modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--soft"), activecolor: colour("--accent") },
    },
  };
  return { ...structuredClone(layout), template, height };
}

function drawChart(item) {
  const figure = item.panel.variants[item.key()];
  const traces = structuredClone(figure.data);
  for (const trace of traces) if (trace.meta && hidden.has(trace.meta.run)) trace.visible = false;
  const text = getComputedStyle(root).getPropertyValue("--text").trim();
  for (const trace of traces) if (trace.type === "heatmap") trace.textfont = { color: text };
  const options = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d", "zoomIn2d", "zoomOut2d", "autoScale2d"] };
  return Plotly.react(item.body, traces, themedLayout(figure.layout, item.panel.height), options);
}

// ---- tables ----

function formatCell(value, digits) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  return Number.isInteger(value) && digits === null ? String(value) : value.toFixed(digits);
}

function drawTable(item) {
  const { columns, rows, digits, heat = [], search = false } = item.panel.variants[item.key()];
  item.search.hidden = !search;
  const wanted = search ? item.search.lastChild.value.toLowerCase() : "";
  let shown = rows.filter((row) => !hidden.has(row.run));
  if (wanted) shown = shown.filter((row) => row.cells.some((cell) => String(cell).toLowerCase().includes(wanted)));
  if (item.sort) {
    const { column, rising } = item.sort;
    const order = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
    const known = shown.filter((row) => row.cells[column] !== null);
    known.sort((a, b) => (rising ? 1 : -1) * order(a.cells[column], b.cells[column]));
    shown = [...known, ...shown.filter((row) => row.cells[column] === null)];
  }
  const numeric = columns.map((_, c) => rows.some((row) => typeof row.cells[c] === "number"));
  const whole = columns.map((_, c) => rows.every((row) => row.cells[c] === null || Number.isInteger(row.cells[c])));
  const integral = columns.map((_, c) => whole[c] && !heat.includes(c));
  const shaded = rows.flatMap((row) => heat.map((c) => row.cells[c])).filter((value) => typeof value === "number");
  const most = Math.max(1e-9, ...shaded);
  const head = make("tr", {}, ...columns.map((name, c) => {
    const button = make("button", { type: "button" }, name);
    button.addEventListener("click", () => {
      item.sort = { column: c, rising: item.sort?.column === c ? !item.sort.rising : !numeric[c] };
      drawTable(item);
      item.body.querySelectorAll("th button")[c].focus();
    });
    const sorted = item.sort?.column === c ? (item.sort.rising ? "ascending" : "descending") : "none";
    return make("th", { scope: "col", className: numeric[c] ? "number" : "", "aria-sort": sorted }, button);
  }));
  const body = shown.map((row) => make("tr", {}, ...row.cells.map((value, c) => {
    const text = formatCell(value, integral[c] ? null : digits);
    const cell = make(c ? "td" : "th", { className: numeric[c] ? "number" : String(value).length > 24 ? "text" : "" });
    if (!c) {
      cell.scope = "row";
      if (row.run !== null && content.runs.length > 1) cell.append(swatch(content.runs[row.run].colour));
    }
    cell.append(text);
    if (heat.includes(c) && typeof value === "number") {
      cell.style.background = `rgba(var(--heat), ${(0.42 * Math.max(0, value) / most).toFixed(3)})`;
    }
    return cell;
  })));
  item.body.replaceChildren(make("table", {}, make("thead", {}, head), make("tbody", {}, ...body)));
}

function swatch(colour) {
  const mark = make("i");
  mark.style.background = colour;
  return mark;
}

// ---- panels ----

function makePanel(panel) {
  const item = { panel, sort: null };
  const draw = () => (panel.kind === "chart" ? drawChart(item) : drawTable(item));
  const chosen = panel.selects.map(([label, options]) => choice(label, options, draw));
  item.key = () => chosen.map(({ select }) => select.value).join(",");
  item.search = make("label", { hidden: true }, "Search", make("input", { type: "search", size: 12 }));
  item.search.lastChild.addEventListener("input", draw);
  const useful = chosen.filter(({ select }) => select.length > 1).map(({ label }) => label);
  const head = make("div", { className: "head" }, make("h3", {}, panel.title), make("div", { className: "choices" }, ...useful, item.search));
  item.body = panel.kind === "chart"
    ? make("div", { className: "chart", role: "img", "aria-label": panel.title })
    : make("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": panel.title });
  if (panel.kind === "chart") item.body.style.minHeight = `${panel.height}px`;
  (panel.kind === "chart" ? charts : tables).push(item);
  const parts = [head, item.body];
  if (panel.note) parts.push(make("p", { className: "note" }, panel.note));
  return make("div", { className: panel.wide ? "panel wide" : "panel" }, ...parts);
}

// ---- pictures ----

function startGallery(section, gallery) {
  const names = ["correct", "classification", "localisation", "both", "duplicate", "background"];
  const runs = Object.keys(gallery.groups).map(Number);
  const step = 6;
  let most = step;
  let compared = [null];
  const redraw = () => { most = step; draw(); };
  const run = choice("Run", runs.map((r) => content.runs[r].name), () => { startRun(); redraw(); });
  const beside = choice("Beside", ["none"], redraw);
  const label = choice("Class", ["all"], redraw);
  const kind = choice("Errors", ["any", ...names.slice(1), "missed"], redraw);
  const order = choice("Order", ["worst first", "best first"], redraw);
  const score = make("input", { type: "range", min: 0.05, max: 1, step: 0.01 });
  const said = make("output");
  score.addEventListener("input", draw);
  const named = make("input", { type: "checkbox" });
  named.addEventListener("change", draw);
  const status = make("span", { role: "status" });
  const chosen = [run, beside, label].filter((_, i) => (i < 2 ? runs.length > 1 : true)).map((c) => c.label);
  const controls = make("div", { className: "controls", role: "group", "aria-label": "Filters of the images" },
    ...chosen, kind.label, order.label, make("label", {}, "Least score", score, said), make("label", {}, named, "Labels"), status);
  const key = make("div", { className: "key" }, ...[...names, "missed", "ignored"].map((name) => {
    const mark = make("i");
    mark.style.borderColor = `var(--${name})`;
    if (name === "missed" || name === "ignored") mark.style.borderStyle = "dashed";
    return make("span", {}, mark, name === "correct" ? "correct, found" : name);
  }));
  const list = make("div", { className: "pictures" });
  const more = make("button", { type: "button", className: "more" });
  more.addEventListener("click", () => { most += step; draw(); });
  section.append(controls, key, list, more);

  const current = () => runs[run.select.value];
  const classes = () => gallery.classes[gallery.groups[current()]];

  function startRun() {
    const before = label.select.selectedOptions[0]?.text;
    label.select.replaceChildren(...["all", ...classes()].map((text, i) => new Option(text, i - 1, text === before, text === before)));
    compared = [null, ...runs.filter((r) => r !== current() && gallery.groups[r] === gallery.groups[current()])];
    beside.select.replaceChildren(...compared.map((r, i) => new Option(r === null ? "none" : content.runs[r].name, i)));
    score.value = gallery.thresholds[current()];
  }

  /** Counts of a picture at a score: by kind, missed ground truths, F1; and which ground truths are found. */
  function judge(picture, number, least, only) {
    const kept = picture.runs[number].filter((row) => row[5] >= least);
    const found = new Set(kept.filter((row) => row[6] === 0).map((row) => row[7]));
    const counts = Object.fromEntries([...names, "missed"].map((name) => [name, 0]));
    for (const row of kept) if (row[6] >= 0 && (only < 0 || row[4] === only)) counts[names[row[6]]] += 1;
    picture.truths.forEach((truth, i) => {
      if (!truth[5] && !found.has(i) && (only < 0 || truth[4] === only)) counts.missed += 1;
    });
    const wrong = names.slice(1).reduce((sum, name) => sum + counts[name], counts.missed);
    const f1 = counts.correct || wrong ? (2 * counts.correct) / (2 * counts.correct + wrong) : 1;
    const present = only < 0 || kept.some((row) => row[4] === only) || picture.truths.some((truth) => truth[4] === only);
    return { kept, found, counts, f1, present };
  }

  function frame(picture, boxes) {
    const shown = make("button", { type: "button", className: "frame", "aria-label": `Enlarge ${picture.name}` },
      make("img", { src: picture.src, alt: picture.name, width: picture.width, height: picture.height }));
    for (const { row, tone, text, faint } of boxes) {
      const box = make("div", { className: `box ${tone}${faint ? " faint" : ""}`, title: `${text}, ${tone}` });
      const place = [row[0] / picture.width, row[1] / picture.height, row[2] / picture.width, row[3] / picture.height];
      ["left", "top", "width", "height"].forEach((side, i) => { box.style[side] = `${(100 * place[i]).toFixed(2)}%`; });
      if (named.checked && !faint) box.append(make("span", {}, text));
      shown.append(box);
    }
    shown.addEventListener("click", () => enlarge(shown));
    return shown;
  }

  function detectionBoxes(picture, judged, only, error) {
    return judged.kept.map((row) => {
      const tone = row[6] < 0 ? "ignored" : names[row[6]];
      const faint = (only >= 0 && row[4] !== only) || (error !== "any" && tone !== error);
      return { row, tone, text: `${classes()[row[4]]} ${row[5].toFixed(2)}`, faint };
    }).reverse();
  }

  function truthBoxes(picture, judged, only, error) {
    return picture.truths.map((row, i) => {
      const tone = row[5] ? "ignored" : judged.found.has(i) ? "correct" : "missed";
      const faint = (only >= 0 && row[4] !== only) || (error === "missed" && tone !== "missed");
      return { row, tone, text: classes()[row[4]], faint };
    });
  }

  function card(picture, judged, only, error, other, least) {
    const view = (title, boxes) => make("figure", { className: "view" }, make("figcaption", {}, title), frame(picture, boxes));
    const single = other === null;
    const views = [
      view("Ground truth", truthBoxes(picture, judged, only, error)),
      view(single ? "Detections" : content.runs[current()].name, detectionBoxes(picture, judged, only, error)),
    ];
    if (!single) {
      const second = judge(picture, other, Number(least), only);
      views.push(view(content.runs[other].name, detectionBoxes(picture, second, only, error)));
    }
    const facts = Object.entries(judged.counts).filter(([, count]) => count).map(([name, count]) => `${count} ${name}`);
    return make("article", { className: "panel" },
      make("div", { className: "head" }, make("h3", {}, picture.name), make("span", { className: "note" }, `id ${picture.id}`)),
      make("div", { className: "views" }, ...views),
      make("p", { className: "note" }, `F1 ${judged.f1.toFixed(2)}: ${facts.join(", ") || "nothing there, nothing found"}`));
  }

  function draw() {
    const [number, least, only] = [current(), Number(score.value), Number(label.select.value)];
    const error = kind.select.selectedOptions[0].text;
    const other = compared[beside.select.value] ?? null;
    said.textContent = least.toFixed(2);
    const judged = gallery.pictures
      .filter((picture) => picture.group === gallery.groups[number])
      .map((picture) => [picture, judge(picture, number, least, only)]);
    const shown = judged.filter(([, one]) => one.present && (error === "any" || one.counts[error]));
    const sign = order.select.value === "0" ? 1 : -1;
    shown.sort(([a, one], [b, two]) => sign * (one.f1 - two.f1) || b.truths.length - a.truths.length);
    list.replaceChildren(...shown.slice(0, most).map(([picture, one]) => card(picture, one, only, error, other, least)));
    list.classList.toggle("three", other !== null);
    if (!shown.length) list.append(make("p", { className: "none" }, "No image here has such an error; choose another filter or a lower score."));
    status.textContent = `${shown.length} of ${judged.length} images`;
    more.hidden = shown.length <= most;
    more.textContent = `Show ${Math.min(step, shown.length - most)} more`;
  }

  startRun();
  draw();
}

function enlarge(frame) {
  const dialog = document.getElementById("enlarged");
  if (dialog.open) return;
  const copy = make("div", { className: "frame" }, ...frame.cloneNode(true).childNodes);
  dialog.lastElementChild.replaceChildren(copy);
  dialog.showModal();
}

// ---- the page ----

function startRuns() {
  if (content.runs.length < 2) return;
  content.runs.forEach((run, number) => {
    const box = make("input", { type: "checkbox", checked: true });
    box.addEventListener("change", () => {
      if (box.checked) hidden.delete(number); else hidden.add(number);
      charts.forEach(drawChart);
      tables.forEach(drawTable);
    });
    document.getElementById("runs").append(make("label", {}, box, swatch(run.colour), run.name));
  });
}

function followSections(links) {
  const observer = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      for (const link of links) link.removeAttribute("aria-current");
      links.find((link) => link.hash === `#${entry.target.id}`).setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-20% 0px -70% 0px" });
  document.querySelectorAll("main > section").forEach((section) => observer.observe(section));
}

async function start() {
  startTheme();
  startRuns();
  const main = document.getElementById("main");
  const links = [];
  for (const part of content.sections) {
    const section = make("section", { id: part.name }, make("h2", {}, part.title));
    if (part.intro) section.append(make("p", {}, part.intro));
    if (part.panels.length) section.append(make("div", { className: "panels" }, ...part.panels.map(makePanel)));
    main.append(section);
    if (part.gallery) startGallery(section, part.gallery);
    links.push(make("a", { href: `#${part.name}` }, part.title));
  }
  document.querySelector("nav").append(...links);
  followSections(links);
  tables.forEach(drawTable);
  for (const item of charts) await drawChart(item);
  root.dataset.ready = "true";
}

start();
