// What PyTorch brings along and JavaScript does not: linear maps, norms, activations, noise.
//
// A tensor is a flat Float64Array, row after row; the shape stands in a comment: (T, width) means
// T rows of `width` numbers. There is no batch: one image at a time.

// The `count` rows from row `start` of a tensor (…, width), without copying.
export function rows_of(x, width, start, count = 1) {
  return x.subarray(start * width, (start + count) * width);
}

// x += y, where a shorter y is repeated: (T, width) + (width).
export function add_(x, y) {
  for (let i = 0; i < x.length; i += y.length) {
    for (let j = 0; j < y.length; j++) x[i + j] += y[j];
  }
  return x;
}

// x + y, as a new tensor.
export function add(x, y) {
  return add_(x.slice(), y);
}

// nn.Linear: x Wᵀ + b. Rows are taken four at a time, so that each weight is read once for four.
export class Linear {
  constructor(tensors, name) {
    this.weight = tensor(tensors, `${name}.weight`); // (outputs, inputs)
    this.bias = tensor(tensors, `${name}.bias`); // (outputs)
    this.inputs = this.weight.length / this.bias.length;
    if (this.bias.length % 4) throw new Error(`${name}: outputs must be a multiple of 4`);
  }

  // (rows, inputs) to (rows, outputs).
  forward(x) {
    const rows = x.length / this.inputs;
    const y = new Float64Array(rows * this.bias.length);
    let r = 0;
    for (; r + 4 <= rows; r += 4) this.four_rows(x, y, r);
    for (; r < rows; r++) this.one_row(x, y, r);
    return y;
  }

  // Rows r … r+3 of y, two outputs at a time: eight sums run side by side.
  four_rows(x, y, r) {
    const { weight, bias, inputs } = this;
    const outputs = bias.length;
    const r0 = r * inputs, r1 = r0 + inputs, r2 = r1 + inputs, r3 = r2 + inputs;
    for (let j = 0; j < outputs; j += 2) {
      const row = j * inputs, next = row + inputs;
      let a0 = bias[j], a1 = a0, a2 = a0, a3 = a0;
      let b0 = bias[j + 1], b1 = b0, b2 = b0, b3 = b0;
      for (let i = 0; i < inputs; i++) {
        const v = weight[row + i], w = weight[next + i];
        const x0 = x[r0 + i], x1 = x[r1 + i], x2 = x[r2 + i], x3 = x[r3 + i];
        a0 += v * x0; a1 += v * x1; a2 += v * x2; a3 += v * x3;
        b0 += w * x0; b1 += w * x1; b2 += w * x2; b3 += w * x3;
      }
      const at = r * outputs + j;
      y[at] = a0; y[at + outputs] = a1; y[at + 2 * outputs] = a2; y[at + 3 * outputs] = a3;
      y[at + 1] = b0; y[at + outputs + 1] = b1;
      y[at + 2 * outputs + 1] = b2; y[at + 3 * outputs + 1] = b3;
    }
  }

  // Row r of y, four outputs at a time: what a step of the exact inverse needs.
  one_row(x, y, r) {
    const { weight, bias, inputs } = this;
    const from = r * inputs, to = r * bias.length;
    for (let j = 0; j < bias.length; j += 4) {
      const w0 = j * inputs, w1 = w0 + inputs, w2 = w1 + inputs, w3 = w2 + inputs;
      let a0 = bias[j], a1 = bias[j + 1], a2 = bias[j + 2], a3 = bias[j + 3];
      for (let i = 0; i < inputs; i++) {
        const v = x[from + i];
        a0 += weight[w0 + i] * v; a1 += weight[w1 + i] * v;
        a2 += weight[w2 + i] * v; a3 += weight[w3 + i] * v;
      }
      y[to + j] = a0; y[to + j + 1] = a1; y[to + j + 2] = a2; y[to + j + 3] = a3;
    }
  }
}

// nn.LayerNorm: each row less its mean, over its standard deviation; then scaled and shifted.
export class LayerNorm {
  constructor(tensors, name, eps = 1e-5) {
    this.weight = tensor(tensors, `${name}.weight`);
    this.bias = tensor(tensors, `${name}.bias`);
    this.eps = eps;
  }

  // (rows, width) to the same shape.
  forward(x) {
    const width = this.weight.length, y = new Float64Array(x.length);
    for (let r = 0; r < x.length; r += width) {
      let mean = 0, variance = 0;
      for (let i = 0; i < width; i++) mean += x[r + i] / width;
      for (let i = 0; i < width; i++) variance += (x[r + i] - mean) ** 2 / width;
      const scale = 1 / Math.sqrt(variance + this.eps);
      for (let i = 0; i < width; i++) {
        y[r + i] = (x[r + i] - mean) * scale * this.weight[i] + this.bias[i];
      }
    }
    return y;
  }
}

// Each row over its root mean square, then scaled.
export class RMSNorm {
  constructor(tensors, name, eps = 1e-6) {
    this.weight = tensor(tensors, `${name}.weight`);
    this.eps = eps;
  }

  // (rows, width) to the same shape.
  forward(x) {
    const width = this.weight.length, y = new Float64Array(x.length);
    for (let r = 0; r < x.length; r += width) {
      let square = 0;
      for (let i = 0; i < width; i++) square += x[r + i] ** 2 / width;
      const scale = 1 / Math.sqrt(square + this.eps);
      for (let i = 0; i < width; i++) y[r + i] = x[r + i] * scale * this.weight[i];
    }
    return y;
  }
}

export const NORMS = { layer: LayerNorm, rms: RMSNorm };

// A tensor by its name; a missing one is an error, not an array of nothing.
export function tensor(tensors, name) {
  if (!(name in tensors)) throw new Error(`the weights have no tensor ${name}`);
  return tensors[name];
}

// The distribution function Φ of N(0, 1) and its density φ at −8, −8 + 1/128, … 8.
const STEPS = 128, REACH = 8;
const PHI = Float64Array.from({ length: 2 * REACH * STEPS + 1 }, (_, i) => Phi(i / STEPS - REACH));
const DENSITY = PHI.map((_, i) => phi(i / STEPS - REACH));

function phi(x) {
  return Math.exp(-0.5 * x * x) / Math.sqrt(2 * Math.PI);
}

// Φ(x) = 1/2 + φ(x)·(x + x³/3 + x⁵/(3·5) + …) for x ≥ 0, and Φ(−x) = 1 − Φ(x).
function Phi(x) {
  if (x < 0) return 1 - Phi(-x);
  let term = x, sum = 0;
  for (let k = 3; term > 1e-17 * sum; k += 2) {
    sum += term;
    term *= (x * x) / k;
  }
  return 0.5 + phi(x) * sum;
}

// x Φ(x), from the table: between two of its places, the cubic with the right values and slopes.
export function gelu(x) {
  if (!(Math.abs(x) < REACH)) return x < 0 ? 0 : x;
  const place = (x + REACH) * STEPS, i = Math.floor(place), t = place - i;
  const rise = PHI[i + 1] - PHI[i];
  const bend_a = DENSITY[i] / STEPS - rise, bend_b = rise - DENSITY[i + 1] / STEPS;
  return x * (PHI[i] + t * rise + t * (1 - t) * ((1 - t) * bend_a + t * bend_b));
}

// x σ(x), with the logistic function σ.
export function silu(x) {
  return x / (1 + Math.exp(-x));
}

// Independent draws from N(0, 1) that depend on the seed alone; PyTorch and NumPy draw others.
export function standard_normal(count, seed) {
  const uniform = random_numbers(seed);
  return Float64Array.from({ length: count }, () => {
    const radius = Math.sqrt(-2 * Math.log(1 - uniform()));
    return radius * Math.cos(2 * Math.PI * uniform()); // Box and Muller, 1958
  });
}

// Random numbers in [0, 1) from a seed: Tommy Ettinger's generator mulberry32.
function random_numbers(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}
