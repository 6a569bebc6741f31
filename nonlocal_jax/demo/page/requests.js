// Requests to the server of this page; every fault becomes an Error with a message for the user.

/**
 * Sends something that is computed, and waits in the line for the result.
 *
 * @param {string} address
 * @param {Blob | string} body
 * @param {object} options
 * @param {AbortSignal} options.signal Leaves the line.
 * @param {(ahead: number) => void} options.onTurn Called with how many requests come before.
 * @returns {Promise<object>} The result.
 */
export async function compute(address, body, { signal, onTurn }) {
  const answer = await ask(address, { method: 'POST', body, signal });
  for await (const line of lines(answer.body)) {
    const { ahead, fault, result } = JSON.parse(line);
    if (fault !== undefined) throw new Error(fault);
    if (result !== undefined) return result;
    onTurn(ahead);
  }
  throw new Error('The server broke off; what it printed says why.');
}

/**
 * Asks for something that is there.
 *
 * @param {string} address
 * @param {RequestInit} [options]
 * @returns {Promise<Response>}
 */
export async function ask(address, options = {}) {
  let answer;
  try {
    answer = await fetch(address, options);
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new Error('The server does not answer: is nonlocal-jax demo still running?');
  }
  if (answer.ok) return answer;
  const { fault } = await answer.json().catch(() => ({}));
  throw new Error(fault ?? `The server answers with status ${answer.status}.`);
}

async function* lines(stream) {
  const decoder = new TextDecoder();
  const reader = stream.getReader();
  let rest = '';
  while (true) {
    const { done, value } = await read(reader);
    if (done) return;
    const parts = (rest + decoder.decode(value, { stream: true })).split('\n');
    rest = parts.pop();
    yield* parts;
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new Error('The server broke off: is nonlocal-jax demo still running?');
  }
}
