// The pad: strokes of mouse, pen or finger, made into an image like those of MNIST.
import { resize, to_model_range } from "../model/data.js";

const SIDE = 280; // pixels of the pad
const MNIST = 28, BOX = 20; // MNIST puts digits into a box of 20 pixels in a frame of 28
const PEN = 22; // width of a stroke

// Let people draw on a canvas; finished(canvas) is called after every stroke.
export function make_pad(canvas, finished) {
  const context = canvas.getContext("2d", { willReadFrequently: true });
  Object.assign(context, { lineWidth: PEN, lineCap: "round", lineJoin: "round" });
  let last = null; // where the pen was, while it is down

  function place(event) {
    const { left, top, width, height } = canvas.getBoundingClientRect();
    return [((event.clientX - left) * SIDE) / width, ((event.clientY - top) * SIDE) / height];
  }

  function stroke_to(point) {
    context.strokeStyle = "#fff";
    context.beginPath();
    context.moveTo(...last);
    context.lineTo(...point);
    context.stroke();
    last = point;
  }

  canvas.addEventListener("pointerdown", (event) => {
    if (event.button || !event.isPrimary) return; // the left button or the first finger
    canvas.setPointerCapture(event.pointerId);
    last = place(event);
    stroke_to(last); // a dot
  });
  canvas.addEventListener("pointermove", (event) => {
    if (last && event.isPrimary) stroke_to(place(event));
  });
  for (const end of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(end, () => {
      if (last) finished(canvas);
      last = null;
    });
  }
  clear_pad(canvas);
}

// Black again.
export function clear_pad(canvas) {
  const context = canvas.getContext("2d");
  context.fillStyle = "#000";
  context.fillRect(0, 0, SIDE, SIDE);
}

// What is drawn, as an image (1, H, H) in [−1, 1] of the size that F knows; null: nothing is.
export function read_pad(canvas, cfg) {
  const ink = find_ink(canvas);
  if (!ink) return null;
  return to_model_range(resize(shrink(normalise(canvas, ink)), cfg.image_size));
}

// The brightness (SIDE, SIDE) of a canvas, 0 … 255.
function brightness(canvas) {
  const { data } = canvas.getContext("2d").getImageData(0, 0, SIDE, SIDE);
  return Float64Array.from({ length: SIDE * SIDE }, (_, i) => data[4 * i]);
}

// The box around the ink, and the ink's centre of mass; null where there is none.
function find_ink(canvas) {
  let [left, right, top, bottom] = [SIDE, 0, SIDE, 0];
  let mass = 0, x_mean = 0, y_mean = 0;
  brightness(canvas).forEach((value, i) => {
    if (value < 20) return;
    const x = i % SIDE, y = Math.floor(i / SIDE);
    [left, right] = [Math.min(left, x), Math.max(right, x + 1)];
    [top, bottom] = [Math.min(top, y), Math.max(bottom, y + 1)];
    mass += value;
    x_mean += value * (x + 0.5);
    y_mean += value * (y + 0.5);
  });
  if (!mass) return null;
  return { left, top, width: right - left, height: bottom - top,
    x_mean: x_mean / mass, y_mean: y_mean / mass };
}

// As MNIST was made: the longer side fills the box, the centre of mass lies in the middle.
function normalise(canvas, { left, top, width, height, x_mean, y_mean }) {
  const scale = (SIDE * BOX) / MNIST / Math.max(width, height);
  const drawn = document.createElement("canvas");
  drawn.width = drawn.height = SIDE;
  clear_pad(drawn);
  const context = drawn.getContext("2d");
  const x = SIDE / 2 - (x_mean - left) * scale, y = SIDE / 2 - (y_mean - top) * scale;
  context.drawImage(canvas, left, top, width, height, x, y, width * scale, height * scale);
  return drawn;
}

// The mean of every square of the pad: pixel values (28, 28).
function shrink(canvas) {
  const bright = brightness(canvas), p = SIDE / MNIST;
  const pixels = new Float64Array(MNIST * MNIST);
  bright.forEach((value, i) => {
    const row = Math.floor(i / SIDE / p), column = Math.floor((i % SIDE) / p);
    pixels[row * MNIST + column] += value / (p * p);
  });
  return pixels;
}
