// What a note is, and what `python -m export.page` says of the model beside it.

/** A note as Python has it: times in seconds, pitch and program as in MIDI. */
export interface Note {
  onset: number;
  offset: number;
  pitch: number;
  velocity: number;
  program: number;
  isDrum: boolean;
  confidence: number;
}

/** What `decoding.json` says of the network's weights; see RollDecoding in Python. */
export interface ReadingLimits {
  onset_limit: number;
  stroke_limit: number;
  unison_limit: number;
  end_limit: number;
  shortest: number; // frames
  same_strike: number; // seconds
  similar_drums: number[][]; // keys of which one at a time is struck
  shrink: number;
}

/** `model.json`: the model's sizes, how it is read, and names; written by export/page.py. */
export interface ModelFacts {
  name: string;
  version: string;
  sampleRate: number;
  inputSamples: number;
  leadSamples: number;
  segmentFrames: number;
  hopSamples: number;
  reading: ReadingLimits;
  programs: string[];
  colors: string[];
  drumColor: string;
  drums: Record<string, string>;
}

const LETTERS = ["C", "C♯", "D", "E♭", "E", "F", "F♯", "G", "A♭", "A", "B♭", "B"];

/** Name of a pitch, middle C being C4. */
export function pitchName(pitch: number): string {
  return `${LETTERS[pitch % 12]}${Math.floor(pitch / 12) - 1}`;
}

export function isBlackKey(pitch: number): boolean {
  return [1, 3, 6, 8, 10].includes(pitch % 12);
}

/** 75.4 -> "1:15". */
export function clock(seconds: number): string {
  const whole = Math.max(0, Math.floor(seconds));
  const rest = String(whole % 60).padStart(2, "0");
  return `${Math.floor(whole / 60)}:${rest}`;
}
