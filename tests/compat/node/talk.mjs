// One client library at work: node talk.mjs MODULE BASE_URL
//
// Each line of the input is JSON: {"do": operation, "model": name}. The output is lines of JSON:
// {"part": …} for each part of a stream, then {"answer": …} or {"error": …}. It lives until its
// input ends, so whoever sees its client gone has seen an abort, not the end of this process.

import { createInterface } from "node:readline";

const [, , library, base] = process.argv;
const { operations } = await import(`./${library}.mjs`);
const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]();
const tell = (told) => process.stdout.write(JSON.stringify(told) + "\n");

const talk = {
  base,
  part: (part) => tell({ part }),
  told: async () => (await lines.next()).value,
};

for (let line = await talk.told(); line !== undefined; line = await talk.told()) {
  const { do: name, model } = JSON.parse(line);
  try {
    tell({ answer: (await operations[name](talk, model)) ?? null });
  } catch (error) {
    const status = error.status ?? error.status_code ?? null;
    const headers = Object.fromEntries(error.headers ?? []);
    tell({ error: { kind: error.constructor.name, status, message: error.message, headers } });
  }
}
