// Runs the network with ONNX Runtime, beside the page, which stays responsive.

import * as ort from './onnxruntime/ort.wasm.min.mjs';
import { fitted } from './resize.js';

ort.env.wasm.wasmPaths = new URL('./onnxruntime/', self.location.href).href;
// Threads need a server that isolates the page from other origins.
ort.env.wasm.numThreads = self.crossOriginIsolated
  ? Math.min(navigator.hardwareConcurrency || 1, 8)
  : 1;

let session;
let network;

self.onmessage = async ({ data }) => {
  try {
    if (data.kind === 'load') {
      network = data.network;
      session = await ort.InferenceSession.create(await downloaded('network.onnx'));
      self.postMessage({ kind: 'ready' });
    } else {
      self.postMessage(await segmented(data));
    }
  } catch (error) {
    const doing = data.kind === 'load' ? 'The network cannot be loaded' : 'This image failed';
    self.postMessage({ kind: 'fault', message: `${doing}: ${error.message}` });
  }
};

async function segmented({ number, pixels }) {
  const started = performance.now();
  const [height, width] = network.size;
  const { data, rows, columns } = fitted(pixels, height, width, network.fill);
  const images = new ort.Tensor('uint8', data, [1, height, width, 3]);
  const outputs = await session.run({ images });
  const confidence = outputs.confidence ? outputs.confidence.data : null;
  const result = {
    width: columns,
    height: rows,
    labels: cropped(outputs.classes.data, width, rows, columns),
    confidence: confidence && cropped(confidence, width, rows, columns),
  };
  return { kind: 'result', number, result, milliseconds: performance.now() - started };
}

// The upper left corner of a picture with one value for each pixel.
function cropped(values, width, rows, columns) {
  const corner = new values.constructor(rows * columns);
  for (let row = 0; row < rows; row++) {
    corner.set(values.subarray(row * width, row * width + columns), row * columns);
  }
  return corner;
}

// Reads a file of this folder, and says how far it is.
async function downloaded(name) {
  const answer = await fetch(name);
  if (!answer.ok) throw new Error(`${name} cannot be read (${answer.status})`);
  const length = Number(answer.headers.get('Content-Length'));
  const chunks = [];
  let done = 0;
  let said = -1;
  for (const reader = answer.body.getReader(); ; ) {
    const chunk = await reader.read();
    if (chunk.done) break;
    chunks.push(chunk.value);
    done += chunk.value.length;
    const percent = length ? Math.min(Math.floor((100 * done) / length), 100) : -1;
    if (percent > said) {
      said = percent;
      self.postMessage({ kind: 'loading', percent });
    }
  }
  return new Uint8Array(await new Blob(chunks).arrayBuffer());
}
