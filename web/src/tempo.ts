// A tempo from onsets alone: the grid of sixteenths on which they lie most closely.

const SLOWEST = 60;
const FASTEST = 200;
/** Below this coherence the onsets lie on no grid: rubato, or a changing tempo. */
const LEAST_COHERENCE = 0.6;
const LEAST_ONSETS = 16;

/** How many beats a bar is taken to have where the user has not said so. */
export const USUAL_BAR = 4;

export interface Tempo {
  beatsPerMinute: number;
  beatsPerBar: number;
  firstBar: number; // seconds, below one bar
}

function coherence(onsets: number[], beatsPerMinute: number): [number, number] {
  const turn = (2 * Math.PI * 4 * beatsPerMinute) / 60;
  let real = 0;
  let imaginary = 0;
  for (const onset of onsets) {
    real += Math.cos(turn * onset);
    imaginary += Math.sin(turn * onset);
  }
  return [Math.hypot(real, imaginary) / onsets.length, Math.atan2(imaginary, real) / turn];
}

/** The tempo of onsets in seconds; null where they keep none. */
export function findTempo(onsets: number[]): Tempo | null {
  if (onsets.length < LEAST_ONSETS) return null;
  const length = Math.max(...onsets) - Math.min(...onsets);
  const step = Math.min(0.5, 3 / Math.max(length, 1)); // a quarter of a turn over the piece
  let best = { value: 0, beatsPerMinute: 0 };
  for (let bpm = SLOWEST; bpm <= FASTEST; bpm += step) {
    const [value] = coherence(onsets, bpm);
    if (value > best.value) best = { value, beatsPerMinute: bpm };
  }
  if (best.value < LEAST_COHERENCE) return null;
  return alignTempo(onsets, best.beatsPerMinute);
}

/** Puts the beats of a given tempo where most onsets are. */
export function alignTempo(onsets: number[], beatsPerMinute: number): Tempo {
  const beat = 60 / beatsPerMinute;
  const [, sixteenth] = coherence(onsets, beatsPerMinute);
  let best = { count: -1, firstBeat: 0 };
  for (let i = 0; i < 4; i++) {
    const firstBeat = (((sixteenth + (i * beat) / 4) % beat) + beat) % beat;
    const count = onsets.filter((onset) => {
      const away = (((onset - firstBeat) % beat) + beat) % beat;
      return Math.min(away, beat - away) < beat / 8;
    }).length;
    if (count > best.count) best = { count, firstBeat };
  }
  return { beatsPerMinute, beatsPerBar: USUAL_BAR, firstBar: best.firstBeat };
}

/** The same beats in other bars, one of which begins at the beat nearest to `seconds`. */
export function alignBars(tempo: Tempo, beatsPerBar: number, seconds: number): Tempo {
  const beat = 60 / tempo.beatsPerMinute;
  const first = tempo.firstBar % beat;
  const number = Math.round((seconds - first) / beat);
  const place = ((number % beatsPerBar) + beatsPerBar) % beatsPerBar;
  return { ...tempo, beatsPerBar, firstBar: first + place * beat };
}
