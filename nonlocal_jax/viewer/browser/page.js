// The page: takes an image, has it segmented by the worker, and shows what comes back.

import { Viewer, decodeImage, takeFiles } from './viewer.js';

const MOST_PIXELS = 2 ** 26;

const status = document.getElementById('status');
const input = document.getElementById('file');
const place = document.getElementById('viewer');

function say(text, isFault = false) {
  status.textContent = text;
  status.classList.toggle('is-fault', isFault);
}

async function main() {
  say('Loading the network …');
  const answer = await fetch('network.json');
  if (!answer.ok) throw new Error(`network.json cannot be read (${answer.status}).`);
  const network = await answer.json();
  const [height, width] = network.size;
  document.getElementById('about').textContent =
    `${network.title}. Images are fitted into ${width}x${height} pixels and segmented on this ` +
    'machine; none is sent anywhere.';
  const viewer = new Viewer(place, network);
  const worker = new Worker('worker.js', { type: 'module' });
  let newest = 0;
  worker.onerror = (event) => {
    say(`The network cannot be run here: ${event.message || 'its script did not load'}.`, true);
  };
  worker.onmessage = ({ data }) => {
    if (data.kind === 'loading') {
      say(`Loading the network: ${data.percent} % …`);
    } else if (data.kind === 'ready') {
      input.disabled = false;
      say('Ready.');
    } else if (data.kind === 'fault') {
      say(data.message, true);
    } else if (data.number === newest) {
      viewer.showResult(data.result);
      say(`Segmented in ${(data.milliseconds / 1000).toFixed(1)} s.`);
    }
  };

  takeFiles(input, document.body, async (file) => {
    if (input.disabled) return;
    const number = ++newest;
    try {
      const bitmap = await decodeImage(file, MOST_PIXELS);
      if (number !== newest) return;
      place.hidden = false;
      viewer.showImage(bitmap, bitmap.width, bitmap.height);
      say('Segmenting …');
      const pixels = pixelsOf(bitmap);
      bitmap.close();
      worker.postMessage({ kind: 'segment', number, pixels }, [pixels.data.buffer]);
    } catch (error) {
      say(error.message, true);
    }
  });
  worker.postMessage({ kind: 'load', network });
}

function pixelsOf(bitmap) {
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext('2d', { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  return context.getImageData(0, 0, bitmap.width, bitmap.height);
}

main().catch((error) => say(error.message, true));
