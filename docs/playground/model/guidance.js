// Classifier-free guidance of G at inference (lesson 14): every block is asked twice.

// Past the state with a label, away from that without: (1 + w)·a − w·b.
export function cfg_extrapolate(with_label, without, w) {
  return with_label.map((a, i) => (1 + w) * a - w * without[i]);
}

// Noise (T, D) to an image (C, H, W), for a G that was trained without w: two passes.
export function guided_pass(model, z, c, w) {
  if (model.cfg.max_guidance) throw new Error("this G takes w as an input: use one_pass");
  return model.run_blocks(z, (block, h) =>
    cfg_extrapolate(block.forward(h, c), block.forward(h, -1), w));
}
