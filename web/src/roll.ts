// The piano roll: a canvas that draws what is in view of a scrolled, wide element.

import { clock, isBlackKey, pitchName, type Note } from "./notes";
import type { Tempo } from "./tempo";

/** Notes of one part as they are drawn. */
export interface Lane {
  color: string;
  isFaded: boolean;
  notes: Note[];
}

const KEYBOARD = 84; // pixels, with the names of drums
const NARROW_KEYBOARD = 60; // where there is little width
const NARROW = 600;
const KEY = 44;
const RULER = 26;
const DRUM_ROW = 13;
const LEAST_ROW = 6;
const MOST_ROW = 16;
const LEAST_NOTE = 3;
const LEAST_NAMED_ROW = 8; // in which a note's name can be read
const LABEL_GAP = 64; // pixels between labels of the ruler
const LABELS = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300]; // seconds between them
const LEAST_SCALE = 4; // pixels a second
const MOST_SCALE = 600;

interface Theme {
  text: string;
  faint: string;
  line: string;
  strong: string;
  row: string;
  surface: string;
  accent: string;
}

export class Roll {
  onSeek: (seconds: number) => void = () => undefined;
  onRange: (from: number, to: number) => void = () => undefined;
  onHover: (note: Note | undefined) => void = () => undefined;
  cursor = 0;
  duration = 1;
  done = 0; // seconds transcribed so far
  range: [number, number] | undefined;
  tempo: Tempo | null = null;
  drumNames: Record<string, string> = {};
  selected: Note | undefined;
  private scale = 80; // pixels a second
  private lanes: Lane[] = [];
  private drums: number[] = [];
  private lowest = 48;
  private highest = 72;
  private row = MOST_ROW;
  private isWaiting = false;

  constructor(
    private readonly scroller: HTMLElement,
    private readonly spacer: HTMLElement,
    private readonly canvas: HTMLCanvasElement,
    private readonly ruler: HTMLElement,
  ) {
    scroller.addEventListener("scroll", () => this.draw());
    new ResizeObserver(() => this.layOut()).observe(scroller);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    this.listen();
  }

  setNotes(lanes: Lane[]): void {
    this.lanes = lanes;
    const all = lanes.flatMap(({ notes }) => notes);
    const pitches = all.filter((note) => !note.isDrum).map((note) => note.pitch);
    const drums = new Set(all.filter((note) => note.isDrum).map((note) => note.pitch));
    this.drums = [...drums].sort((a, b) => b - a);
    this.lowest = Math.min(57, ...pitches) - 2;
    this.highest = Math.max(72, ...pitches) + 2;
    this.layOut();
  }

  /** Shows a part as long as the width allows, whole if `seconds` is the duration. */
  zoomTo(seconds: number): void {
    this.setScale((this.scroller.clientWidth - this.left - 8) / seconds);
  }

  zoomBy(factor: number): void {
    this.setScale(this.scale * factor);
  }

  private setScale(scale: number): void {
    const anchor = this.isVisible(this.cursor) ? this.cursor : this.timeAt(this.width / 2);
    const place = this.x(anchor);
    this.scale = Math.min(MOST_SCALE, Math.max(LEAST_SCALE, scale));
    this.layOut();
    this.scroller.scrollLeft += this.x(anchor) - place;
  }

  /** Scrolls so that a time can be seen, a little ahead of it where it plays. */
  reveal(time: number): void {
    const x = this.x(time);
    if (x < this.left + 4 || x > this.width - 30) {
      this.scroller.scrollLeft += x - this.left - this.width * 0.15;
    }
  }

  draw(): void {
    if (this.isWaiting) return;
    this.isWaiting = true;
    requestAnimationFrame(() => {
      this.isWaiting = false;
      this.paint();
    });
  }

  private get left(): number {
    return this.width < NARROW ? NARROW_KEYBOARD : KEYBOARD;
  }

  private get width(): number {
    return this.scroller.clientWidth;
  }

  private x(time: number): number {
    return this.left + time * this.scale - this.scroller.scrollLeft;
  }

  private timeAt(x: number): number {
    const time = (x - this.left + this.scroller.scrollLeft) / this.scale;
    return Math.min(this.duration, Math.max(0, time));
  }

  private isVisible(time: number): boolean {
    return this.x(time) >= this.left && this.x(time) <= this.width;
  }

  private y(pitch: number): number {
    return RULER + (this.highest - pitch) * this.row;
  }

  private get drumTop(): number {
    return this.y(this.lowest - 1) + 6;
  }

  private drumY(pitch: number): number {
    return this.drumTop + this.drums.indexOf(pitch) * DRUM_ROW;
  }

  private layOut(): void {
    const rows = this.highest - this.lowest + 1;
    const space = Math.max(380, Math.min(640, window.innerHeight * 0.6));
    const forDrums = this.drums.length * DRUM_ROW;
    this.row = Math.min(MOST_ROW, Math.max(LEAST_ROW, (space - RULER - forDrums) / rows));
    const height = Math.ceil(this.drumTop + forDrums + 4);
    const ratio = window.devicePixelRatio || 1;
    this.spacer.style.width = `${this.left + this.duration * this.scale + 8}px`;
    this.canvas.style.width = `${this.width}px`;
    this.canvas.style.height = `${height}px`;
    this.canvas.width = Math.round(this.width * ratio);
    this.canvas.height = Math.round(height * ratio);
    this.paint(); // setting the size has cleared it
  }

  private theme(): Theme {
    const style = getComputedStyle(this.scroller);
    const read = (name: string) => style.getPropertyValue(`--${name}`).trim();
    return {
      text: read("text"),
      faint: read("faint"),
      line: read("line"),
      strong: read("strong-line"),
      row: read("row"),
      surface: read("surface"),
      accent: read("accent"),
    };
  }

  private paint(): void {
    const context = this.canvas.getContext("2d");
    if (!context) return;
    const theme = this.theme();
    const ratio = window.devicePixelRatio || 1;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.fillStyle = theme.surface;
    context.fillRect(0, 0, this.width, this.canvas.height);
    context.font = "11px system-ui, sans-serif";
    context.textBaseline = "middle";
    this.paintRows(context, theme);
    this.paintGrid(context, theme);
    context.save();
    context.beginPath();
    context.rect(this.left, RULER, this.width, this.canvas.height);
    context.clip();
    for (const lane of this.lanes) this.paintLane(context, lane, theme);
    context.restore();
    this.paintRange(context, theme);
    this.paintKeyboard(context, theme);
    this.paintCursor(context, theme);
  }

  private paintRows(context: CanvasRenderingContext2D, theme: Theme): void {
    context.fillStyle = theme.row;
    for (let pitch = this.lowest; pitch <= this.highest; pitch++) {
      if (isBlackKey(pitch)) context.fillRect(this.left, this.y(pitch), this.width, this.row);
    }
    this.drums.forEach((_, i) => {
      if (i % 2 === 0) {
        context.fillRect(this.left, this.drumTop + i * DRUM_ROW, this.width, DRUM_ROW);
      }
    });
    context.fillStyle = theme.line;
    for (let pitch = this.lowest; pitch <= this.highest; pitch++) {
      if (pitch % 12 === 0) context.fillRect(this.left, this.y(pitch - 1), this.width, 1);
    }
    if (this.drums.length) context.fillRect(0, this.drumTop - 4, this.width, 2);
  }

  /** Lines of seconds, or of bars and beats where there is a tempo, with their labels. */
  private paintGrid(context: CanvasRenderingContext2D, theme: Theme): void {
    const [first, step, group] = this.tempo
      ? [this.tempo.firstBar, 60 / this.tempo.beatsPerMinute, this.tempo.beatsPerBar]
      : secondsGrid(this.scale);
    const from = Math.floor((this.timeAt(this.left) - first) / step);
    const to = Math.ceil((this.timeAt(this.width) - first) / step);
    const labelEach = Math.ceil(LABEL_GAP / (group * step * this.scale));
    for (let i = from; i <= to; i++) {
      const x = Math.round(this.x(first + i * step));
      const isMain = i % group === 0;
      if (first + i * step < 0) continue;
      if (x < this.left || (!isMain && step * this.scale < 10)) continue;
      context.fillStyle = isMain ? theme.strong : theme.line;
      context.fillRect(x, isMain ? RULER - 7 : RULER, 1, this.canvas.height);
      const number = i / group;
      if (!isMain || number < 0 || number % labelEach) continue;
      context.fillStyle = theme.faint;
      const label = this.tempo ? `${number + 1}` : clockLabel(i * step, step * group);
      context.fillText(label, x + 4, RULER / 2);
    }
  }

  private paintLane(context: CanvasRenderingContext2D, lane: Lane, theme: Theme): void {
    const [from, to] = [this.timeAt(this.left), this.timeAt(this.width)];
    for (const note of lane.notes) {
      if (note.offset < from || note.onset > to) continue;
      const x = this.x(note.onset);
      const width = Math.max(LEAST_NOTE, (note.offset - note.onset) * this.scale - 1);
      context.globalAlpha = lane.isFaded ? 0.15 : 0.5 + (0.5 * note.velocity) / 127;
      context.fillStyle = lane.color;
      if (note.isDrum) {
        const middle = this.drumY(note.pitch) + DRUM_ROW / 2;
        context.beginPath();
        context.arc(x + 3, middle, 2.5 + (2.5 * note.velocity) / 127, 0, 7);
        context.fill();
      } else {
        const y = this.y(note.pitch);
        context.beginPath();
        context.roundRect(x, y + 0.5, width, this.row - 1, 2);
        context.fill();
        if (this.row >= LEAST_NAMED_ROW && width > 26 && !lane.isFaded) {
          context.fillStyle = inkOn(lane.color, theme.surface, context.globalAlpha);
          context.globalAlpha = 1;
          context.font = `${Math.min(11, this.row + 1)}px system-ui, sans-serif`;
          context.fillText(pitchName(note.pitch), x + 4, y + this.row / 2 + 0.5);
        }
      }
      if (note === this.selected) this.outline(context, theme, x, width, note);
    }
    context.globalAlpha = 1;
  }

  private outline(
    context: CanvasRenderingContext2D,
    theme: Theme,
    x: number,
    width: number,
    note: Note,
  ): void {
    const top = note.isDrum ? this.drumY(note.pitch) : this.y(note.pitch);
    context.globalAlpha = 1;
    context.strokeStyle = theme.text;
    context.lineWidth = 2;
    context.strokeRect(x - 2, top - 1, Math.max(width, 8) + 4, note.isDrum ? DRUM_ROW : this.row + 2);
  }

  private paintKeyboard(context: CanvasRenderingContext2D, theme: Theme): void {
    context.fillStyle = theme.surface;
    context.fillRect(0, 0, this.left, this.canvas.height);
    const bottom = this.y(this.lowest - 1);
    const keys = this.left - KEY - 2;
    context.fillStyle = "#fff";
    context.fillRect(keys, RULER, KEY, bottom - RULER);
    for (let pitch = this.lowest; pitch <= this.highest; pitch++) {
      const y = this.y(pitch);
      if (isBlackKey(pitch)) {
        context.fillStyle = "#222";
        context.fillRect(keys, y, KEY * 0.55, this.row);
      } else if ([0, 5].includes(pitch % 12)) {
        context.fillStyle = "#bbb";
        context.fillRect(keys, y + this.row, KEY, 1);
      }
      if (pitch % 12 === 0) {
        context.fillStyle = "#333";
        context.textAlign = "right";
        context.fillText(pitchName(pitch), this.left - 5, y + this.row / 2);
        context.textAlign = "left";
      }
    }
    context.fillStyle = theme.faint;
    context.font = "10px system-ui, sans-serif";
    for (const drum of this.drums) {
      const name = this.drumNames[drum] ?? `${drum}`;
      context.fillText(name, 2, this.drumY(drum) + DRUM_ROW / 2, this.left - 5);
    }
  }

  private paintRange(context: CanvasRenderingContext2D, theme: Theme): void {
    context.fillStyle = theme.surface;
    context.globalAlpha = 0.65;
    const until = this.x(this.done);
    if (this.done < this.duration) context.fillRect(until, RULER, this.width, this.canvas.height);
    if (this.range) {
      const [from, to] = this.range.map((time) => this.x(time));
      context.fillRect(this.left, RULER, from - this.left, this.canvas.height);
      context.fillRect(to, RULER, this.width, this.canvas.height);
      context.globalAlpha = 0.5;
      context.fillStyle = theme.accent;
      context.fillRect(from, 0, to - from, RULER - 8);
    }
    context.globalAlpha = 1;
  }

  private paintCursor(context: CanvasRenderingContext2D, theme: Theme): void {
    const x = this.x(this.cursor);
    if (x < this.left) return;
    context.fillStyle = theme.accent;
    context.fillRect(x - 1, 0, 2, this.canvas.height);
    context.beginPath();
    context.moveTo(x - 6, 0);
    context.lineTo(x + 6, 0);
    context.lineTo(x, 8);
    context.fill();
  }

  /** Ruler: a click moves the cursor, a drag selects a range. Canvas: names the note below. */
  private listen(): void {
    let from: number | undefined;
    const at = (event: PointerEvent) =>
      this.timeAt(event.clientX - this.scroller.getBoundingClientRect().left);
    this.ruler.addEventListener("pointerdown", (event) => {
      this.ruler.setPointerCapture(event.pointerId);
      from = at(event);
    });
    this.ruler.addEventListener("pointermove", (event) => {
      if (from === undefined || Math.abs(at(event) - from) * this.scale < 6) return;
      this.onRange(Math.min(from, at(event)), Math.max(from, at(event)));
    });
    this.ruler.addEventListener("pointerup", (event) => {
      if (from !== undefined && Math.abs(at(event) - from) * this.scale < 6) this.onSeek(from);
      from = undefined;
    });
    this.canvas.addEventListener("pointermove", (event) => this.onHover(this.find(event)));
    this.canvas.addEventListener("pointerleave", () => this.onHover(undefined));
    this.canvas.addEventListener("click", (event) => {
      const bounds = this.canvas.getBoundingClientRect();
      if (event.clientX - bounds.left > this.left) this.onSeek(this.timeAt(event.clientX - bounds.left));
    });
    this.scroller.addEventListener(
      "wheel",
      (event) => {
        if (!event.ctrlKey) return;
        event.preventDefault();
        this.zoomBy(Math.exp(-event.deltaY / 200));
      },
      { passive: false },
    );
  }

  private find(event: MouseEvent): Note | undefined {
    const bounds = this.canvas.getBoundingClientRect();
    const [x, y] = [event.clientX - bounds.left, event.clientY - bounds.top];
    const isHere = (note: Note) => {
      const [left, right] = [this.x(note.onset) - 2, this.x(note.offset) + LEAST_NOTE];
      const top = note.isDrum ? this.drumY(note.pitch) : this.y(note.pitch);
      const height = note.isDrum ? DRUM_ROW : this.row;
      return x >= left && x <= right && y >= top && y < top + height;
    };
    for (const { notes, isFaded } of this.lanes) {
      const note = isFaded ? undefined : notes.find(isHere);
      if (note) return note;
    }
    return undefined;
  }
}

/** Start, distance of lines in seconds, and lines from label to label. */
function secondsGrid(scale: number): [number, number, number] {
  const label = LABELS.find((step) => step * scale >= LABEL_GAP) ?? LABELS[LABELS.length - 1];
  const parts = [5, 4, 2].find((parts) => (label * scale) / parts >= 16) ?? 1;
  return [0, label / parts, parts];
}

function clockLabel(seconds: number, step: number): string {
  const rest = step < 1 ? ((seconds + 1e-6) % 1).toFixed(1).slice(1) : "";
  return `${clock(seconds + 1e-6)}${rest}`;
}

/** Black or white, whichever can be read on a color that lets some of what is below through. */
function inkOn(color: string, below: string, alpha: number): string {
  const luminance = (hex: string) =>
    [0.3, 0.59, 0.11]
      .map((weight, i) => (weight * parseInt(hex.slice(1 + 2 * i, 3 + 2 * i), 16)) / 255)
      .reduce((sum, part) => sum + part, 0);
  return alpha * luminance(color) + (1 - alpha) * luminance(below) > 0.55 ? "#111" : "#fff";
}
