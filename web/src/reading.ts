// Samples -> notes: cut segments, run the network, carry its state, read its candidates.
// What a phone needs is this file; the network is whatever runs `model.tflite`.

import { nameNotes } from "./piece";
import type { ModelFacts, Note } from "./notes";

const NUM_PITCHES = 88;
const LOWEST_PITCH = 21;
const NUM_PROGRAMS = 128;
const LEAST_FRAMES = 2; // of a note
const LEAST_DURATION = 0.01; // seconds, of a stroke too
const ENDED = 0.5;
/** Candidates of less confidence are forgotten: no limit may be set below. */
export const LEAST_CONFIDENCE = 0.05;

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
  programs: Float32Array;
}

/** One recording: its segments are run in order, its notes can be read at any time. */
export class Reading {
  readonly numSegments: number;
  private readonly onsets: Candidate[] = [];
  private readonly strokes: Candidate[] = [];
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
    collect(outputs.onsets, outputs.programs, first, this.onsets);
    collect(outputs.strokes, undefined, first, this.strokes);
    this.ended.push(Uint8Array.from(outputs.ended, (value) => (value >= ENDED ? 1 : 0)));
  }

  /** The notes of all segments read so far, by onset; a note that still sounds ends there. */
  notes(onsetLimit = this.facts.onsetLimit, strokeLimit = this.facts.strokeLimit): Note[] {
    const onsets = this.onsets.filter((onset) => onset.confidence >= onsetLimit);
    const chances = onsets.map((onset) => onset.programs);
    const programs = nameNotes(chances, onsets.map((onset) => onset.pitch));
    const next = new Map<number, number>(); // frame of the following onset of each pitch
    const notes: Note[] = [];
    for (let i = onsets.length - 1; i >= 0; i--) {
      const end = this.findEnd(onsets[i], next.get(onsets[i].pitch));
      next.set(onsets[i].pitch, onsets[i].frame);
      notes.push(this.toNote(onsets[i], end, programs[i], false));
    }
    for (const stroke of this.strokes) {
      if (stroke.confidence >= strokeLimit) notes.push(this.toNote(stroke, 0, 0, true));
    }
    return notes.sort((a, b) => a.onset - b.onset || a.pitch - b.pitch);
  }

  private findEnd(onset: Candidate, next = Infinity): number {
    const { segmentFrames } = this.facts;
    const last = Math.min(next, this.numRead * segmentFrames);
    for (let frame = onset.frame + LEAST_FRAMES; frame < last; frame++) {
      const segment = this.ended[Math.floor(frame / segmentFrames)];
      const row = (frame % segmentFrames) * NUM_PITCHES;
      if (segment[row + onset.pitch - LOWEST_PITCH]) return frame;
    }
    return last;
  }

  private toNote(onset: Candidate, end: number, program: number, isDrum: boolean): Note {
    const begin = this.time(onset.frame);
    return {
      onset: begin,
      offset: Math.max(begin + LEAST_DURATION, isDrum ? 0 : this.time(end)),
      pitch: onset.pitch,
      velocity: Math.min(127, Math.max(1, Math.round(onset.velocity))),
      program,
      isDrum,
      confidence: onset.confidence,
    };
  }

  private time(frame: number): number {
    return ((frame + 0.5) * this.facts.hopSamples) / this.facts.sampleRate;
  }
}

/** Adds the rows (frame, pitch, probability, velocity) of a segment, by frame. */
function collect(
  rows: Float32Array,
  programs: Float32Array | undefined,
  firstFrame: number,
  found: Candidate[],
): void {
  const added: Candidate[] = [];
  for (let i = 0; i < rows.length / 4; i++) {
    const [frame, pitch, confidence, velocity] = rows.subarray(4 * i, 4 * i + 4);
    if (confidence < LEAST_CONFIDENCE) continue;
    added.push({
      frame: firstFrame + Math.round(frame),
      pitch: Math.round(pitch),
      confidence,
      velocity,
      programs: programs?.slice(i * NUM_PROGRAMS, (i + 1) * NUM_PROGRAMS) ?? new Float32Array(0),
    });
  }
  added.sort((a, b) => a.frame - b.frame || a.pitch - b.pitch);
  found.push(...added);
}
