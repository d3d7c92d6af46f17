// The list of instruments: mute, solo, another name, another instrument.

import type { ModelFacts, Note } from "./notes";

const DRUMS = "drums";

/** One instrument of the piece, as the user has set it. */
export interface ListedPart {
  key: string; // what the network called it
  name: string;
  program: number;
  isDrum: boolean;
  color: string;
  isMuted: boolean;
  isSolo: boolean;
  notes: Note[];
}

interface Row {
  part: ListedPart;
  box: HTMLElement;
  name: HTMLInputElement;
  swatch: HTMLElement;
  count: HTMLElement;
}

export class Parts {
  private rows = new Map<string, Row>();
  private facts: ModelFacts | undefined;

  constructor(
    private readonly home: HTMLElement,
    private readonly onChange: () => void,
  ) {}

  /** Forgets all settings: another recording follows. */
  forget(): void {
    this.rows.clear();
    this.home.replaceChildren();
  }

  /** Sorts notes into parts; what the user set for a part stays. */
  update(notes: Note[], facts: ModelFacts): void {
    this.facts = facts;
    const found = new Map<string, Note[]>();
    for (const note of notes) {
      const key = note.isDrum ? DRUMS : String(note.program);
      const own = found.get(key);
      if (own) own.push(note);
      else found.set(key, [note]);
    }
    for (const [key, row] of this.rows) if (!found.has(key)) row.part.notes = [];
    for (const [key, own] of found) {
      const row = this.rows.get(key) ?? this.addRow(key);
      row.part.notes = own;
      row.count.textContent = `${own.length} note${own.length === 1 ? "" : "s"}`;
    }
    const shown = [...this.rows.values()].filter(({ part }) => part.notes.length);
    const order = ({ part }: Row) => (part.isDrum ? 1000 : Number(part.key));
    shown.sort((a, b) => order(a) - order(b));
    const boxes = shown.map(({ box }) => box);
    const isSame = boxes.length === this.home.children.length;
    if (!isSame || boxes.some((box, i) => box !== this.home.children[i])) {
      this.home.replaceChildren(...boxes); // only then, as it would take the focus away
    }
  }

  /** Parts that have notes, drums last. */
  list(): ListedPart[] {
    const parts = [...this.rows.values()].map(({ part }) => part).filter((part) => part.notes.length);
    return parts.sort((a, b) => Number(a.isDrum) - Number(b.isDrum) || a.program - b.program);
  }

  isAudible(part: ListedPart): boolean {
    const solos = this.list().filter(({ isSolo }) => isSolo);
    return solos.length ? part.isSolo : !part.isMuted;
  }

  private addRow(key: string): Row {
    const facts = this.facts as ModelFacts;
    const isDrum = key === DRUMS;
    const program = isDrum ? 0 : Number(key);
    const name = isDrum ? "Drums" : facts.programs[program];
    const color = isDrum ? facts.drumColor : facts.colors[program];
    const part = { key, name, program, isDrum, color, isMuted: false, isSolo: false, notes: [] };
    const box = document.createElement("fieldset");
    box.className = "part";
    box.setAttribute("aria-label", name);
    const swatch = document.createElement("span");
    swatch.className = "swatch";
    swatch.style.background = color;
    const title = document.createElement("input");
    Object.assign(title, { type: "text", value: name, ariaLabel: `Name of ${name}` });
    const count = document.createElement("span");
    count.className = "count";
    const row: Row = { part, box, name: title, swatch, count };
    title.onchange = () => {
      part.name = title.value.trim() || (isDrum ? "Drums" : facts.programs[part.program]);
      title.value = part.name;
      this.onChange();
    };
    const choice = isDrum ? document.createElement("span") : this.makeChoice(row);
    const toggle = (text: string, field: "isMuted" | "isSolo") => {
      const made = Object.assign(document.createElement("button"), { type: "button", textContent: text });
      made.setAttribute("aria-label", `${text} ${name}`);
      made.setAttribute("aria-pressed", "false");
      made.onclick = () => {
        row.part[field] = !row.part[field];
        made.setAttribute("aria-pressed", String(row.part[field]));
        this.onChange();
      };
      return made;
    };
    box.append(swatch, title, choice, count, toggle("Mute", "isMuted"), toggle("Solo", "isSolo"));
    this.rows.set(key, row);
    return row;
  }

  /** A list of all General MIDI instruments. */
  private makeChoice(row: Row): HTMLSelectElement {
    const { programs, colors } = this.facts as ModelFacts;
    const choice = document.createElement("select");
    choice.setAttribute("aria-label", `Instrument of ${row.part.name}`);
    programs.forEach((name, i) => choice.add(new Option(name, String(i), false, i === row.part.program)));
    choice.onchange = () => {
      const { part } = row;
      const wasNamed = part.name !== programs[part.program];
      part.program = Number(choice.value);
      part.color = row.swatch.style.background = colors[part.program];
      if (!wasNamed) part.name = row.name.value = programs[part.program];
      this.onChange();
    };
    return choice;
  }
}
