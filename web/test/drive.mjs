// Drives the page in a real Chromium: node drive.mjs CHROMIUM ADDRESS FOLDER < tasks.json
// Each task is done in a fresh page; answers are printed as a JSON list. benchmarks/browser.py asks.

import { chromium } from "playwright-core";
import { existsSync, readFileSync } from "node:fs";
import { basename, join } from "node:path";

const [executablePath, address, folder] = process.argv.slice(2);
const tasks = JSON.parse(readFileSync(0, "utf8"));
const PATIENCE_MS = 1_200_000;

/** Drops a file on the page, as a user does. */
async function drop(page, path) {
  const bytes = readFileSync(path).toString("base64");
  await page.evaluate(
    ({ bytes, name }) => {
      const data = Uint8Array.from(atob(bytes), (letter) => letter.charCodeAt(0));
      const transfer = new DataTransfer();
      transfer.items.add(new File([data], name));
      document.dispatchEvent(new DragEvent("drop", { dataTransfer: transfer }));
    },
    { bytes, name: basename(path) },
  );
}

/** Chooses a file. */
const choose = (page, path) => page.setInputFiles("#file", path);
const status = (page) => page.textContent("#status");
const whole = (page) =>
  page.waitForFunction(() => globalThis.mt3.isWhole, null, { timeout: PATIENCE_MS });
const readNotes = (page) => page.evaluate(() => globalThis.mt3.notes);

/** Of the page's process: seconds of its threads so far, and most bytes it has taken. */
async function measure() {
  const { processInfo } = await devices.send("SystemInfo.getProcessInfo");
  const tabs = processInfo.filter(({ type }) => type === "renderer");
  const peaks = tabs.map(({ id }) => {
    const path = `/proc/${id}/status`; // on Linux
    const text = existsSync(path) ? readFileSync(path, "utf8") : "";
    return 1024 * Number(/VmHWM:\s*(\d+)/.exec(text)?.[1] ?? 0);
  });
  const cpuSeconds = Math.max(...tabs.map(({ cpuTime }) => cpuTime));
  return { cpuSeconds, peakBytes: Math.max(...peaks) };
}

async function play(page) {
  await page.click("#play");
  await page.waitForFunction(() => document.querySelector("#play").textContent === "Pause");
  await page.waitForFunction(() => !document.querySelector("#time").textContent.startsWith("0:00"));
  await page.click("#play");
  return { time: await page.textContent("#time"), status: await status(page) };
}

async function save(page, kind, name) {
  const [download] = await Promise.all([
    page.waitForEvent("download"),
    page.click(`#save-${kind}`),
  ]);
  const path = join(folder, `${name}-${download.suggestedFilename()}`);
  await download.saveAs(path);
  return path;
}

const actions = {
  /** Notes, files saved, what it took. */
  async transcribe(page, { file, saves = [], pictures = [], isPlayed = false }) {
    await page.waitForFunction(() => globalThis.mt3.isReady);
    const { cpuSeconds: before } = await measure();
    await drop(page, file);
    await whole(page);
    const facts = await page.evaluate(() => {
      const { notes, seconds, duration } = globalThis.mt3;
      return { notes, seconds, duration };
    });
    const { cpuSeconds, peakBytes } = await measure();
    const answer = { ...facts, cpuSeconds: cpuSeconds - before, peakBytes, saved: {} };
    for (const kind of saves) answer.saved[kind] = await save(page, kind, "saved");
    for (const [width, height, scheme, name] of pictures) {
      await page.setViewportSize({ width, height });
      await page.emulateMedia({ colorScheme: scheme });
      await page.waitForTimeout(500);
      await page.screenshot({ path: join(folder, name), fullPage: true });
    }
    if (isPlayed) answer.played = await play(page);
    return answer;
  },
  /** What the page says of files that it does not transcribe. */
  async refuse(page, { files }) {
    const errors = [];
    for (const file of files) {
      await choose(page, file);
      await page.waitForFunction(
        (name) => document.querySelector("#error:not([hidden])")?.textContent.startsWith(name),
        basename(file),
      );
      errors.push(await page.textContent("#error"));
    }
    return { errors };
  },
  async microphone(page, { isAllowed }) {
    if (isAllowed) await page.context().grantPermissions(["microphone"]);
    await page.click("#record");
    if (!isAllowed) {
      await page.waitForSelector("#error:not([hidden])");
      return { error: await page.textContent("#error") };
    }
    await page.waitForFunction(() => document.querySelector("#status").textContent.includes("…"));
    await page.waitForTimeout(1500);
    await page.click("#record");
    await whole(page);
    return { status: await status(page) };
  },
  /** What it says while it works on a long file, and after Stop. */
  async stop(page, { file }) {
    await choose(page, file);
    await page.waitForFunction(() => document.querySelector("#status").textContent.includes("left"));
    const working = await status(page);
    await page.click("#cancel");
    await whole(page);
    return { working, stopped: await status(page) };
  },
  /** Everything that a user can do with a result. */
  async use(page, { file }) {
    await choose(page, file);
    await whole(page);
    const before = await readNotes(page);
    await page.fill("#limit", "0.8");
    await page.waitForFunction((n) => globalThis.mt3.notes.length < n, before.length);
    const fewer = await readNotes(page);
    const played = await play(page);
    const first = page.locator(".part").first();
    await first.locator("select").selectOption("40");
    await first.locator("input").fill("Fiddle");
    await first.locator("input").blur();
    await first.getByRole("button", { name: /Solo/ }).click();
    const midi = await save(page, "midi", "solo");
    await page.focus("#scroller");
    for (const key of ["Home", "ArrowRight", "b"]) await page.keyboard.press(key);
    const seconds = await page.evaluate(() => globalThis.mt3.cursor);
    await page.fill("#per-bar", "3");
    await page.locator("#per-bar").blur();
    const inBars = { seconds, midi: await save(page, "midi", "bars") };
    inBars.musicxml = await save(page, "musicxml", "bars");
    await page.focus("#scroller");
    for (const key of ["Home", "n", "n"]) await page.keyboard.press(key);
    const note = await page.textContent("#note");
    await page.click("#list summary");
    await page.waitForSelector("#rows tr");
    const rows = await page.locator("#rows tr").count();
    const nameless = await page.evaluate(() =>
      [...document.querySelectorAll("button, input, select, progress, summary, fieldset")]
        .filter((one) => one.id !== "file")
        .filter((one) => !(one.ariaLabel || one.textContent.trim() || one.labels?.length ||
          one.getAttribute("aria-labelledby")))
        .map((one) => one.outerHTML),
    );
    return { fewer, played, midi, inBars, note, rows, nameless };
  },
};

const browser = await chromium.launch({
  executablePath,
  args: ["--no-sandbox", "--use-fake-device-for-media-stream"],
});
const devices = await browser.newBrowserCDPSession();
const answers = [];
for (const task of tasks) {
  const context = await browser.newContext({ viewport: { width: 1280, height: 900 } });
  const foreign = [];
  const failures = [];
  await context.route(
    (url) => !url.href.startsWith(address) && !/^(blob|data):/.test(url.href),
    (route) => (foreign.push(route.request().url()), route.abort()),
  );
  const page = await context.newPage();
  page.setDefaultTimeout(PATIENCE_MS);
  const downloaded = { before: 0, sounds: 0 }; // bytes
  const sizes = [];
  page.on("requestfinished", (request) => {
    if (/^(blob|data):/.test(request.url())) return;
    const kind = request.url().includes("/sounds/") ? "sounds" : "before";
    sizes.push(request.sizes().then(({ responseBodySize }) => (downloaded[kind] += responseBodySize)));
  });
  page.on("pageerror", (error) => failures.push(error.message));
  await page.goto(address);
  await page.waitForFunction(() => document.querySelector("#model").textContent);
  const answer = await actions[task.do](page, task);
  await Promise.all(sizes);
  answers.push({ ...answer, downloaded, foreign, failures });
  await context.close();
}
await browser.close();
console.log(JSON.stringify(answers));
