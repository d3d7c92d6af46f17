// Files and the microphone -> samples.

/** What cannot be transcribed; the message is a sentence for the page. */
export class AudioProblem extends Error {}

export interface Recorded {
  name: string;
  mono: Float32Array; // at `rate`, to be transcribed
  rate: number;
  seconds: number;
  sound: AudioBuffer; // to be played
}

const MOST_SECONDS = 30 * 60;
const LEAST_BYTES = 100; // more than a header alone has
const MOST_BYTES = 1024 ** 3;
const STEREO_SECONDS = 10 * 60; // longer recordings are played back in mono, to save memory
const DEFAULT_RATE = 48000;
const CANCELLED = 0.01; // as mt3_keras/audio.py has it

/** Decodes a file at its own sample rate. */
export async function readFile(file: Blob, name: string): Promise<Recorded> {
  if (file.size < LEAST_BYTES) throw new AudioProblem(`${name} is empty: it holds no sound.`);
  if (file.size > MOST_BYTES) {
    throw new AudioProblem(`${name} is larger than 1 GB. Cut it into parts, or use the command mt3.`);
  }
  await refuseLong(file, name);
  const bytes = await file.arrayBuffer();
  const rate = findRate(new Uint8Array(bytes)) ?? DEFAULT_RATE;
  let sound: AudioBuffer;
  try {
    sound = await new OfflineAudioContext(1, 1, rate).decodeAudioData(bytes);
  } catch {
    throw new AudioProblem(
      `${name} cannot be read as audio by this browser. Is it a recording? ` +
        "WAV, FLAC, MP3, OGG and M4A usually work.",
    );
  }
  if (!sound.length) throw new AudioProblem(`${name} holds no sound: it is 0 seconds long.`);
  if (sound.duration > MOST_SECONDS) throw tooLong(name, sound.duration);
  const mono = mix(sound);
  if (!mono.some((sample) => sample !== 0)) {
    throw new AudioProblem(`${name} is silent: there is nothing to transcribe.`);
  }
  const isLong = sound.duration > STEREO_SECONDS && sound.numberOfChannels > 1;
  const kept = isLong ? toBuffer(mono, rate) : sound;
  return { name, mono, rate, seconds: mono.length / rate, sound: kept };
}

function tooLong(name: string, seconds: number): AudioProblem {
  const minutes = Math.round(seconds / 60);
  return new AudioProblem(
    `${name} is ${minutes} minutes long; this page takes up to ${MOST_SECONDS / 60}. ` +
      "Cut it into parts, or use the command mt3 transcribe.",
  );
}

/** Asks the browser how long a file is before all of it is decoded into memory. */
async function refuseLong(file: Blob, name: string): Promise<void> {
  const element = new Audio();
  const address = URL.createObjectURL(file);
  const seconds = await new Promise<number>((resolve) => {
    element.onloadedmetadata = () => resolve(element.duration);
    element.onerror = () => resolve(NaN); // decoding will say what is wrong
    setTimeout(() => resolve(NaN), 3000);
    element.preload = "metadata";
    element.src = address;
  });
  URL.revokeObjectURL(address);
  if (Number.isFinite(seconds) && seconds > MOST_SECONDS) throw tooLong(name, seconds);
}

function toBuffer(samples: Float32Array, rate: number): AudioBuffer {
  const buffer = new AudioBuffer({ length: samples.length, sampleRate: rate, numberOfChannels: 1 });
  buffer.copyToChannel(samples as Float32Array<ArrayBuffer>, 0);
  return buffer;
}

/** The mean over the channels; or the loudest one, where the channels cancel each other. */
function mix(sound: AudioBuffer): Float32Array {
  const channels = Array.from({ length: sound.numberOfChannels }, (_, i) => sound.getChannelData(i));
  if (channels.length === 1) return channels[0].slice();
  const mono = new Float32Array(sound.length);
  for (const channel of channels) {
    for (let i = 0; i < mono.length; i++) mono[i] += channel[i] / channels.length;
  }
  const energies = channels.map(energy);
  const mean = energies.reduce((sum, value) => sum + value, 0) / channels.length;
  if (energy(mono) >= ((CANCELLED * 2) / channels.length) * mean) return mono;
  return channels[energies.indexOf(Math.max(...energies))].slice();
}

function energy(samples: Float32Array): number {
  let sum = 0;
  for (const sample of samples) sum += sample * sample;
  return sum;
}

/**
 * The sample rate in a file's header, so that the browser need not resample, which it does with a
 * short filter. Null where the format is another: then 48 kHz does no harm.
 */
export function findRate(bytes: Uint8Array): number | null {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const text = (at: number, length: number) =>
    String.fromCharCode(...bytes.subarray(at, at + length));
  if (bytes.length < 64) return null;
  let rate: number | null = null;
  if (text(0, 4) === "RIFF" && text(8, 4) === "WAVE") {
    for (let at = 12; at + 24 < bytes.length; at += 8 + view.getUint32(at + 4, true)) {
      if (text(at, 4) === "fmt ") {
        rate = view.getUint32(at + 12, true);
        break;
      }
    }
  } else if (text(0, 4) === "fLaC") {
    rate = view.getUint32(18) >>> 12;
  } else if (text(0, 4) === "OggS") {
    rate = text(29, 6) === "vorbis" ? view.getUint32(40, true) : null; // Opus is 48 kHz
  } else {
    rate = findMp3Rate(bytes);
  }
  return rate !== null && rate >= 8000 && rate <= 96000 ? rate : null;
}

/** Of the first frame of an MP3, behind its tags. */
function findMp3Rate(bytes: Uint8Array): number | null {
  let at = 0;
  if (bytes[0] === 0x49 && bytes[1] === 0x44 && bytes[2] === 0x33) {
    at = 10 + ((bytes[6] << 21) | (bytes[7] << 14) | (bytes[8] << 7) | bytes[9]);
  }
  if (at + 4 > bytes.length || bytes[at] !== 0xff || (bytes[at + 1] & 0xe0) !== 0xe0) return null;
  const version = (bytes[at + 1] >> 3) & 3; // 3 is MPEG 1, 2 is MPEG 2, 0 is MPEG 2.5
  const rate = [44100, 48000, 32000][(bytes[at + 2] >> 2) & 3];
  if (!rate || version === 1 || ((bytes[at + 1] >> 1) & 3) !== 1) return null; // layer III alone
  return rate / (version === 3 ? 1 : version === 2 ? 2 : 4);
}

/** Records the microphone until `stop` is called. */
export class Microphone {
  private constructor(
    private readonly stream: MediaStream,
    private readonly recorder: MediaRecorder,
    private readonly parts: Blob[],
  ) {}

  static async start(): Promise<Microphone> {
    if (!navigator.mediaDevices?.getUserMedia) {
      throw new AudioProblem(
        "This browser gives no access to a microphone here: the page must come from https or localhost.",
      );
    }
    let stream: MediaStream;
    try {
      // What makes speech clearer spoils music.
      const plain = { echoCancellation: false, noiseSuppression: false, autoGainControl: false };
      stream = await navigator.mediaDevices.getUserMedia({ audio: plain });
    } catch (error) {
      const isRefused = error instanceof DOMException && error.name === "NotAllowedError";
      throw new AudioProblem(
        isRefused
          ? "The microphone was refused. Allow it for this page in the browser's settings, or choose a file."
          : "No microphone was found. Connect one, or choose a file.",
      );
    }
    const parts: Blob[] = [];
    const recorder = new MediaRecorder(stream, { audioBitsPerSecond: 256000 });
    recorder.ondataavailable = ({ data }) => parts.push(data);
    recorder.start(1000);
    return new Microphone(stream, recorder, parts);
  }

  async stop(): Promise<Blob> {
    const stopped = new Promise((resolve) => (this.recorder.onstop = resolve));
    this.recorder.stop();
    await stopped;
    this.stream.getTracks().forEach((track) => track.stop());
    return new Blob(this.parts, { type: this.recorder.mimeType });
  }
}
