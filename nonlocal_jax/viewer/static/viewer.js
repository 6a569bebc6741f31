// Shows an image with its label map over it: legend, opacity, and what is under the pointer.

const MOST_PIXELS_SHOWN = 2 ** 22;

export class Viewer {
  /**
   * Fills an element with an empty viewer.
   *
   * @param {HTMLElement} root The element.
   * @param {object} options
   * @param {string[]} options.classes Name of each class.
   * @param {number[][]} options.palette Red, green and blue of each class, in [0, 255].
   * @param {(point: {x: number, y: number}) => void} [options.onPoint] Called with the pixel of the
   *   image that was clicked.
   */
  constructor(root, { classes, palette, onPoint }) {
    this.classes = classes;
    this.palette = palette;
    this.result = null;
    this.size = null;

    this.image = element('canvas', 'viewer-image');
    this.layer = element('canvas', 'viewer-layer');
    this.marks = element('canvas', 'viewer-layer');
    this.stage = element('div', 'viewer-stage', this.image, this.layer, this.marks);
    this.pointed = element('p', 'viewer-pointed');
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
      if (event.pointerType === 'mouse') this.#describe(null); // a finger leaves when it is lifted
    });
    if (onPoint) {
      this.stage.classList.add('viewer-clickable');
      this.stage.addEventListener('click', (event) => {
        const at = this.#pixel(event, this.size);
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
    this.result = null;
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
    const pixels = new ImageData(width, height);
    for (let i = 0; i < labels.length; i++) {
      counts[labels[i]] += 1;
      pixels.data.set(this.palette[labels[i]], 4 * i);
      pixels.data[4 * i + 3] = 255;
    }
    this.showLayer(pixels);
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
    this.#describe(at, this.#pixel(event, this.size));
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
