// The page: what the user does -> what is read, shown, played and saved.

import { AudioProblem, Microphone, readFile, type Recorded } from "./audio";
import { toMidi, type Part } from "./midifile";
import { toMusicXml } from "./musicxml";
import { clock, pitchName, type ModelFacts, type Note } from "./notes";
import { Parts } from "./parts";
import { Player } from "./player";
import { Roll } from "./roll";
import { alignBars, alignTempo, findTempo, USUAL_BAR, type Tempo } from "./tempo";
import type { Reply, Request } from "./worker";

const MOST_ROWS = 2000; // of the list of notes
const LONG_SECONDS = 10 * 60;

function element<T extends HTMLElement = HTMLElement>(id: string): T {
  const found = document.getElementById(id);
  if (!found) throw new Error(`no element ${id}`);
  return found as T;
}

const button = (id: string) => element<HTMLButtonElement>(id);
const input = (id: string) => element<HTMLInputElement>(id);
const show = (id: string, isShown: boolean) => (element(id).hidden = !isShown);
/** What the page is doing; a screen reader speaks it, unless it is but a count that goes on. */
const say = (text: string, isCount = false) => {
  element("status").setAttribute("aria-live", isCount ? "off" : "polite");
  element("status").textContent = text;
};

let facts: ModelFacts;
let recorded: Recorded | undefined;
let notes: Note[] = [];
let isReady = false;
let isWhole = false;
let startedAt = 0;
let firstUpdate: { at: number; seconds: number } | undefined;
let tempo: Tempo | null = null;
let hasOwnTempo = false; // of the user's
let microphone: Microphone | undefined;
const worker = startWorker();
const player = new Player();
const roll = new Roll(
  ...([element("scroller"), element("spacer"), element<HTMLCanvasElement>("canvas")] as const),
  element("ruler"),
);
const parts = new Parts(element("part-list"), () => showParts());

/** What a test reads. */
Object.assign(globalThis, {
  mt3: {
    get notes() {
      return notes;
    },
    get isReady() {
      return isReady;
    },
    get isWhole() {
      return isWhole;
    },
    get cursor() {
      return roll.cursor;
    },
    /** Of the recording. */
    get duration() {
      return recorded?.seconds;
    },
    /** That transcribing it has taken. */
    get seconds() {
      return (performance.now() - startedAt) / 1000;
    },
  },
});

function startWorker(): Worker {
  const started = new Worker("wasm/worker.js");
  started.onmessage = ({ data }: MessageEvent<Reply>) => {
    if (data.kind === "ready") isReady = true;
    if (data.kind === "notes") take(data.notes, data.seconds, data.isWhole);
    if (data.kind === "failed") fail(`The network could not be run here: ${data.message}`);
  };
  started.onerror = ({ message }) => fail(`The network could not be loaded: ${message}`);
  return started;
}

function ask(request: Request, transfer: Transferable[] = []): void {
  worker.postMessage(request, transfer);
}

function fail(message: string): void {
  show("working", false);
  say("");
  element("error").textContent = message;
  show("error", true);
}

/** Reads a file and has it transcribed. */
async function open(file: Blob, name: string): Promise<void> {
  show("error", false);
  say(`Reading ${name} …`);
  try {
    const read = await readFile(file, name);
    player.stop();
    begin(read);
  } catch (error) {
    if (!(error instanceof AudioProblem)) throw error;
    fail(error.message);
  }
}

function begin(read: Recorded): void {
  recorded = read;
  notes = [];
  isWhole = hasOwnTempo = false;
  parts.forget();
  document.body.classList.add("has-result");
  show("result", true);
  show("working", true);
  Object.assign(roll, { duration: read.seconds, done: 0, cursor: 0, selected: undefined });
  setRange(undefined);
  input("limit").value = String(facts.reading.onset_limit);
  showLimit();
  setTempo(null);
  showNotes();
  roll.zoomTo(Math.min(read.seconds, 20));
  showTime(0);
  startedAt = performance.now();
  firstUpdate = undefined;
  const samples = read.mono;
  ask({ kind: "transcribe", samples, rate: read.rate }, [samples.buffer]);
  showProgress(0);
}

function showProgress(seconds: number): void {
  if (!recorded) return;
  const total = recorded.seconds;
  element<HTMLProgressElement>("progress").value = seconds / total;
  // The first one comes after the network has been loaded, which says nothing about its speed.
  const now = performance.now() / 1000;
  if (seconds > 0) firstUpdate ??= { at: now, seconds };
  const speed = firstUpdate ? (seconds - firstUpdate.seconds) / (now - firstUpdate.at) : 0;
  const left = speed > 0 ? `, ${describeTime((total - seconds) / speed)} left` : "";
  const long = total > LONG_SECONDS ? ` It is ${Math.round(total / 60)} minutes long.` : "";
  say(`Transcribing ${recorded.name}: ${clock(seconds)} of ${clock(total)}${left}.${long}`, seconds > 0);
}

function describeTime(seconds: number): string {
  return seconds < 90 ? `${Math.ceil(seconds)} s` : `${Math.round(seconds / 60)} minutes`;
}

/** Takes the notes found so far. */
function take(found: Note[], seconds: number, isEnd: boolean): void {
  if (!recorded) return;
  const wasWhole = isWhole;
  notes = found;
  isWhole = isEnd;
  roll.done = seconds;
  if (isEnd && !hasOwnTempo) setTempo(findTempo(notes.map(({ onset }) => onset)));
  showNotes();
  if (!isEnd) {
    showProgress(seconds);
    return;
  }
  show("working", false);
  const isPart = seconds < recorded.seconds - 0.01;
  const took = isPart
    ? `, stopped at ${clock(seconds)}`
    : wasWhole
      ? ""
      : ` in ${describeTime((performance.now() - startedAt) / 1000)}`;
  const count = (n: number, what: string) => `${n} ${what}${n === 1 ? "" : "s"}`;
  const instruments = count(parts.list().length, "instrument");
  say(
    notes.length
      ? `${recorded.name}: ${count(notes.length, "note")} of ${instruments}${took}.`
      : `${recorded.name}: no notes were found${took}. A lower confidence may show some.`,
  );
}

function showNotes(): void {
  parts.update(notes, facts);
  showParts();
}

/** Shows and plays the parts as the user has set them. */
function showParts(): void {
  const all = parts.list();
  roll.setNotes(all.map((part) => ({ ...part, isFaded: !parts.isAudible(part) })));
  player.setVoices(all.map((part) => ({ ...part, isAudible: parts.isAudible(part) })));
  if (element<HTMLDetailsElement>("list").open) showRows();
}

function showRows(): void {
  const rows = selectedParts().flatMap((part) => part.notes.map((note) => ({ note, part })));
  rows.sort((a, b) => a.note.onset - b.note.onset);
  const shown = rows.slice(0, MOST_ROWS).map(({ note, part }) => {
    const row = document.createElement("tr");
    const values = [note.onset.toFixed(2), note.offset.toFixed(2), nameOf(note), part.name];
    values.push(`${note.velocity}`, note.confidence.toFixed(2));
    row.append(
      ...values.map((text) => Object.assign(document.createElement("td"), { textContent: text })),
    );
    return row;
  });
  element("rows").replaceChildren(...shown);
}

function nameOf(note: Note): string {
  return note.isDrum ? (facts.drums[note.pitch] ?? `drum ${note.pitch}`) : pitchName(note.pitch);
}

function describe(note: Note): string {
  const instrument = parts.list().find((part) => part.notes.includes(note))?.name ?? "";
  const times = `${note.onset.toFixed(2)} to ${note.offset.toFixed(2)} s`;
  const sure = `confidence ${note.confidence.toFixed(2)}`;
  return `${nameOf(note)}, ${instrument}, ${times}, velocity ${note.velocity}, ${sure}`;
}

// Time, range, tempo

function showTime(seconds: number): void {
  roll.cursor = seconds;
  element("time").textContent = `${clock(seconds)} / ${clock(recorded?.seconds ?? 0)}`;
  roll.draw();
}

function seek(seconds: number): void {
  const time = Math.min(recorded?.seconds ?? 0, Math.max(0, seconds));
  showTime(time);
  roll.reveal(time);
  if (player.isPlaying) void play();
}

function setRange(range: [number, number] | undefined): void {
  roll.range = range;
  const [from, to] = range ?? [0, recorded?.seconds ?? 0];
  input("from").value = from.toFixed(1);
  input("to").value = to.toFixed(1);
  button("whole").disabled = !range;
  roll.draw();
  if (element<HTMLDetailsElement>("list").open) showRows();
}

function setTempo(found: Tempo | null): void {
  tempo = roll.tempo = found;
  input("tempo").value = found ? String(Math.round(found.beatsPerMinute * 100) / 100) : "";
  input("per-bar").value = String(found?.beatsPerBar ?? USUAL_BAR);
  input("per-bar").disabled = button("bar-here").disabled = !found;
  roll.draw();
}

/** Bars of so many beats, one of which begins at a time. */
function setBars(beatsPerBar: number, seconds: number): void {
  if (!tempo) return;
  hasOwnTempo = true;
  setTempo(alignBars(tempo, beatsPerBar, seconds));
}

async function play(): Promise<void> {
  if (!recorded) return;
  const before = element("status").textContent ?? "";
  try {
    say("Loading the sounds of the instruments …");
    await player.prepare();
    say(before);
  } catch (error) {
    say(`Only the recording is played: ${error instanceof Error ? error.message : error}.`);
  }
  const [from, to] = roll.range ?? [0, recorded.seconds];
  const isInside = roll.cursor >= from && roll.cursor < to - 0.05;
  await player.play(recorded.sound, isInside ? roll.cursor : from, to);
  showPlaying();
}

function showPlaying(): void {
  button("play").textContent = player.isPlaying ? "Pause" : "Play";
}

function togglePlay(): void {
  if (!player.isPlaying) {
    void play();
    return;
  }
  player.stop();
  showTime(player.time());
  showPlaying();
}

player.onTime = (time) => {
  showTime(time);
  roll.reveal(time);
};
player.onEnd = showPlaying;
roll.onSeek = seek;
roll.onRange = (from, to) => setRange([from, to]);
roll.onHover = (note) => (element("note").textContent = note ? describe(note) : "");

function showLimit(): void {
  element("limit-text").textContent = Number(input("limit").value).toFixed(2);
}

// Saving

/** The audible parts, within the selected range; its start becomes 0 when there is one. */
function selectedParts(): Part[] {
  const [from, to] = roll.range ?? [0, Infinity];
  return parts
    .list()
    .filter((part) => parts.isAudible(part))
    .map((part) => ({
      ...part,
      notes: part.notes
        .filter((note) => note.onset >= from && note.onset < to)
        .map((note) => ({
          ...note,
          onset: note.onset - from,
          offset: Math.min(note.offset, to) - from,
        })),
    }))
    .filter((part) => part.notes.length);
}

function selectedTempo(): Tempo | null {
  if (!tempo || !roll.range) return tempo;
  const bar = (tempo.beatsPerBar * 60) / tempo.beatsPerMinute;
  const first = (tempo.firstBar - roll.range[0]) % bar;
  return { ...tempo, firstBar: (first + bar) % bar };
}

function save(content: BlobPart, type: string, suffix: string): void {
  const name = (recorded?.name ?? "notes").replace(/\.[^.]*$/, "");
  const address = URL.createObjectURL(new Blob([content], { type }));
  Object.assign(document.createElement("a"), { href: address, download: `${name}.${suffix}` }).click();
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}

/** The columns that mt3 transcribe --formats csv writes. */
function toCsv(): string {
  const lines = selectedParts().flatMap((part) =>
    part.notes.map((note) => ({
      onset: note.onset,
      text: [
        ...[note.onset.toFixed(3), note.offset.toFixed(3), note.pitch, note.velocity],
        ...[part.isDrum ? 0 : part.program, part.isDrum ? "True" : "False"],
        ...[`"${part.name.replaceAll('"', '""')}"`, note.confidence.toFixed(3)],
      ].join(","),
    })),
  );
  lines.sort((a, b) => a.onset - b.onset);
  const head = "onset,offset,pitch,velocity,program,is_drum,instrument,confidence";
  return [head, ...lines.map(({ text }) => text), ""].join("\r\n");
}

button("save-midi").onclick = () => {
  const comment = `Transcribed by MT3 in Keras ${facts.version}, model ${facts.name}`;
  const bytes = toMidi(selectedParts(), selectedTempo(), comment);
  save(bytes as Uint8Array<ArrayBuffer>, "audio/midi", "mid");
};
button("save-musicxml").onclick = () => {
  const text = toMusicXml(selectedParts(), selectedTempo(), recorded?.name ?? "");
  save(text, "application/vnd.recordare.musicxml+xml", "musicxml");
};
button("save-csv").onclick = () => save(toCsv(), "text/csv", "csv");

// Input

async function record(): Promise<void> {
  show("error", false);
  const running = microphone;
  if (running) {
    microphone = undefined;
    const sound = await running.stop();
    await open(sound, `recording ${new Date().toTimeString().slice(0, 5).replace(":", ".")}`);
  } else {
    try {
      microphone = await Microphone.start();
      countRecording(microphone, performance.now());
    } catch (error) {
      if (!(error instanceof AudioProblem)) throw error;
      fail(error.message);
    }
  }
  button("record").textContent = microphone ? "Stop recording" : "Record";
}

/** Says how long a recording is, until it ends. */
function countRecording(running: Microphone, start: number): void {
  const count = () => {
    if (microphone !== running) return clearInterval(timer);
    const seconds = (performance.now() - start) / 1000;
    say(`Recording … ${clock(seconds)}. Press Stop recording when you are done.`, seconds >= 1);
  };
  const timer = window.setInterval(count, 1000);
  count();
}

button("choose").onclick = () => input("file").click();
input("file").onchange = () => {
  const [file] = input("file").files ?? [];
  if (file) void open(file, file.name);
  input("file").value = ""; // the same file may be chosen again
};
button("record").onclick = () => void record();
button("example").onclick = async () => {
  const answer = await fetch("example.flac");
  if (answer.ok) await open(await answer.blob(), "example.flac");
  else fail("The example is missing from this copy of the page.");
};
button("cancel").onclick = () => {
  say("Stopping …");
  ask({ kind: "stop" });
};
for (const kind of ["dragenter", "dragover", "dragleave", "drop"] as const) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    element("drop").classList.toggle("over", kind === "dragenter" || kind === "dragover");
    const file = kind === "drop" ? event.dataTransfer?.files[0] : undefined;
    if (file) void open(file, file.name);
  });
}

// Widgets

button("play").onclick = togglePlay;
input("balance").oninput = () => player.setBalance(Number(input("balance").value));
input("limit").oninput = () => {
  showLimit();
  const onsets = Number(input("limit").value);
  // The limit of strokes moves along, from its own value.
  const strokes = facts.reading.stroke_limit + (onsets - facts.reading.onset_limit);
  ask({ kind: "limit", onsets, strokes: Math.min(0.98, Math.max(0.05, strokes)) });
};
input("tempo").onchange = () => {
  const value = Number(input("tempo").value);
  hasOwnTempo = true;
  const isTempo = value >= 30 && value <= 300;
  const beatsPerBar = tempo?.beatsPerBar ?? USUAL_BAR;
  const found = isTempo ? alignTempo(notes.map(({ onset }) => onset), value) : null;
  setTempo(found && { ...found, beatsPerBar });
};
input("per-bar").onchange = () => {
  const count = Math.round(Number(input("per-bar").value));
  if (tempo) setBars(count >= 1 && count <= 12 ? count : tempo.beatsPerBar, tempo.firstBar);
};
button("bar-here").onclick = () => setBars(tempo?.beatsPerBar ?? USUAL_BAR, roll.cursor);
button("zoom-in").onclick = () => roll.zoomBy(1.5);
button("zoom-out").onclick = () => roll.zoomBy(1 / 1.5);
button("zoom-all").onclick = () => roll.zoomTo(recorded?.seconds ?? 1);
for (const id of ["from", "to"]) {
  input(id).onchange = () => {
    const [from, to] = [Number(input("from").value), Number(input("to").value)];
    const end = recorded?.seconds ?? 0;
    setRange(from >= 0 && from < to ? [from, Math.min(to, end)] : undefined);
  };
}
button("whole").onclick = () => setRange(undefined);
element<HTMLDetailsElement>("list").ontoggle = () => showRows();

/** The next note from the cursor on, or the one before it. */
function stepToNote(forwards: boolean): void {
  const audible = parts.list().filter((part) => parts.isAudible(part));
  const all = audible.flatMap((part) => part.notes).sort((a, b) => a.onset - b.onset);
  const at = roll.selected ? all.indexOf(roll.selected) : -1;
  const first = all.findIndex((note) => note.onset >= roll.cursor);
  const next = at >= 0 ? at + (forwards ? 1 : -1) : forwards ? first : first - 1;
  const note = all[next];
  if (!note) return;
  roll.selected = note;
  element("note").textContent = describe(note);
  seek(note.onset);
}

element("scroller").addEventListener("keydown", (event) => {
  const step = tempo ? 60 / tempo.beatsPerMinute : 1;
  const move = { ArrowLeft: -step, ArrowRight: step }[event.key];
  const to = { Home: 0, End: recorded?.seconds ?? 0 }[event.key];
  if (move !== undefined) {
    const [from, until] = roll.range ?? [roll.cursor, roll.cursor];
    seek(roll.cursor + move);
    if (event.shiftKey) setRange([Math.min(from, roll.cursor), Math.max(until, roll.cursor)]);
  } else if (to !== undefined) seek(to);
  else if (event.key === "+" || event.key === "=") roll.zoomBy(1.5);
  else if (event.key === "-") roll.zoomBy(1 / 1.5);
  else if (event.key === " ") togglePlay();
  else if (event.key === "Escape") setRange(undefined);
  else if (event.key === "b") setBars(tempo?.beatsPerBar ?? USUAL_BAR, roll.cursor);
  else if (event.key === "n" || event.key === "p") stepToNote(event.key === "n");
  else return;
  event.preventDefault();
});

async function start(): Promise<void> {
  const answer = await fetch("model/model.json");
  if (!answer.ok) {
    fail("The model is missing from this copy of the page: build it with make web.");
    return;
  }
  facts = (await answer.json()) as ModelFacts;
  roll.drumNames = facts.drums;
  element("model").textContent = `MT3 in Keras ${facts.version}, model ${facts.name}.`;
}

void start();
