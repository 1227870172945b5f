"use strict";
// The page is complete without this: it adds sorting, filters, copying and saving.

// ---- tables: a click on a column's name sorts by it, a second one turns the order

function order(cell) {
  return "order" in cell.dataset ? Number(cell.dataset.order) : cell.textContent.trim();
}

function compare(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b), undefined, { numeric: true });
}

function sortBy(table, column, descending) {
  const body = table.tBodies[0];
  const rows = [...body.rows].sort((a, b) => compare(order(a.cells[column]), order(b.cells[column])));
  body.append(...(descending ? rows.reverse() : rows));
  [...table.tHead.rows[0].cells].forEach((head, number) => {
    if (number === column) head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  });
}

for (const table of document.querySelectorAll(".scroll > table:not(.checks)")) {
  if (table.tBodies[0].rows.length < 2) continue;
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sortBy(table, column, head.getAttribute("aria-sort") === "ascending"));
    head.append(button);
  });
}

// ---- tables: copied as Markdown and as LaTeX, in the order in which they stand

const text = (cell) => cell.textContent.replace(/[\u2195\u2191\u2193]/g, "").replace(/\s+/g, " ").trim();
const lines = (table) => [...table.rows].map((row) => [...row.cells].map(text));

function markdown(table) {
  const [head, ...rows] = lines(table).map((row) => row.map((words) => words.replace(/([|\\*_`<])/g, "\\$1")));
  return [head, head.map((_, n) => (n ? "---:" : "---")), ...rows].map((row) => `| ${row.join(" | ")} |`).join("\n") + "\n";
}

function latex(table) {
  const special = { "\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}" };
  const [head, ...rows] = lines(table).map((row) =>
    row.map((words) => words.replace(/[\\~^]|[&%$#_{}]/g, (sign) => special[sign] || "\\" + sign)).join(" & ") + " \\\\");
  const columns = "l" + "r".repeat(table.rows[0].cells.length - 1);
  return [`\\begin{tabular}{${columns}}`, "\\toprule", head, "\\midrule", ...rows, "\\bottomrule", "\\end{tabular}"].join("\n") + "\n";
}

for (const scroll of document.querySelectorAll("#accuracy .scroll, #calibration .scroll, #changed .scroll, #cost .lead + .scroll")) {
  if (!navigator.clipboard) continue;
  const beside = scroll.previousElementSibling.querySelector(".tools"); // of a title that has some already
  const tools = beside || make("p", "tools");
  for (const [kind, written] of [["Markdown", markdown], ["LaTeX", latex]]) {
    const button = tool("button", `Copy ${kind}`, "", async () => {
      await navigator.clipboard.writeText(written(scroll.querySelector("table")));
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = `Copy ${kind}`; }, 1500);
    });
    tools.append(button, " ");
  }
  if (!beside) scroll.before(tools);
}

// ---- tables that are wider than their place say so

for (const scroll of document.querySelectorAll(".scroll")) {
  const hint = make("p", "scroll-hint", "scroll for more \u2192");
  const look = () => {
    const left = scroll.scrollLeft, right = scroll.scrollWidth - scroll.clientWidth - left;
    scroll.classList.toggle("more-left", left > 1);
    scroll.classList.toggle("more-right", right > 1);
    hint.hidden = right <= 1;
  };
  scroll.before(hint);
  scroll.addEventListener("scroll", look, { passive: true });
  new ResizeObserver(look).observe(scroll);
}

// ---- the section that is being read

const places = [...document.querySelectorAll("nav a")].map((link) => [link, document.querySelector(link.hash)]);
function mark() {
  const reached = places.filter(([, section]) => section && section.getBoundingClientRect().top < 80);
  const current = reached.length ? reached.reduce((a, b) =>
    (a[1].getBoundingClientRect().top > b[1].getBoundingClientRect().top ? a : b))[0] : null;
  for (const [link] of places) {
    if (link === current) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
  }
}
document.addEventListener("scroll", mark, { passive: true });

// ---- figures: saved as they look now, with their colours written into them

const DRAWN = ["fill", "fill-opacity", "stroke", "stroke-width", "stroke-dasharray", "stroke-linecap",
  "stroke-linejoin", "paint-order", "opacity", "font-family", "font-size", "font-weight"];

function standalone(svg) {
  const copy = svg.cloneNode(true);
  const originals = [svg, ...svg.querySelectorAll("*")];
  [copy, ...copy.querySelectorAll("*")].forEach((element, number) => {
    const style = getComputedStyle(originals[number]);
    element.removeAttribute("class");
    for (const name of DRAWN) element.setAttribute(name, style.getPropertyValue(name));
  });
  const [, , width, height] = svg.getAttribute("viewBox").split(" ").map(Number);
  copy.setAttribute("width", width);
  copy.setAttribute("height", height);
  const ground = document.createElementNS("http://www.w3.org/2000/svg", "rect");
  ground.setAttribute("width", "100%");
  ground.setAttribute("height", "100%");
  ground.setAttribute("fill", getComputedStyle(document.documentElement).getPropertyValue("--card").trim());
  copy.prepend(ground);
  return { text: new XMLSerializer().serializeToString(copy), width, height };
}

function save(name, blob) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function saveSvg(svg, name) {
  save(name + ".svg", new Blob([standalone(svg).text], { type: "image/svg+xml" }));
}

function savePng(svg, name) {
  const { text, width, height } = standalone(svg);
  const image = new Image();
  image.onload = () => {
    const canvas = document.createElement("canvas");
    canvas.width = 3 * width;
    canvas.height = 3 * height;
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    canvas.toBlob((blob) => save(name + ".png", blob), "image/png");
  };
  image.src = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(text);
}

for (const figure of document.querySelectorAll("figure[data-name]")) {
  const tools = document.createElement("span");
  tools.className = "save";
  for (const [kind, action] of [["SVG", saveSvg], ["PNG", savePng]]) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "button";
    button.textContent = kind;
    button.setAttribute("aria-label", "Save figure as " + kind);
    button.addEventListener("click", () => action(figure.querySelector("svg"), figure.dataset.name));
    tools.append(button);
  }
  figure.querySelector("figcaption").append(tools);
}

// ---- galleries: the attacked image is the clean one and its perturbation, put together here

async function pixels(source) {
  const image = new Image();
  image.src = source;
  await image.decode();
  const canvas = document.createElement("canvas");
  canvas.width = image.naturalWidth;
  canvas.height = image.naturalHeight;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, canvas.width, canvas.height);
}

async function attacked(clean, change, scale) {
  const image = await pixels(clean);
  if (change) {
    const levels = (await pixels(change)).data;
    for (let n = 0; n < levels.length; n += 1) {
      if (n % 4 !== 3) image.data[n] += Math.round((levels[n] - 128) / scale);
    }
  }
  return image;
}

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function tool(className, text, name, action) {
  const button = make("button", className, text);
  button.type = "button";
  if (name) button.setAttribute("aria-label", name);
  button.addEventListener("click", action);
  return button;
}

const AT_ONCE = 12; // cards that are shown before somebody asks for more

class Gallery {
  constructor(root) {
    this.root = root;
    this.form = root.querySelector(".filters");
    this.cards = [...root.querySelectorAll(".card")];
    const { steps, data } = JSON.parse(root.querySelector(".gallery-data").textContent);
    this.steps = steps;
    this.said = data.said;
    this.changes = data.changes;
    this.changes[data.first] = this.cards.map((card) => {
      const image = card.querySelector(".change img");
      return [image ? image.getAttribute("src") : "", Number(card.dataset.scale)];
    });
    this.changes.clean = this.cards.map(() => ["", 1]);
    this.key = this.first = data.first;
    // A picture is put together when its card comes near the window, and again when the controls move.
    this.near = new Set();
    this.watch = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        const number = this.cards.indexOf(entry.target);
        if (entry.isIntersecting && !this.near.has(number)) {
          this.near.add(number);
          this.draw(number);
        } else if (!entry.isIntersecting) this.near.delete(number);
      }
    }, { rootMargin: "300px" });
    for (const card of this.cards) this.watch.observe(card);
    this.most = AT_ONCE;
    this.more = root.querySelector(".more");
    this.more.firstChild.addEventListener("click", () => {
      this.most += 4 * AT_ONCE;
      this.filter();
    });
    this.form.hidden = false;
    this.form.addEventListener("input", () => {
      this.most = AT_ONCE;
      this.show();
    });
    this.closer = new Closer(this);
    this.cards.forEach((card, number) => {
      const name = `Look closer at sample ${card.dataset.sample}`;
      card.querySelector(".labels").append(tool("closer", "Look closer", name, () => this.closer.open(number)));
      card.querySelector(".pictures").classList.add("open");
      card.querySelector(".pictures").addEventListener("click", () => this.closer.open(number));
    });
    this.form.addEventListener("submit", (event) => event.preventDefault());
    this.show();
  }

  control(name) {
    return this.form.querySelector(`[data-filter=${name}]`);
  }

  chosen(name) {
    const control = this.control(name);
    return control ? control.value : "";
  }

  // What is stored for the step and the target that are chosen; not every target has every step.
  wanted() {
    const [step] = this.steps[Number(this.chosen("step"))];
    if (step < 0) return "clean";
    return `${this.chosen("target") || this.first.split(",")[0]},${step}`;
  }

  show() {
    const slider = this.control("step");
    const words = this.steps[Number(slider.value)][1];
    const key = this.wanted();
    const stored = key in this.said;
    slider.setAttribute("aria-valuetext", `eps ${words}`);
    this.form.querySelector(".eps").textContent = stored ? words : `${words}: not stored for this output`;
    if (stored && key !== this.key) {
      this.key = key;
      this.cards.forEach((card, number) => this.tell(card, number));
      for (const number of this.near) this.draw(number);
    }
    this.filter();
    this.closer.show();
  }

  tell(card, number) {
    card.querySelectorAll(".opinions li").forEach((row, output) => {
      const [predicted, share, label, right] = this.said[this.key][number][output];
      row.classList.toggle("wrong", !right);
      row.querySelector(".what").textContent = predicted;
      row.querySelector(".what").title = predicted;
      row.querySelector(".share").textContent = `${Math.round(100 * share)} %`;
      const before = Math.round(100 * this.said.clean[number][output][2]);
      row.querySelector(".meter").title = `probability of the label: ${Math.round(100 * label)} %, on the clean image ${before} %`;
      row.querySelector("i").style.width = `${Math.round(100 * label)}%`;
    });
  }

  // Draws the change and the attacked image of a card into `place`: the card itself, or what looks closer at it.
  async draw(number, place = this.cards[number]) {
    const key = this.key;
    const [change, scale] = this.changes[key][number];
    const frame = place.querySelector(".change");
    place.querySelector(".times").textContent = change ? `change \u00d7${scale}` : "no change";
    place.querySelector(".after").textContent = change ? "attacked" : "not attacked";
    if (change) {
      const image = frame.querySelector("img") || document.createElement("img");
      image.alt = `perturbation, ${scale} times, grey is none`;
      image.src = change;
      frame.replaceChildren(image);
    } else frame.replaceChildren();
    const image = await attacked(this.cards[number].querySelector(".clean").src, change, scale);
    // The controls, or who looks closer, may have moved on meanwhile.
    if (key !== this.key || (place === this.closer.dialog && number !== this.closer.number)) return;
    const canvas = place.querySelector("canvas");
    canvas.width = image.width;
    canvas.height = image.height;
    canvas.getContext("2d").putImageData(image, 0, 0);
    canvas.hidden = false;
  }

  fits(number, outcome) {
    const patterns = outcome.split("|").filter(Boolean);
    const signs = this.said[this.key][number].map((said) => (said[3] ? "+" : "-"));
    return !patterns.length || patterns.some((p) => signs.every((sign, n) => p[n] === "*" || p[n] === sign));
  }

  filter() {
    const label = this.chosen("label");
    const outcome = this.chosen("outcome");
    const labelled = this.cards.map((card) => !label || card.dataset.label === label);
    let shown = 0;
    this.cards.forEach((card, number) => {
      const fits = labelled[number] && this.fits(number, outcome);
      card.hidden = !fits;
      card.classList.toggle("later", fits && shown >= this.most);
      shown += fits;
    });
    for (const option of this.control("outcome") ? this.control("outcome").options : []) {
      option.dataset.words ||= option.textContent;
      const found = this.cards.filter((_, number) => labelled[number] && this.fits(number, option.value)).length;
      option.textContent = `${option.dataset.words} (${found})`;
    }
    const left = shown - this.most;
    this.more.hidden = left <= 0;
    this.more.firstChild.textContent = `Show ${Math.min(left, 4 * AT_ONCE)} more`;
    this.form.querySelector(".count").textContent = `${shown} of ${this.cards.length} shown`;
  }
}

// ---- one image, large: what each output says of it before and after, with the budget to move and the next image

class Closer {
  constructor(gallery) {
    this.gallery = gallery;
    this.number = 0;
    this.dialog = make("dialog");
    this.title = make("h2");
    this.title.tabIndex = -1;
    const head = make("header");
    head.append(this.title, tool("button", "\u2190", "Previous image", () => this.step(-1)),
      tool("button", "\u2192", "Next image", () => this.step(1)),
      tool("button", "Close", "", () => this.dialog.close()));
    const pictures = make("div", "pictures");
    this.clean = make("img", "clean");
    this.canvas = make("canvas");
    this.canvas.setAttribute("role", "img");
    pictures.append(this.clean, make("span", "change"), this.canvas, make("small", "", "clean"),
      make("small", "times"), make("small", "after"));
    const eps = make("label", "wide", "eps ");
    this.slider = make("input");
    this.slider.type = "range";
    this.slider.max = gallery.steps.length - 1;
    this.words = make("output", "eps");
    eps.append(this.slider, " ", this.words);
    this.slider.addEventListener("input", () => {
      gallery.control("step").value = this.slider.value;
      gallery.show();
    });
    const controls = make("div", "controls");
    controls.append(eps);
    const table = make("table");
    table.createTHead().insertRow().append(...["output", "clean", "attacked"].map((words) => {
      const cell = make("th", "", words);
      cell.scope = "col";
      return cell;
    }));
    this.rows = table.createTBody();
    const scroll = make("div", "scroll");
    scroll.append(table);
    this.dialog.append(head, pictures, controls, scroll);
    this.dialog.addEventListener("click", (event) => event.target === this.dialog && this.dialog.close());
    this.dialog.addEventListener("keydown", (event) => {
      if (event.target === this.slider) return; // whose keys are its own
      if (event.key === "ArrowLeft") this.step(-1);
      if (event.key === "ArrowRight") this.step(1);
    });
    gallery.root.append(this.dialog);
  }

  open(number) {
    this.number = number;
    this.dialog.showModal();
    this.title.focus();
    this.show();
  }

  // The next image of those that the filters leave, around the end to the first.
  step(by) {
    const left = this.gallery.cards.map((_, number) => number).filter((number) => !this.gallery.cards[number].hidden);
    const at = left.indexOf(this.number);
    if (left.length) this.number = left[(at + by + left.length) % left.length];
    this.show();
  }

  show() {
    if (!this.dialog.open) return;
    const { gallery, number } = this;
    const card = gallery.cards[number];
    const slider = gallery.control("step");
    this.title.replaceChildren(card.dataset.label, " ", make("small", "", `sample ${card.dataset.sample}`));
    this.dialog.setAttribute("aria-label", `Sample ${card.dataset.sample}, label ${card.dataset.label}`);
    this.clean.src = card.querySelector(".clean").src;
    this.clean.alt = "clean";
    this.canvas.setAttribute("aria-label", "attacked");
    this.slider.value = slider.value;
    this.slider.setAttribute("aria-valuetext", slider.getAttribute("aria-valuetext"));
    this.words.textContent = gallery.form.querySelector(".eps").textContent;
    this.rows.replaceChildren(...[...card.querySelectorAll(".opinions li")].map((said, output) => {
      const row = make("tr", said.classList[0]);
      const name = make("th", "", said.querySelector(".who").textContent);
      name.scope = "row";
      row.append(name);
      for (const key of ["clean", gallery.key]) {
        const [predicted, share, label, right] = gallery.said[key][number][output];
        const cell = make("td", right ? "" : "wrong", `${right ? "\u2713" : "\u2717"} ${predicted}, `);
        cell.title = predicted;
        cell.append(make("span", "share", `${Math.round(100 * share)} %`));
        if (!right) cell.append(make("small", "", `label: ${Math.round(100 * label)} %`));
        row.append(cell);
      }
      return row;
    }));
    gallery.draw(number, this.dialog);
  }
}

const galleries = [...document.querySelectorAll(".gallery")].map((root) => new Gallery(root));

// ---- commands and printing

for (const button of document.querySelectorAll(".copy")) {
  if (!navigator.clipboard) continue;
  button.hidden = false;
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(button.previousElementSibling.textContent);
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}

window.addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
  for (const gallery of galleries) gallery.cards.forEach((_, number) => gallery.draw(number));
});
