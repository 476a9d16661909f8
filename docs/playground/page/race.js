// Panel 7: the exact inverse, token by token, against one pass of G.
import { unpatchify } from "../model/data.js";
import { exact_steps, serial_steps } from "../model/exact_inverse.js";
import { one_pass, sample_noise } from "../model/reverse_model.js";
import { under_label } from "./digit.js";
import { by_id, chosen_radio, next_frame, paint, superscript } from "./dom.js";

// The panel keeps the digit, and a seed for races that start from new noise.
export class RacePanel {
  constructor(F, G) {
    Object.assign(this, { F, G, digit: null, seed: 1000 });
    by_id("race").addEventListener("click", () => this.run());
  }

  // Before the race both have the same noise.
  show() {
    if (by_id("race").disabled) return; // one is being run
    const z = tokens_as_image(this.digit.z, this.F.cfg, this.F.cfg.num_blocks);
    for (const id of ["exact", "pass"]) paint(by_id(id), z, this.F.cfg, "The noise z at the start");
    by_id("exact-caption").textContent = `exact inverse: ${serial_steps(this.F)} steps to go`;
    by_id("pass-caption").textContent = "one pass of G: 1 step to go";
    by_id("race-result").textContent = "";
  }

  // The noise to start from, its label, and, where there is one, the image that it belongs to.
  start() {
    if (chosen_radio("start") === "digit") return this.digit;
    this.seed += 1;
    return { z: sample_noise(this.F.cfg, this.seed), c: this.digit.c, x: null };
  }

  async run() {
    by_id("race").disabled = true;
    by_id("race-result").textContent = "";
    const { z, c, x } = this.start();
    const pass_ms = this.run_pass(z, c);
    await next_frame();
    const [exact_ms, image] = await this.run_exact(z, c);
    by_id("race-result").textContent = this.conclusion(exact_ms, pass_ms, image, x);
    by_id("race").disabled = false;
  }

  // One pass of G; returns its milliseconds.
  run_pass(z, c) {
    const started = performance.now();
    const image = one_pass(this.G, z, c);
    const ms = performance.now() - started;
    paint(by_id("pass"), image, this.F.cfg, `What G made of z ${under_label(c)}`);
    by_id("pass-caption").textContent = `one pass of G: 1 step, ${ms.toFixed(0)} ms`;
    return ms;
  }

  // The exact inverse, drawn after each token; the drawing is not in the time.
  async run_exact(z, c) {
    const total = serial_steps(this.F), steps = exact_steps(this.F, z, c);
    let ms = 0;
    for (let count = 1; ; count++) {
      const started = performance.now();
      const { done, value } = steps.next();
      ms += performance.now() - started;
      if (done) {
        const image = unpatchify(value[0], this.F.cfg);
        const alt = `What the exact inverse made of z ${under_label(c)}`;
        paint(by_id("exact"), image, this.F.cfg, alt);
        return [ms, image];
      }
      const where = `step ${count} of ${total}, block ${value.block}`;
      const caption = `exact inverse: ${where}, ${ms.toFixed(0)} ms`;
      const now = tokens_as_image(value.tokens, this.F.cfg, value.block);
      paint(by_id("exact"), now, this.F.cfg, caption);
      by_id("exact-caption").textContent = caption;
      await next_frame();
    }
  }

  // What came out, in words: computed, since it depends on the machine.
  conclusion(exact_ms, pass_ms, image, x) {
    const steps = serial_steps(this.F), faster = exact_ms > pass_ms;
    const ratio = faster ? exact_ms / pass_ms : pass_ms / exact_ms;
    let text = `The exact inverse took ${steps} steps that wait for one another, ` +
      `${exact_ms.toFixed(0)} ms; G took one pass, ${pass_ms.toFixed(0)} ms: ` +
      `${ratio.toFixed(1)} times ${faster ? "faster" : "slower"}. ` +
      "Both ran on one core in JavaScript, which computes the tokens of a pass one after " +
      "another, too. Hardware that computes them side by side gains in the pass, not in the steps.";
    if (x) text += ` The exact inverse found the digit again: error ${largest(image, x)}.`;
    return text;
  }
}

// Tokens (T, D) that the inverse of a block works on, as an image (C, H, W) to paint.
function tokens_as_image(tokens, cfg, block) {
  const range = block === 0 ? 1 : 3; // block 0 ends with an image; the states before reach farther
  return unpatchify(tokens, cfg).map((value) => value / range);
}

// The largest difference of two images, rounded.
function largest(a, b) {
  const difference = a.reduce((most, value, i) => Math.max(most, Math.abs(value - b[i])), 0);
  const [digit, power] = difference.toExponential(0).split("e");
  return `${digit}\u00a0·\u00a010${superscript(Number(power))}`;
}
