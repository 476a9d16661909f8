// The page: unpack what build.py put into it, make the panels, follow the digit.
import { to_model_range } from "../model/data.js";
import { ReverseModel } from "../model/reverse_model.js";
import { load_tensors, read_config } from "../model/safetensors.js";
import { TARFlow } from "../model/tarflow.js";
import { Digit, digit_panel, show_digit, show_trajectory } from "./digit.js";
import { by_id, coalesced, next_frame } from "./dom.js";
import { GuidancePanel, InpaintingPanel, InterpolationPanel, show_labels } from "./edits.js";
import { RacePanel } from "./race.js";

// The bytes of a script element that holds base64.
function embedded_bytes(id) {
  const text = atob(by_id(id).textContent);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  by_id(id).remove();
  return bytes;
}

// A model from its config and its gzipped weights.
async function embedded_model(name, saved, Model) {
  const packed = new Blob([embedded_bytes(name)]).stream();
  const unpacked = packed.pipeThrough(new DecompressionStream("gzip"));
  const buffer = await new Response(unpacked).arrayBuffer();
  return new Model(read_config(saved, Model.name), load_tensors(buffer));
}

// The test digits: {pixels, label} each.
function embedded_digits({ labels, pixels_per_digit: n }) {
  const bytes = embedded_bytes("test-digits");
  return labels.map((label, i) => ({ label, pixels: bytes.subarray(i * n, (i + 1) * n) }));
}

// Make the panels that follow the digit, and a function that takes a new image of one.
function make_panels(F, G, test_digits) {
  const inpainting = new InpaintingPanel(F, G), race = new RacePanel(F, G);
  const interpolation = new InterpolationPanel(F, G, ends_of(test_digits));
  let image = null, digit = null;

  // The browser may draw between the panels.
  const follow = coalesced(async () => {
    if (digit?.x !== image) digit = new Digit(F, image);
    for (const panel of [inpainting, interpolation, race]) panel.digit = digit;
    show_digit(F, digit);
    show_trajectory(F, digit);
    await next_frame();
    show_labels(G, digit);
    await inpainting.show();
    race.show();
    count_update();
  });
  const take = (x) => {
    image = x;
    return follow();
  };
  const buttons = digit_panel(F, test_digits, take, follow);
  return { buttons, follow, interpolation };
}

// Two test digits of one class, to interpolate between at the start: {x, c} each.
function ends_of(test_digits) {
  const { label } = test_digits[4];
  const [a, b] = test_digits.filter((digit) => digit.label === label);
  return [a, b].map(({ pixels }) => ({ x: to_model_range(pixels), c: label }));
}

// How often all panels have followed; tests wait for it.
function count_update() {
  const { dataset } = document.documentElement;
  dataset.updates = Number(dataset.updates ?? 0) + 1;
}

// Unpack, show everything once, and say how long that took.
async function main() {
  const facts = JSON.parse(by_id("facts-json").textContent);
  const F = await embedded_model("forward", facts.forward, TARFlow);
  const G = await embedded_model("reverse", facts.reverse, ReverseModel);
  by_id("facts").textContent = facts.about;
  const { buttons, follow, interpolation } = make_panels(F, G, embedded_digits(facts.test_digits));
  buttons[13].click(); // the second 3, written more clearly than the first
  await follow();
  await interpolation.show();
  await new GuidancePanel(G).show_both();
  const seconds = performance.now() / 1000;
  by_id("status").textContent =
    `Ready after ${seconds.toFixed(1)} s. The page is one file and loads nothing else.`;
  document.documentElement.dataset.ready = seconds.toFixed(2);
}

// What went wrong, where people see it.
main().catch((error) => {
  by_id("status").textContent = `The playground cannot start: ${error.message}`;
  throw error;
});
