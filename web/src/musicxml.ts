// Notes -> MusicXML on a grid of sixteenths: one voice for each part, its chords cut where the
// next begin. Times are counted in steps of the grid. mt3 transcribe --formats musicxml quantises
// with more care.

import type { Part } from "./midifile";
import type { Note } from "./notes";
import { USUAL_BAR, type Tempo } from "./tempo";

const STEPS_A_BEAT = 4;
const LENGTHS: [number, string, boolean][] = [
  ...([[16, "whole", false], [12, "half", true], [8, "half", false]] as const),
  ...([[6, "quarter", true], [4, "quarter", false], [3, "eighth", true]] as const),
  ...([[2, "eighth", false], [1, "16th", false]] as const),
].map(([steps, type, isDotted]) => [steps, type, isDotted]);
const STEPS = ["C", "C", "D", "E", "E", "F", "F", "G", "A", "A", "B", "B"];
const ALTERS = [0, 1, 0, -1, 0, 0, 1, 0, -1, 0, -1, 0];
// Where drums stand on their staff; others on the middle line.
const DRUM_PLACES: Record<number, [string, number]> = {
  ...{ 35: ["F", 4], 36: ["F", 4], 37: ["C", 5], 38: ["C", 5], 40: ["C", 5], 41: ["A", 4] },
  ...{ 42: ["G", 5], 43: ["A", 4], 44: ["D", 4], 45: ["D", 5], 46: ["G", 5], 47: ["D", 5] },
  ...{ 48: ["E", 5], 49: ["A", 5], 50: ["E", 5], 51: ["F", 5], 57: ["A", 5], 59: ["F", 5] },
};

interface Chord {
  begin: number; // steps
  end: number;
  notes: Note[];
}

/** The text of a MusicXML file. */
export function toMusicXml(parts: Part[], tempo: Tempo | null, title: string): string {
  const beatsPerMinute = tempo?.beatsPerMinute ?? 120;
  const step = 60 / beatsPerMinute / STEPS_A_BEAT;
  const bar = (tempo?.beatsPerBar ?? USUAL_BAR) * STEPS_A_BEAT;
  const first = tempo?.firstBar ?? 0;
  const earliest = Math.min(...parts.flatMap(({ notes }) => notes.map(({ onset }) => onset)));
  const origin = earliest < first - step / 2 ? first - bar * step : first; // the first bar line
  const toStep = (seconds: number) => Math.round((seconds - origin) / step);
  const chords = parts.map((part) => toChords(part.notes, toStep));
  const last = Math.max(1, ...chords.map((some) => some.at(-1)?.end ?? 0));
  const numBars = Math.ceil(last / bar);
  const list = parts.map((part, i) => describe(part, i + 1));
  const written = parts.map((part, i) => {
    const bars = toBars(chords[i], part, i + 1, [numBars, bar], i === 0 ? beatsPerMinute : null);
    return `<part id="P${i + 1}">${bars}</part>`;
  });
  return (
    '<?xml version="1.0" encoding="UTF-8"?>\n' +
    '<!DOCTYPE score-partwise PUBLIC "-//Recordare//DTD MusicXML 4.0 Partwise//EN" ' +
    '"http://www.musicxml.org/dtds/partwise.dtd">\n<score-partwise version="4.0">' +
    `<work><work-title>${escape(title)}</work-title></work>` +
    `<part-list>${list.join("")}</part-list>${written.join("\n")}</score-partwise>\n`
  );
}

function escape(text: string): string {
  return text.replace(/[&<>"]/g, (letter) => `&#${letter.charCodeAt(0)};`);
}

/** The entry of a part in the list; each drum is an instrument of its own, with its key. */
function describe({ name, program, isDrum, notes }: Part, place: number): string {
  const keys = isDrum ? [...new Set(notes.map(({ pitch }) => pitch))] : [0];
  const ids = keys.map((key) => `P${place}-I${key}`);
  const named = ids.map((id) => `<score-instrument id="${id}"><instrument-name>${escape(name)}` +
    "</instrument-name></score-instrument>");
  const sounds = ids.map((id, i) => {
    const sound = isDrum
      ? `<midi-channel>10</midi-channel><midi-unpitched>${keys[i] + 1}</midi-unpitched>`
      : `<midi-channel>${((place - 1) % 9) + 1}</midi-channel><midi-program>${program + 1}</midi-program>`;
    return `<midi-instrument id="${id}">${sound}</midi-instrument>`;
  });
  return (
    `<score-part id="P${place}"><part-name>${escape(name)}</part-name>` +
    `${named.join("")}${sounds.join("")}</score-part>`
  );
}

function drum({ pitch, isDrum }: Note, place: number): string {
  return isDrum ? `<instrument id="P${place}-I${pitch}"/>` : "";
}

function toChords(notes: Note[], toStep: (seconds: number) => number): Chord[] {
  const chords: Chord[] = [];
  for (const note of notes) {
    const begin = Math.max(0, toStep(note.onset));
    const end = Math.max(begin + 1, note.isDrum ? 0 : toStep(note.offset));
    const last = chords.at(-1);
    if (last?.begin === begin) {
      if (last.notes.some(({ pitch }) => pitch === note.pitch)) continue;
      last.notes.push(note);
      last.end = Math.max(last.end, end);
    } else {
      if (last) last.end = Math.min(last.end, begin);
      chords.push({ begin, end, notes: [note] });
    }
  }
  return chords;
}

function toBars(
  chords: Chord[],
  part: Part,
  place: number,
  [numBars, bar]: [number, number],
  tempo: number | null,
): string {
  const bars: string[] = Array.from({ length: numBars }, () => "");
  const write = (begin: number, end: number, notes: Note[]) => {
    for (let at = begin; at < end; ) {
      const room = Math.min(end, (Math.floor(at / bar) + 1) * bar) - at;
      const [length, type, isDotted] = LENGTHS.find(([steps]) => steps <= room) ?? LENGTHS[7];
      const ties = { start: at + length < end, stop: at > begin };
      const shape = `<type>${type}</type>${isDotted ? "<dot/>" : ""}`;
      bars[Math.floor(at / bar)] += toElements(notes, place, length, shape, ties);
      at += length;
    }
  };
  let at = 0;
  for (const chord of chords) {
    write(at, chord.begin, []);
    write(chord.begin, chord.end, chord.notes);
    at = chord.end;
  }
  write(at, numBars * bar, []);
  return bars
    .map((text, i) => `<measure number="${i + 1}">${i ? "" : begin(part, bar, tempo)}${text}</measure>`)
    .join("\n");
}

/** What stands before the first note of a part. */
function begin(part: Part, bar: number, tempo: number | null): string {
  const pitches = part.notes.map(({ pitch }) => pitch).sort((a, b) => a - b);
  const isLow = pitches[Math.floor(pitches.length / 2)] < 58;
  const clef = part.isDrum
    ? "<sign>percussion</sign>"
    : isLow
      ? "<sign>F</sign><line>4</line>"
      : "<sign>G</sign><line>2</line>";
  const speed = tempo
    ? "<direction placement=\"above\"><direction-type><metronome><beat-unit>quarter</beat-unit>" +
      `<per-minute>${Math.round(tempo)}</per-minute></metronome></direction-type>` +
      `<sound tempo="${tempo.toFixed(2)}"/></direction>`
    : "";
  return (
    `<attributes><divisions>${STEPS_A_BEAT}</divisions><key><fifths>0</fifths></key>` +
    `<time><beats>${bar / STEPS_A_BEAT}</beats><beat-type>4</beat-type></time><clef>${clef}</clef></attributes>${speed}`
  );
}

function toElements(
  notes: Note[],
  place: number,
  length: number,
  shape: string,
  ties: { start: boolean; stop: boolean },
): string {
  const ending = `<duration>${length}</duration>`;
  if (!notes.length) return `<note><rest/>${ending}<voice>1</voice>${shape}</note>`;
  const kinds = (["stop", "start"] as const).filter((kind) => ties[kind]);
  return notes
    .map((note, i) => {
      const tied = note.isDrum ? [] : kinds;
      const signs = tied.map((kind) => `<tie type="${kind}"/>`).join("");
      const marks = tied.map((kind) => `<tied type="${kind}"/>`).join("");
      const notations = marks && `<notations>${marks}</notations>`;
      return (
        `<note>${i ? "<chord/>" : ""}${toPitch(note)}${ending}${signs}${drum(note, place)}<voice>1</voice>` +
        `${shape}${notations}</note>`
      );
    })
    .join("");
}

function toPitch({ pitch, isDrum }: Note): string {
  if (isDrum) {
    const [step, octave] = DRUM_PLACES[pitch] ?? ["B", 4];
    return (
      `<unpitched><display-step>${step}</display-step>` +
      `<display-octave>${octave}</display-octave></unpitched>`
    );
  }
  const alter = ALTERS[pitch % 12];
  return (
    `<pitch><step>${STEPS[pitch % 12]}</step>${alter ? `<alter>${alter}</alter>` : ""}` +
    `<octave>${Math.floor(pitch / 12) - 1}</octave></pitch>`
  );
}
