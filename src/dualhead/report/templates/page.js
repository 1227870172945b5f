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
    this.key = data.first;
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
    this.form.hidden = false;
    this.form.addEventListener("input", () => this.show());
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
    return `${this.chosen("target") || this.key.split(",")[0]},${step}`;
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
  }

  tell(card, number) {
    card.querySelectorAll(".opinions li").forEach((row, output) => {
      const [predicted, share, label, right] = this.said[this.key][number][output];
      row.classList.toggle("wrong", !right);
      row.querySelector(".what").textContent = predicted;
      row.querySelector(".what").title = predicted;
      row.querySelector(".share").textContent = `${Math.round(100 * share)} %`;
      row.querySelector(".meter").title = `probability of the label: ${Math.round(100 * label)} %`;
      row.querySelector("i").style.width = `${Math.round(100 * label)}%`;
    });
  }

  async draw(number) {
    const key = this.key;
    const card = this.cards[number];
    const clean = card.querySelector(".clean");
    const [change, scale] = this.changes[key][number];
    const place = card.querySelector(".change");
    card.querySelector(".times").textContent = change ? `, \u00d7${scale}` : "";
    if (change) {
      const image = place.querySelector("img") || document.createElement("img");
      image.alt = image.title = `perturbation, ${scale} times, grey is none`;
      image.src = change;
      place.replaceChildren(image);
    } else place.replaceChildren();
    const image = await attacked(clean.src, change, scale);
    if (key !== this.key) return; // the controls have moved on
    const canvas = card.querySelector("canvas");
    canvas.width = image.width;
    canvas.height = image.height;
    canvas.getContext("2d").putImageData(image, 0, 0);
    canvas.hidden = false;
  }

  filter() {
    const label = this.chosen("label");
    const patterns = this.chosen("outcome").split("|").filter(Boolean);
    let shown = 0;
    this.cards.forEach((card, number) => {
      const signs = this.said[this.key][number].map((said) => (said[3] ? "+" : "-"));
      const fits = (!label || card.dataset.label === label)
        && (!patterns.length || patterns.some((p) => signs.every((sign, n) => p[n] === "*" || p[n] === sign)));
      card.hidden = !fits;
      shown += fits;
    });
    this.form.querySelector(".count").textContent = `${shown} of ${this.cards.length} shown`;
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
