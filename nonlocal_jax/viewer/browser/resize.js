// Fits images into the size of the network, as the tests of the network do.

/**
 * Resizes an image with its aspect ratio kept, and fills what is left at the right and the bottom.
 *
 * @param {ImageData} pixels
 * @param {number} height Of the network.
 * @param {number} width Of the network.
 * @param {number[]} fill Red, green and blue of the rest.
 * @returns {{data: Uint8Array, rows: number, columns: number}} RGB (height, width, 3), and the
 *   part of it that the image takes.
 */
export function fitted(pixels, height, width, fill) {
  const scale = Math.min(width / pixels.width, height / pixels.height);
  const rows = Math.min(Math.max(Math.round(pixels.height * scale), 1), height);
  const columns = Math.min(Math.max(Math.round(pixels.width * scale), 1), width);
  const data = new Uint8Array(height * width * 3);
  for (let i = 0; i < data.length; i++) data[i] = fill[i % 3];
  const down = taps(pixels.height, rows);
  const across = taps(pixels.width, columns);
  for (let row = 0; row < rows; row++) {
    const [upper, lower, below] = down[row];
    for (let column = 0; column < columns; column++) {
      const [left, right, beside] = across[column];
      for (let channel = 0; channel < 3; channel++) {
        const at = (y, x) => pixels.data[4 * (y * pixels.width + x) + channel];
        const top = at(upper, left) * (1 - beside) + at(upper, right) * beside;
        const bottom = at(lower, left) * (1 - beside) + at(lower, right) * beside;
        const value = top * (1 - below) + bottom * below;
        data[3 * (row * width + column) + channel] = Math.round(value);
      }
    }
  }
  return { data, rows, columns };
}

// The two samples that each output sample interpolates, and the weight of the second one: bilinear
// with half-pixel centers and without antialiasing, as OpenCV's INTER_LINEAR.
function taps(size, count) {
  return Array.from({ length: count }, (_, index) => {
    const source = Math.min(Math.max(((index + 0.5) * size) / count - 0.5, 0), size - 1);
    const first = Math.floor(source);
    return [first, Math.min(first + 1, size - 1), source - first];
  });
}
