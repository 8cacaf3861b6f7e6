// The page's program: an image in, scaled as `tinycifar predict` does; ten probabilities out.
import * as ort from "./ort.wasm.bundle.min.mjs";

const SIDE = 32; // of the images that the network takes, in pixels
const STRIP = 256; // rows of a large image that are held at once
const byId = (id) => document.getElementById(id);
const drawn = [...document.querySelectorAll("#drawn img")];
const classes = drawn.map((image) => image.alt.replace("drawn ", "")); // in the network's order

// ------------------------------------------------------------------------------------ the image

/** The filter of Pillow's BICUBIC. */
function cubic(x) {
  x = Math.abs(x);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? ((2.5 - 0.5 * x) * x - 4) * x + 2 : 0;
}

/**
 * What each of SIDE pixels along one axis is made of, when the middle `crop` of `size` source
 * pixels is scaled: as in Pillow's Resample.c, the filter is as wide as the area that a pixel
 * covers, and reaches beyond the crop where the image goes on.
 */
function weightsAlong(size, crop) {
  const scale = crop / SIDE;
  const stretch = Math.max(scale, 1);
  return Array.from({ length: SIDE }, (_, i) => {
    const center = (size - crop) / 2 + (i + 0.5) * scale;
    const first = Math.max(Math.trunc(center - 2 * stretch + 0.5), 0);
    const end = Math.min(Math.trunc(center + 2 * stretch + 0.5), size);
    const weights = Float64Array.from({ length: end - first }, (_, j) =>
      cubic((first + j - center + 0.5) / stretch),
    );
    const sum = weights.reduce((a, b) => a + b);
    return { first, end, weights: weights.map((weight) => weight / sum) };
  });
}

/** The weighted sums along one axis, rounded to bytes; `source[start + i * step]` is the red of pixel i. */
function sumInto(target, offset, { first, weights }, source, start, step) {
  let red = 0, green = 0, blue = 0;
  for (let j = 0, k = start + first * step; j < weights.length; j++, k += step) {
    red += weights[j] * source[k];
    green += weights[j] * source[k + 1];
    blue += weights[j] * source[k + 2];
  }
  target.set([red, green, blue], offset); // a Uint8ClampedArray rounds
}

/** The middle square of a bitmap on white, scaled to SIDE x SIDE: its RGB bytes, row by row. */
function scaled(bitmap) {
  const { width, height } = bitmap;
  const crop = Math.min(width, height);
  const across = weightsAlong(width, crop);
  const down = weightsAlong(height, crop);
  const left = across[0].first;
  const canvas = new OffscreenCanvas(across.at(-1).end - left, STRIP);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  const rows = new Uint8ClampedArray(height * SIDE * 3);
  for (let y = down[0].first; y < down.at(-1).end; y += STRIP) {
    context.fillRect(0, 0, canvas.width, STRIP);
    context.drawImage(bitmap, -left, -y);
    const strip = context.getImageData(0, 0, canvas.width, STRIP).data;
    for (let row = 0; row < Math.min(STRIP, height - y); row++)
      across.forEach((weights, x) => {
        const start = (row * canvas.width - left) * 4;
        sumInto(rows, ((y + row) * SIDE + x) * 3, weights, strip, start, 4);
      });
  }
  const pixels = new Uint8ClampedArray(SIDE * SIDE * 3);
  down.forEach((weights, y) => {
    for (let x = 0; x < SIDE; x++)
      sumInto(pixels, (y * SIDE + x) * 3, weights, rows, x * 3, SIDE * 3);
  });
  return new Uint8Array(pixels.buffer);
}

// ---------------------------------------------------------------------------------- the network

ort.env.wasm.numThreads = 1; // more would need headers that static hosts don't send
const sessions = new Map();

/** The network in a file, loaded once. */
function load(file) {
  if (!sessions.has(file)) sessions.set(file, open(file));
  return sessions.get(file);
}

async function open(file) {
  const session = await ort.InferenceSession.create(file);
  await run(session, new Uint8Array(SIDE * SIDE * 3)); // the first run is slow
  return session;
}

async function run(session, pixels) {
  const images = new ort.Tensor("uint8", pixels, [1, SIDE, SIDE, 3]);
  return (await session.run({ images })).probabilities.data;
}

// ------------------------------------------------------------------------------------- the page

let current; // the pixels on show

const bars = classes.map((name) => {
  const bar = byId("bars").appendChild(document.createElement("li"));
  bar.append(document.createElement("span"), document.createElement("span"));
  bar.firstChild.textContent = name;
  return bar;
});

const percent = (probability) => `${(100 * probability).toFixed(1)} %`;

function say(text, wrong = false) {
  byId("answer").textContent = text;
  byId("answer").classList.toggle("wrong", wrong);
}

function showPixels() {
  const image = new ImageData(SIDE, SIDE);
  for (let i = 0; i < SIDE * SIDE; i++)
    image.data.set([...current.subarray(3 * i, 3 * i + 3), 255], 4 * i);
  byId("pixels").getContext("2d").putImageData(image, 0, 0);
}

async function answer() {
  const session = await load(document.querySelector("[name=weights]:checked").value);
  const start = performance.now();
  const probabilities = await run(session, current);
  const milliseconds = performance.now() - start;
  const best = probabilities.indexOf(Math.max(...probabilities));
  bars.forEach((bar, i) => {
    bar.style.setProperty("--p", probabilities[i]);
    bar.classList.toggle("best", i === best);
    bar.lastChild.textContent = percent(probabilities[i]);
  });
  byId("time").textContent = `Inference: ${milliseconds.toFixed(1)} ms`;
  say(`${classes[best]}, ${percent(probabilities[best])}`);
  byId("answer").scrollIntoView({ block: "nearest" });
}

async function show(source, name) {
  let bitmap;
  try {
    // As Pillow reads it: turned as its EXIF says, colours as stored.
    const options = { imageOrientation: "from-image", colorSpaceConversion: "none" };
    bitmap = await createImageBitmap(source, options);
  } catch {
    return say(`${name} can't be read as an image: try a PNG, JPEG or WebP file.`, true);
  }
  current = scaled(bitmap);
  bitmap.close();
  showPixels();
  byId("pixels").setAttribute("aria-label", `${name}, scaled to 32 by 32 pixels`);
  await answer();
}

let last = Promise.resolve();
let waiting = 0;

/** Run the tasks one at a time, in the order of the calls. */
function enqueue(task) {
  const busy = (change) => document.body.setAttribute("aria-busy", (waiting += change) > 0);
  const lost = (error) => say(`The network can't be used (${error.message}): reload the page.`, true);
  busy(1);
  last = last.then(task).catch(lost).then(() => busy(-1));
}

function showFirst(files) {
  const [file] = files;
  if (file) enqueue(() => show(file, file.name || "The image"));
}

for (const input of [byId("file"), byId("photo")])
  input.addEventListener("change", () => {
    showFirst(input.files);
    input.value = ""; // so that the same file can be chosen again
  });
for (const image of drawn)
  image.parentElement.addEventListener("click", () => enqueue(() => show(image, image.alt)));
for (const choice of document.querySelectorAll("[name=weights]"))
  choice.addEventListener("change", () => enqueue(() => current && answer()));

document.addEventListener("paste", (event) => showFirst(event.clipboardData.files));
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  showFirst(event.dataTransfer.files);
});
for (const [type, over] of [["dragenter", true], ["dragover", true], ["dragleave", false], ["drop", false]])
  document.addEventListener(type, () => document.body.classList.toggle("over", over));

enqueue(() => load("net.onnx").then(() => say("Choose an image")));
