// Panel 7: the exact inverse, token by token, against one pass of G.
import { unpatchify } from "../model/data.js";
import { exact_inverse, exact_steps, serial_steps } from "../model/exact_inverse.js";
import { one_pass, sample_noise } from "../model/reverse_model.js";
import { under_label } from "./digit.js";
import { by_id, chosen_radio, next_frame, paint, superscript } from "./dom.js";

const REPEATS = 5; // of what is timed

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

  // The race, drawn; then both once more without drawing, for the clock.
  async run() {
    by_id("race").disabled = true;
    by_id("race-result").textContent = "";
    const { z, c, x } = this.start();
    this.draw_pass(z, c);
    const image = await this.draw_exact(z, c);
    by_id("race-result").textContent = this.conclusion(this.time_both(z, c), image, x);
    by_id("race").disabled = false;
  }

  draw_pass(z, c) {
    const alt = `What G made of z ${under_label(c)}`;
    paint(by_id("pass"), one_pass(this.G, z, c), this.F.cfg, alt);
    by_id("pass-caption").textContent = "one pass of G: done in 1 step";
  }

  // Draws after each token; returns the image.
  async draw_exact(z, c) {
    const total = serial_steps(this.F), steps = exact_steps(this.F, z, c);
    let count = 0, step = steps.next();
    for (; !step.done; step = steps.next()) {
      count += 1;
      const { block, tokens } = step.value;
      const caption = `exact inverse: step ${count} of ${total}, in block ${block}`;
      paint(by_id("exact"), tokens_as_image(tokens, this.F.cfg, block), this.F.cfg, caption);
      by_id("exact-caption").textContent = caption;
      await next_frame();
    }
    const image = unpatchify(step.value[0], this.F.cfg);
    const alt = `What the exact inverse made of z ${under_label(c)}`;
    paint(by_id("exact"), image, this.F.cfg, alt);
    by_id("exact-caption").textContent = `exact inverse: done in ${total} steps`;
    return image;
  }

  // Milliseconds of both, in turns, so that a busy computer is busy for both.
  time_both(z, c) {
    const exact = [], pass = [];
    for (let i = 0; i < REPEATS; i++) {
      exact.push(milliseconds(() => exact_inverse(this.F, z, c)));
      pass.push(milliseconds(() => one_pass(this.G, z, c)));
    }
    return { exact: median(exact), pass: median(pass) };
  }

  // What came out, in words: computed, since it depends on the machine.
  conclusion({ exact, pass }, image, x) {
    const faster = exact > pass, ratio = faster ? exact / pass : pass / exact;
    let text = `The exact inverse took ${serial_steps(this.F)} steps that wait for one another, ` +
      `G one pass. Without the drawing that is ${exact.toFixed(0)} ms and ${pass.toFixed(0)} ms ` +
      `(medians of ${REPEATS}): G is ${ratio.toFixed(1)} times ${faster ? "faster" : "slower"}. ` +
      "Both ran on one core in JavaScript, which computes the tokens of a pass one after " +
      "another, too. Hardware that computes them side by side gains in the pass, not in the steps.";
    if (x) text += ` The exact inverse found the digit again: error ${largest(image, x)}.`;
    return text;
  }
}

// How long a call takes.
function milliseconds(call) {
  const started = performance.now();
  call();
  return performance.now() - started;
}

// The middle of an odd number of values.
function median(values) {
  return values.sort((a, b) => a - b)[(values.length - 1) / 2];
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
