// The worker: holds the network and the recording, so that the page stays quick.

import { loadAndCompile, loadLiteRt, Tensor } from "@litertjs/core";

import type { ModelFacts, Note } from "./notes";
import { Reading, type Network } from "./reading";
import { Resampled } from "./resample";

// Between two lists of notes while segments are read: at least so long, and so much longer than it
// took to make one, which grows with the piece.
const UPDATE_MS = 400;
const UPDATE_SHARE = 8;

export type Request =
  | { kind: "transcribe"; samples: Float32Array; rate: number }
  | { kind: "limit"; onsets: number; strokes: number }
  | { kind: "stop" };

export type Reply =
  | { kind: "ready" }
  | { kind: "notes"; notes: Note[]; seconds: number; isWhole: boolean }
  | { kind: "failed"; message: string };

interface Loaded {
  facts: ModelFacts;
  network: Network;
  state: Record<string, number>;
}

const send = (reply: Reply) => postMessage(reply);
let reading: Reading | undefined;
let isStopped = false;
let limits: { onsets?: number; strokes?: number } = {};

async function load(): Promise<Loaded> {
  const answer = await fetch("../model/model.json");
  if (!answer.ok) throw new Error(`model/model.json: ${answer.status} ${answer.statusText}`);
  const facts = (await answer.json()) as ModelFacts;
  await loadLiteRt("./");
  const model = await loadAndCompile("../model/model.tflite", { accelerator: "wasm" });
  const signature = model.signatures.detect;
  const inputs = signature.getInputDetails();
  const network: Network = async (arrays) => {
    const given = Object.fromEntries(
      inputs.map(({ name, shape }) => [name, new Tensor(arrays[name], shape)]),
    );
    const results = await signature.run(given);
    const outputs: Record<string, Float32Array> = {};
    for (const [name, tensor] of Object.entries(results)) {
      outputs[name] = Float32Array.from(tensor.toTypedArray());
      tensor.delete();
    }
    Object.values(given).forEach((tensor) => tensor.delete());
    return outputs;
  };
  const state: Record<string, number> = {};
  for (const { name, shape } of inputs) {
    if (name !== "samples") state[name] = shape.reduce((product, size) => product * size, 1);
  }
  send({ kind: "ready" });
  return { facts, network, state };
}

const loading = load();
loading.catch((error: unknown) => send({ kind: "failed", message: String(error) }));

/** Lets messages come in between two segments. */
const pause = () => new Promise((resolve) => setTimeout(resolve));

async function transcribe(samples: Float32Array, rate: number): Promise<void> {
  reading = undefined; // that of another recording ends
  const { facts, network, state } = await loading;
  limits = {};
  const own = new Reading(new Resampled(samples, rate, facts.sampleRate), facts, state);
  reading = own;
  isStopped = false;
  let nextUpdate = performance.now() + UPDATE_MS;
  while (own.numRead < own.numSegments && !isStopped) {
    await own.readNext(network);
    await pause();
    if (reading !== own) return; // another recording has come
    const now = performance.now();
    if (now > nextUpdate && own.numRead < own.numSegments && !isStopped) {
      sendNotes();
      const took = performance.now() - now;
      nextUpdate = now + took + Math.max(UPDATE_MS, UPDATE_SHARE * took);
    }
  }
  sendNotes();
}

function sendNotes(): void {
  if (!reading) return;
  const isWhole = isStopped || reading.numRead === reading.numSegments;
  const notes = reading.notes(limits.onsets, limits.strokes);
  send({ kind: "notes", notes, seconds: reading.seconds, isWhole });
}

onmessage = ({ data }: MessageEvent<Request>) => {
  if (data.kind === "stop") {
    isStopped = true;
    return;
  }
  if (data.kind === "limit") {
    limits = data;
    sendNotes();
    return;
  }
  transcribe(data.samples, data.rate).catch((error: unknown) => {
    send({ kind: "failed", message: String(error) });
  });
};
