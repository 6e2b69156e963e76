// Time to the first token and time per output token of llama.cpp, as node-llama-cpp ships it, on the CPU.
//
//     node scripts/llama_cpp_decode.mjs MODEL.gguf PROMPT_IDS NEW_TOKENS RUNS THREADS [MODULES]
//
// PROMPT_IDS: numbers with commas. MODULES: the folder that holds node_modules, by default that of this file.
// Prints a line of JSON: the times of each run and the tokens of the last one, greedy.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";
import path from "node:path";

const [model, ids, count, runs, threads, modules] = process.argv.slice(2);
const from = createRequire(path.join(modules ?? import.meta.dirname, "node_modules", "x.js"));
const { getLlama } = await import(pathToFileURL(from.resolve("node-llama-cpp")).href);

const llama = await getLlama({ gpu: false, build: "never", skipDownload: true, logLevel: "error", maxThreads: Number(threads) });
const loaded = await llama.loadModel({ modelPath: model, gpuLayers: 0 });
const prompt = ids.split(",").map(Number);
const context = await loaded.createContext({ contextSize: 1024, batchSize: 512, threads: Number(threads), sequences: 1 });
const sequence = context.getSequence();
const found = { ttft_ms: [], tpot_ms: [], tokens: [] };
for (let run = 0; run < Number(runs); run++) {
  await sequence.clearHistory();
  const start = performance.now();
  const tokens = [];
  let first;
  for await (const token of sequence.evaluate(prompt, { temperature: 0, yieldEogToken: true })) {
    tokens.push(token);
    first ??= performance.now();
    if (tokens.length >= Number(count)) break;
  }
  found.ttft_ms.push(first - start);
  found.tpot_ms.push((performance.now() - first) / (tokens.length - 1));
  found.tokens = tokens;
}
found.peak_rss_mb = process.resourceUsage().maxRSS / 1024;
console.log(JSON.stringify(found));
process.exit(0);
