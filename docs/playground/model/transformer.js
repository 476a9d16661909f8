// The transformer of F and of G (lesson 04): pre-norm layers over the tokens of a square image.
// A causal one can also go token by token, with a KV cache.
import { Linear, NORMS, RMSNorm, add, add_, gelu, rows_of, silu } from "./numbers.js";

// The angles by which queries and keys are turned, (T, head_dim/2): half for the row, half for
// the column of a token, each with waves from fast to slow.
function rotary_angles(side, head_dim, base = 100) {
  const n = head_dim / 4, T = side * side;
  const angles = new Float64Array(T * 2 * n);
  for (let t = 0; t < T; t++) {
    for (let i = 0; i < n; i++) {
      const frequency = base ** (-i / n);
      angles[t * 2 * n + i] = Math.floor(t / side) * frequency;
      angles[t * 2 * n + n + i] = (t % side) * frequency;
    }
  }
  return angles;
}

// Turn the pairs of features (i, i + head_dim/2) of each head by the token's angles, in place.
// x is (S, width), the angles (S, head_dim/2).
function rotate_(x, width, angles, head_dim) {
  const half = head_dim / 2;
  for (let at = 0; at < x.length; at += head_dim) {
    const row = Math.floor(at / width) * half;
    for (let i = 0; i < half; i++) {
      const a = x[at + i], b = x[at + half + i];
      const cos = Math.cos(angles[row + i]), sin = Math.sin(angles[row + i]);
      x[at + i] = a * cos - b * sin;
      x[at + half + i] = a * sin + b * cos;
    }
  }
}

// softmax(q kᵀ/√head_dim) v in every head. q is (S, width), k and v are (T, width); the queries
// belong to the last S of the T tokens. Causal: a token sees none after it.
export function attend(q, k, v, width, head_dim, causal) {
  const S = q.length / width, T = k.length / width;
  const y = new Float64Array(S * width), weights = new Float64Array(T);
  for (let s = 0; s < S; s++) {
    const seen = causal ? T - S + s + 1 : T;
    for (let head = 0; head < width; head += head_dim) {
      const at = s * width + head; // where the query of this head starts, in q and in y
      for (let t = 0; t < seen; t++) {
        let score = 0;
        for (let i = 0; i < head_dim; i++) score += q[at + i] * k[t * width + head + i];
        weights[t] = score / Math.sqrt(head_dim);
      }
      softmax_(weights, seen);
      for (let t = 0; t < seen; t++) {
        for (let i = 0; i < head_dim; i++) y[at + i] += weights[t] * v[t * width + head + i];
      }
    }
  }
  return y;
}

// The first `count` numbers to positive ones that sum to 1, in place.
function softmax_(x, count) {
  let largest = -Infinity, sum = 0;
  for (let t = 0; t < count; t++) largest = Math.max(largest, x[t]);
  for (let t = 0; t < count; t++) {
    x[t] = Math.exp(x[t] - largest);
    sum += x[t];
  }
  for (let t = 0; t < count; t++) x[t] /= sum;
}

// Keys and values of the tokens seen so far, for every layer. Passed in and passed back, as in
// the package: a longer cache shares the memory of the shorter one.
export class KVCache {
  constructor(k, v, length = 0) {
    Object.assign(this, { k, v, length }); // k and v: one (T, width) a layer
  }

  // Take in k and v (S, width) of the next S tokens; return all that this layer has seen.
  extend(layer, k, v, width) {
    this.k[layer].set(k, this.length * width);
    this.v[layer].set(v, this.length * width);
    const end = this.length * width + k.length;
    return [this.k[layer].subarray(0, end), this.v[layer].subarray(0, end)];
  }

  // The cache after a whole step.
  advance(tokens) {
    return new KVCache(this.k, this.v, this.length + tokens);
  }
}

// The `count` columns from column `start` of a tensor (S, width): (S, count).
function columns_of(x, width, start, count) {
  const y = new Float64Array((x.length / width) * count);
  for (let to = 0, from = start; to < y.length; to += count, from += width) {
    for (let i = 0; i < count; i++) y[to + i] = x[from + i];
  }
  return y;
}

// Pre-norm multi-head self-attention.
class Attention {
  constructor(tensors, name, cfg, causal) {
    Object.assign(this, { width: cfg.width, head_dim: cfg.head_dim, causal });
    this.norm = new NORMS[cfg.norm](tensors, `${name}.norm`);
    this.qkv = new Linear(tensors, `${name}.qkv`);
    this.proj = new Linear(tensors, `${name}.proj`);
    this.q_norm = cfg.qk_norm ? new RMSNorm(tensors, `${name}.q_norm`) : null;
    this.k_norm = cfg.qk_norm ? new RMSNorm(tensors, `${name}.k_norm`) : null;
  }

  // Tokens (S, width) to q, k, v, each (S, width), heads side by side; q and k turned by angles.
  heads(x, angles) {
    const { width, head_dim } = this;
    const qkv = this.qkv.forward(this.norm.forward(x)); // (S, 3·width)
    let [q, k, v] = [0, 1, 2].map((part) => columns_of(qkv, 3 * width, part * width, width));
    if (this.q_norm) q = this.q_norm.forward(q); // its rows are heads
    if (this.k_norm) k = this.k_norm.forward(k);
    if (angles) [q, k].forEach((part) => rotate_(part, width, angles, head_dim));
    return [q, k, v];
  }

  // All tokens at once, (T, width) to the same shape.
  forward(x, angles) {
    const [q, k, v] = this.heads(x, angles);
    return this.proj.forward(attend(q, k, v, this.width, this.head_dim, this.causal));
  }

  // The next S tokens (S, width), after those in the cache.
  step(x, cache, layer, angles) {
    const [q, new_k, new_v] = this.heads(x, angles);
    const [k, v] = cache.extend(layer, new_k, new_v, this.width);
    return this.proj.forward(attend(q, k, v, this.width, this.head_dim, this.causal));
  }
}

// Norm, widen four times, GELU, narrow.
class GeluMLP {
  constructor(tensors, name, cfg) {
    this.norm = new NORMS[cfg.norm](tensors, `${name}.norm`);
    this.widen = new Linear(tensors, `${name}.main.0`);
    this.narrow = new Linear(tensors, `${name}.main.2`);
  }

  // Each token by itself, (S, width) to the same shape.
  forward(x) {
    return this.narrow.forward(this.widen.forward(this.norm.forward(x)).map(gelu));
  }
}

// Norm, gate silu(W₁x)·W₂x, narrow.
class SwiGLU {
  constructor(tensors, name, cfg) {
    this.norm = new NORMS[cfg.norm](tensors, `${name}.norm`);
    this.gate_up = new Linear(tensors, `${name}.gate_up`);
    this.down = new Linear(tensors, `${name}.down`);
  }

  // Each token by itself, (S, width) to the same shape.
  forward(x) {
    const both = this.gate_up.forward(this.norm.forward(x)); // (S, 2·hidden)
    const hidden = this.gate_up.bias.length / 2;
    const product = new Float64Array(both.length / 2); // (S, hidden)
    for (let i = 0; i < product.length; i++) {
      const gate = Math.floor(i / hidden) * 2 * hidden + (i % hidden);
      product[i] = silu(both[gate]) * both[gate + hidden];
    }
    return this.down.forward(product);
  }
}

const MLPS = { gelu: GeluMLP, swiglu: SwiGLU };

// Attention, then MLP, each added to what came in.
class Layer {
  constructor(tensors, name, cfg, causal) {
    this.attention = new Attention(tensors, `${name}.attention`, cfg, causal);
    this.mlp = new MLPS[cfg.mlp](tensors, `${name}.mlp`, cfg);
  }

  // All tokens at once, (T, width) to the same shape.
  forward(x, angles) {
    const y = add(x, this.attention.forward(x, angles));
    return add_(y, this.mlp.forward(y));
  }

  // The next S tokens; `layer` is this layer's number in the cache.
  step(x, cache, layer, angles) {
    const y = add(x, this.attention.step(x, cache, layer, angles));
    return add_(y, this.mlp.forward(y));
  }
}

// Layers one after another over the side² tokens of an image.
export class Transformer {
  constructor(tensors, name, cfg, side, causal) {
    Object.assign(this, { cfg, num_tokens: side * side });
    this.layers = [];
    for (let i = 0; i < cfg.num_layers; i++) {
      this.layers.push(new Layer(tensors, `${name}.layers.${i}`, cfg, causal));
    }
    this.angles = cfg.rotary ? rotary_angles(side, cfg.head_dim) : null;
  }

  // The angles of S tokens from token `start`; `flip`: counted from the end of the image.
  own_angles(start, S, flip) {
    if (!this.angles) return null;
    const half = this.cfg.head_dim / 2;
    if (!flip) return rows_of(this.angles, half, start, S);
    return flip_rows(this.angles, half).subarray(start * half, (start + S) * half);
  }

  // All tokens (T, width) to the same shape; `flip`: they come in reversed raster order.
  forward(x, flip = false) {
    const angles = this.own_angles(0, this.num_tokens, flip);
    return this.layers.reduce((h, layer) => layer.forward(h, angles), x);
  }

  // The next S tokens (S, width): their outputs and the longer cache.
  step(x, cache, flip = false) {
    const S = x.length / this.cfg.width;
    const angles = this.own_angles(cache.length, S, flip);
    const h = this.layers.reduce((y, layer, i) => layer.step(y, cache, i, angles), x);
    return [h, cache.advance(S)];
  }

  // A cache that holds nothing yet.
  empty_cache() {
    const memory = () => this.layers.map(() => new Float64Array(this.num_tokens * this.cfg.width));
    return new KVCache(memory(), memory());
  }
}

// The rows of a tensor (T, width) from the last to the first.
export function flip_rows(x, width) {
  const y = new Float64Array(x.length);
  for (let at = 0; at < x.length; at += width) {
    y.set(x.subarray(at, at + width), x.length - width - at);
  }
  return y;
}
