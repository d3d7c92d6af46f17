// Notes -> a MIDI file, one track for each part, as mt3_keras/midi.py writes them.

import { writeMidi, type MidiEvent } from "midi-file";

import type { Note } from "./notes";
import type { Tempo } from "./tempo";

/** A part of the piece under the name that the user gave it. */
export interface Part {
  name: string;
  program: number;
  isDrum: boolean;
  notes: Note[];
}

const TICKS_A_BEAT = 480;
const PLAIN_TEMPO = 120; // where none is known
const LEAST_PICKUP = 20_000; // microseconds
const DRUM_CHANNEL = 9;
const NUM_MELODIC = 15;

/**
 * The bytes of a MIDI file; times are moved by less than a tick, about 1 ms.
 *
 * Before the first bar line stands a bar of as many beats as fit, and there is no time signature
 * without a tempo. MIDI has 15 melodic channels: further parts go to a second port, which has 15
 * more.
 */
export function toMidi(parts: Part[], tempo: Tempo | null, comment: string): Uint8Array {
  const beat = Math.round(60e6 / (tempo?.beatsPerMinute ?? PLAIN_TEMPO)); // microseconds
  const before = Math.round((tempo?.firstBar ?? 0) * 1e6);
  const pickup = before > LEAST_PICKUP ? Math.max(1, Math.round(before / beat)) : 0; // beats
  const start = pickup ? before : 0;
  const firstTick = pickup * TICKS_A_BEAT;
  const toTicks = (seconds: number) => {
    const after = seconds * 1e6 - start;
    return firstTick + Math.round(after < 0 ? (after * firstTick) / start : (after * TICKS_A_BEAT) / beat);
  };
  const head: MidiEvent[] = [{ deltaTime: 0, meta: true, type: "text", text: comment }];
  if (pickup) head.push(...startBars(0, Math.round(before / pickup), pickup));
  head.push(...startBars(firstTick, beat, tempo?.beatsPerBar));
  head.push({ deltaTime: 0, meta: true, type: "endOfTrack" });
  let melodic = 0;
  const tracks = parts.map((part) => {
    const index = part.isDrum ? 0 : melodic++;
    const place = index % NUM_MELODIC;
    const channel = part.isDrum ? DRUM_CHANNEL : place < DRUM_CHANNEL ? place : place + 1;
    return toTrack(part, channel, Math.floor(index / NUM_MELODIC), toTicks);
  });
  const header = { format: 1 as const, ticksPerBeat: TICKS_A_BEAT, numTracks: parts.length + 1 };
  return Uint8Array.from(writeMidi({ header, tracks: [head, ...tracks] }));
}

/** Tempo, and time signature where one is known, so many ticks after the event before. */
function startBars(deltaTime: number, beat: number, numerator: number | undefined): MidiEvent[] {
  const speed: MidiEvent = { deltaTime, meta: true, type: "setTempo", microsecondsPerBeat: beat };
  if (!numerator) return [speed];
  const shape = { numerator, denominator: 4, metronome: 24, thirtyseconds: 8 } as const;
  return [speed, { deltaTime: 0, meta: true, type: "timeSignature", ...shape }];
}

function toTrack(
  part: Part,
  channel: number,
  port: number,
  toTicks: (seconds: number) => number,
): MidiEvent[] {
  const timed: { at: number; rank: number; event: MidiEvent }[] = [];
  for (const { onset, offset, pitch, velocity } of part.notes) {
    const [begin, end] = [toTicks(onset), Math.max(toTicks(offset), toTicks(onset) + 1)];
    const common = { deltaTime: 0, channel, noteNumber: pitch };
    timed.push({ at: begin, rank: 1, event: { ...common, type: "noteOn", velocity } });
    timed.push({ at: end, rank: 0, event: { ...common, type: "noteOff", velocity: 0 } });
  }
  timed.sort((a, b) => a.at - b.at || a.rank - b.rank); // a note ends before the next begins
  const events: MidiEvent[] = [
    { deltaTime: 0, meta: true, type: "trackName", text: toLatin(part.name) },
    { deltaTime: 0, meta: true, type: "portPrefix", port },
    { deltaTime: 0, type: "programChange", channel, programNumber: part.program },
  ];
  let before = 0;
  for (const { at, event } of timed) {
    events.push({ ...event, deltaTime: at - before });
    before = at;
  }
  events.push({ deltaTime: 1, meta: true, type: "endOfTrack" });
  return events;
}

/** MIDI's text has one byte a letter. */
function toLatin(text: string): string {
  return text.replace(/[^\x20-\xff]/g, "?");
}
