// Images and tokens (lesson 00). An image is (C, H, W) with values from −1, black, to 1, white.

// Cut an image into tokens (T, D): T = (H/p)² in raster order, D = C·p².
export function patchify(x, cfg) {
  const tokens = new Float64Array(x.length);
  each_pixel(cfg, (pixel, value) => { tokens[value] = x[pixel]; });
  return tokens;
}

// Put tokens (T, D) back where `patchify` took them from.
export function unpatchify(tokens, cfg) {
  const x = new Float64Array(tokens.length);
  each_pixel(cfg, (pixel, value) => { x[pixel] = tokens[value]; });
  return x;
}

// Calls visit(place in the image, place in the tokens) for every value.
function each_pixel({ image_size: size, patch_size: p, channels, side, token_dim }, visit) {
  for (let channel = 0; channel < channels; channel++) {
    for (let row = 0; row < size; row++) {
      for (let column = 0; column < size; column++) {
        const token = Math.floor(row / p) * side + Math.floor(column / p);
        const within = (channel * p + (row % p)) * p + (column % p);
        visit((channel * size + row) * size + column, token * token_dim + within);
      }
    }
  }
}

// Pixel values 0 … 255 to the middles of 256 bins that tile [−1, 1].
export function to_model_range(pixels) {
  return Float64Array.from(pixels, (value) => (value + 0.5) / 128 - 1);
}

// The inverse: the bin that each value falls into; values outside [−1, 1] are clipped.
export function to_pixels(x) {
  return Uint8ClampedArray.from(x, (value) => Math.floor((value + 1) * 128));
}

// A square picture (H, H) of pixel values to (size, size), smoothed first, rounded to 8 bits:
// the same as the package's `resize`, which made the training images.
export function resize(pixels, size) {
  const from = Math.sqrt(pixels.length);
  if (from === size) return pixels;
  const weights = triangle_weights(from, size);
  const narrow = new Float64Array(from * size); // every row resized
  const small = new Float64Array(size * size); // and then every column
  for (let i = 0; i < size; i++) {
    for (let k = 0; k < from; k++) {
      const w = weights[i * from + k];
      for (let j = 0; j < from; j++) narrow[j * size + i] += w * pixels[j * from + k];
    }
  }
  for (let i = 0; i < size; i++) {
    for (let k = 0; k < from; k++) {
      const w = weights[i * from + k];
      for (let j = 0; j < size; j++) small[i * size + j] += w * narrow[k * size + j];
    }
  }
  return small.map((value) => Math.min(255, Math.max(0, Math.round(value))));
}

// How much pixel k counts for the smaller picture's pixel i: (size, from), each row sums to 1.
function triangle_weights(from, size) {
  const weights = new Float64Array(size * from);
  const scale = from / size;
  for (let i = 0; i < size; i++) {
    const row = weights.subarray(i * from, (i + 1) * from);
    const centre = (i + 0.5) * scale - 0.5;
    for (let k = 0; k < from; k++) row[k] = Math.max(0, 1 - Math.abs(k - centre) / scale);
    const sum = row.reduce((total, w) => total + w, 0);
    for (let k = 0; k < from; k++) row[k] /= sum;
  }
  return weights;
}
