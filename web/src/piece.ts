// Which program plays each note, decided for all notes of a piece together: what
// mt3_keras/instruments.py does, with the same numbers.

const NUM_CLASSES = 16;
const PROGRAMS_PER_CLASS = 8;
const ROUNDS = 60;
const TEMPER = 1.5; // how far a note's own chances count
const LEAST = 1e-4; // of a note's chance for any instrument
const LEAST_SPREAD = 4; // semitones
const SPREAD_WEIGHT = 8; // notes
const WIDEST = 12; // semitones
const BASS = 4; // class
const HIGH_BASS = 34; // pitch above which basses play less
const BASS_SPREAD = 10; // semitones
const GONE = 1e-12; // share of a class that is not looked at any more

/**
 * The two likeliest programs of each note.
 *
 * The notes are shared out to classes of instruments; those of a class then have one program, the
 * likeliest of all of them together.
 *
 * @param chances of each note by itself, [128] of General MIDI programs
 * @param pitches of the notes
 * @param shrink share of the notes that a class loses in every round
 */
export function namePrograms(
  chances: Float32Array[],
  pitches: number[],
  shrink: number,
): [number, number][] {
  const own = byClass(chances);
  const found = shareOut(inRegister(own, pitches), pitches, shrink);
  const program = findPrograms(chances, found);
  return chances.map((_, i) => {
    const [share, chance] = [found, own].map((all) =>
      all.subarray(i * NUM_CLASSES, (i + 1) * NUM_CLASSES),
    );
    // Of those that have no share in the note, the likelier one by its own chances.
    const order = [...share.keys()].sort(
      (a, b) => share[b] - share[a] || chance[b] - chance[a] || a - b,
    );
    return [program[order[0]], program[order[1]]];
  });
}

/** How likely each class plays each note by itself, [notes, classes]. */
function byClass(chances: Float32Array[]): Float64Array {
  const own = new Float64Array(chances.length * NUM_CLASSES);
  chances.forEach((row, i) => {
    row.forEach(
      (chance, k) => (own[i * NUM_CLASSES + Math.floor(k / PROGRAMS_PER_CLASS)] += chance),
    );
  });
  return own;
}

/** The same chances, lower where a bass would play above its register. */
function inRegister(own: Float64Array, pitches: number[]): Float64Array {
  const found = own.slice();
  pitches.forEach((pitch, i) => {
    const above = Math.max(pitch - HIGH_BASS, 0) / BASS_SPREAD;
    found[i * NUM_CLASSES + BASS] *= Math.exp(-0.5 * above ** 2);
  });
  return found;
}

/** The one program of each class, given how likely the class plays each note. */
function findPrograms(chances: Float32Array[], found: Float64Array): number[] {
  const scores = new Float64Array(NUM_CLASSES * PROGRAMS_PER_CLASS);
  chances.forEach((row, i) => {
    for (let c = 0; c < NUM_CLASSES; c++) {
      const first = c * PROGRAMS_PER_CLASS;
      const own = Array.from(row.subarray(first, first + PROGRAMS_PER_CLASS), (chance) =>
        Math.log(Math.max(chance, LEAST)),
      );
      const highest = Math.max(...own);
      const share = found[i * NUM_CLASSES + c];
      own.forEach((value, k) => (scores[first + k] += share * (value - highest)));
    }
  });
  return Array.from({ length: NUM_CLASSES }, (_, c) => {
    const first = c * PROGRAMS_PER_CLASS;
    const own = scores.subarray(first, first + PROGRAMS_PER_CLASS);
    return first + own.indexOf(Math.max(...own));
  });
}

/** Expectation-maximisation: how likely each class plays each note, [notes, classes]. */
function shareOut(chances: Float64Array, pitches: number[], shrink: number): Float64Array {
  const [num, columns] = [pitches.length, NUM_CLASSES];
  const own = chances.map((chance) => Math.max(chance, LEAST) ** TEMPER);
  let shares = new Float64Array(columns).fill(1 / columns);
  const found = new Float64Array(num * columns);
  const inRange = new Float64Array(num * columns).fill(1);
  for (let round = 0; round < ROUNDS; round++) {
    const weights = expect(own, inRange, shares, found, columns);
    shares = weights.map((weight) => Math.max(weight - shrink * num, 0));
    let total = shares.reduce((sum, share) => sum + share, 0);
    if (!total) {
      // None has its least share: the likeliest alone.
      const highest = Math.max(...weights);
      shares = weights.map((weight) => (weight === highest ? 1 : 0));
      total = shares.reduce((sum, share) => sum + share, 0);
    }
    shares = shares.map((share) => share / total);
    fitRanges(found, weights, pitches, inRange, columns);
  }
  return found;
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
