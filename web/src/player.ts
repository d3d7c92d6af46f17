// Plays the recording and the notes together.

import { WorkletSynthesizer } from "spessasynth_lib";

import type { Note } from "./notes";

/** Notes that sound as one instrument. */
export interface Voice {
  program: number;
  isDrum: boolean;
  isAudible: boolean;
  notes: Note[]; // by onset
}

const TICK_MS = 50;
const AHEAD = 0.25; // seconds for which notes are handed to the synthesizer
const START_DELAY = 0.08; // seconds
const DRUM_CHANNEL = 9;

export class Player {
  onTime: (seconds: number) => void = () => undefined;
  onEnd: () => void = () => undefined;
  private context: AudioContext | undefined;
  private synthesizer: WorkletSynthesizer | undefined;
  private recordingGain: GainNode | undefined;
  private notesGain: GainNode | undefined;
  private source: AudioBufferSourceNode | undefined;
  private timer = 0;
  private startedAt = 0; // context time at which the recording's time was `startedFrom`
  private startedFrom = 0;
  private range: [number, number] = [0, 0];
  private given: number[] = []; // of each voice, notes handed over
  private balance = 0.5;
  private voices: Voice[] = [];

  get isPlaying(): boolean {
    return this.timer !== 0;
  }

  /** Loads the synthesizer and its sounds once; without them only the recording is played. */
  async prepare(): Promise<void> {
    if (this.context) return;
    const context = (this.context = new AudioContext());
    this.recordingGain = new GainNode(context);
    this.notesGain = new GainNode(context);
    this.recordingGain.connect(context.destination);
    this.notesGain.connect(context.destination);
    this.setBalance(this.balance);
    const font = await fetch("sounds/font.sf3");
    if (!font.ok) throw new Error("this copy of the page has no sounds");
    await context.audioWorklet.addModule("sounds/synthesizer.js");
    const synthesizer = new WorkletSynthesizer(context);
    await synthesizer.soundBankManager.addSoundBank(await font.arrayBuffer(), "main");
    await synthesizer.isReady;
    synthesizer.connect(this.notesGain);
    this.synthesizer = synthesizer;
    this.setVoices(this.voices);
  }

  /** 0: the recording alone, 1: the notes alone. */
  setBalance(balance: number): void {
    this.balance = balance;
    if (!this.recordingGain || !this.notesGain) return;
    this.recordingGain.gain.value = Math.min(1, 2 * (1 - balance));
    this.notesGain.gain.value = Math.min(1, 2 * balance);
  }

  /** What is played; may change while it plays. */
  setVoices(voices: Voice[]): void {
    this.voices = voices;
    const { synthesizer } = this;
    if (!synthesizer) return;
    synthesizer.stopAll(false);
    while (synthesizer.channelCount <= channelOf(voices.length)) synthesizer.addNewChannel();
    voices.forEach(({ program, isDrum }, i) => {
      if (!isDrum) synthesizer.programChange(channelOf(i), program);
    });
    if (this.isPlaying) this.skipTo(this.time());
  }

  time(): number {
    if (!this.context || !this.isPlaying) return this.startedFrom;
    const passed = this.context.currentTime - this.startedAt;
    return Math.min(this.range[1], Math.max(this.range[0], this.startedFrom + passed));
  }

  /** Plays from `from` seconds to `to`. */
  async play(sound: AudioBuffer, from: number, to: number): Promise<void> {
    const { context, recordingGain } = this;
    if (!context || !recordingGain) return;
    this.stop();
    await context.resume();
    this.range = [from, to];
    this.startedFrom = from;
    this.startedAt = context.currentTime + START_DELAY;
    this.source = new AudioBufferSourceNode(context, { buffer: sound });
    this.source.connect(recordingGain);
    this.source.start(this.startedAt, from, Math.max(0, to - from));
    this.skipTo(from);
    this.timer = window.setInterval(() => this.tick(), TICK_MS);
    this.tick();
  }

  stop(): void {
    if (!this.isPlaying) return;
    this.startedFrom = this.time();
    clearInterval(this.timer);
    this.timer = 0;
    this.source?.stop();
    this.synthesizer?.stopAll(true);
  }

  private skipTo(time: number): void {
    this.given = this.voices.map(({ notes }) => {
      const next = notes.findIndex((note) => note.onset >= time - 1e-6);
      return next < 0 ? notes.length : next;
    });
  }

  private tick(): void {
    const time = this.time();
    this.onTime(time);
    if (time >= this.range[1]) {
      this.stop();
      this.onEnd();
      return;
    }
    const { synthesizer } = this;
    if (!synthesizer) return;
    const shift = this.startedAt - this.startedFrom;
    this.voices.forEach(({ notes, isDrum, isAudible }, i) => {
      const channel = isDrum ? DRUM_CHANNEL : channelOf(i);
      for (; this.given[i] < notes.length; this.given[i]++) {
        const note = notes[this.given[i]];
        if (note.onset > Math.min(time + AHEAD, this.range[1])) break;
        if (!isAudible) continue;
        const end = Math.min(note.offset, this.range[1]);
        synthesizer.noteOn(channel, note.pitch, note.velocity, { time: note.onset + shift });
        synthesizer.noteOff(channel, note.pitch, { time: end + shift });
      }
    });
  }
}

/** The channel of the voice at `index`: channel 10, as musicians count, is for drums. */
function channelOf(index: number): number {
  return index < DRUM_CHANNEL ? index : index + 1;
}
