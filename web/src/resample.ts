// Any sample rate -> another, as Python's soxr does it at its quality HQ: linear phase, flat to
// .913 of the lower rate's band, 126 dB down at its end.

const PASSBAND = 0.913;
const ATTENUATION_DB = 126;
const MOST_PHASES = 4096;

/** Modified Bessel function of the first kind and order 0. */
function bessel(x: number): number {
  let sum = 1;
  let term = 1;
  for (let k = 1; term > 1e-17 * sum; k++) {
    term *= (x / (2 * k)) ** 2;
    sum += term;
  }
  return sum;
}

function greatestDivisor(a: number, b: number): number {
  return b ? greatestDivisor(b, a % b) : a;
}

/** A low pass between two rates, as one filter for each place of an output between two inputs. */
function makeFilters(from: number, to: number, phases: number) {
  const lower = Math.min(from, to);
  const cutoff = ((1 + PASSBAND) / 4) * lower; // Hz, the middle of the transition
  const transition = ((1 - PASSBAND) / 2) * lower;
  const beta = 0.1102 * (ATTENUATION_DB - 8.7); // Kaiser's
  const half = Math.ceil(((ATTENUATION_DB - 7.95) / 14.36 / (transition / from)) / 2);
  const taps = 2 * half;
  const filters = new Float32Array(phases * taps);
  for (let phase = 0; phase < phases; phase++) {
    for (let tap = 0; tap < taps; tap++) {
      const away = tap - (half - 1) - phase / phases; // input samples from the output's time
      const edge = away / half;
      const window = Math.abs(edge) < 1 ? bessel(beta * Math.sqrt(1 - edge * edge)) : 0;
      const angle = 2 * Math.PI * (cutoff / from) * away;
      const sinc = angle === 0 ? 1 : Math.sin(angle) / angle;
      filters[phase * taps + tap] = (2 * cutoff * sinc * window) / from / bessel(beta);
    }
  }
  return { filters, taps, half };
}

/**
 * Samples at rate `from` -> at rate `to`, ceil(n * to / from) of them.
 *
 * A rate whose ratio has no small terms is taken for the nearest that has: at most 0.02 % away.
 */
export function resample(samples: Float32Array, from: number, to: number): Float32Array {
  if (from === to) return samples;
  const divisor = greatestDivisor(from, to);
  let phases = to / divisor;
  let step = from / divisor;
  if (phases > MOST_PHASES) {
    step = Math.round((step * MOST_PHASES) / phases);
    phases = MOST_PHASES;
  }
  const { filters, taps, half } = makeFilters(from, to, phases);
  const padded = new Float32Array(samples.length + taps + 1);
  padded.set(samples, half - 1);
  const result = new Float32Array(Math.ceil((samples.length * to) / from));
  for (let i = 0; i < result.length; i++) {
    const place = i * step; // in input samples times `phases`
    const first = Math.floor(place / phases);
    const row = (place - first * phases) * taps;
    let sum = 0;
    for (let tap = 0; tap < taps; tap++) sum += filters[row + tap] * padded[first + tap];
    result[i] = sum;
  }
  return result;
}
