// The page: sends an image, shows its classes, their confidence, and where a pixel looks.

import { INFERNO, VIRIDIS, colored, gradient } from './ramps.js';
import { ask, compute } from './requests.js';
import { Viewer, decodeImage, takeFiles } from './viewer.js';

const MOST_CONFIDENCE = 65535;
const SOON = 1500; // milliseconds

const byId = (id) => document.getElementById(id);
const input = byId('file');
const status = byId('status');

function say(text, isFault = false) {
  status.textContent = text;
  status.classList.toggle('is-fault', isFault);
}

function choose(view) {
  document.querySelector(`input[name=view][value=${view}]`).checked = true;
}

class Page {
  constructor(network) {
    this.network = network;
    this.image = null; // what the server knows of the image that is shown
    this.attention = null; // of the pixel that was clicked
    this.request = new AbortController();
    this.viewer = new Viewer(byId('viewer'), { ...network, onPoint: (at) => this.look(at) });
    this.viewer.pointed.after(byId('caption'));
    byId('views').addEventListener('change', () => this.showView());
    takeFiles(input, document.body, (file) => this.take(file));
    for (let i = 0; i < network.samples; i++) this.addSample(i);
    input.disabled = false;
  }

  addSample(index) {
    const picture = document.createElement('img');
    picture.src = `samples/${index}.png`;
    picture.alt = `Sample ${index + 1}: gray shapes and a colored disc`;
    const button = document.createElement('button');
    button.type = 'button';
    button.append(picture);
    button.addEventListener('click', () =>
      this.work(async () => {
        const sample = await (await ask(picture.src)).blob();
        await this.take(new File([sample], `Sample ${index + 1}`));
      }),
    );
    byId('samples').append(button);
    byId('samples').hidden = false;
  }

  /** Runs something and says what fails, unless something else was begun meanwhile. */
  async work(task) {
    try {
      await task();
    } catch (error) {
      if (error.name !== 'AbortError') say(error.message, true);
    }
  }

  /** Begins a request in place of the one before, which leaves the line; returns its options. */
  begin(doing) {
    this.request.abort();
    this.request = new AbortController();
    const { signal } = this.request;
    const started = Date.now();
    let ahead = 0;
    const tell = () => {
      const waited = Date.now() - started;
      const seconds = waited > SOON ? ` ${Math.round(waited / 1000)} s` : '';
      const before = ahead === 1 ? '1 request comes' : `${ahead} requests come`;
      say(ahead > 0 ? `Waiting: ${before} before yours …` : `${doing} …${seconds}`);
    };
    const timer = setInterval(tell, 1000);
    const end = () => clearInterval(timer);
    signal.addEventListener('abort', end);
    tell();
    return {
      signal,
      end,
      seconds: () => ((Date.now() - started) / 1000).toFixed(1),
      onTurn: (count) => {
        ahead = count;
        tell();
      },
    };
  }

  take(file) {
    const { mostBytes } = this.network;
    const name = file.name || 'The image';
    return this.work(async () => {
      if (file.size > mostBytes) {
        const size = (file.size / 2 ** 20).toFixed(0);
        throw new Error(`${name} has ${size} MiB; ${mostBytes / 2 ** 20} MiB are the most.`);
      }
      const options = this.begin(`Segmenting ${name}`);
      try {
        const isShown = await this.preview(file, options.signal);
        const image = await compute('images', file, options);
        await this.show(image, isShown, options.signal);
        say(`${name}: segmented in ${options.seconds()} s.`);
      } catch (error) {
        if (error.name === 'AbortError') throw error;
        throw new Error(error.message.replace(/^The file /, `${name} `));
      } finally {
        options.end();
      }
    });
  }

  /** Shows an image before it is segmented; returns false if the browser does not read it. */
  async preview(file, signal) {
    let bitmap;
    try {
      bitmap = await decodeImage(file, this.network.mostPixels);
    } catch {
      return false; // the server says what is wrong, or reads it
    }
    signal.throwIfAborted();
    this.clear(bitmap, bitmap.width, bitmap.height);
    bitmap.close();
    return true;
  }

  clear(picture, width, height) {
    this.image = this.attention = null;
    byId('views').hidden = byId('caption').hidden = true;
    byId('viewer').hidden = false;
    choose('classes');
    this.viewer.stage.classList.remove('is-gray', 'is-smooth');
    this.viewer.showImage(picture, width, height);
  }

  async show(image, isShown, signal) {
    const part = async (name) => ask(`images/${image.image}/${name}`, { signal });
    const [labels, confidence] = await Promise.all(
      ['labels', 'confidence'].map(async (name) => (await part(name)).arrayBuffer()),
    );
    if (!isShown) {
      const picture = await createImageBitmap(await (await part('picture')).blob());
      signal.throwIfAborted();
      this.clear(picture, image.width, image.height);
    }
    signal.throwIfAborted();
    this.image = image;
    this.confidence = new Uint16Array(confidence);
    this.result = {
      ...image.shown,
      labels: new Uint8Array(labels),
      confidence: Float32Array.from(this.confidence, (steps) => steps / MOST_CONFIDENCE),
    };
    this.viewer.showResult(this.result);
    byId('views').hidden = false;
  }

  /** Computes where a pixel looks. */
  look({ x, y }) {
    if (this.image === null) return undefined;
    if (!this.network.attention) {
      choose('attention');
      this.showView();
      return undefined;
    }
    const { image } = this;
    return this.work(async () => {
      const options = this.begin(`Looking from (${x}, ${y})`);
      try {
        const address = `images/${image.image}/attention`;
        const found = await compute(address, JSON.stringify({ x, y }), options);
        options.signal.throwIfAborted();
        this.attention = { ...found, x, y };
        choose('attention');
        this.showView();
        say(`Computed in ${options.seconds()} s.`);
      } finally {
        options.end();
      }
    });
  }

  /** Shows what is chosen: classes, confidence or attention. */
  showView() {
    const { viewer, attention } = this;
    const view = document.querySelector('input[name=view]:checked').value;
    const { width, height } = this.image.shown;
    viewer.stage.classList.toggle('is-gray', view !== 'classes');
    viewer.stage.classList.toggle('is-smooth', view === 'attention');
    viewer.clearMarks();
    if (view === 'classes') {
      viewer.showLabels();
      byId('caption').hidden = true;
    } else if (view === 'confidence') {
      viewer.showLayer(colored(this.confidence, MOST_CONFIDENCE, width, height, VIRIDIS));
      this.explain("The probability of each pixel's class.", VIRIDIS, '0 %', '100 %');
    } else if (!this.network.attention) {
      viewer.showLayer(new ImageData(1, 1));
      this.explain('This network has no non-local block, and so no attention.');
    } else if (attention === null) {
      viewer.showLayer(new ImageData(1, 1));
      this.explain('Click at a pixel to see where it looks, or choose one by the arrow keys.');
    } else {
      const shades = Uint8Array.from(atob(attention.shades), (byte) => byte.charCodeAt(0));
      viewer.showLayer(colored(shades, 255, attention.width, attention.height, INFERNO));
      this.mark();
      const { x, y, span } = attention;
      this.explain(
        `Where (${x}, ${y}) looks, marked by a ring; lines lead to the largest weights. Relative ` +
          `to their mean, weights are ${span}.`,
        INFERNO,
        'least',
        'most',
      );
    }
  }

  explain(text, ramp = null, low = '', high = '') {
    byId('caption').hidden = false;
    byId('explanation').textContent = text;
    byId('ramp').hidden = ramp === null;
    if (ramp === null) return;
    byId('low').textContent = low;
    byId('high').textContent = high;
    byId('bar').style.background = gradient(ramp);
  }

  /** Draws a ring around the pixel that looks, and lines to what it looks at most. */
  mark() {
    const { context, scale, unit } = this.viewer.startMarks();
    const [x, y] = this.attention.query.map((value) => (value + 0.5) * scale);
    for (const [linkX, linkY, strength] of this.attention.links) {
      const [toX, toY] = [(linkX + 0.5) * scale, (linkY + 0.5) * scale];
      context.strokeStyle = context.fillStyle = '#fff';
      context.lineWidth = unit * Math.max(1.5 * strength, 0.5);
      context.beginPath();
      context.moveTo(x, y);
      context.lineTo(toX, toY);
      context.stroke();
      context.beginPath();
      context.arc(toX, toY, 1.8 * unit, 0, 2 * Math.PI);
      context.fill();
    }
    context.lineWidth = 2 * unit;
    context.strokeStyle = '#40e0d0';
    context.beginPath();
    context.arc(x, y, 5 * unit, 0, 2 * Math.PI);
    context.stroke();
  }
}

async function main() {
  say('Loading …');
  const network = await (await ask('network.json')).json();
  byId('title').textContent = network.title;
  byId('about').textContent = network.attention
    ? 'See the class of each pixel; click at one to see where it looks. Images go to the machine ' +
      'that serves this page, and are not stored.'
    : 'See the class of each pixel. This network has no non-local block, and so no attention. ' +
      'Images go to the machine that serves this page, and are not stored.';
  new Page(network);
  say('Ready.');
}

main().catch((error) => say(error.message, true));
