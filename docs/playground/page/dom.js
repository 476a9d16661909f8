// Elements of the page: finding, making, painting them.
import { to_pixels } from "../model/data.js";

// The element of an id that index.html has.
export function by_id(id) {
  return document.getElementById(id);
}

// A new element with attributes and children.
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// Paint an image (C, H, W) of 1 or 3 channels, one pixel for one, and say what it shows; a picture
// whose meaning is said elsewhere has the empty text.
export function paint(canvas, x, cfg, alt) {
  const size = cfg.image_size, pixels = to_pixels(x);
  if (canvas.width !== size) canvas.width = canvas.height = size;
  const context = canvas.getContext("2d"), picture = context.createImageData(size, size);
  for (let i = 0; i < size * size; i++) {
    for (let j = 0; j < 3; j++) {
      picture.data[4 * i + j] = pixels[(j % cfg.channels) * size * size + i];
    }
    picture.data[4 * i + 3] = 255; // opaque
  }
  context.putImageData(picture, 0, 0);
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", alt);
  canvas.setAttribute("aria-hidden", `${alt === ""}`);
}

// Shift and scale values to [−1, 1]: a state of F then has its own range of grey.
export function stretch(x) {
  let low = Infinity, high = -Infinity;
  for (const value of x) {
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  return x.map((value) => (2 * (value - low)) / Math.max(high - low, 1e-9) - 1);
}

// Show pictures {x, alt, caption, chosen} side by side; canvases that are there are used again.
export function show_row(row, pictures, cfg) {
  while (row.children.length > pictures.length) row.lastElementChild.remove();
  while (row.children.length < pictures.length) {
    row.append(element("figure", {}, element("canvas"), element("figcaption")));
  }
  pictures.forEach(({ x, alt, caption = "", chosen = false }, i) => {
    const figure = row.children[i];
    paint(figure.firstElementChild, x, cfg, alt);
    figure.lastElementChild.textContent = caption;
    figure.classList.toggle("chosen", chosen);
  });
}

// Fill a select with pairs [value, text]; what was chosen stays chosen.
export function fill_select(select, choices) {
  const before = select.value;
  select.replaceChildren(...choices.map(([value, text]) => element("option", { value }, text)));
  if (choices.some(([value]) => `${value}` === before)) select.value = before;
}

// The value of the chosen radio button of a group.
export function chosen_radio(name) {
  return document.querySelector(`input[name="${name}"]:checked`).value;
}

// A whole number, raised: 10 and superscript(-3) make 10⁻³.
export function superscript(i) {
  return [...`${i}`].map((digit) => (digit === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit])).join("");
}

// Resolves when the browser has had time to draw what is there.
export function next_frame() {
  return new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve)));
}

// A function that runs `work` soon. Calls that come while it waits or works are one more run, so
// that a slider that is dragged never leaves a queue behind. The result resolves when all is done.
export function coalesced(work) {
  let wanted = false, running = null;
  async function run() {
    while (wanted) {
      wanted = false;
      await next_frame();
      await work();
    }
  }
  return () => {
    wanted = true;
    running ??= run().finally(() => { running = null; });
    return running;
  };
}
