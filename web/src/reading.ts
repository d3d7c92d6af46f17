// Samples -> notes: cut segments, run the network, carry its state, read its candidates.
// What a phone needs is this file; the network is whatever runs `model.tflite`.

import { namePrograms } from "./piece";
import type { ModelFacts, Note } from "./notes";

const NUM_PITCHES = 88;
const LOWEST_PITCH = 21;
const NUM_PROGRAMS = 128;
const LEAST_DURATION = 0.01; // seconds, of a stroke too
const [ONSET_COLUMNS, STROKE_COLUMNS] = [5, 4];
const LEAST_CONFIDENCE = 0.05; // less likely candidates are forgotten, to save memory

type Arrays = Record<string, Float32Array>;

/** Runs the signature `detect`: inputs by name -> outputs by name. */
export type Network = (inputs: Arrays) => Promise<Arrays>;

/** A recording at the network's rate. */
export interface Samples {
  readonly length: number;
  slice(from: number, to: number): Float32Array;
}

interface Candidate {
  frame: number; // of the recording
  pitch: number;
  confidence: number;
  velocity: number;
  unison: number; // probability that two instruments play the pitch
  programs: Float32Array;
}

/** One recording: its segments are run in order, its notes can be read at any time. */
export class Reading {
  readonly numSegments: number;
  private readonly onsets: Candidate[] = [];
  private readonly strokes: Candidate[][] = []; // of each segment
  private readonly ended: Uint8Array[] = []; // of each segment, [frames, pitches]
  private state: Arrays;

  constructor(
    private readonly samples: Samples,
    private readonly facts: ModelFacts,
    state: Record<string, number>, // names of the network's states and their lengths
  ) {
    this.numSegments = Math.floor(samples.length / this.segmentSamples) + 1;
    this.state = Object.fromEntries(
      Object.entries(state).map(([name, length]) => [name, new Float32Array(length)]),
    );
  }

  get numRead(): number {
    return this.ended.length;
  }

  get seconds(): number {
    return Math.min(this.numRead * this.segmentSamples, this.samples.length) / this.facts.sampleRate;
  }

  /** As Python counts them: the last one is filled up with zeros. */
  private get numFrames(): number {
    const inAll = Math.floor(this.samples.length / this.facts.hopSamples) + 1;
    return Math.min(this.numRead * this.facts.segmentFrames, inAll);
  }

  private get segmentSamples(): number {
    return this.facts.segmentFrames * this.facts.hopSamples;
  }

  /** Runs the next segment. */
  async readNext(network: Network): Promise<void> {
    const { inputSamples, leadSamples, segmentFrames } = this.facts;
    const begin = this.numRead * this.segmentSamples - leadSamples;
    const window = new Float32Array(inputSamples);
    const from = Math.max(begin, 0);
    window.set(this.samples.slice(from, begin + inputSamples), from - begin);
    const outputs = await network({ samples: window, ...this.state });
    for (const name of Object.keys(this.state)) this.state[name] = outputs[name];
    const first = this.numRead * segmentFrames;
    const { onset_limit, stroke_limit, end_limit } = this.facts.reading;
    const least = Math.min(LEAST_CONFIDENCE, onset_limit, stroke_limit);
    this.onsets.push(...toCandidates(outputs.onsets, ONSET_COLUMNS, first, least, outputs.programs));
    this.strokes.push(toCandidates(outputs.strokes, STROKE_COLUMNS, first, least));
    this.ended.push(Uint8Array.from(outputs.ended, (value) => (value >= end_limit ? 1 : 0)));
  }

  /** The notes of all segments read so far, by onset; a note that still sounds ends there. */
  notes(
    onsetLimit = this.facts.reading.onset_limit,
    strokeLimit = this.facts.reading.stroke_limit,
  ): Note[] {
    const isHeard = ({ frame }: Candidate) => frame < this.numFrames; // not in zeros after the end
    const onsets = this.onsets.filter((c) => c.confidence >= onsetLimit && isHeard(c));
    const chances = onsets.map(({ programs }) => programs);
    const pitches = onsets.map(({ pitch }) => pitch);
    const programs = namePrograms(chances, pitches, this.facts.reading.shrink);
    const names = new Map(onsets.map((onset, i) => [onset, programs[i]]));
    const struck = this.dropRepeated(onsets);
    const next = new Map<number, number>(); // frame of the following onset of each pitch
    const notes: Note[] = [];
    for (const onset of struck.reverse()) {
      const [first, second] = names.get(onset) as [number, number];
      const end = this.findEnd(onset, next.get(onset.pitch));
      next.set(onset.pitch, onset.frame);
      notes.push(this.toNote(onset, end, first, false));
      if (onset.unison >= this.facts.reading.unison_limit) {
        notes.push(this.toNote(onset, end, second, false));
      }
    }
    const strokes = this.strokes.flatMap((segment) =>
      this.dropSimilar(segment.filter(isHeard), strokeLimit),
    );
    const heard = this.dropRepeated(strokes, (key) => this.drumOf(key));
    notes.push(...heard.map((stroke) => this.toNote(stroke, 0, 0, true)));
    return notes.sort((a, b) => a.onset - b.onset || a.pitch - b.pitch);
  }

  /** Without those that follow one of the same pitch, or drum, too soon to be another. */
  private dropRepeated(found: Candidate[], kindOf = (pitch: number) => pitch): Candidate[] {
    const last = new Map<number, number>();
    return found.filter(({ frame, pitch }) => {
      const [time, kind] = [this.time(frame), kindOf(pitch)];
      if (time - (last.get(kind) ?? -Infinity) <= this.facts.reading.same_strike) return false;
      last.set(kind, time);
      return true;
    });
  }

  /** The strokes of a segment; where drums that are alike are struck at once, the surest. */
  private dropSimilar(strokes: Candidate[], limit: number): Candidate[] {
    const kept: Candidate[] = [];
    for (const stroke of [...strokes].sort((a, b) => b.confidence - a.confidence)) {
      if (stroke.confidence < limit) break;
      const isAlike = kept.some(
        (other) =>
          this.drumOf(other.pitch) === this.drumOf(stroke.pitch) &&
          Math.abs(this.time(other.frame) - this.time(stroke.frame)) <=
            this.facts.reading.same_strike,
      );
      if (!isAlike) kept.push(stroke);
    }
    return kept.sort((a, b) => a.frame - b.frame || a.pitch - b.pitch);
  }

  /** The first key of those like a drum's. */
  private drumOf(key: number): number {
    return this.facts.reading.similar_drums.find((keys) => keys.includes(key))?.[0] ?? key;
  }

  /** Seconds at which a note ends: when it has ended, at the next onset, or with the recording. */
  private findEnd(onset: Candidate, next = Infinity): number {
    const { segmentFrames, hopSamples, sampleRate } = this.facts;
    const numFrames = this.numFrames;
    const last = Math.min(next, numFrames);
    for (let frame = onset.frame + this.facts.reading.shortest; frame < last; frame++) {
      const segment = this.ended[Math.floor(frame / segmentFrames)];
      const row = (frame % segmentFrames) * NUM_PITCHES;
      if (segment[row + onset.pitch - LOWEST_PITCH]) return this.time(frame);
    }
    return next < numFrames ? this.time(next) : (numFrames * hopSamples) / sampleRate;
  }

  private toNote(onset: Candidate, end: number, program: number, isDrum: boolean): Note {
    const begin = this.time(onset.frame);
    return {
      onset: begin,
      offset: Math.max(begin + LEAST_DURATION, end),
      pitch: onset.pitch,
      velocity: onset.velocity,
      program,
      isDrum,
      confidence: onset.confidence,
    };
  }

  private time(frame: number): number {
    return ((frame + 0.5) * this.facts.hopSamples) / this.facts.sampleRate;
  }
}

/** The rows (frame, pitch, probability, velocity, ...) of a segment that are likely, by frame. */
function toCandidates(
  rows: Float32Array,
  columns: number,
  firstFrame: number,
  least: number,
  programs: Float32Array = new Float32Array(0),
): Candidate[] {
  const found: Candidate[] = [];
  for (let i = 0; i < rows.length / columns; i++) {
    const [frame, pitch, confidence, velocity, unison = 0] = rows.subarray(i * columns, (i + 1) * columns);
    if (confidence < least || confidence === 0) continue;
    found.push({
      frame: firstFrame + Math.round(frame),
      pitch: Math.round(pitch),
      confidence,
      velocity: Math.round(velocity),
      unison,
      programs: programs.slice(i * NUM_PROGRAMS, (i + 1) * NUM_PROGRAMS),
    });
  }
  return found.sort((a, b) => a.frame - b.frame); // at one time the likeliest first
}
