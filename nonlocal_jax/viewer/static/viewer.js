// Shows an image with its label map over it: legend, opacity, and what is under the pointer.

const MOST_PIXELS_SHOWN = 2 ** 22;
// Steps of the arrow keys, as shares of the longer side.
const STEP = 1 / 100;
const LARGE_STEP = 1 / 10;
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

export class Viewer {
  /**
   * Fills an element with an empty viewer.
   *
   * @param {HTMLElement} root The element.
   * @param {object} options
   * @param {string[]} options.classes Name of each class.
   * @param {number[][]} options.palette Red, green and blue of each class, in [0, 255].
   * @param {(point: {x: number, y: number}) => void} [options.onPoint] Called with the pixel of the
   *   image that was clicked, or chosen by the arrow keys and Enter.
   */
  constructor(root, { classes, palette, onPoint }) {
    this.classes = classes;
    this.palette = palette;
    this.result = null;
    this.size = null;
    this.labels = null;
    this.at = null; // the pixel that the arrow keys have reached
    this.pointedAt = null; // the pixel under the pointer

    this.image = element('canvas', 'viewer-image');
    this.layer = element('canvas', 'viewer-layer');
    this.marks = element('canvas', 'viewer-layer');
    this.cursor = element('div', 'viewer-cursor');
    this.cursor.hidden = true;
    this.stage = element(
      'div',
      'viewer-stage',
      this.image,
      this.layer,
      this.marks,
      this.cursor,
    );
    this.stage.tabIndex = 0;
    this.stage.setAttribute('role', 'application');
    this.stage.setAttribute('aria-roledescription', 'picture');
    this.stage.setAttribute(
      'aria-label',
      `The image. Arrow keys choose a pixel${onPoint ? ', and Enter takes it' : ''}.`,
    );
    this.pointed = element('p', 'viewer-pointed');
    this.pointed.setAttribute('aria-live', 'polite');
    this.opacity = element('input', 'viewer-opacity');
    Object.assign(this.opacity, { type: 'range', min: '0', max: '100', value: '60' });
    this.legend = element('ul', 'viewer-legend');
    root.replaceChildren(
      element('div', 'viewer-picture', this.stage, this.pointed),
      element(
        'div',
        'viewer-side',
        element('label', 'viewer-label', 'Opacity', this.opacity),
        element('h2', 'viewer-heading', 'Classes'),
        this.legend,
      ),
    );
    root.classList.add('viewer');

    this.opacity.addEventListener('input', () => this.#setOpacity());
    this.#setOpacity();
    for (const kind of ['pointermove', 'pointerdown']) {
      this.stage.addEventListener(kind, (event) => this.#point(event));
    }
    this.stage.addEventListener('pointerleave', (event) => {
      if (event.pointerType !== 'mouse') return; // a finger leaves when it is lifted
      this.pointedAt = null;
      this.#describe(null);
    });
    this.stage.addEventListener('keydown', (event) => this.#press(event, onPoint));
    this.stage.addEventListener('blur', () => this.#moveTo(null));
    if (onPoint) {
      this.stage.classList.add('viewer-clickable');
      this.stage.addEventListener('click', (event) => {
        // Clicks have whole coordinates: the pixel is the one that was described before.
        const at = this.pointedAt ?? this.#pixel(event, this.size);
        if (at) onPoint(at);
      });
    }
    this.#describe(null);
  }

  /**
   * Shows an image without a label map.
   *
   * @param {CanvasImageSource} source The image.
   * @param {number} width Its width in pixels.
   * @param {number} height Its height.
   */
  showImage(source, width, height) {
    const scale = Math.min(1, Math.sqrt(MOST_PIXELS_SHOWN / (width * height)));
    this.image.width = Math.max(Math.round(width * scale), 1);
    this.image.height = Math.max(Math.round(height * scale), 1);
    this.image.getContext('2d').drawImage(source, 0, 0, this.image.width, this.image.height);
    this.size = { width, height };
    this.stage.style.aspectRatio = `${width} / ${height}`;
    this.stage.style.maxWidth = `calc(75vh * ${width / height})`;
    this.result = this.labels = this.pointedAt = null;
    this.#moveTo(null);
    this.legend.replaceChildren();
    clear(this.layer);
    clear(this.marks);
    this.#describe(null);
  }

  /**
   * Shows the classes of the image's pixels, over the whole image.
   *
   * @param {object} result
   * @param {number} result.width Width of the label map.
   * @param {number} result.height Its height.
   * @param {Uint8Array} result.labels Class of each pixel, row by row.
   * @param {Float32Array | null} [result.confidence] Probability of each pixel's class.
   */
  showResult(result) {
    this.result = result;
    const counts = new Array(this.classes.length).fill(0);
    const { labels, width, height } = result;
    const table = new Uint32Array(this.palette.length);
    const bytes = new Uint8Array(table.buffer);
    this.palette.forEach((color, index) => bytes.set([...color, 255], 4 * index));
    this.labels = new ImageData(width, height);
    const colors = new Uint32Array(this.labels.data.buffer);
    for (let i = 0; i < labels.length; i++) {
      counts[labels[i]] += 1;
      colors[i] = table[labels[i]];
    }
    this.showLabels();
    const present = counts.map((count, index) => ({ count, index })).filter((of) => of.count > 0);
    present.sort((a, b) => b.count - a.count);
    this.legend.replaceChildren(
      ...present.map(({ count, index }) =>
        element(
          'li',
          '',
          this.#swatch(index),
          element('span', 'viewer-name', this.classes[index]),
          element('span', 'viewer-share', percent(count / labels.length)),
        ),
      ),
    );
    this.#describe(null);
  }

  /** Shows the label map, in the place of what `showLayer` has shown. */
  showLabels() {
    this.showLayer(this.labels);
  }

  /**
   * Shows another picture in the place of the label map, at the opacity of the slider.
   *
   * @param {ImageData} pixels
   */
  showLayer(pixels) {
    this.layer.width = pixels.width;
    this.layer.height = pixels.height;
    this.layer.getContext('2d').putImageData(pixels, 0, 0);
  }

  /**
   * Removes the marks, and begins new ones.
   *
   * @returns {{context: CanvasRenderingContext2D, scale: number, unit: number}} What draws over the
   *   picture, how many of its pixels one of the image is wide, and a good width of thin lines.
   */
  startMarks() {
    const { width, height } = this.stage.getBoundingClientRect();
    this.marks.width = Math.max(Math.round(width * devicePixelRatio), 1);
    this.marks.height = Math.max(Math.round(height * devicePixelRatio), 1);
    const scale = this.marks.width / this.size.width;
    return { context: this.marks.getContext('2d'), scale, unit: 1.5 * devicePixelRatio };
  }

  /** Removes the marks. */
  clearMarks() {
    clear(this.marks);
  }

  #press(event, onPoint) {
    if (!this.size || event.ctrlKey || event.metaKey || event.altKey) return;
    const { width, height } = this.size;
    if (event.key in ARROWS) {
      const share = event.shiftKey ? LARGE_STEP : STEP;
      const step = Math.max(Math.round(share * Math.max(width, height)), 1);
      const [right, down] = ARROWS[event.key];
      const from = this.at ?? { x: Math.floor(width / 2), y: Math.floor(height / 2) };
      this.#moveTo({
        x: Math.min(Math.max(from.x + step * right, 0), width - 1),
        y: Math.min(Math.max(from.y + step * down, 0), height - 1),
      });
    } else if (event.key === 'Enter' && onPoint && this.at) {
      onPoint(this.at);
    } else {
      return;
    }
    event.preventDefault();
  }

  #moveTo(at) {
    this.at = at;
    this.cursor.hidden = at === null;
    if (at === null) {
      this.#describe(null);
      return;
    }
    const { width, height } = this.size;
    this.cursor.style.left = `${(100 * (at.x + 0.5)) / width}%`;
    this.cursor.style.top = `${(100 * (at.y + 0.5)) / height}%`;
    if (!this.result) return;
    const place = {
      x: Math.floor(((at.x + 0.5) / width) * this.result.width),
      y: Math.floor(((at.y + 0.5) / height) * this.result.height),
    };
    this.#describe(place, at);
  }

  #setOpacity() {
    this.layer.style.opacity = String(Number(this.opacity.value) / 100);
  }

  #swatch(index) {
    const swatch = element('span', 'viewer-swatch');
    swatch.style.backgroundColor = `rgb(${this.palette[index].join(' ')})`;
    return swatch;
  }

  #pixel(event, size) {
    if (!size) return null;
    const box = this.stage.getBoundingClientRect();
    const x = Math.floor(((event.clientX - box.left) / box.width) * size.width);
    const y = Math.floor(((event.clientY - box.top) / box.height) * size.height);
    return x >= 0 && y >= 0 && x < size.width && y < size.height ? { x, y } : null;
  }

  #point(event) {
    const at = this.result && this.#pixel(event, this.result);
    this.pointedAt = this.#pixel(event, this.size);
    this.#describe(at, this.pointedAt);
  }

  #describe(at, inImage = null) {
    if (!at || !inImage) {
      this.pointed.replaceChildren(
        this.result ? 'Point at a pixel to see its class.' : '\u00a0',
      );
      return;
    }
    const place = at.y * this.result.width + at.x;
    const index = this.result.labels[place];
    const { confidence } = this.result;
    const parts = [this.#swatch(index), element('strong', '', this.classes[index])];
    if (confidence) parts.push(element('span', '', percent(confidence[place])));
    parts.push(element('span', 'viewer-share', `(${inImage.x}, ${inImage.y})`));
    this.pointed.replaceChildren(...parts);
  }
}

/**
 * Calls a function with image files that are chosen, dropped or pasted.
 *
 * @param {HTMLInputElement} input A file chooser.
 * @param {HTMLElement} target Where files can be dropped.
 * @param {(file: File) => void} onFile
 */
export function takeFiles(input, target, onFile) {
  input.addEventListener('change', () => {
    if (input.files.length > 0) onFile(input.files[0]);
    input.value = ''; // so that the same file can be chosen again
  });
  for (const kind of ['dragenter', 'dragover']) {
    target.addEventListener(kind, (event) => {
      event.preventDefault();
      target.classList.add('is-dragged-over');
    });
  }
  target.addEventListener('dragleave', (event) => {
    if (!target.contains(event.relatedTarget)) target.classList.remove('is-dragged-over');
  });
  target.addEventListener('drop', (event) => {
    event.preventDefault();
    target.classList.remove('is-dragged-over');
    if (event.dataTransfer.files.length > 0) onFile(event.dataTransfer.files[0]);
  });
  window.addEventListener('paste', (event) => {
    if (event.clipboardData.files.length > 0) onFile(event.clipboardData.files[0]);
  });
}

/**
 * Decodes an image file, turned as its EXIF data say, without conversion of colors.
 *
 * @param {Blob} file
 * @param {number} mostPixels
 * @returns {Promise<ImageBitmap>}
 * @throws {Error} With a message for the user, if it is no image or too large.
 */
export async function decodeImage(file, mostPixels) {
  const name = file.name || 'The file';
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { colorSpaceConversion: 'none' });
  } catch {
    throw new Error(`${name} is no image that this browser reads.`);
  }
  const { width, height } = bitmap;
  if (width * height > mostPixels) {
    bitmap.close();
    const most = Math.round(mostPixels / 1e6);
    throw new Error(`${name} has ${width}x${height} pixels; ${most} million are the most.`);
  }
  return bitmap;
}

export function percent(share) {
  return `${(100 * share).toFixed(1)} %`;
}

function element(kind, className, ...children) {
  const made = document.createElement(kind);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

function clear(canvas) {
  canvas.width = canvas.width; // as the standard has it
}
