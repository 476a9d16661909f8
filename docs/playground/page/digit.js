// Panels 1 and 2: a digit, its trajectory through F, and its likelihood under each label.
import { to_model_range, unpatchify } from "../model/data.js";
import { log_prob, to_bits } from "../model/tarflow.js";
import { by_id, element, fill_select, paint, show_row, stretch, superscript } from "./dom.js";
import { clear_pad, make_pad, read_pad } from "./pad.js";

// The digit that all panels work on: its image x (C, H, W), the label c that F and G are told, and
// its trajectory under that label.
export class Digit {
  // What is known about x: a trajectory and bits per dimension for each label, −1 (none) last.
  constructor(F, x) {
    this.x = x;
    this.trajectories = new Map();
    this.bits = new Map();
    for (const c of all_labels(F.cfg)) {
      const trajectory = F.forward(x, c);
      this.trajectories.set(c, trajectory);
      this.bits.set(c, to_bits(log_prob(trajectory), x.length));
    }
    const labels = all_labels(F.cfg).slice(0, -1);
    this.ranked = labels.sort((a, b) => this.bits.get(a) - this.bits.get(b)); // likely ones first
    this.c = this.ranked[0];
  }

  get trajectory() {
    return this.trajectories.get(this.c);
  }

  get z() {
    return this.trajectory.z;
  }
}

// 0 … K − 1 and −1, "no label".
function all_labels(cfg) {
  return [...Array(cfg.num_classes).keys(), -1];
}

// A label as tables and lists show it.
export function label_name(c) {
  return c < 0 ? "none" : `${c}`;
}

// A label as part of a sentence.
export function under_label(c) {
  return c < 0 ? "without a label" : `under label ${c}`;
}

// Panel 1. chosen(x) is called with each new image, relabelled() when another label is chosen.
export function digit_panel(F, test_digits, chosen, relabelled) {
  const pad = by_id("pad"), hint = by_id("hint"), { cfg } = F;
  const clear = () => {
    clear_pad(pad);
    hint.hidden = false;
  };
  const buttons = test_digits.map(({ pixels, label }, i) => {
    const canvas = element("canvas"), x = to_model_range(pixels);
    paint(canvas, x, cfg, "");
    const button = element("button", { type: "button", "aria-pressed": "false" }, canvas);
    button.setAttribute("aria-label", `test digit ${i + 1}, a ${label}`);
    button.addEventListener("click", () => {
      clear();
      press(buttons, button);
      chosen(x);
    });
    return button;
  });
  by_id("picks").append(...buttons);
  pad.addEventListener("pointerdown", () => { hint.hidden = true; });
  make_pad(pad, () => {
    const x = read_pad(pad, cfg);
    if (!x) return;
    press(buttons, null);
    chosen(x);
  });
  by_id("clear").addEventListener("click", clear);
  by_id("label").addEventListener("change", relabelled);
  const { image_size: size } = cfg;
  by_id("size").textContent = `${size}\u00a0×\u00a0${size}\u00a0pixels`;
  return buttons;
}

// Mark one of the buttons as pressed, or none.
function press(buttons, pressed) {
  for (const button of buttons) button.setAttribute("aria-pressed", `${button === pressed}`);
}

// Show the digit as F sees it, and offer labels; "auto" is the most likely one.
export function show_digit(F, digit) {
  const [best] = digit.ranked;
  paint(by_id("seen"), digit.x, F.cfg, "The digit as F sees it");
  const names = all_labels(F.cfg).map((c) => [c, label_name(c)]);
  fill_select(by_id("label"), [["auto", `the most likely (${best})`], ...names]);
  const chosen = by_id("label").value;
  digit.c = chosen === "auto" ? best : Number(chosen);
}

// Panel 2: the states x^0 … x^B as images, then the table of likelihoods.
export function show_trajectory(F, digit) {
  const { states } = digit.trajectory, last = states.length - 1;
  const pictures = states.map((state, i) => {
    const name = i === last ? `x${superscript(i)} = z` : `x${superscript(i)}`;
    const what = i === 0 ? "the digit as tokens" : `after block ${i} of ${last}`;
    return { x: stretch(unpatchify(state, F.cfg)), caption: name, alt: `State ${i}, ${what}` };
  });
  show_row(by_id("states"), pictures, F.cfg);
  show_likelihood(F, digit);
}

// A row for each label, and a sentence with the most likely one.
function show_likelihood(F, digit) {
  const [best, second] = digit.ranked, least = digit.bits.get(best);
  const most = Math.max(...digit.bits.values()) - least;
  const rows = all_labels(F.cfg).map((c) => {
    const more = digit.bits.get(c) - least;
    const bar = element("span", { class: "bar" });
    bar.style.width = `${(70 * Math.max(more, 0)) / Math.max(most, 1e-9)}%`;
    const row = element("tr", {}, element("th", { scope: "row" }, label_name(c)),
      element("td", { class: "value" }, digit.bits.get(c).toFixed(3)),
      element("td", { class: "more" }, bar, c === best ? "the best" : ` ${signed(more)}`));
    row.classList.toggle("chosen", c === best);
    return row;
  });
  by_id("likelihood").tBodies[0].replaceChildren(...rows);
  const gap = digit.bits.get(second) - least, dims = digit.x.length;
  by_id("most-likely").textContent =
    `F finds ${best} most likely: ${least.toFixed(2)} bits per dimension. Next comes ${second}, ` +
    `with ${gap.toFixed(3)} more; over all ${dims} dimensions that makes ` +
    `${(gap * dims).toFixed(1)} bits.`;
}

// A number with its sign, as typography wants it.
function signed(value) {
  return `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(3)}`;
}
