// Colors for numbers: from low to high, at equal distances, red, green and blue in [0, 255].

// Samples of matplotlib's viridis and inferno.
export const VIRIDIS = [
  [68, 1, 84], [71, 45, 123], [59, 82, 139], [44, 114, 142], [33, 145, 140],
  [40, 174, 128], [94, 201, 98], [173, 220, 48], [253, 231, 37],
];
export const INFERNO = [
  [0, 0, 4], [31, 12, 72], [85, 15, 109], [136, 34, 106], [187, 55, 84],
  [227, 89, 51], [249, 140, 10], [249, 201, 50], [252, 255, 164],
];

/**
 * Colors shades.
 *
 * @param {ArrayLike<number>} shades In [0, most], row by row.
 * @param {number} most
 * @param {number} width
 * @param {number} height
 * @param {number[][]} ramp
 * @returns {ImageData}
 */
export function colored(shades, most, width, height, ramp) {
  const table = new Uint32Array(256);
  const bytes = new Uint8Array(table.buffer);
  for (let i = 0; i < 256; i++) {
    const place = (i / 255) * (ramp.length - 1);
    const low = Math.min(Math.floor(place), ramp.length - 2);
    const share = place - low;
    const color = ramp[low].map((from, c) => Math.round(from + share * (ramp[low + 1][c] - from)));
    bytes.set([...color, 255], 4 * i);
  }
  const pixels = new ImageData(width, height);
  const colors = new Uint32Array(pixels.data.buffer);
  const scale = 255 / most;
  for (let i = 0; i < shades.length; i++) colors[i] = table[Math.round(shades[i] * scale)];
  return pixels;
}

/** The same ramp for CSS. */
export function gradient(ramp) {
  return `linear-gradient(to right, ${ramp.map((color) => `rgb(${color.join(' ')})`).join(', ')})`;
}
