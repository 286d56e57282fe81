// Handles one request of tools/llama_cpp.py with llama.cpp.
//
//   node llama_cpp.mjs FOLDER OUT < REQUEST
//
// FOLDER is where node-llama-cpp is installed. REQUEST is JSON; the response is OUT/response.json, and
// the file OUT/logprobs for log-probabilities.

import fs from "node:fs";
import path from "node:path";
import {pathToFileURL} from "node:url";

const folder = path.resolve(process.argv[2]);
const out = process.argv[3];
const module = pathToFileURL(path.join(folder, "node_modules/node-llama-cpp/dist/index.js"));
const {getLlama} = await import(module.href);

const request = JSON.parse(fs.readFileSync(0, "utf8"));

// A sequence with room for `length` tokens, all of which are evaluated in one batch.
async function sequence(model, length) {
  const context = await model.createContext({
    contextSize: length,
    batchSize: length,
    threads: request.threads,
    flashAttention: false,
    experimentalKvCacheKeyType: request.cache,
    experimentalKvCacheValueType: request.cache,
  });
  return context.getSequence();
}

// The tokens that are generated greedily; an end-of-sequence token does not end them.
async function* generate(model, seq, tokens, n) {
  let left = n;
  while (left > 0) {
    for await (const token of seq.evaluate(tokens, {temperature: 0, yieldEogToken: true})) {
      yield token;
      tokens = [token];
      if (--left === 0) break;
    }
  }
}

const actions = {
  vocabulary(model) {
    const {bos, eos, eot} = model.tokens;
    const tokens = [...model.iterateAllTokens()];
    return {
      size: tokens.length,
      bos, eos, eot,
      end: tokens.filter((token) => model.isEogToken(token)),
      begins_with_bos: model.tokens.shouldPrependBosToken,
      texts: request.texts.map((text) => model.tokenize(text, request.special)),
    };
  },

  async logprobs(model) {
    const seq = await sequence(model, request.tokens.length + 1);
    const size = [...model.iterateAllTokens()].length;
    const file = fs.openSync(path.join(out, "logprobs"), "w");
    const rows = await seq.controlledEvaluate(
      request.tokens.map((token) => [token, {generateNext: {probabilities: true}}]),
    );
    for (const {next} of rows) {
      // llama.cpp has added the probabilities up in float32: a relative error of 1e-4.
      let sum = 0;
      for (const probability of next.probabilities.values()) sum += probability;
      const row = new Float32Array(size).fill(NaN);
      for (const [token, p] of next.probabilities) row[token] = Math.log(p / sum);
      fs.writeSync(file, row);
    }
    fs.closeSync(file);
    return {rows: rows.length, size};
  },

  async greedy(model) {
    const {tokens, n} = request;
    const seq = await sequence(model, tokens.length + n);
    const out = [];
    for await (const token of generate(model, seq, tokens, n)) out.push(token);
    return out;
  },

  async speed(model) {
    const {tokens, n, rounds} = request;
    const seq = await sequence(model, tokens.length + n);
    const seconds = [];  // of processor time
    for (let round = 0; round < rounds; round++) {
      await seq.clearHistory();
      let start;  // when the first token is there: the prompt is not timed
      for await (const _ of generate(model, seq, tokens, n)) start ??= process.cpuUsage();
      const {user, system} = process.cpuUsage(start);
      seconds.push((user + system) / 1e6);
    }
    return {seconds, memory: process.memoryUsage().rss};
  },
};

const llama = await getLlama({
  gpu: false,
  build: "never",
  usePrebuiltBinaries: true,
  logLevel: "error",
  maxThreads: request.threads,
});
const model = await llama.loadModel({
  modelPath: request.path,
  vocabOnly: request.action === "vocabulary",
});
const response = await actions[request.action](model);
fs.writeFileSync(path.join(out, "response.json"), JSON.stringify(response));
process.exit(0);  // Without it, the threads of the runtime end seconds later.
