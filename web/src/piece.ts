// Which instrument plays each note, decided for all notes of a piece together: what
// mt3_keras/instruments.py does, with the same numbers.

const ROUNDS = 60;
const LEAST = 1e-4; // of a note's chance for any instrument
const LEAST_SPREAD = 7; // semitones
const SPREAD_WEIGHT = 8; // notes
const WIDEST = 18; // semitones
const GONE = 1e-12; // share of an instrument that is not looked at any more

/**
 * Expectation-maximisation over the notes of a piece.
 *
 * @param chances of each note by itself, each row a probability for every instrument
 * @param pitches of the notes
 * @returns the instrument of each note
 */
export function nameNotes(chances: Float32Array[], pitches: number[]): Int32Array {
  const num = chances.length;
  const names = new Int32Array(num);
  if (!num) return names;
  const columns = chances[0].length;
  const own = new Float64Array(num * columns);
  for (let i = 0; i < num; i++) {
    for (let c = 0; c < columns; c++) own[i * columns + c] = Math.max(chances[i][c], LEAST);
  }
  let shares = new Float64Array(columns).fill(1 / columns);
  const found = new Float64Array(num * columns);
  const inRange = new Float64Array(num * columns).fill(1);
  for (let round = 0; round < ROUNDS; round++) {
    const weights = expect(own, inRange, shares, found, columns);
    const total = weights.reduce((sum, weight) => sum + weight, 0);
    shares = weights.map((weight) => weight / total);
    fitRanges(found, weights, pitches, inRange, columns);
  }
  for (let i = 0; i < num; i++) {
    const row = found.subarray(i * columns, (i + 1) * columns);
    let best = 0;
    for (let c = 1; c < columns; c++) if (row[c] > row[best]) best = c;
    names[i] = best;
  }
  return names;
}

/** Writes how likely each instrument plays each note into `found`; returns its sums over notes. */
function expect(
  own: Float64Array,
  inRange: Float64Array,
  shares: Float64Array,
  found: Float64Array,
  columns: number,
): Float64Array {
  const weights = new Float64Array(columns);
  const kept = keptColumns(shares);
  found.fill(0);
  for (let i = 0; i < found.length; i += columns) {
    let sum = 0;
    for (const c of kept) sum += found[i + c] = own[i + c] * inRange[i + c] * shares[c];
    for (const c of kept) weights[c] += found[i + c] /= Math.max(sum, 1e-300);
  }
  return weights;
}

/** How well each note's pitch fits the pitches of each instrument, as a normal density. */
function fitRanges(
  found: Float64Array,
  weights: Float64Array,
  pitches: number[],
  inRange: Float64Array,
  columns: number,
): void {
  const num = pitches.length;
  for (const c of keptColumns(weights)) {
    let sum = 0;
    for (let i = 0; i < num; i++) sum += found[i * columns + c] * pitches[i];
    const mean = sum / Math.max(weights[c], 1e-9);
    let spread = SPREAD_WEIGHT * WIDEST ** 2;
    for (let i = 0; i < num; i++) spread += found[i * columns + c] * (pitches[i] - mean) ** 2;
    const variance = Math.max(spread / (weights[c] + SPREAD_WEIGHT), LEAST_SPREAD ** 2);
    const scale = 1 / Math.sqrt(variance);
    for (let i = 0; i < num; i++) {
      const density = scale * Math.exp((-0.5 * (pitches[i] - mean) ** 2) / variance);
      inRange[i * columns + c] = Math.max(density, 1e-6);
    }
  }
}

/** Instruments that still play something. */
function keptColumns(shares: Float64Array): number[] {
  return [...shares.keys()].filter((c) => shares[c] > GONE);
}
