// G, the learned inverse of F: noise to a clean image, in one pass (lesson 10).
import { unpatchify } from "./data.js";
import { Linear, NORMS, add, add_, silu, standard_normal, tensor } from "./numbers.js";
import { ClassEmbedding } from "./tarflow.js";
import { Transformer } from "./transformer.js";

// From a guidance scale w to a vector (width); only a G that was trained with w has one.
class ScaleEmbedding {
  constructor(tensors, name) {
    this.into = new Linear(tensors, `${name}.0`);
    this.out = new Linear(tensors, `${name}.2`);
  }

  forward(w) {
    return this.out.forward(this.into.forward(Float64Array.of(w)).map(silu));
  }
}

// Inverts one f_i: h^{i+1} to h^i, every token seeing every other.
class ReverseBlock {
  constructor(tensors, name, cfg) {
    this.class_embed = new ClassEmbedding(tensors, `${name}.class_embed`, cfg.num_classes);
    this.transformer = new Transformer(
      tensors, `${name}.transformer`, cfg.transformer, cfg.side, false,
    );
    this.scale_embed = null;
    if (cfg.max_guidance) this.scale_embed = new ScaleEmbedding(tensors, `${name}.scale_embed`);
  }

  // Features (T, width), a label (−1: none) and, where G takes it, w, to features (T, width).
  forward(h, c, w) {
    const inside = add(h, this.class_embed.forward(c));
    if (this.scale_embed) add_(inside, this.scale_embed.forward(w));
    return this.transformer.forward(inside);
  }
}

// G: the noise enters the model's width, B blocks invert F's, one more removes the noise.
export class ReverseModel {
  constructor(cfg, tensors) {
    this.cfg = cfg;
    this.proj_in = new Linear(tensors, "proj_in");
    this.pos_embed = tensor(tensors, "pos_embed"); // (T, width)
    this.blocks = [];
    for (let i = 0; i < cfg.num_blocks; i++) {
      this.blocks.push(new ReverseBlock(tensors, `blocks.${i}`, cfg));
    }
    this.denoiser = new ReverseBlock(tensors, "denoiser", cfg);
    this.out_norm = new NORMS[cfg.transformer.norm](tensors, "out.0");
    this.out = new Linear(tensors, "out.1");
  }

  // Noise (T, D) to an image (C, H, W), where run(block, h) says how a block is applied.
  run_blocks(z, run) {
    let h = add_(this.proj_in.forward(z), this.pos_embed);
    for (const block of this.blocks.toReversed()) h = run(block, h);
    h = run(this.denoiser, h);
    return unpatchify(this.out.forward(this.out_norm.forward(h)), this.cfg);
  }
}

// Sample: one forward pass of G. w is used only by a G that was trained with it.
export function one_pass(model, z, c, w = 0) {
  return model.run_blocks(z, (block, h) => block.forward(h, c, w));
}

// Noise z (T, D) of a seed.
export function sample_noise(cfg, seed = 0) {
  return standard_normal(cfg.num_tokens * cfg.token_dim, seed);
}
