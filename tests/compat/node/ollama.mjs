import { Ollama } from "ollama";
import { asked, callsTool, read, tool, untilTold } from "./shared.mjs";

const tools = [{ type: "function", function: tool }];
const client = ({ base }, fetch) => new Ollama({ host: base, fetch });
const called = ({ function: { name, arguments: given } }) => [name, given];

export const operations = {
  async whole(talk, model) {
    return (await client(talk).chat({ model, messages: asked })).message.content;
  },
  async stream(talk, model) {
    const stream = await client(talk).chat({ model, messages: asked, stream: true });
    await read(stream, talk, (each) => each.message.content);
  },
  async generate(talk, model) {
    return (await client(talk).generate({ model, prompt: "who?" })).response;
  },
  async "generate-stream"(talk, model) {
    const stream = await client(talk).generate({ model, prompt: "who?", stream: true });
    await read(stream, talk, (each) => each.response);
  },
  async tools(talk, model) {
    const { message } = await client(talk).chat({ model, messages: callsTool, tools });
    return message.tool_calls.map(called);
  },
  async "tools-stream"(talk, model) {
    const found = [];
    const stream = await client(talk).chat({ model, messages: callsTool, tools, stream: true });
    for await (const { message } of stream) found.push(...(message.tool_calls ?? []).map(called));
    return found;
  },
  async embed(talk, model) {
    return (await client(talk).embed({ model, input: ["a", "b"] })).embeddings;
  },
  async list(talk) {
    return (await client(talk).list()).models.map((each) => each.name).sort();
  },
  async install(talk, model) {
    // Each of these rejects unless its stream ends in a success.
    const ollama = client(talk);
    for await (const { status } of await ollama.pull({ model, stream: true })) talk.part(status);
    await ollama.create({ model: "mine", from: model });
    await ollama.copy({ source: "mine", destination: "twin" });
    await ollama.delete({ model: "mine" });
    return (await ollama.push({ model: "twin" })).status;
  },
  async show(talk, model) {
    return (await client(talk).show({ model })).capabilities;
  },
  async abort(talk, model) {
    const stream = await client(talk).chat({ model, messages: asked, stream: true });
    await read(stream, talk, (each) => each.message.content, () => stream.abort());
  },
  async "abort-whole"(talk, model) {
    // The library aborts streams only; of a whole answer the caller's own fetch does.
    await untilTold(talk, (signal) =>
      client(talk, (url, given) => fetch(url, { ...given, signal })).chat({
        model,
        messages: asked,
      }),
    );
  },
};
