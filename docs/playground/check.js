// Compares F, G, the exact inverse and the edits with PyTorch: node docs/playground/check.js
//
// With the path of a file that reference.py wrote, that file is read; without one, it is written
// first, by the Python that the environment variable PYTHON names, else python3.
import { spawnSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { resize, unpatchify } from "./model/data.js";
import { inpaint, interpolate } from "./model/editing.js";
import { exact_inverse } from "./model/exact_inverse.js";
import { guided_pass } from "./model/guidance.js";
import { ReverseModel, one_pass, sample_noise } from "./model/reverse_model.js";
import { load_tensors, read_config } from "./model/safetensors.js";
import { TARFlow, log_prob } from "./model/tarflow.js";

const HERE = dirname(fileURLToPath(import.meta.url));
const TOLERANCE = 1e-5;
let wrong = 0;

// The bytes of a file, as an ArrayBuffer of their own.
function read_bytes(path) {
  const { buffer, byteOffset, byteLength } = readFileSync(path);
  return buffer.slice(byteOffset, byteOffset + byteLength);
}

// A model that comes with the course.
function load_model(name, folder, Model) {
  const path = join(HERE, "../../data", name, folder);
  const saved = JSON.parse(readFileSync(join(path, "config.json"), "utf8"));
  return new Model(
    read_config(saved, Model.name), load_tensors(read_bytes(join(path, "model.safetensors"))),
  );
}

// The largest |found − expected|, printed, and counted as wrong above the tolerance.
function compare(name, found, expected) {
  if (found.length !== expected.length) throw new Error(`${name}: ${found.length} values`);
  let error = 0;
  for (let i = 0; i < expected.length; i++) {
    const difference = Math.abs(found[i] - expected[i]);
    error = difference <= error ? error : difference; // NaN counts as an error, too
  }
  const good = error <= TOLERANCE;
  if (!good) wrong += 1;
  const verdict = `${good ? "ok   " : "WRONG"} ${name.padEnd(34)}`;
  console.log(`${verdict} largest error ${error.toExponential(1)}`);
}

// Everything that the page computes with one pair of models.
function compare_pair(expected) {
  const F = load_model(expected.name, "forward", TARFlow);
  const G = load_model(expected.name, "reverse", ReverseModel);
  const { c, w, narrow } = expected.inputs;
  const [x, z, eps] = [expected.inputs.x, expected.inputs.z, expected.eps].map(
    (values) => Float64Array.from(values),
  );
  const where = `${expected.name}, label ${c}: `;
  const trajectory = F.forward(x, c);
  trajectory.states.forEach((state, i) => compare(`${where}x^${i}`, state, expected.states[i]));
  compare(`${where}logdet`, [trajectory.logdet], [expected.logdet]);
  compare(`${where}log_prob`, [log_prob(trajectory)], [expected.log_prob]);
  compare(`${where}exact_inverse`, exact_inverse(F, z, c), expected.exact_inverse);
  compare(`${where}one_pass`, one_pass(G, z, c), expected.one_pass);
  const guide = G.cfg.max_guidance ? one_pass : guided_pass;
  compare(`${where}with w = ${w}`, guide(G, z, c, w), expected.guided);
  const known = Array.from({ length: F.cfg.num_tokens }, (_, t) => t < F.cfg.num_tokens / 2);
  if (F.cfg.side % 2 === 0) { // the upper half is whole tokens
    compare(`${where}inpaint`, inpaint(F, G, x, known, c, eps), expected.inpaint);
  }
  const images = interpolate(F, G, x, mirrored(x, F.cfg), c, 5);
  compare(`${where}interpolate`, images.flatMap((image) => [...image]), expected.interpolate);
  for (const block of F.blocks) block.limit = narrow;
  compare(`${where}clipped`, F.forward(x, c).z, expected.clipped);
  compare(`${where}clipped inverse`, exact_inverse(F, z, c), expected.clipped_inverse);
}

// An image with left and right exchanged.
function mirrored(x, { image_size }) {
  return x.map((_, i) => x[i - (i % image_size) + image_size - 1 - (i % image_size)]);
}

// What needs no reference: models that the page does not know are refused.
function check_refusals() {
  const cfg = { image_size: 16, channels: 1, patch_size: 4 };
  const unknown = { kind: "TARFlow", config: { ...cfg, logit_alpha: 0.05 } };
  const other = { kind: "TARFlow", config: cfg };
  for (const [saved, kind] of [[unknown, "TARFlow"], [other, "ReverseModel"]]) {
    try {
      read_config(saved, kind);
    } catch (error) {
      console.log(`ok    refused: ${error.message}`);
      continue;
    }
    wrong += 1;
    console.log(`WRONG accepted as ${kind}: ${JSON.stringify(saved)}`);
  }
}

// The CPU milliseconds of one call, the fastest of some; the clock of other programs is left out.
function cpu_ms(call, repeats = 15) {
  const times = [];
  for (let i = 0; i < repeats; i++) {
    const start = process.cpuUsage();
    call();
    const { user, system } = process.cpuUsage(start);
    times.push((user + system) / 1000);
  }
  return Math.min(...times).toFixed(1);
}

// How long the smallest pair takes; for information, nothing is required.
function report_times() {
  const F = load_model("mnist-mini", "forward", TARFlow);
  const G = load_model("mnist-mini", "reverse", ReverseModel);
  const z = sample_noise(F.cfg, 1), x = unpatchify(z, F.cfg);
  const times = { F: () => F.forward(x, 3), "one pass of G": () => one_pass(G, z, 3),
    "exact inverse": () => exact_inverse(F, z, 3) };
  const named = Object.entries(times).map(([name, call]) => `${name} ${cpu_ms(call)} ms`);
  console.log(`mnist-mini, CPU time of one image on one core: ${named.join(", ")}`);
}

// Reads the reference, writing it first where none is given.
function read_reference(path) {
  if (path) return JSON.parse(readFileSync(path, "utf8"));
  const folder = mkdtempSync(join(tmpdir(), "playground-"));
  const file = join(folder, "reference.json");
  const python = process.env.PYTHON ?? "python3";
  const done = spawnSync(python, [join(HERE, "reference.py"), file], { stdio: "inherit" });
  if (done.status !== 0) throw new Error(`${python} reference.py did not succeed`);
  const text = readFileSync(file, "utf8");
  rmSync(folder, { recursive: true });
  return JSON.parse(text);
}

const reference = read_reference(process.argv[2]);
reference.pairs.forEach(compare_pair);
compare("resize", resize(reference.resize.pixels, 16), reference.resize.small);
check_refusals();
report_times();
console.log(wrong ? `${wrong} comparisons failed` : `all within ${TOLERANCE}`);
process.exitCode = wrong ? 1 : 0;
