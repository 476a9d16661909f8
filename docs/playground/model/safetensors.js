// A checkpoint is a folder with config.json and model.safetensors. This reads both.

// Named tensors of a safetensors file: {name: Float64Array}.
//
// The file is: 8 bytes that say how long the header is, a JSON header that says where each tensor
// lies, and the numbers. Shipped weights are bfloat16, which is the upper half of a float32, or
// 8-bit integers, each row with a scale of its own in the tensor "….scale".
export function load_tensors(buffer) {
  const header_bytes = Number(new DataView(buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, header_bytes)));
  const tensors = {};
  for (const [name, { dtype, data_offsets }] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    const [start, end] = data_offsets;
    const bytes = buffer.slice(8 + header_bytes + start, 8 + header_bytes + end);
    tensors[name] = to_float64(bytes, dtype, name);
  }
  for (const name of Object.keys(tensors).filter((name) => `${name}.scale` in tensors)) {
    scale_rows(tensors[name], tensors[`${name}.scale`]);
    delete tensors[`${name}.scale`];
  }
  return tensors;
}

// Multiply each row of a matrix by its scale, rounded to float32 as PyTorch does.
function scale_rows(matrix, scales) {
  const width = matrix.length / scales.length;
  for (let i = 0; i < matrix.length; i++) {
    matrix[i] = Math.fround(matrix[i] * scales[Math.floor(i / width)]);
  }
}

// Bytes to float64, exactly: every bfloat16 and every float32 is a float64, too.
function to_float64(bytes, dtype, name) {
  if (dtype === "F32") return Float64Array.from(new Float32Array(bytes));
  if (dtype === "I8") return Float64Array.from(new Int8Array(bytes));
  if (dtype !== "BF16") throw new Error(`${name} is stored as ${dtype}; this reads BF16, F32, I8`);
  const upper = new Uint16Array(bytes);
  const floats = new Uint32Array(upper.length);
  for (let i = 0; i < upper.length; i++) floats[i] = upper[i] << 16;
  return Float64Array.from(new Float32Array(floats.buffer));
}

// The config of a checkpoint of a kind, "TARFlow" or "ReverseModel", with the sizes that follow.
// What this page cannot compute is refused here, so that it never computes something else.
export function read_config(saved, kind) {
  if (saved.kind !== kind) throw new Error(`this is a ${saved.kind}; a ${kind} is needed here`);
  const cfg = saved.config;
  for (const [field, value] of Object.entries(ONLY[kind])) {
    if (field in cfg && `${cfg[field]}` !== `${value}`) {
      throw new Error(`${kind} with ${field} = ${cfg[field]}: the playground knows ${value} only`);
    }
  }
  const side = cfg.image_size / cfg.patch_size; // tokens a side
  const token_dim = cfg.channels * cfg.patch_size ** 2;
  return { ...cfg, side, num_tokens: side * side, token_dim };
}

// Fields that no shipped model uses, with the one value that is computed here ([] reads as "").
const ONLY = {
  TARFlow: { logit_alpha: 0, block_layers: [], prior_var: false },
  ReverseModel: { denoise: true, token_states: false, scale_token: false },
};
