// The exact inverse of F, token by token with a KV cache (lesson 08).
import { unpatchify } from "./data.js";
import { add_, rows_of } from "./numbers.js";

// Transformer evaluations that must follow one another: B·(T − 1).
export function serial_steps(model) {
  return model.cfg.num_blocks * (model.cfg.num_tokens - 1);
}

// f_i⁻¹: x_t = y_t·exp(α_t) + μ_t, where α_t and μ_t need x_{t−1} first. A generator: it stops
// after every token and shows how far it is, so that a page can draw it. y and x are (T, D).
export function* invert_block(block, y, c) {
  const { D, width } = block;
  const x = block.order(y, D).slice(), offset = block.offset(c);
  const T = x.length / D;
  let cache = block.transformer.empty_cache();
  for (let t = 1; t < T; t++) {
    const h = add_(block.proj_in.forward(rows_of(x, D, t - 1)), rows_of(offset, width, t - 1));
    const [features, longer] = block.transformer.step(h, cache, block.flip);
    const params = block.read_out(features); // α and μ of token t, (2·D)
    for (let i = 0; i < D; i++) x[t * D + i] = x[t * D + i] * Math.exp(params[i]) + params[D + i];
    cache = longer;
    yield { token: block.flip ? T - 1 - t : t, tokens: block.order(x, D) };
  }
  return block.order(x, D);
}

// All serial steps of F⁻¹ from z (T, D), last block first; returns the states x^0 … x^B.
export function* exact_steps(model, z, c) {
  const states = [z];
  for (let i = model.blocks.length - 1; i >= 0; i--) {
    const steps = invert_block(model.blocks[i], states[0], c);
    let step = steps.next();
    for (; !step.done; step = steps.next()) yield { block: i, ...step.value };
    states.unshift(step.value);
  }
  return states;
}

// F⁻¹(z), an image (C, H, W): exact, but serial.
export function exact_inverse(model, z, c) {
  const steps = exact_steps(model, z, c);
  let step = steps.next();
  while (!step.done) step = steps.next();
  return unpatchify(step.value[0], model.cfg);
}
