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
const DRUM_CHANNEL = 9;
const NUM_MELODIC = 15;

/**
 * The bytes of a MIDI file; times are moved by less than half a tick, about 0.5 ms.
 *
 * MIDI has 15 melodic channels: further parts go to a second port, which has 15 more.
 */
export function toMidi(parts: Part[], tempo: Tempo | null, comment: string): Uint8Array {
  const beatsPerMinute = tempo?.beatsPerMinute ?? PLAIN_TEMPO;
  const microseconds = Math.round(60e6 / beatsPerMinute);
  const toTicks = (seconds: number) => Math.round((seconds * 1e6 * TICKS_A_BEAT) / microseconds);
  const head: MidiEvent[] = [
    { deltaTime: 0, meta: true, type: "text", text: comment },
    { deltaTime: 0, meta: true, type: "setTempo", microsecondsPerBeat: microseconds },
    {
      ...{ deltaTime: 0, meta: true, type: "timeSignature", numerator: 4, denominator: 4 },
      ...{ metronome: 24, thirtyseconds: 8 },
    } as MidiEvent,
    { deltaTime: 0, meta: true, type: "endOfTrack" },
  ];
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
