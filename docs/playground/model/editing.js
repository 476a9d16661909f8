// Edits: encode with F, change something, decode with G (lesson 15).
import { patchify, unpatchify } from "./data.js";
import { guided_pass } from "./guidance.js";
import { one_pass } from "./reverse_model.js";

// z = F(x), the noise (T, D) that belongs to an image.
export function encode(F, x, c) {
  return F.forward(x, c).z;
}

// Noise (T, D) to an image: one pass of G, guided if asked. A G without w as an input needs two.
export function decode(G, z, c, w = 0) {
  return G.cfg.max_guidance || !w ? one_pass(G, z, c, w) : guided_pass(G, z, c, w);
}

// The straight line from a (t = 0) to b (t = 1).
export function lerp(a, b, t) {
  return a.map((value, i) => (1 - t) * value + t * b[i]);
}

// The arc from a to b: direction and length change evenly. Parallel ends: the line.
export function slerp(a, b, t) {
  const length_a = Math.max(norm(a), 1e-12), length_b = Math.max(norm(b), 1e-12);
  const cos = dot(a, b) / (length_a * length_b);
  const angle = Math.acos(Math.min(1, Math.max(-1, cos)));
  if (Math.sin(angle) < 1e-4) return lerp(a, b, t);
  const length = ((1 - t) * length_a + t * length_b) / Math.sin(angle);
  const share_a = (Math.sin((1 - t) * angle) / length_a) * length;
  const share_b = (Math.sin(t * angle) / length_b) * length;
  return a.map((value, i) => share_a * value + share_b * b[i]);
}

function dot(a, b) {
  return a.reduce((sum, value, i) => sum + value * b[i], 0);
}

function norm(a) {
  return Math.sqrt(dot(a, a));
}

// Images along the arc between the noises of two images, both ends included.
export function interpolate(F, G, a, b, c, steps = 7) {
  const start = encode(F, a, c), end = encode(F, b, c);
  const images = [];
  for (let i = 0; i < steps; i++) {
    images.push(decode(G, slerp(start, end, i / (steps - 1)), c));
  }
  return images;
}

// x where its token is known, y elsewhere; images (C, H, W), `known` has a truth value a token.
export function paste(x, y, known, cfg) {
  return unpatchify(keep_known(patchify(x, cfg), patchify(y, cfg), known), cfg);
}

// z' = M⊙z + (1 − M)⊙ε: noises (T, D), M a truth value a token.
export function keep_known(z, eps, known) {
  const D = z.length / known.length;
  return z.map((value, i) => (known[Math.floor(i / D)] ? value : eps[i]));
}

// Make sure that nothing hidden reaches F: black stands in the hole.
export function hide(x, known, cfg, fill = -1) {
  return paste(x, new Float64Array(x.length).fill(fill), known, cfg);
}

// Keep the noise of the known tokens, take ε (T, D) for the others, decode. Nothing is pasted.
export function inpaint(F, G, x, known, c, eps, w = 0) {
  const z = encode(F, hide(x, known, F.cfg), c);
  return decode(G, keep_known(z, eps, known), c, w);
}
