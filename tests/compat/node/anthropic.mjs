import Anthropic from "@anthropic-ai/sdk";
import { asked, callsTool, read, tool, untilTold, waits } from "./shared.mjs";

const tools = [
  { name: tool.name, description: tool.description, input_schema: tool.parameters },
];
const client = ({ base }, maxRetries = 0) =>
  new Anthropic({ baseURL: base, apiKey: "made up", maxRetries, timeout: 100_000 });
const given = (model) => ({ model, max_tokens: 100, messages: asked });
const text = (event) => (event.type === "content_block_delta" ? event.delta.text : "");
const used = (block) => [block.name, block.input];

export const operations = {
  async whole(talk, model) {
    return (await client(talk).messages.create(given(model))).content[0].text;
  },
  async stream(talk, model) {
    await read(await client(talk).messages.create({ ...given(model), stream: true }), talk, text);
  },
  async tools(talk, model) {
    const asking = { ...given(model), messages: callsTool, tools };
    return (await client(talk).messages.create(asking)).content.map(used);
  },
  async "tools-stream"(talk, model) {
    const asking = { ...given(model), messages: callsTool, tools };
    return (await client(talk).messages.stream(asking).finalMessage()).content.map(used);
  },
  async count(talk, model) {
    await client(talk).messages.countTokens({ model, messages: asked });
  },
  async abort(talk, model) {
    const asking = { ...given(model), max_tokens: 1_000_000 };
    const stream = await client(talk).messages.create({ ...asking, stream: true });
    await read(stream, talk, text, () => stream.controller.abort());
  },
  async "abort-whole"(talk, model) {
    const asking = { ...given(model), max_tokens: 1_000_000 };
    await untilTold(talk, (signal) => client(talk).messages.create(asking, { signal }));
  },
  async again(talk, model) {
    return await waits(() => client(talk, 2).messages.create(given(model)));
  },
};
