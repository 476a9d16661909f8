// Panels 3 to 6: labels, inpainting, guidance, interpolation.
import { decode, hide, inpaint, interpolate, lerp, paste } from "../model/editing.js";
import { one_pass, sample_noise } from "../model/reverse_model.js";
import { by_id, chosen_radio, coalesced, element, fill_select, paint, show_row } from "./dom.js";
import { label_name } from "./digit.js";

// Panel 3: the same z under each label, one pass for each.
export function show_labels(G, digit) {
  const pictures = [];
  for (let c = 0; c < G.cfg.num_classes; c++) {
    const chosen = c === digit.c;
    const alt = `The z of the digit decoded as a ${c}${chosen ? ", its own label" : ""}`;
    pictures.push({ x: one_pass(G, digit.z, c), caption: `${c}`, chosen, alt });
  }
  show_row(by_id("labels"), pictures, G.cfg);
}

// Panel 4. What it keeps: which tokens are known, and which noise fills the others.
export class InpaintingPanel {
  constructor(F, G) {
    Object.assign(this, { F, G, digit: null, seed: 1 });
    this.known = Array.from({ length: F.cfg.num_tokens }, (_, t) => this.is_upper(t));
    this.show = coalesced(() => this.show_now());
    this.buttons = this.known.map((_, t) => this.token_button(t));
    const tokens = by_id("tokens");
    tokens.style.gridTemplate = `repeat(${F.cfg.side}, 1fr) / repeat(${F.cfg.side}, 1fr)`;
    tokens.append(...this.buttons);
    this.listen(tokens);
  }

  // Whether a token lies in the upper half of the image.
  is_upper(t) {
    const { side } = this.F.cfg;
    return Math.floor(t / side) < side / 2;
  }

  // A token as a button: the keyboard can paint, too.
  token_button(t) {
    const { side } = this.F.cfg;
    const name = `token in row ${Math.floor(t / side) + 1}, column ${(t % side) + 1}: resample`;
    const button = element("button", { type: "button", "aria-label": name });
    button.addEventListener("click", () => this.brush(t));
    return button;
  }

  // Painting with a pointer that is down, and the other controls.
  listen(tokens) {
    const paint_at = (event) => {
      const under = document.elementFromPoint(event.clientX, event.clientY);
      const t = this.buttons.indexOf(under);
      if (event.buttons && t >= 0) this.brush(t);
    };
    tokens.addEventListener("pointerdown", (event) => {
      if (event.target.hasPointerCapture(event.pointerId)) {
        event.target.releasePointerCapture(event.pointerId); // a finger may leave its first token
      }
      paint_at(event);
    });
    tokens.addEventListener("pointermove", paint_at);
    by_id("lower-half").addEventListener("click", () => this.set_known((t) => this.is_upper(t)));
    by_id("keep-all").addEventListener("click", () => this.set_known(() => true));
    by_id("paste").addEventListener("change", this.show);
    by_id("inpaint-noise").addEventListener("click", () => {
      this.seed += 4;
      this.show();
    });
  }

  // Apply the brush to a token.
  brush(t) {
    const keep = chosen_radio("brush") === "keep";
    if (this.known[t] !== keep) this.set_known((other) => (other === t ? keep : this.known[other]));
  }

  // Take known(t) for every token t.
  set_known(known) {
    this.known = this.known.map((_, t) => known(t));
    this.show();
  }

  // Four fillings with four ε; the label stays.
  show_now() {
    const { F, G, digit, known } = this, { x, c } = digit;
    this.buttons.forEach((button, t) => button.setAttribute("aria-pressed", `${!known[t]}`));
    const hidden = known.filter((is_known) => !is_known).length;
    const count = `${hidden} of ${known.length} tokens are hidden`;
    paint(by_id("given"), hide(x, known, F.cfg), F.cfg, `What is given: ${count}`);
    const pictures = ["₁", "₂", "₃", "₄"].map((name, i) => {
      const y = inpaint(F, G, x, known, c, sample_noise(F.cfg, this.seed + i));
      const shown = by_id("paste").checked ? paste(x, y, known, F.cfg) : y;
      return { x: shown, caption: `ε${name}`, alt: `Filling ${i + 1} of 4; ${count}` };
    });
    show_row(by_id("filled"), pictures, F.cfg);
  }
}

// Panel 5: six noises of one label, without guidance and with it.
export class GuidancePanel {
  constructor(G) {
    Object.assign(this, { G, seed: 100 });
    const labels = Array.from({ length: G.cfg.num_classes }, (_, c) => [c, label_name(c)]);
    fill_select(by_id("guidance-label"), labels);
    by_id("guidance-label").value = Math.min(4, G.cfg.num_classes - 1);
    if (G.cfg.max_guidance) by_id("w").max = G.cfg.max_guidance;
    by_id("guidance-cost").textContent = G.cfg.max_guidance
      ? "This G was trained with w as an input: one pass will do."
      : "This G was trained without w, so guidance costs two passes.";
    this.show = coalesced(() => this.show_now());
    this.show_both = coalesced(() => {
      this.show_row("unguided", 0);
      this.show_now();
    });
    by_id("w").addEventListener("input", this.show);
    by_id("guidance-label").addEventListener("change", this.show_both);
    by_id("guidance-noise").addEventListener("click", () => {
      this.seed += 6;
      this.show_both();
    });
  }

  // The row of a w; which noise it is depends on the seed alone.
  show_row(id, w) {
    const c = Number(by_id("guidance-label").value), pictures = [];
    for (let i = 0; i < 6; i++) {
      const x = decode(this.G, sample_noise(this.G.cfg, this.seed + i), c, w);
      pictures.push({ x, alt: `A ${c} from noise ${i + 1} with guidance scale ${w.toFixed(1)}` });
    }
    show_row(by_id(id), pictures, this.G.cfg);
  }

  show_now() {
    const w = Number(by_id("w").value);
    by_id("w-value").textContent = by_id("w-title").textContent = w.toFixed(1);
    this.show_row("guided", w);
  }
}

// Panel 6: from digit A to digit B, as a crossfade and through z.
export class InterpolationPanel {
  constructor(F, G, [a, b]) {
    Object.assign(this, { F, G, a, b, digit: null }); // a and b: an image x and its label c each
    by_id("take-a").addEventListener("click", () => this.take("a"));
    by_id("take-b").addEventListener("click", () => this.take("b"));
    this.show = coalesced(() => this.show_now());
  }

  take(end) {
    this[end] = { x: this.digit.x, c: this.digit.c };
    this.show();
  }

  show_now() {
    const { F, G, a, b } = this, steps = 7;
    const c = a.c === b.c ? a.c : -1; // both ends are encoded with the same label
    const captions = ["A", ...Array(steps - 2).fill(""), "B"];
    const fade = captions.map((_, i) => lerp(a.x, b.x, i / (steps - 1)));
    const walk = interpolate(F, G, a.x, b.x, c, steps);
    for (const [id, images, way] of [["crossfade", fade, "pixels"], ["walk", walk, "noise"]]) {
      const pictures = images.map((x, i) => {
        const alt = `Mixed ${way}, step ${i + 1} of ${steps} from A to B`;
        return { x, caption: captions[i], alt };
      });
      show_row(by_id(id), pictures, F.cfg);
    }
    by_id("walk-label").textContent = c < 0
      ? `A has label ${label_name(a.c)} and B ${label_name(b.c)}, so both go without a label.`
      : `Both ends are encoded and decoded with label ${c}.`;
  }
}
