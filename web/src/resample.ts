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
 * A recording at another rate, made as far as it is asked for: ceil(n * to / from) samples.
 *
 * A rate whose ratio has no small terms is taken for the nearest that has: at most 0.02 % away.
 */
export class Resampled {
  readonly length: number;
  private readonly result: Float32Array;
  private readonly phases: number;
  private readonly step: number; // inputs an output, times `phases`
  private readonly filter?: ReturnType<typeof makeFilters>;
  private readonly padded: Float32Array;
  private numDone = 0;

  constructor(samples: Float32Array, from: number, to: number) {
    this.length = Math.ceil((samples.length * to) / from);
    const divisor = greatestDivisor(from, to);
    this.phases = Math.min(MOST_PHASES, to / divisor);
    this.step = Math.round((from / divisor) * (this.phases / (to / divisor)));
    if (from === to) {
      this.result = this.padded = samples;
      this.numDone = this.length;
      return;
    }
    this.filter = makeFilters(from, to, this.phases);
    this.result = new Float32Array(this.length);
    this.padded = new Float32Array(samples.length + this.filter.taps + 1);
    this.padded.set(samples, this.filter.half - 1);
  }

  /** Samples `from` up to `to`, which may lie beyond the end. */
  slice(from: number, to: number): Float32Array {
    const end = Math.min(to, this.length);
    for (; this.numDone < end; this.numDone++) this.result[this.numDone] = this.at(this.numDone);
    return this.result.subarray(Math.min(from, end), end);
  }

  private at(index: number): number {
    const { filters, taps } = this.filter as ReturnType<typeof makeFilters>;
    const place = index * this.step;
    const first = Math.floor(place / this.phases);
    const row = (place - first * this.phases) * taps;
    let sum = 0;
    for (let tap = 0; tap < taps; tap++) sum += filters[row + tap] * this.padded[first + tap];
    return sum;
  }
}
