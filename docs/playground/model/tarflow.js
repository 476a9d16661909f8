// F, the normalizing flow: data to noise, block after block (lesson 07).
import { patchify } from "./data.js";
import { Linear, add_, rows_of, tensor } from "./numbers.js";
import { Transformer, flip_rows } from "./transformer.js";

// A learned vector (width) for every class; label −1, "no label", is the mean of them all.
export class ClassEmbedding {
  constructor(tensors, name, num_classes) {
    this.weight = tensor(tensors, `${name}.weight`); // (classes, 1, width)
    this.num_classes = num_classes;
    this.none = new Float64Array(this.weight.length / num_classes);
    for (let i = 0; i < this.weight.length; i++) {
      this.none[i % this.none.length] += this.weight[i] / num_classes;
    }
  }

  forward(c) {
    if (!(c >= -1 && c < this.num_classes)) throw new Error(`there is no label ${c}`);
    return c < 0 ? this.none : rows_of(this.weight, this.none.length, c);
  }
}

// f_i, x^i → x^{i+1}: shift and scale each token by what stands before it.
export class FlowBlock {
  constructor(tensors, name, cfg, flip) {
    const limit = cfg.clip || Infinity; // κ of lesson 09; 0: none
    Object.assign(this, { flip, limit, D: cfg.token_dim, width: cfg.transformer.width });
    this.proj_in = new Linear(tensors, `${name}.proj_in`);
    this.pos_embed = tensor(tensors, `${name}.pos_embed`); // (T, width)
    this.class_embed = new ClassEmbedding(tensors, `${name}.class_embed`, cfg.num_classes);
    this.transformer = new Transformer(
      tensors, `${name}.transformer`, cfg.transformer, cfg.side, true,
    );
    this.proj_out = new Linear(tensors, `${name}.proj_out`);
  }

  // Raster order to the block's own, or back: odd blocks read from the end. (T, width).
  order(x, width) {
    return this.flip ? flip_rows(x, width) : x;
  }

  // What is added to every token of the block's order: position and class, (T, width).
  offset(c) {
    return add_(this.order(this.pos_embed, this.width).slice(), this.class_embed.forward(c));
  }

  // α and μ, each clipped to ±κ, from the transformer's output (S, width): (S, 2·D).
  read_out(features) {
    const { limit } = this;
    return this.proj_out.forward(features).map((v) => Math.max(-limit, Math.min(limit, v)));
  }

  // (α, μ) of every token, (T, 2·D), from tokens (T, D) in the block's order. What the network
  // puts out at token t is for token t + 1; the first token gets 0.
  affine_params(x, c) {
    const h = add_(this.proj_in.forward(x), this.offset(c));
    const out = this.read_out(this.transformer.forward(h, this.flip));
    const params = new Float64Array(out.length);
    params.set(out.subarray(0, out.length - 2 * this.D), 2 * this.D);
    return params;
  }

  // x^i (T, D) and a label to x^{i+1} and log|det ∂f_i/∂x^i|: y_t = (x_t − μ_t)·exp(−α_t).
  forward(x, c) {
    const { D } = this;
    const tokens = this.order(x, D), params = this.affine_params(tokens, c);
    const y = new Float64Array(x.length);
    let logdet = 0;
    for (let i = 0; i < y.length; i++) {
      const at = Math.floor(i / D) * 2 * D + (i % D);
      const alpha = params[at], mu = params[at + D];
      y[i] = (tokens[i] - mu) * Math.exp(-alpha);
      logdet -= alpha;
    }
    return [this.order(y, D), logdet];
  }
}

// F = f_{B−1} ∘ … ∘ f_0.
export class TARFlow {
  constructor(cfg, tensors) {
    this.cfg = cfg;
    this.blocks = [];
    for (let i = 0; i < cfg.num_blocks; i++) {
      this.blocks.push(new FlowBlock(tensors, `blocks.${i}`, cfg, i % 2 === 1));
    }
  }

  // An image (C, H, W) and a label (−1: none) to its trajectory:
  // states x^0 … x^B, each (T, D), the last of which is z, and the summed log|det|.
  forward(x, c) {
    const states = [patchify(x, this.cfg)];
    let logdet = 0;
    for (const block of this.blocks) {
      const [state, block_logdet] = block.forward(states.at(-1), c);
      states.push(state);
      logdet += block_logdet;
    }
    return { states, z: states.at(-1), logdet };
  }
}

// log p(x) = log p_0(z) + log|det|, with p_0 = N(0, I), in nats.
export function log_prob(trajectory) {
  const { z, logdet } = trajectory;
  let square = 0;
  for (const value of z) square += value * value;
  return -0.5 * (square + z.length * Math.log(2 * Math.PI)) + logdet;
}

// Bits per dimension of an 8-bit image: 7 = log₂ 128 for bins 1/128 wide (lesson 02).
export function to_bits(log_prob_of_x, dims) {
  return -log_prob_of_x / (dims * Math.LN2) + 7;
}
